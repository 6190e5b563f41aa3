"""Slurm's epilog: a job is COMPLETING for as long as a checkpoint of it is on its way to the store, within a limit."""

from __future__ import annotations

import signal

from jobs import Job, Jobs
from nodes import Cluster, send
from waiting import wait_for
from workloads import counter

CONFIGURATION = "etc/hpccr/epilog.conf"


def transfers(cluster: Cluster) -> list[int]:
    return [pid for node in cluster.nodes for pid in cluster.pids(node, r"-m hpccr\.noded\.transfer")]


def stop_flush(job: Job) -> list[int]:
    """Processes of the flush of a new checkpoint, stopped as soon as it has begun."""
    cluster = job.cluster
    wait_for("the end of other flushes", lambda: not transfers(cluster))
    # It may be over when the command has ended.
    with cluster.popen("ctl", "hpccr", "checkpoint", str(job.id), "--no-wait", user=job.user) as client:
        found = wait_for("a flush", lambda: transfers(cluster), every=0.005)
        send(signal.SIGSTOP, found)
        said = client.communicate(timeout=60)
    assert client.returncode == 0, said
    return found


def test_a_job_is_completing_while_its_checkpoint_is_written(jobs: Jobs) -> None:
    cluster = jobs.cluster
    # What a flush has to write takes a moment: it is found at work.
    body = "head -c 100000000 /dev/urandom > /tmp/data\n" + counter()
    first, second = (jobs.sbatch(body, ["--checkpoint=requeue"]) for _ in range(2))
    stopped: list[int] = []
    configured = [cluster.root(node) / CONFIGURATION for node in cluster.nodes]
    try:
        for job in (first, second):
            job.wait_event("started")
            job.wait_output("1 1")
        stopped += stop_flush(first)
        cluster.check("ctl", "scancel", str(first.id))
        # Its processes are gone, and it is not over.
        wait_for("the end of its processes", lambda: first.events("finished"))
        assert first.wait_state("CANCELLED", "COMPLETING").states == {"CANCELLED", "COMPLETING"}
        assert not first.events("durable") and first.status()["checkpoints"][0]["state"] != "complete"
        send(signal.SIGCONT, stopped)
        assert first.wait_over(within=60).states == {"CANCELLED"}
        assert first.status()["checkpoints"][0]["state"] == "complete"

        for file in configured:
            file.write_text("LIMIT=2\n")
        stopped += stop_flush(second)
        cluster.check("ctl", "scancel", str(second.id))
        assert second.wait_over(within=60).states == {"CANCELLED"}
        assert second.status()["checkpoints"][0]["state"] != "complete"
    finally:
        send(signal.SIGCONT, stopped)
        for file in configured:
            file.unlink(missing_ok=True)
    wait_for("the end of all transfers", lambda: not transfers(cluster))
