"""hpccrd on real nodes: each case of hpccrd_checks.py by itself, then users, nodes and deaths together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nodes import USERS, Cluster, send
from waiting import rounds, wait_for

PYTHON = "/opt/hpccr/bin/python"
CHECKS = "/src/tests/cluster/hpccrd_checks.py"
STORE = "/shared/home/user1/hpccrd-checks"
SERVER = "import socket; s=socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); c,a=s.accept(); "
SERVER += "c.sendall(b'hello'); print(a[0], flush=True)"
DEAF = "import socket; s=socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); "
DEAF += "taken=s.accept(); s.accept()"
SLOW = 200
"""Seconds; these cases make a dozen capsules on a machine of two cores."""

ALONE = ("basic", "identity", "abort", "probe", "garbage", "wrong-create", "out-of-order", "wrong-start", "silent")
ALONE += ("unread", "many-leases", "forged-tickets", "foreign-namespaces", "pair", "no-low-ports")
STORING = ("checkpoint", "kill-at-release", "flush-outlives", "damaged", "ends-before-unhold")
ROOT = ("forged-packets", "impatient", "embedded", "second", "unit-capabilities", "stopped", "orphaned")
ROOT += ("foreign-mounts", "spool-fills", "flush-overtaken-fails")
STATES = (
    "creating",
    "created",
    "connected",
    "running",
    "ended",
    "preparing",
    "prepared",
    "frozen",
    "dumping",
    "dumped",
)
STATES += ("released", "fetching", "restored", "resumed", "unheld")


def check(cluster: Cluster, node: str, *arguments: str, user: str = "user1") -> None:
    cluster.check(node, PYTHON, CHECKS, *arguments, user=user, timeout=SLOW)


@contextmanager
def running(cluster: Cluster, node: str, word: str, *arguments: str, user: str = "user1") -> Iterator[subprocess.Popen]:
    """A case that goes on in the background, from the line `word` that it prints."""
    process = cluster.popen(node, PYTHON, CHECKS, *arguments, user=user, stdin=subprocess.PIPE, stderr=None)
    with ended(process):
        assert process.stdout.readline().strip() == word
        yield process


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """The process does not outlive the block."""
    with process:
        try:
            yield
        finally:
            process.kill()


@pytest.fixture
def node(cluster: Cluster, untouched: None) -> str:
    """A node on which nothing of hpccr is left afterwards."""
    return cluster.nodes[0]


@pytest.fixture
def store(cluster: Cluster, node: str) -> Iterator[str]:
    """A directory of user1 for fragments."""
    yield STORE
    shutil.rmtree(cluster.here(STORE), ignore_errors=True)


@pytest.mark.parametrize("case", ALONE)
def test_case(cluster: Cluster, node: str, case: str) -> None:
    check(cluster, node, case)


@pytest.mark.parametrize("case", STORING)
def test_case_with_a_store(cluster: Cluster, node: str, store: str, case: str) -> None:
    check(cluster, node, case, store)


@pytest.mark.parametrize("case", ROOT)
def test_case_of_root(cluster: Cluster, node: str, case: str) -> None:
    check(cluster, node, case, user="root")


@pytest.mark.parametrize("state", STATES)
def test_a_lease_that_ends_leaves_nothing(cluster: Cluster, node: str, store: str, state: str) -> None:
    check(cluster, node, "leave", store, state)
    check(cluster, node, "clean", user="root")


@pytest.mark.parametrize(
    ("case", "user", "short", "long"),
    [
        ("destroyed-at-any-moment", "root", 15, 1000),
        ("given-up-at-any-moment", "root", 60, 2000),
        ("restored-and-destroyed-at-any-moment", "user1", 10, 500),
    ],
)
def test_any_moment(cluster: Cluster, node: str, store: str, case: str, user: str, short: int, long: int) -> None:
    """HPCCR_SEED gives the moments."""
    arguments = [os.environ["HPCCR_SEED"], str(rounds(short, long)), *([store] if case.startswith("restored") else [])]
    cluster.check(node, PYTHON, CHECKS, case, *arguments, user=user, timeout=rounds(SLOW, 3600))
    check(cluster, node, "clean", user="root")


def test_stores_that_cannot_be_written(cluster: Cluster, node: str, store: str) -> None:
    cluster.check(node, "mkdir", "-p", "/mnt/small")
    cluster.check(node, "mount", "-t", "tmpfs", "-o", f"size=64k,uid={USERS['user1']},mode=700", "small", "/mnt/small")
    try:
        check(cluster, node, "flush-fails", store, "/mnt/small")
    finally:
        cluster.check(node, "umount", "/mnt/small")


def test_two_nodes(cluster: Cluster, node: str) -> None:
    other = cluster.nodes[1]
    with running(cluster, other, "listening", "relay") as relay:
        check(cluster, node, "pair-apart", other)
        assert relay.wait(60) == 0
    check(cluster, other, "clean", user="root")


def test_uplink(cluster: Cluster, node: str) -> None:
    """A capsule reaches another node, which sees it come from its own node; both roads are closed again afterwards."""
    other = cluster.nodes[1]
    own = cluster.check(node, "hostname", "-I").split()[0]
    before = cluster.check(node, "cat", "/proc/sys/net/ipv4/ip_forward")
    server = cluster.popen(other, PYTHON, "-c", SERVER)
    with ended(server):
        port = server.stdout.readline().strip()
        check(cluster, node, "uplink", other, port)
        assert server.stdout.readline().strip() == own
    check(cluster, node, "clean", user="root")
    assert cluster.check(node, "cat", "/proc/sys/net/ipv4/ip_forward") == before


def test_two_users_at_once(cluster: Cluster, node: str) -> None:
    with running(cluster, node, "holding", "hold"), running(cluster, node, "holding", "hold", user="user2"):
        check(cluster, node, "basic")
        check(cluster, node, "basic", user="user2")


def test_tickets_are_one_users(cluster: Cluster, node: str) -> None:
    path = cluster.shared / "tickets.json"
    path.write_text("")
    path.chmod(0o666)
    try:
        with running(cluster, node, "offered", "offer-tickets", cluster.there(path)) as offer:
            check(cluster, node, "use-tickets", cluster.there(path), user="user2")
            offer.stdin.close()
            assert offer.wait(60) == 0
    finally:
        path.unlink()


def test_fragments_are_one_users(cluster: Cluster, node: str, store: str) -> None:
    """user2 gets hold of a fragment of user1, and claims to be the same job."""
    check(cluster, node, "offered", f"{store}/theirs", f"{store}-record")
    copy = cluster.home("user2") / "stolen"
    shutil.copytree(cluster.here(f"{store}/theirs"), copy)
    record = cluster.here(f"{store}-record")
    record.rename(copy / "record")
    for path in (copy, *copy.iterdir()):
        os.chown(path, USERS["user2"], USERS["user2"])
    try:
        check(cluster, node, "stolen", cluster.there(copy), cluster.there(copy / "record"), user="user2")
    finally:
        shutil.rmtree(copy)


def restarted(cluster: Cluster, node: str, old: int) -> int:
    def new() -> int | None:
        found = cluster.pids(node, r"python\S* -I /usr/local/bin/hpccrd")
        return found[0] if found and found != [old] else None

    return wait_for("a new hpccrd", new, within=30)


def end_hpccrd(cluster: Cluster, node: str, *, kill: bool) -> None:
    """End it with SIGKILL, or as a restart of its service would, and wait until its successor serves."""
    pid = cluster.hpccrd(node)
    if kill:
        os.kill(pid, signal.SIGKILL)
    else:
        cluster.check(node, "kill", "-HUP", "1")
    restarted(cluster, node, pid)
    wait_for("hpccrd serves", lambda: cluster.run(node, PYTHON, CHECKS, "probe", user="user1").returncode == 0)


@pytest.mark.parametrize("kill", [True, False])
def test_hpccrd_ends(cluster: Cluster, node: str, kill: bool) -> None:
    """The capsules end with it, its successor removes what is left and works."""
    server = cluster.popen(cluster.nodes[1], PYTHON, "-c", DEAF)
    with ended(server):
        port = server.stdout.readline().strip()
        with running(cluster, node, "holding", "hold", cluster.nodes[1], port) as held:
            assert cluster.pids(node, r"noded\.init")
            end_hpccrd(cluster, node, kill=kill)
            assert held.wait(60) == 0
        check(cluster, node, "clean", user="root")
    check(cluster, node, "basic")


def transfers(cluster: Cluster, node: str, daemon: int) -> list[int]:
    """Not what they have just forked, which looks like them until it executes its program."""
    return [pid for pid in cluster.pids(node, r"-m hpccr\.noded\.transfer") if parent(pid) == daemon]


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


@pytest.mark.parametrize("kill", [True, False])
def test_flush_outlives_hpccrd(cluster: Cluster, node: str, store: str, kill: bool) -> None:
    """hpccrd ends in the middle of a flush: its successor leaves that alone, and it comes to its end."""
    directory, daemon = f"{store}/late", cluster.hpccrd(node)
    case = cluster.popen(node, PYTHON, CHECKS, "flush-here", directory, user="user1", stderr=None)
    with ended(case):
        found = wait_for("the transfer", lambda: transfers(cluster, node, daemon))
        assert len(found) == 1
        send(signal.SIGSTOP, found)
        end_hpccrd(cluster, node, kill=kill)
        case.kill()
        assert not cluster.here(f"{directory}/fragment.json").exists()
        assert cluster.check(node, "ls", "/var/spool/hpccr").split()
        send(signal.SIGCONT, found)
    wait_for("the fragment", cluster.here(f"{directory}/fragment.json").exists)
    check(cluster, node, "clean", user="root")


def test_flushes_that_wait_for_their_turn_begin_when_hpccrd_stops(cluster: Cluster, node: str, store: str) -> None:
    """Of checkpoints whose jobs are killed, as by a requeue of all of a user's jobs before a maintenance."""
    directory, turns, waiting, jobs = f"{store}/many", 8, 3, 16
    begun = 0

    daemon = cluster.hpccrd(node)

    def fragment(number: int) -> Path:
        return cluster.here(f"{directory}/{number}/fragment.json")

    def stopped(count: int) -> bool:
        """All there are are stopped, and that many; or one came to its end before it could be."""
        found = transfers(cluster, node, daemon)
        send(signal.SIGSTOP, found)
        return len(found) == count or fragment(begun - 1).exists()

    with running(cluster, node, "killed", "flushes-here", directory, str(jobs)) as case:

        def begin() -> None:
            case.stdin.write("\n")
            case.stdin.flush()
            assert case.stdout.readline().strip() == "began"

        while (count := len(transfers(cluster, node, daemon))) < turns:
            begin()
            begun += 1
            wait_for("the transfer", lambda count=count + 1: stopped(count), every=0.001)
        for _ in range(waiting):
            begin()
        case.stdin.close()
        held = transfers(cluster, node, daemon)
        try:
            assert len(held) == turns
            end_hpccrd(cluster, node, kill=False)
        finally:
            send(signal.SIGCONT, held)
        assert case.wait(60) == 0
    for number in range(begun + waiting):
        wait_for("the fragment", fragment(number).exists)
    check(cluster, node, "clean", user="root")
