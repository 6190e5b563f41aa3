"""The store on shared storage: what checkpoints share, what a killed flush leaves, and a checkpoint that travels."""

from __future__ import annotations

import json
import os
import random
import signal
import stat

from jobs import Job, Jobs
from nodes import USERS, Cluster
from waiting import Late, rounds, wait_for
from workloads import Workloads

FLUSH = r"-m hpccr\.(noded\.transfer|store\.worker flush)"


def start(jobs: Jobs, workloads: Workloads) -> Job:
    """A job on two nodes that computes until it is cancelled."""
    job = jobs.submit(workloads.stencil())
    job.wait_event("started")
    wait_for("output", lambda: job.output.exists() and job.output.stat().st_size)
    return job


def goes_on(job: Job, workloads: Workloads) -> None:
    """The job runs, and all it has printed is what it would have printed undisturbed. It is ended here."""
    size = job.output.stat().st_size
    wait_for("more output", lambda: job.output.stat().st_size > size)
    job.cancel()
    lines = job.said().splitlines(keepends=True)
    workloads.check_endless("".join(line for line in lines if line.startswith("step ")))


def complete(job: Job) -> list[int]:
    return [found["sequence"] for found in job.status()["checkpoints"] if found["state"] == "complete"]


def new_pids(cluster: Cluster, node: str, known: set[int]) -> list[int]:
    """Processes of a flush that were not there before."""
    return wait_for("a flush", lambda: sorted(set(cluster.pids(node, FLUSH)) - known), every=0.005)


def test_checkpoints_share_what_did_not_change(jobs: Jobs, workloads: Workloads) -> None:
    job = start(jobs, workloads)
    for _ in range(4):
        job.checkpoint()
    found = json.loads(job.hpccr_ok("inspect", "--json"))
    size = found["summary"]["bytes"]
    assert sum(one["own"] for one in found["stored"]) < size / 4
    assert all(one["shared"] for one in found["stored"])
    wait_for("gc", lambda: complete(job) == [4, 3])
    for sequence in complete(job):
        assert "is whole" in job.hpccr_ok("verify", str(sequence))
    for path in job.store.rglob("*"):
        status = path.lstat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode) & 0o077) == (USERS["user1"], 0) or path.suffix == ".log"
    job.requeue()
    goes_on(job, workloads)


def test_killed_flushes(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """Either process of a flush is killed, at any moment: what is listed as complete is whole, and the job goes on."""
    job = start(jobs, workloads)
    chance = random.Random(workloads.seed)
    job.checkpoint()
    failed = 0
    for _ in range(rounds(5, 50)):
        node = chance.choice(job.slurm().nodes)
        known = set(cluster.pids(node, FLUSH))
        asked = cluster.popen("ctl", "hpccr", "checkpoint", "--wait", str(job.id), user="user1")
        try:
            os.kill(chance.choice(new_pids(cluster, node, known)), signal.SIGKILL)
        except (Late, ProcessLookupError):
            pass  # it was faster
        asked.communicate(timeout=120)
        failed += asked.returncode != 0
        for sequence in complete(job):
            assert "is whole" in job.hpccr_ok("verify", str(sequence))
    assert failed, "no flush was hit"
    assert job.checkpoint()["sequence"] in complete(job)
    job.requeue()
    goes_on(job, workloads)


def test_a_checkpoint_travels(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """Exported, removed, imported, restored on one node outside Slurm."""
    job = start(jobs, workloads)
    job.requeue_and_hold()
    job.cancel()
    job.release()
    archive = cluster.there(job.directory / "job.hpccr")
    job.hpccr_ok("export", "-o", archive)
    assert job.hpccr("rm").returncode == 11
    job.hpccr_ok("rm", "--force")
    assert not job.store.exists()
    done = cluster.check("ctl", "hpccr", "import", archive, user="user1")
    assert "goes on with it" in done
    size = job.output.stat().st_size
    restore = f"cd {cluster.there(job.directory)} && exec hpccr restore {job.store.name} >> out.txt"
    restored = cluster.popen(cluster.nodes[2], "sh", "-c", restore, user="user1")
    try:
        wait_for("more output", lambda: job.output.stat().st_size > size)
        restored.terminate()
        restored.communicate(timeout=60)
    finally:
        restored.kill()
    lines = job.said().splitlines(keepends=True)
    workloads.check_endless("".join(line for line in lines if line.startswith("step ")))
