"""Messages for a long time: the job is checkpointed again and again, restored on other nodes, and once stands still as
long as in a very large dump. None is lost, doubled, changed or overtaken by a later one."""

from __future__ import annotations

import os
import random
import time

import pytest

from jobs import Job, Jobs
from mpis import HOME, LIBRARIES, Library
from nodes import Cluster
from turnstile import Turnstile
from waiting import rounds, soak, wait_for
from workloads import SOURCES, Workloads

PERIOD = rounds(2, 5)
"""Seconds between two checkpoints; each RESTORE-th is a requeue onto other nodes."""
RESTORE = rounds(3, 6)
CHECKPOINTS = rounds(3, 120)
STANDSTILL = rounds(2, 300)
"""Seconds of the one long hold."""
MAX_BYTES = 1 << 20
"""Of a message."""
COMPILERS = {
    "mpich-debian": "mpicc.mpich",
    "openmpi-debian": "mpicc.openmpi",
    # There is no compiler with Intel's library, which has MPICH's ABI.
    "impi-pypi": f"{HOME}/mpich/bin/mpicc",
}
CHOSEN = [library for library in LIBRARIES if library.key in COMPILERS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """In the short form one library of HPCCR_SEED's choice."""
    chosen = CHOSEN if soak() else random.Random(os.environ["HPCCR_SEED"]).sample(CHOSEN, 1)
    metafunc.parametrize("library", chosen, ids=[library.key for library in chosen])


def test_messages(jobs: Jobs, cluster: Cluster, workloads: Workloads, library: Library) -> None:
    program = f"/shared/programs/pairs-{library.key}"
    compiler = COMPILERS[library.key]
    cluster.check(cluster.nodes[0], compiler, "-O2", "-o", program, f"{SOURCES}/pairs.c")
    path = f"env LD_LIBRARY_PATH={HOME}/{library.home}/lib " if library.home != "debian" else ""

    # The pause, in milliseconds, is for the sake of the twin, which does without.
    command = f"{path}{program} {workloads.seed} 1000000 10 {MAX_BYTES} {rounds(20, 100)}"
    job = jobs.submit(library.command(command), environment=library.variables)
    job.wait_output("round ")
    start = time.monotonic()
    for number in range(1, CHECKPOINTS + 1):
        # The pace is what is tested.
        time.sleep(max(0.0, start + number * PERIOD - time.monotonic()))
        if number == 2:
            stand_still(job, cluster, STANDSTILL)
            start += STANDSTILL
        elif number % RESTORE == 0:
            job.requeue("hpccr")
        else:
            job.hpccr_ok("checkpoint", "--no-wait")
    moves_on(job)
    job.cancel()
    assert not job.events("checkpoint-failed") and not job.events("lost")
    assert len(job.events("restored")) == CHECKPOINTS // RESTORE
    said = [line for line in job.said().splitlines() if line.startswith("round ")]
    # Every line has the digest of all messages before it, and is the same however many rounds follow, with any library.
    # (Intel MPI cannot run on two nodes of this machine outside of capsules: it takes them for one.)
    twin = workloads.twin(workloads.pairs(int(said[-1].split()[1]), max_bytes=MAX_BYTES))
    assert said == [line for line in twin.splitlines() if line.startswith("round ")]


def stand_still(job: Job, cluster: Cluster, seconds: float) -> None:
    """A checkpoint in which the job is held for that long."""
    first, second = job.slurm().nodes
    released = len(job.events("released"))
    # With hpccrd stopped it would not become so, and the next one would wait for it.
    job.wait_event("durable", released)
    with Turnstile(cluster, job, (first, second)) as turnstile:
        client = cluster.popen("ctl", "hpccr", "checkpoint", str(job.id), user=job.user)
        turnstile.hold_in("dumping")
        time.sleep(seconds)  # it is the time itself that is tested
    said, errors = client.communicate(timeout=60)
    assert client.returncode == 0, said + errors
    event = job.wait_event("released", released + 1)
    assert event["freeze_seconds"] >= seconds
    moves_on(job)


def moves_on(job: Job) -> None:
    size = job.output.stat().st_size
    wait_for(f"more output of job {job.id}", lambda: job.output.stat().st_size > size)
