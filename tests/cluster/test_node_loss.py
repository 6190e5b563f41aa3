"""Nodes that go: powered off without warning, or cut off from the network. And checkpoints that cannot be restored."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jobs import Job, Jobs
from nodes import TESTBED, Cluster
from test_preemption import computes, finish
from waiting import rounds, wait_for
from workloads import ENOUGH, Workloads, check_counter, counter

OF_A_JOB = r"hpccr (run|agent)|hpccr\.noded\.init|slurm_script"
LOSS = 120
"""Seconds from the loss of a node until the job runs again: its silence, Slurm's SlurmdTimeout, the requeue delay."""


def do(cluster: Cluster, *words: str) -> None:
    subprocess.run([sys.executable, TESTBED, *words], check=True, env=cluster.environment, timeout=90)


@contextmanager
def without(cluster: Cluster, *, dead: str = "", cut: str = "") -> Iterator[None]:
    """A node is off, and another one cut off, in this block; behind it Slurm has them back."""
    if dead:
        do(cluster, "kill", dead)
    if cut:
        do(cluster, "partition", cut)
    try:
        yield
    finally:
        if cut:
            do(cluster, "heal", cut)
            # Slurm ends what it finds there of jobs that are elsewhere by now.
            wait_for("the end of old jobs", lambda: not cluster.pids(cut, OF_A_JOB), within=90, every=0.25)
            # Its slurmstepd then tries for minutes to tell slurmctld of it.
            do(cluster, "kill", cut)
            do(cluster, "start", cut)
        if dead:
            do(cluster, "start", dead)
        wait_for(
            "all nodes back",
            lambda: not re.search(r"\*|down", cluster.check("ctl", "sinfo", "-h", "-N", "-o", "%t")),
            within=90,
            every=0.5,
        )


def test_a_node_is_powered_off_and_another_cut_off(jobs: Jobs, workloads: Workloads) -> None:
    """Five jobs at once: of each of these nodes one has its ranks there and one its batch script. The script of the
    fifth ends well before anybody can know that its other node is off, as after an mpirun that is faster to see it."""
    cluster = jobs.cluster
    first, dead, cut, last = cluster.nodes[:4]

    def on(body: str, *nodes: str, tasks: int = 2, plain: bool = False) -> Job:
        """There now, and wherever it can be later. (Slurm starts no step of a job while it drains one of its nodes.)"""
        cluster.drain(*(node for node in cluster.nodes if node not in nodes))
        job = jobs.sbatch(
            body,
            ["--mail-type=END,FAIL", *([] if plain else ["--checkpoint=requeue"])],
            nodes=len(nodes),
            tasks=tasks,
            environment={"HPCCR_CHECKPOINT_SILENCE_TIMEOUT": "30"},
        )
        if plain:
            job.wait_state("RUNNING")
        else:
            job.wait_event("started")
        cluster.resume()
        return job

    ranks = on(workloads.stencil(), first, dead, tasks=4)
    cut_ranks = on(workloads.stencil(), first, cut, tasks=4)
    scripts = [on(counter(), dead, last), on(counter(), cut, last)]
    twin = on(counter(), dead, last, plain=True)
    ending = on(counter(), first, dead)
    for job in (ranks, cut_ranks, *scripts, ending):
        computes(job)
        job.checkpoint()
    for job in (ranks, cut_ranks, *scripts, ending):
        computes(job)
    with without(cluster, dead=dead, cut=cut):
        cluster.write(ending.directory / ENOUGH, "", ending.user)
        ending.wait_success(within=LOSS)
        check_counter(ending.said())
        assert ending.events("restoring") and ending.slurm().restarts == 1
        for job in (ranks, cut_ranks, *scripts):
            event = job.wait_event("restored", within=LOSS)
            assert {dead, cut}.isdisjoint(event["nodes"])
            computes(job)
        # Where Slurm cannot be asked, nothing is said in its name.
        asked = cluster.run(cut, "hpccr", "status", "999999", user="user1")
        assert asked.returncode == 1 and "no job 999999" in asked.stderr and "Slurm" not in asked.stderr, asked.stderr
    for job in scripts:
        finish(job)
        assert job.slurm().restarts == 1
    twin.wait_state("RUNNING")
    computes(twin)
    finish(twin)
    # Slurm takes the node's failure for one of the job's, whose end this is not.
    assert scripts[0].mails(2) == twin.mails(2) == ["Failed", "Ended"]
    ends_well(cut_ranks, workloads, restarts=1)
    for turn in range(rounds(0, 3)):
        in_turn(ranks, turn)
    ends_well(ranks, workloads, restarts=rounds(1, 4))


def ends_well(job: Job, workloads: Workloads, *, restarts: int) -> None:
    """All it has printed is what an undisturbed run prints. It is ended here."""
    assert job.slurm().restarts == restarts
    said = job.said()
    job.cancel()
    workloads.check_endless(said)


def in_turn(job: Job, turn: int) -> None:
    """Another of the job's nodes is cut off."""
    job.checkpoint()
    node = job.slurm().nodes[turn % len(job.slurm().nodes)]
    with without(job.cluster, cut=node):
        event = job.wait_event("restored", turn + 2, within=LOSS)
        assert node not in event["nodes"]
        computes(job)


@contextmanager
def without_hpccrd(cluster: Cluster) -> Iterator[None]:
    """No node has one that answers."""
    socket = "/run/hpccr/hpccrd.sock"
    for node in cluster.nodes:
        cluster.check(node, "mv", socket, f"{socket}.away")
    try:
        yield
    finally:
        for node in cluster.nodes:
            cluster.check(node, "mv", f"{socket}.away", socket)


def test_a_node_that_cannot_take_the_job_is_left_for_others(jobs: Jobs) -> None:
    """It has a checkpoint and is started again where there is no hpccrd: that is no end of it."""
    cluster = jobs.cluster
    job = jobs.sbatch(counter(), ["--checkpoint=requeue"])
    job.wait_event("started")
    computes(job)
    job.requeue_and_hold()
    with without_hpccrd(cluster):
        job.release()
        wait_for(
            "the job to be requeued",
            lambda: any("no hpccrd answers" in event["text"] for event in job.events("warning")),
        )
        cluster.drain(*cluster.nodes)
    job.release()
    assert job.wait_event("restored")["sequence"] == 1
    finish(job)
    assert not job.events("failed") and not job.events("restoring")[1:]


def test_checkpoints_that_cannot_be_restored(jobs: Jobs) -> None:
    """The newest does not verify: the one before is taken. None does: the job ends, and says how to begin again."""
    cluster = jobs.cluster
    job = jobs.sbatch(counter(), ["--checkpoint=requeue"])
    job.wait_event("started")
    computes(job)
    job.checkpoint()
    computes(job)
    job.requeue_and_hold()
    spoil(job, 2)
    job.release()
    assert job.wait_event("restored")["sequence"] == 1
    computes(job)
    job.requeue_and_hold()
    shutil.rmtree(job.step() / "ckpt-000001")  # nothing of the damaged one went into the third
    spoil(job, 3)
    job.release()
    ended = job.wait_over()
    assert (ended.states, ended.code) == ({"FAILED"}, 12)
    said = job.said()
    assert f"hpccr: error: no checkpoint of {cluster.name}-{job.id}/0 can be restored: checkpoint 3: " in said
    assert f"hpccr rm --force {job.id}; scontrol requeue {job.id}" in said
    restarts = ended.restarts

    # As the hint says.
    job.hpccr_ok("rm", "--force")
    cluster.check("ctl", "scontrol", "requeue", str(job.id), user=job.user)
    wait_for("a new beginning", lambda: job.said().splitlines().count("1 1") == 2)
    job.cluster.write(job.directory / ENOUGH, "", job.user)
    job.wait_success()
    assert job.slurm().restarts == restarts + 1 and not job.events("restored")


def spoil(job: Job, sequence: int) -> None:
    """Change a byte in every pack of a checkpoint, and take what its nodes have kept of it away."""
    for node in job.cluster.nodes:
        job.cluster.check(node, "sh", "-c", "rm -rf /var/spool/hpccr/kept-*")
    packs = sorted((job.step() / f"ckpt-{sequence:06d}").glob("capsule-*/*.pack"))
    assert packs
    for pack in packs:
        content = bytearray(pack.read_bytes())
        content[len(content) // 2] ^= 1
        # Older checkpoints may have the same file.
        pack.unlink()
        job.cluster.write(pack, bytes(content), job.user)
