"""Jobs that others push aside: by preemption, with and without notice, and by `scontrol suspend`."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

from jobs import Job, Jobs
from nodes import stopped
from waiting import rounds, wait_for
from workloads import ENOUGH, Workloads, check_counter, counter


def computes(job: Job) -> None:
    """Returns when it has printed more than it had."""
    size = job.output.stat().st_size if job.output.exists() else 0
    wait_for(f"more output of job {job.id}", lambda: job.output.exists() and job.output.stat().st_size > size)


def finish(job: Job) -> None:
    """Let a counter end, and check what it has printed."""
    job.cluster.write(job.directory / ENOUGH, "", job.user)
    job.wait_success()
    check_counter(job.said())


def coordinator_of(job: Job) -> int:
    """On its first node. What it starts looks like it until it executes: it is known when there is no other."""
    node = job.slurm().nodes[0]
    return wait_for(
        "one coordinator",
        lambda: found[0] if len(found := job.cluster.pids(node, r"hpccr run --batch")) == 1 else None,
    )


def frozen(pid: int) -> bool:
    """By Slurm, with the freezer of its step."""
    group = re.findall(r"^\d+:freezer:(.*)$", Path(f"/proc/{pid}/cgroup").read_text(), re.MULTILINE)[0]
    return Path(f"/sys/fs/cgroup/freezer{group}/freezer.state").read_text().strip() == "FROZEN"


def test_preempted_twice_with_and_without_notice(jobs: Jobs, workloads: Workloads) -> None:
    """One has KillWait and its node to itself; the other GraceTime, and makes room before that is over."""
    at_once = jobs.sbatch(counter(), ["--checkpoint=requeue", "--partition=low", "--exclusive"])
    with_notice = jobs.sbatch(workloads.stencil(), ["--checkpoint=requeue", "--partition=grace"], nodes=2, tasks=4)
    for turn in (1, 2):
        for job in (at_once, with_notice):
            job.wait_event("started" if turn == 1 else "restored")
            computes(job)
        urgent = jobs.submit("true", nodes=4, tasks=4, options=("--partition=urgent",), plain=True)
        urgent.wait_success()
        for job in (at_once, with_notice):
            job.wait_event("restored", turn)
    finish(at_once)
    computes(with_notice)
    said = with_notice.said()
    with_notice.cancel()
    workloads.check_endless(said)
    for job in (at_once, with_notice):
        assert len(job.events("requeued")) == job.slurm().restarts == 2
        assert {event["why"] for event in job.events("terminate")[:2]} == {"preempted"}
    # Nobody waited for the end of GraceTime, which is 20 s. A checkpoint may have taken more than one attempt.
    asked = 0.0
    for event in with_notice.events():
        if event["event"] == "checkpoint":
            asked = event["time"]
        assert event["event"] != "requeued" or event["time"] - asked < 20


def test_suspended_and_resumed_while_it_is_checkpointed(jobs: Jobs, workloads: Workloads) -> None:
    cluster = jobs.cluster
    job = jobs.sbatch(counter(), ["--checkpoint=requeue"], nodes=2, tasks=2)
    job.wait_event("started")
    coordinator = coordinator_of(job)

    def scontrol(act: str) -> None:
        cluster.check("ctl", "scontrol", act, str(job.id))
        wait_for(act, lambda: frozen(coordinator) == (act == "suspend"))

    chance = random.Random(workloads.seed)
    for _ in range(rounds(2, 20)):
        computes(job)
        client = cluster.popen("ctl", "hpccr", "checkpoint", str(job.id), "--no-wait", user="user1")
        time.sleep(chance.uniform(0.2, 1.0))  # somewhere in the course of it: the place is what the test varies
        scontrol("suspend")
        scontrol("resume")
        client.communicate(timeout=60)
    computes(job)
    scontrol("suspend")
    refused = job.hpccr("checkpoint")
    assert refused.returncode == 11 and f"job {job.id} is suspended" in refused.stderr, refused.stderr
    # With it there may be its child, which looks like it until it executes `sleep`.
    scripts = cluster.pids(job.slurm().nodes[0], r"^/bin/bash .*slurm_script")
    assert scripts and all(map(frozen, scripts))
    scontrol("resume")
    computes(job)
    job.requeue()
    finish(job)
    assert not job.events("lost") and job.events("released")
    assert len(job.events("suspended")) == rounds(2, 20) + 1


def test_a_stop_that_stops_nothing_keeps_checkpoints_off_only_for_a_while(jobs: Jobs) -> None:
    """^Z in a terminal looks like what `scontrol suspend` begins with, and no SIGCONT needs to follow."""
    job = jobs.sbatch(counter(), ["--checkpoint=requeue"])
    job.wait_event("started")
    os.kill(coordinator_of(job), signal.SIGTSTP)
    assert "is suspended" in job.hpccr("checkpoint").stderr
    wait_for("a checkpoint", lambda: job.hpccr("checkpoint").returncode == 0)
    finish(job)


def test_interrupted_before_it_runs(jobs: Jobs) -> None:
    """There is no command yet that the signal could be passed to."""
    cluster = jobs.cluster
    with stopped([cluster.hpccrd(node) for node in cluster.nodes]):
        job = jobs.sbatch(counter(), ["--checkpoint=requeue"])
        job.wait_event("boot")
        wait_for("a capsule", lambda: job.status()["status"]["phase"] == "creating")
        os.kill(coordinator_of(job), signal.SIGINT)
    job.wait_over()
    assert not job.events("started") and not job.said()
