"""`hpccr doctor`: every node is checked; each failure is found and comes with its remedy."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs import Jobs
from nodes import Cluster
from waiting import wait_for
from workloads import Workloads

UNMAPPED = 4242
"""A group of nobody's."""
UNSUPPORTED = 13


def ask(cluster: Cluster, *arguments: str, directory: str = "/") -> subprocess.CompletedProcess[str]:
    """`hpccr doctor` of a user on the login node, called in that directory; asked again while Slurm has a node that
    does not respond. On a busy machine one late answer to a ping sets that for some seconds, and so does a resume."""

    def look() -> subprocess.CompletedProcess[str] | None:
        done = cluster.run("ctl", "env", f"--chdir={directory}", "hpccr", "doctor", *arguments, user="user1")
        return None if "NOT_RESPONDING" in done.stdout else done

    return wait_for("nodes that respond", look)


def doctor(cluster: Cluster, *arguments: str, directory: str = "/") -> dict[str, Any]:
    """Its report."""
    done = ask(cluster, "--json", *arguments, directory=directory)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["ok"] else 1), done.stderr
    return found


def failures(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Node (or "all") and check of everything that is wrong."""
    found = [(node["node"], check) for node in report["nodes"] for check in node["checks"] if not check["ok"]]
    return found + [("all", check) for check in report["cluster"] if not check["ok"]]


def test_a_healthy_cluster(cluster: Cluster, untouched: None) -> None:
    report = doctor(cluster)
    assert report["ok"] and not failures(report)
    assert [node["node"] for node in report["nodes"]] == list(cluster.nodes)
    names = {check["name"] for check in report["nodes"][0]["checks"]}
    for part in ("criu", "key", "spool", "hpccrd", "ptrace"):
        assert any(part in name.lower() for name in names), (part, names)
    told = ask(cluster)
    assert told.returncode == 0 and all(node in told.stdout for node in cluster.nodes) and "FAIL" not in told.stdout
    alone = cluster.run(cluster.nodes[0], "hpccr", "doctor", "--local", user="user1")
    assert alone.returncode == 0, alone.stdout


@contextmanager
def no_hpccrd(cluster: Cluster, node: str) -> Iterator[None]:
    """Its socket does not answer: the daemon is stopped and cannot be reached under its name."""
    socket = cluster.root(node) / "run/hpccr/hpccrd.sock"
    away = socket.with_name("away")
    socket.rename(away)
    try:
        yield
    finally:
        away.rename(socket)


@contextmanager
def open_key(cluster: Cluster, node: str) -> Iterator[None]:
    """Everybody on the node can read the site key."""
    key = cluster.root(node) / "etc/hpccr/key"
    mode = stat.S_IMODE(key.stat().st_mode)
    key.chmod(0o644)
    try:
        yield
    finally:
        key.chmod(mode)


@contextmanager
def another_key(cluster: Cluster, node: str) -> Iterator[None]:
    """The node has a key of its own."""
    key = cluster.root(node) / "etc/hpccr/key"
    text = key.read_text()
    key.write_text("ab" * 32 + "\n")
    restart(cluster, node)
    try:
        yield
    finally:
        key.write_text(text)
        restart(cluster, node)


def restart(cluster: Cluster, node: str) -> None:
    old = cluster.hpccrd(node)
    os.kill(cluster.pid_one(node), 1)
    wait_for("a new hpccrd", lambda: cluster.hpccrd(node) != old)
    socket = cluster.root(node) / "run/hpccr/hpccrd.sock"
    wait_for("hpccrd's socket", socket.exists)


@contextmanager
def small_spool(cluster: Cluster, node: str) -> Iterator[None]:
    with cluster.small_spool(node, "1m"):
        yield


@pytest.mark.parametrize(
    ("trouble", "word"),
    [(no_hpccrd, "hpccrd"), (open_key, "key"), (another_key, "key"), (small_spool, "spool")],
    ids=["no hpccrd", "open key", "another key", "spool full"],
)
def test_what_is_wrong_is_found(cluster: Cluster, untouched: None, trouble: Any, word: str) -> None:
    node = cluster.nodes[1]
    with trouble(cluster, node):
        # hpccrd gives what it has found for some seconds before it looks again.
        found = wait_for("a finding", lambda: failures(doctor(cluster)))
        assert {where for where, _ in found} <= {node, "all"}
        assert any(word in check["name"] + check["detail"] for _, check in found), found
        assert all(check["hint"] for _, check in found), found
        told = ask(cluster)
        assert told.returncode == 1 and "FAIL" in told.stdout and "hint: " in told.stdout
    wait_for("no finding", lambda: doctor(cluster)["ok"])


@contextmanager
def root_kept_out(cluster: Cluster, node: str, directory: Path) -> Iterator[None]:
    """On the node root has no rights of its own at `directory` (of this machine), which is closed to others, as where
    NFS squashes root: a mount that does not map the directory's group gives nobody's capabilities any weight there. Its
    owner, and root farther below, notice nothing."""
    status = directory.stat()
    place = cluster.there(directory)
    os.chown(directory, status.st_uid, UNMAPPED)
    directory.chmod(0o700)
    ids = f"u:{status.st_uid}:{status.st_uid}:1 g:{status.st_uid}:{status.st_uid}:1"
    try:
        cluster.check(node, "mount", "--bind", "-o", f"X-mount.idmap={ids}", place, place)
        try:
            yield
        finally:
            cluster.check(node, "umount", "-l", place)
    finally:
        os.chown(directory, status.st_uid, status.st_gid)
        directory.chmod(stat.S_IMODE(status.st_mode))


def test_root_is_kept_out(cluster: Cluster, jobs: Jobs, workloads: Workloads) -> None:
    """Of a home, or of a directory above the one in which doctor is called: it says so before a checkpoint does."""
    node, *others = cluster.nodes
    home = cluster.home("user1")
    here = cluster.write(home / jobs.name / "here" / "file", "", "user1").parent
    for closed in (home, here.parent):
        with root_kept_out(cluster, node, closed):
            (found,) = failures(doctor(cluster, "--nodes", node, directory=cluster.there(here)))
            assert found[0] == node
            assert found[1]["detail"] == f"root on this node cannot pass {cluster.there(closed)}"
            assert "chmod o+x" in found[1]["hint"] and "root_squash" in found[1]["hint"]
    cluster.drain(*others)
    with root_kept_out(cluster, node, here.parent):
        job = jobs.submit(workloads.ticker(nodes=1), nodes=1)
        job.wait_output("tick")
        refused = job.hpccr("checkpoint")
        assert refused.returncode == UNSUPPORTED and "root on this node cannot get there" in refused.stderr
        job.cancel()


def test_a_file_system_that_does_not_answer_root(cluster: Cluster, untouched: None) -> None:
    """hpccrd waits for it for a while, with one process per user, and others notice nothing."""
    node, place = cluster.nodes[0], "/run/silent"
    cluster.check(node, "mkdir", place)
    server = cluster.popen(node, "python3", "/src/tests/cluster/programs/silent_fuse.py", place)
    try:
        assert server.stdout is not None and server.stdout.readline() == "mounted\n"

        def looking() -> list[int]:
            return cluster.pids(node, r"-m hpccr\.noded\.passing")

        for detail in (f"{place}: a file system did not tell root", "a file system is still being asked"):
            asked = cluster.run(node, "sh", "-c", f"cd {place} && exec hpccr doctor --local --json", user="user1")
            (found,) = [check for check in json.loads(asked.stdout)["checks"] if not check["ok"]]
            assert detail in found["detail"] and found["hint"]
            assert len(looking()) == 1
        other = cluster.run(node, "hpccr", "doctor", "--local", user="user2")
        assert other.returncode == 0 and len(looking()) == 1, other.stdout
    finally:
        server.kill()
        server.communicate()
        cluster.run(node, "umount", "-l", place)
        cluster.run(node, "rmdir", place)
    wait_for("an end to it", lambda: not looking())


def test_a_drained_node(cluster: Cluster, untouched: None) -> None:
    node = cluster.nodes[2]
    cluster.drain(node)
    try:
        found = failures(doctor(cluster))
        assert [where for where, _ in found] == [node] and "resume" in found[0][1]["hint"], found
    finally:
        cluster.resume()
    wait_for("a healthy node", lambda: doctor(cluster, "--nodes", node)["ok"])
