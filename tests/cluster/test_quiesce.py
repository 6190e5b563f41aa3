"""Safe points: ranks that stand still before the freeze, those that do not come, and what the program is told after."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs import Job, Jobs
from nodes import Cluster
from waiting import wait_for
from workloads import MPICH, NICE, OPEN_MPI, SOURCES, Workloads

EXAMPLES = "/src/mpi/examples"
PYTHON = "env PYTHONPATH=/src python3"
MPIRUN = OPEN_MPI.format(each=2, ranks=4)
PATIENT = {"HPCCR_QUIESCE_TIMEOUT": "60"}
IMPATIENT = {"HPCCR_QUIESCE_TIMEOUT": "6"}

COMMS = 100
"""Steps in each part of `points.py comms`."""


@pytest.fixture(scope="module")
def library(cluster: Cluster) -> Callable[[str], str]:
    """The directory with the C library and the examples, built for an MPI by the site's compiler."""

    def build(mpi: str) -> str:
        out = f"/shared/programs/mpi-{mpi}"
        settings = (f"MPICC=mpicc.{mpi}", "CFLAGS=-O2 -g -Werror", f"OUT={out}")
        cluster.check(cluster.nodes[0], "make", "-s", "-C", "/src/mpi", *settings, "all", "examples")
        return out

    return build


def compiled(cluster: Cluster, mpi: str, out: str, name: str, source: str, *options: str) -> str:
    """A C program of the tests with the library in it, as `name` beside that."""
    compiler = (f"mpicc.{mpi}", "-O2", "-Wall", "-Wextra", "-Werror", "-I/src/mpi", *options)
    command = (*compiler, "-o", f"{out}/{name}", source, f"{out}/libhpccr_mpi.a", "-lpthread", "-lm")
    cluster.check(cluster.nodes[0], *command)
    return f"{out}/{name}"


def slow(cluster: Cluster, mpi: str, out: str, example: str) -> str:
    """An example in C that is held up until the job's gate is open."""
    options = ("-include", f"{SOURCES}/slowly.h")
    return compiled(cluster, mpi, out, f"slow-{example}", f"{EXAMPLES}/{example}.c", *options)


def happened(job: Job) -> list[str]:
    """What the example's hooks and safe points have said so far."""
    log = job.directory / "log.events"
    return log.read_text().splitlines() if log.exists() else []


def test_c_stencil_under_mpich(jobs: Jobs, workloads: Workloads, library: Callable[[str], str]) -> None:
    """Asked from inside, from outside and by a requeue: hooks in order, resume and restart told apart."""
    out, mpirun, arguments = library("mpich"), f"{MPICH.format(ranks=4)} {NICE}", "-s 500 -n 60 -l log -c 10"
    job = jobs.submit(f"{mpirun} {slow(jobs.cluster, 'mpich', out, 'stencil')} {arguments}", environment=PATIENT)
    job.wait_event("durable")
    assert job.events("checkpoint")[0]["reason"] == "program"
    resumed = ["scratch freed", "log flushed", "scratch made: resumed", "resumed"]
    wait_for("the program to say that it goes on", lambda: happened(job) == resumed)
    job.hpccr_ok("checkpoint", "--quiesce")
    wait_for("the program to say so again", lambda: happened(job) == 2 * resumed)
    job.requeue_and_hold()
    # The log of rank 0 was flushed before the freeze, and nothing has run since: the file has whole lines.
    assert (job.directory / "log").read_text().endswith("\n")
    job.release()
    job.wait_event("restored", within=90)
    job.open_gate()
    restarted = ["scratch freed", "log flushed", "scratch made: restarted", "restarted"]
    wait_for("the program to say that it was restored", lambda: happened(job) == 2 * resumed + restarted)
    job.wait_success()
    assert [event["ranks"] for event in job.events("quiesced")] == [4, 4, 4]
    assert not job.events("not-quiesced") and not job.events("checkpoint-failed")
    command = f"{mpirun} {out}/stencil {arguments}"
    assert job.said() == workloads.twin(command)
    assert (job.directory / "log").read_text() == workloads.twin(command, file="log")


def test_python_stencil_under_open_mpi(jobs: Jobs, workloads: Workloads) -> None:
    mpirun, program = f"{MPIRUN} {NICE} {PYTHON}", f"{EXAMPLES}/stencil.py --steps 600 --points 60 --log log --ask 20"
    job = jobs.submit(f"{mpirun} {SOURCES}/slowly.py {program}", environment=PATIENT)
    job.wait_event("durable")
    assert job.events("checkpoint")[0]["reason"] == "program"
    resumed = ["cache dropped", "log flushed", "on resume", "resumed"]
    wait_for("the program to say that it goes on", lambda: happened(job) == resumed)
    job.hpccr_ok("requeue", "--quiesce=require")
    job.wait_event("restored")
    job.open_gate()
    restarted = ["cache dropped", "log flushed", "on restart", "restarted"]
    wait_for("the program to say that it was restored", lambda: happened(job) == resumed + restarted)
    job.wait_success()
    assert [event["ranks"] for event in job.events("quiesced")] == [4, 4]
    command = f"{mpirun} {program}"
    assert job.said() == workloads.twin(command)
    assert (job.directory / "log").read_text() == workloads.twin(command, file="log")


@pytest.mark.parametrize("language", ["c", "python"])
def test_work_queue(jobs: Jobs, workloads: Workloads, library: Callable[[str], str], language: str) -> None:
    """Rounds of unlike work; every message counted by both ends, in Python by the preloaded library."""
    out = library("openmpi")
    if language == "c":
        mpirun, arguments = f"{MPIRUN} {NICE}", "-r 700 -t 12 -p 30000"
        held, program = slow(jobs.cluster, "openmpi", out, "montecarlo"), f"{out}/montecarlo"
    else:
        mpirun = f"{MPIRUN} -x LD_PRELOAD={out}/libhpccr_mpi.so {NICE} {PYTHON}"
        program, arguments = f"{EXAMPLES}/montecarlo.py", "--rounds 700 --tasks 12 --points 20000"
        held = f"{SOURCES}/slowly.py {program}"
    job = jobs.submit(f"{mpirun} {held} {arguments}", environment={**PATIENT, "HPCCR_QUIESCE_MODE": "require"})
    job.wait_output("round 3 ")  # before the first safe point nobody takes part
    job.hpccr_ok("checkpoint", "--no-wait")
    job.requeue("hpccr", avoid=False)
    job.open_gate()
    job.wait_success()
    assert [event["ranks"] for event in job.events("quiesced")] == [4, 4]
    assert job.said() == workloads.twin(f"{mpirun} {program} {arguments}")


@pytest.mark.parametrize("mpi", ["mpich", "openmpi"])
def test_messages_under_way(cluster: Cluster, jobs: Jobs, library: Callable[[str], str], mpi: str) -> None:
    """Traffic pending at every safe point, all kinds of communicators in C, and what each rank is told."""
    out = library(mpi)
    program = compiled(cluster, mpi, out, "traffic", f"{SOURCES}/traffic.c")
    run = MPIRUN if mpi == "openmpi" else MPICH.format(ranks=4)
    job = jobs.submit(f"{run} {NICE} {program}", environment={**PATIENT, "HPCCR_QUIESCE_MODE": "require"})

    def touch(name: str) -> None:
        cluster.write(job.directory / name, "", job.user)

    def told() -> list[list[str]]:
        """What each rank has been told, in the order of the ranks."""
        return [(job.directory / f"outcomes.{rank}").read_text().splitlines() for rank in range(4)]

    job.wait_output("world 10\n")
    job.hpccr_ok("checkpoint", "--no-wait")
    wait_for("every rank to hear of it", lambda: all(told()))
    # At the same safe point.
    assert told()[0][0].endswith(" resumed") and told() == [told()[0]] * 4

    touch("keep")
    job.wait_output("kept\n")
    done = job.hpccr("checkpoint")
    assert done.returncode == 1 and "rank 1 (pid " in done.stderr and "1 messages to it are not received" in done.stderr
    job.hpccr_ok("checkpoint", "--quiesce=prefer")
    assert "1 messages to it" in job.events("not-quiesced")[-1]["why"]
    touch("take")
    job.wait_output("taken\n")
    job.hpccr_ok("checkpoint")

    for number, word in ((3, "halves"), (4, "inter")):
        touch(word)
        job.wait_output(f"{word} 5\n")
        job.hpccr_ok("checkpoint")
        assert len(job.events("quiesced")) >= number

    # Restored from a checkpoint that nobody stood still for: all the same every rank hears of it, and its hooks run.
    job.hpccr_ok("requeue", "--quiesce=off")
    job.wait_event("restored")
    wait_for("every rank to hear of the restart", lambda: all(lines[-1].endswith(" restarted") for lines in told()))
    for lines in told():
        # Once, and nothing after it.
        assert [line for line in lines if line == "hook" or line.endswith(" restarted")] == lines[-2:]
        assert lines[-2] == "hook"
    job.hpccr_ok("checkpoint")
    touch("end")
    job.wait_success()


def test_no_time_for_ranks_that_do_not_come(jobs: Jobs) -> None:
    """Slurm is about to end the job while a checkpoint waits for a rank that never comes, and would for minutes."""
    command = f"{MPIRUN} {NICE} {PYTHON} {SOURCES}/points.py late --steps 600 --log log"
    job = jobs.submit(command, environment={"HPCCR_QUIESCE_TIMEOUT": "600", "HPCCR_QUIESCE_MODE": "require"})
    job.wait_output("late\n")
    with ThreadPoolExecutor(1) as waiting:
        asked = waiting.submit(job.hpccr, "checkpoint")
        job.wait_event("checkpoint")
        job.requeue("scontrol", avoid=False)
        assert asked.result().returncode != 0
    (missing,) = job.events("not-quiesced")
    assert "rank 1 (pid " in missing["why"]
    job.cluster.write(job.directory / "on", "", job.user)
    job.wait_success()
    assert "step 600\n" in job.said()


def test_ranks_that_do_not_come(jobs: Jobs, workloads: Workloads) -> None:
    """One rank calls no safe point for a while: prefer, require and off, and then it does again."""
    command = f"{MPIRUN} {NICE} {PYTHON} {SOURCES}/points.py late --steps 600 --log log"
    job = jobs.submit(command, environment=IMPATIENT)
    job.wait_output("late\n")
    job.hpccr_ok("checkpoint")
    (missing,) = job.events("not-quiesced")
    node = job.slurm().nodes[0]
    assert "rank 1 (pid " in missing["why"] and f" on {node})" in missing["why"] and "rank 0" not in missing["why"]
    assert "not at the safe point in time" in (job.step(0) / "hpccr.log").read_text()
    done = job.hpccr("checkpoint", "--quiesce")
    assert done.returncode == 1 and "rank 1 (pid " in done.stderr and "hint: " in done.stderr
    job.hpccr_ok("checkpoint", "--quiesce=off")
    # The others have stood at their safe point twice: once a checkpoint was made there, once none was.
    wait_for("what the first one has heard", lambda: happened(job) == ["resumed", "abandoned"])
    assert len(job.events("released")) == 2 and len(job.events("not-quiesced")) == 1
    job.cluster.write(job.directory / "on", "", job.user)
    job.wait_output("on time\n")
    job.hpccr_ok("checkpoint", "--quiesce", "--no-wait")
    assert [event["ranks"] for event in job.events("quiesced")] == [4]
    job.wait_success()
    said = job.said().splitlines(keepends=True)
    twin = [f"step {step}\n" for step in range(1, 601)]
    assert [line for line in said if line.startswith("step")] == twin


def test_a_hook_that_takes_longer_than_there_is_time(jobs: Jobs) -> None:
    """It is checkpointed in the middle of it, and ends after a restore: then it hears of that."""
    command = f"{MPIRUN} {NICE} {PYTHON} {SOURCES}/points.py hook --steps 300 --log log"
    job = jobs.submit(command, environment=IMPATIENT)
    job.wait_output("step 20\n")
    job.hpccr_ok("checkpoint")
    (missing,) = job.events("not-quiesced")
    assert "hooks not finished in time: rank 1 (pid " in missing["why"] and "rank 0" not in missing["why"]
    said = lambda rank: (job.directory / f"log.{rank}").read_text().splitlines()  # noqa: E731
    wait_for("the ranks that were in time to go on", lambda: "resumed" in said(0))
    assert said(1) == ["hook begins"]
    job.requeue("hpccr", avoid=False)
    job.cluster.write(job.directory / "on", "", job.user)
    job.wait_success()
    assert job.said().splitlines() == [f"step {step}" for step in range(1, 301)]
    hook, resumed, restarted = ["hook begins", "hook ends"], ["on resume", "resumed"], ["on restart", "restarted"]
    assert said(1) == hook + restarted
    assert [said(rank) for rank in (0, 2, 3)] == [hook + resumed + restarted] * 3


def test_communicators(jobs: Jobs) -> None:
    """Safe points on a dup, on halves that go on at different paces, on an intercommunicator between them."""
    command = f"{MPIRUN} {NICE} {PYTHON} {SOURCES}/points.py comms --steps {COMMS} --log log"
    job = jobs.submit(command, environment={**PATIENT, "HPCCR_QUIESCE_MODE": "require"})
    words = ("dup", "halves", "inter")
    for number, word in enumerate(words, 1):
        # So many that the communicator before counts as out of use: it could still be expected to come back.
        job.wait_output(f"{word} step 8\n")
        job.hpccr_ok("checkpoint")
        assert len(job.events("quiesced")) == number
        # In the part of the program that calls these, not when it comes to the next one.
        assert job.said().splitlines()[-1].startswith(word)
        if word == "inter":
            job.requeue("hpccr", avoid=False)
        job.cluster.write(job.directory / f"on.{word}", "", job.user)
    job.wait_success()
    assert [event["ranks"] for event in job.events("quiesced")] == [4, 4, 4, 4]
    assert job.said().splitlines() == [f"{word} step {step + 1}" for word in words for step in range(COMMS)]
