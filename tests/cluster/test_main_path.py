"""The main path: MPI jobs are checkpointed, requeued and restored on other nodes; what they print is what an
undisturbed run without hpccr prints."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import pytest

from jobs import Job, Jobs
from nodes import Cluster
from waiting import rounds, wait_for
from workloads import SOURCES, Workloads, thermo, thermo_file

INTERVAL = 2.0
"""Seconds between two checkpoints of a job under load."""
PAUSE = 50
RATE = 60
"""Milliseconds between rounds, and steps per second, of jobs that are to be in the middle when they are requeued."""
LOCKED = 11


def runs_on(job: Job) -> None:
    """Returns when the job has printed more than it has now."""
    size = job.output.stat().st_size
    wait_for(f"more output of job {job.id}", lambda: job.output.stat().st_size > size)


def under_way(job: Job) -> None:
    """Returns when the job computes: it has printed something."""
    job.wait_event("started")
    wait_for(f"output of job {job.id}", lambda: job.output.exists() and job.output.stat().st_size)


def test_lammps_under_open_mpi(jobs: Jobs, workloads: Workloads) -> None:
    steps = rounds(3000, 20000)
    command = workloads.melt(steps)
    job = jobs.submit(workloads.melt(steps, gate="gate"))
    job.wait_output("Step")
    released = job.checkpoint()
    assert released["freeze_seconds"] > 0 and released["bytes"] > 0
    runs_on(job)
    assert job.requeue("hpccr") == tuple(dict.fromkeys(job.slurm().nodes))
    job.open_gate()
    job.wait_success()
    assert job.slurm().restarts == 1
    assert thermo(job.said()) == thermo(workloads.twin(command))
    assert thermo_file(job.directory / "melt.log") == thermo(workloads.twin(command, file="melt.log"))


def test_random_messages_under_mpich(jobs: Jobs, workloads: Workloads) -> None:
    """Requeued by Slurm's own command: what is done in time is done on SIGTERM."""
    command = workloads.pairs(rounds(220, 2000))
    job = jobs.submit(workloads.pairs(rounds(220, 2000), pause=PAUSE, gate="gate"))
    under_way(job)
    job.requeue("scontrol")
    # Slurm may send its SIGTERM more than once; there is one final checkpoint.
    assert {event["why"] for event in job.events("terminate")} == {"requeue"} and len(job.events("released")) == 1
    job.open_gate()
    job.wait_success()
    assert job.said() == workloads.twin(command)


def test_mpi4py_restored_twice_in_a_row(jobs: Jobs, workloads: Workloads) -> None:
    command = workloads.stencil(rounds(900, 6000))
    job = jobs.submit(workloads.stencil(rounds(900, 6000), rate=RATE, gate="gate"))
    under_way(job)
    first = job.slurm().nodes
    second = job.requeue("hpccr")
    third = job.requeue("scontrol")  # at once: what was just restored is checkpointed
    assert not set(first) & set(second) and not set(second) & set(third)
    job.open_gate()
    job.wait_success()
    assert job.said() == workloads.twin(command)
    assert (job.directory / "residuals.txt").read_text() == workloads.twin(command, file="residuals.txt")


def test_two_users_on_the_same_nodes(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    first, second = cluster.nodes[:2], cluster.nodes[2:4]
    messages, steps = rounds(220, 1500), rounds(900, 5000)
    twins = {"user1": workloads.pairs(messages), "user2": workloads.stencil(steps)}
    cluster.drain(*second)
    made = [
        jobs.submit(workloads.pairs(messages, pause=PAUSE, gate="gate"), user="user1"),
        jobs.submit(workloads.stencil(steps, rate=RATE, gate="gate"), user="user2"),
    ]
    for job in made:
        under_way(job)
        assert set(job.slurm().nodes) == set(first)
    at_once(made, lambda job: job.checkpoint())
    cluster.resume()
    cluster.drain(*first)
    at_once(made, lambda job: job.requeue("hpccr", avoid=False))
    cluster.resume()
    for job in made:
        assert set(job.slurm().nodes) == set(second)
        job.open_gate()
    for job in made:
        job.wait_success()
        assert job.said() == workloads.twin(twins[job.user])


def at_once(jobs: list[Job], act: Callable[[Job], object]) -> None:
    """Do the same to several jobs at the same moment; the first error is raised when all are done."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(jobs))

    def one(job: Job) -> None:
        barrier.wait()
        try:
            act(job)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_a_checkpoint_every_two_seconds(
    jobs: Jobs, workloads: Workloads, record_property: Callable[[str, object], None]
) -> None:
    """Under message load, all succeed and no message is lost, doubled or changed."""
    job = jobs.submit(workloads.pairs(1_000_000))
    under_way(job)
    start = time.monotonic()
    wanted = rounds(10, 30)
    for number in range(wanted):
        # The pace is what is tested: not before its time, and as soon as possible when the last one took longer.
        time.sleep(max(0.0, start + number * INTERVAL - time.monotonic()))
        job.hpccr_ok("checkpoint", "--no-wait")
    job.wait_event("durable", wanted)
    runs_on(job)
    job.cancel()
    released = job.events("released")
    assert len(released) == wanted
    # hpccr's own further attempts are part of a checkpoint that succeeds; nothing else went wrong.
    assert {event["code"] for event in job.events("checkpoint-failed")} <= {LOCKED}
    # Every line has the digest of all messages before it, and is the same however many rounds follow.
    said = [line for line in job.said().splitlines() if line.startswith("round ")]
    twin = workloads.twin(workloads.pairs(int(said[-1].split()[1])))
    assert said == twin.splitlines()[: len(said)]
    freezes = [event["freeze_seconds"] for event in released]
    record_property("freeze_seconds", freezes)
    print(f"freeze: median {statistics.median(freezes):.3f} s, longest {max(freezes):.3f} s of {len(freezes)}")


@pytest.mark.parametrize("how", ["hpccr", "scontrol"])
def test_one_node(jobs: Jobs, workloads: Workloads, how: str) -> None:
    """A step of one capsule: there are no peers, and the command is not even MPI's."""
    command = f"python3 {SOURCES}/threads.py --rounds {rounds(150, 1500)} --work 20000 --log threads.log"
    job = jobs.submit(f"{command} --gate gate", nodes=1, tasks=1)
    under_way(job)
    job.requeue(how)
    job.open_gate()
    job.wait_success()
    assert job.said() == workloads.twin(command, nodes=1, tasks=1)
    log = workloads.twin(command, nodes=1, tasks=1, file="threads.log")
    assert (job.directory / "threads.log").read_text() == log


def test_lost_before_any_checkpoint(jobs: Jobs, workloads: Workloads) -> None:
    """Requeued by Slurm before hpccr has anything: the final checkpoint is the first. While MPICH starts it may be
    refused, and the job begins anew."""
    command = workloads.pairs(rounds(220, 2000))
    job = jobs.submit(workloads.pairs(rounds(220, 2000), pause=PAUSE, gate="gate"))
    job.wait_event("started")
    job.cluster.check("ctl", "scontrol", "requeue", str(job.id), user=job.user)
    wait_for("the job again", lambda: job.events("restored") or job.events("started")[1:], within=90)
    job.open_gate()
    job.wait_success()
    assert job.said() == workloads.twin(command)
