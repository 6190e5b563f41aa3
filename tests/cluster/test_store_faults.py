"""What happens to the store while it is written: storage that hangs or goes away, processes that are killed at any
moment, root kept out, another cluster. The job goes on, and what is listed as complete is whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs import Job, Jobs
from nodes import USERS, Cluster, send
from opens import Opens
from test_store import FLUSH, complete, verified
from waiting import rounds, wait_for
from workloads import Workloads

CORRUPT = 12
PYTHON = "/opt/hpccr/bin/python"


def start(jobs: Jobs, workloads: Workloads, store: str = "", hold: int = 8) -> Job:
    """A job on two nodes that computes until it is cancelled."""
    job = jobs.submit(workloads.ticker(hold=hold), environment={"HPCCR_STORE_DIR": store} if store else None)
    job.wait_event("started")
    goes_on(job)
    return job


def goes_on(job: Job) -> None:
    size = job.output.stat().st_size if job.output.exists() else 0
    wait_for("more output", lambda: job.output.exists() and job.output.stat().st_size > size)


def ends_well(job: Job, workloads: Workloads) -> None:
    """It runs, and has printed each line once. It is ended here."""
    goes_on(job)
    job.cancel()
    workloads.check_ticks(job.said())


@contextmanager
def frozen(place: Path) -> Iterator[None]:
    """Every write to the file system waits until this block is left, as on a server that does not answer."""
    subprocess.run(["fsfreeze", "-f", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", place], check=True)


def test_storage_that_hangs_and_storage_that_is_gone(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    with cluster.small_share("away", "400m", "user1", disk=True) as store:
        job = start(jobs, workloads, store)
        job.checkpoint()
        with frozen(cluster.here(store)):
            asked = cluster.popen("ctl", "hpccr", "checkpoint", "--dir", store, str(job.id), user="user1")
            # Released, and nothing of it can be written.
            wait_for("the flush", lambda: job.status()["status"]["phase"] == "flush")
            goes_on(job)
            assert asked.poll() is None and complete(job) == [1]
        output, errors = asked.communicate(timeout=60)
        assert asked.returncode == 0, output + errors
        assert complete(job) == [2, 1]
        with cluster.unmounted(store):
            failed = job.hpccr("checkpoint")
            assert failed.returncode == 1 and "hint: " in failed.stderr, failed.stderr
            goes_on(job)
        assert complete(job) == [2, 1]
        job.checkpoint()
        verified(job)
        job.requeue()
        ends_well(job, workloads)


def test_storage_that_is_gone_on_one_node(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """Before the flush, where the user may write below, or in its middle: the checkpoint fails and says why, nothing is
    written beside the store, and when it is back all is as before."""
    with cluster.small_share("part", "400m", "user1", disk=True) as store:
        job = start(jobs, workloads, store, hold=24)
        job.checkpoint()
        node = job.slurm().nodes[1]

        def fails(asked: subprocess.Popen[str]) -> None:
            output, errors = asked.communicate(timeout=60)
            assert asked.returncode == 1 and "hint: " in errors and "mounted" in errors, output + errors
            goes_on(job)
            assert complete(job) == [1]

        def ask() -> subprocess.Popen[str]:
            return cluster.popen("ctl", "hpccr", "checkpoint", "--wait", "--dir", store, str(job.id), user="user1")

        with cluster.unmounted(store, node):
            cluster.check(node, "chmod", "1777", store)
            fails(ask())
            assert cluster.check(node, "ls", "-A", store) == ""
        asked = ask()
        capsule = job.step() / "ckpt-000003" / "capsule-1"
        wait_for("a pack", lambda: any(".pack" in path.name for path in capsule.glob(".tmp-*")), every=0.005)
        pids = cluster.pids(node, FLUSH)
        send(signal.SIGSTOP, pids)
        with cluster.unmounted(store, node):
            send(signal.SIGCONT, pids)
            fails(asked)
            assert cluster.check(node, "ls", "-A", store) == ""
        job.checkpoint()
        verified(job)
        ends_well(job, workloads)


def test_a_device_that_cannot_be_written(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """What has been written to shared storage does not reach it, as the sync says: the flush fails and says where and
    why, and nothing that was complete is lost."""
    with cluster.small_share("broken", "400m", "user1", disk=True) as store:
        job = start(jobs, workloads, store, hold=24)
        job.checkpoint()
        nodes = job.slurm().nodes
        arguments = ("hpccr", "checkpoint", "--wait", "--dir", store, str(job.id))
        asked = cluster.popen("ctl", *arguments, user="user1")
        capsule = job.step() / "ckpt-000002" / "capsule-1"
        wait_for("a pack", lambda: any(".pack" in path.name for path in capsule.glob(".tmp-*")), every=0.005)
        send(signal.SIGSTOP, pids := [pid for node in nodes for pid in cluster.pids(node, FLUSH)])
        with cluster.failing(store):
            send(signal.SIGCONT, pids)
            output, errors = asked.communicate(timeout=60)
            place = f"{store}/{job.store.name}/0/ckpt-000002/capsule-"
            said = [f"error: {node}: the flush failed: {place}{number}" for number, node in enumerate(nodes)]
            assert asked.returncode == 1 and any(text in errors for text in said), output + errors
            assert "Input/output error" in errors and "hint: is the storage" in errors
            goes_on(job)
            assert complete(job) == [1]
            failed = job.hpccr("checkpoint")
            assert failed.returncode == 1 and "Input/output error" in failed.stderr, failed.stderr
            goes_on(job)
        assert complete(job) == [1]
        assert job.checkpoint()["sequence"] in complete(job)
        verified(job)
        job.requeue()
        ends_well(job, workloads)


def test_killed_at_random_moments(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """A flush, an agent or an hpccrd is killed somewhere in a checkpoint: the job goes on, from a checkpoint if it
    must, nothing it prints is lost or doubled, and what is listed as complete verifies."""
    job = start(jobs, workloads, hold=24)
    chance = random.Random(workloads.seed)
    patterns = {
        "flush": FLUSH,
        "agent": r"-m hpccr agent|/hpccr agent",
        "hpccrd": r"python\S* -I /usr/local/bin/hpccrd",
    }
    victims = [*patterns] * rounds(1, 17)
    chance.shuffle(victims)
    for victim in victims[: rounds(3, 50)]:
        newest = job.checkpoint()["sequence"]
        lives = len(job.events("started")) + len(job.events("restored"))
        node = chance.choice(job.slurm().nodes)
        asked = cluster.popen("ctl", "hpccr", "checkpoint", str(job.id), user="user1")
        time.sleep(chance.uniform(0.3, 1.5))  # any moment is the right one
        print(f"killing {victim} on {node}")
        send(signal.SIGKILL, cluster.pids(node, patterns[victim])[:1])
        asked.communicate(timeout=120)
        if victim != "flush":
            wait_for("a restore", lambda: len(job.events("started")) + len(job.events("restored")) > lives)  # noqa: B023
            assert job.events("restored")[-1]["sequence"] >= newest
        goes_on(job)
        verified(job)
    assert job.checkpoint()["sequence"] in complete(job)
    ends_well(job, workloads)


VERIFY = """
import sys
from pathlib import Path
from hpccr.model import StepKey
from hpccr.store.layout import Store
from hpccr.store.verify import verify
root, cluster, job, sequence = sys.argv[1:]
checkpoint = Store(Path(root)).step(StepKey(cluster=cluster, job=job, step='0')).checkpoint(int(sequence))
assert verify(checkpoint) == [], verify(checkpoint)
files = [path for path in sorted(checkpoint.path.rglob('*')) if path.is_file()]
for path in files:
    data = bytearray(path.read_bytes())
    bit = hash(path.name) % (8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    found = verify(checkpoint)
    assert found, (path, bit)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
assert verify(checkpoint) == []
print(len(files), 'files')
"""


def test_root_opens_nothing_and_every_flipped_bit_is_found(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    with cluster.small_share("guarded", "600m", "user1") as store, Opens(cluster.here(store)) as opens:
        job = start(jobs, workloads, store)
        for _ in range(3):
            job.checkpoint()
        job.requeue()
        job.hpccr_ok("gc")
        goes_on(job)
        job.hpccr_ok("verify")
        assert not (tried := cluster.run("node1", "cat", f"{store}/{job.store.name}/0/step.json")).stdout, tried
        assert len(opens.by_root) == 1 and opens.by_root.pop().startswith("cat "), "the watch does not work"
        ends_well(job, workloads)
        assert not opens.by_root
        assert opens.by_users == {USERS["user1"]}
        for path in (job.store, *job.store.rglob("*")):
            status = path.lstat()
            assert status.st_uid == status.st_gid == USERS["user1"], path
            assert stat.S_IMODE(status.st_mode) in ((0o700,) if path.is_dir() else (0o600, 0o700)), path
        arguments = (store, cluster.name, str(job.id), str(complete(job)[0]))
        assert "files" in cluster.check("ctl", PYTHON, "-c", VERIFY, *arguments, user="user1")


def test_another_cluster(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """A checkpoint goes on there if the site key is the same, and is refused if it is not."""
    job = start(jobs, workloads)
    job.requeue_and_hold()
    job.cancel()
    job.release()
    archive = job.directory / "job.hpccr"
    job.hpccr_ok("export", "-o", cluster.there(archive))
    other = Cluster.up(f"{cluster.name}-b", nodes=1)
    try:
        there = other.home("user1") / job.directory.relative_to(cluster.home("user1"))
        shutil.copytree(job.directory, there)
        for path in (there.parent, there, *there.iterdir()):
            os.chown(path, USERS["user1"], USERS["user1"])
        imported = other.check("node1", "hpccr", "import", other.there(there / archive.name), user="user1")
        assert "goes on with it" in imported
        restore = f"cd {other.there(there)} && exec hpccr restore {job.store.name} >> out.txt"
        refused = other.run("node1", "sh", "-c", restore, user="user1")
        assert refused.returncode == CORRUPT and "another key" in refused.stderr, refused.stderr
        key = (cluster.root("node1") / "etc/hpccr/key").read_text()
        (other.root("node1") / "etc/hpccr/key").write_text(key)
        old = other.hpccrd("node1")
        os.kill(other.pid_one("node1"), signal.SIGHUP)
        wait_for("hpccrd with the other key", lambda: other.hpccrd("node1") != old)
        wait_for("its socket", (other.root("node1") / "run/hpccr/hpccrd.sock").exists)
        out = there / "out.txt"
        size = out.stat().st_size
        restored = other.popen("node1", "sh", "-c", restore, user="user1")
        try:
            wait_for("more output", lambda: out.stat().st_size > size or restored.poll() is not None)
            restored.terminate()
            said, errors = restored.communicate(timeout=60)
            assert out.stat().st_size > size, said + errors
        finally:
            restored.kill()
        workloads.check_ticks(out.read_text())
    finally:
        other.down()
