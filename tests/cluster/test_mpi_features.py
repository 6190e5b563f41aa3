"""Every MPI library and every feature: checkpointed inside it under load, restored on other nodes, and the program's
output, which it has checked byte by byte, is what an undisturbed run without hpccr prints."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

import pytest

import mpitable
from jobs import Job, Jobs
from mpis import FINALIZE, LIBRARIES, Library, features
from nodes import Failure
from sockets import deadlines
from waiting import Late, soak
from workloads import Workloads

pytestmark = pytest.mark.xdist_group("features")
"""Most ranks here never sleep while they wait: two of these tests at once take each other's processors."""
HOLD = 300.0
"""Seconds without an answer that every connection has to survive: the longest time that a job may stand still."""
PAUSE = 10.0
"""Seconds between two tries to send what was not acknowledged."""
SLOW = 180.0
"""Seconds for what takes a few on a quiet machine: ranks that poll hold each other up where processors are short."""
LACKS = " is not in this library: "
RESULT = re.compile(r"\w+ \d+ [0-9a-f]{8}$")
TASKS = 8
"""Four for each node, of which two run ranks: MPI has places for children."""


@pytest.mark.parametrize("library", LIBRARIES, ids=[library.key for library in LIBRARIES])
def test_features(jobs: Jobs, workloads: Workloads, library: Library, request: pytest.FixtureRequest) -> None:
    """In the short form one feature of HPCCR_SEED's choice is held; all are there, with what they have under way."""
    making_table = bool(request.config.getoption("--mpi-table"))
    names = features()
    dice = random.Random(f"{workloads.seed} {library.key}")
    twin = expected(workloads)
    runs = [carried(jobs, library, [name for name in names if name not in library.alone], twin, dice)]
    runs += [alone(jobs, library, name, twin, dice) for name in library.alone]
    lacks = {name: reason for found in runs for name, reason in found.items()}
    if not making_table:
        table = mpitable.read()
        assert {name for name, title in names.items() if table[title][library.title] != mpitable.YES} == {*lacks}
    if lacks and soak():
        # What a library lacks it lacks outside of hpccr too.
        assert lacking(undisturbed(workloads, library, [])) == lacks
    if making_table:
        cells = {title: lacks.get(name, mpitable.YES) for name, title in names.items()}
        cells = {"version": version(jobs, library), **cells, FINALIZE: mpitable.YES}
        mpitable.write(library.title, cells, [other.title for other in LIBRARIES])


def carried(jobs: Jobs, library: Library, names: list[str], twin: list[str], dice: random.Random) -> dict[str, str]:
    """A run of these features, requeued while one, or in the long form each, is held; its results are the twin's.
    Those that the library lacks, with its reason."""
    job = jobs.submit(library.features(names, names), tasks=TASKS, environment=library.variables)
    job.wait_event("started")
    job.wait_output("ready\n", SLOW)
    lacks = lacking(job.said())
    there = [name for name in names if name not in lacks]
    inside = there if soak() else [dice.choice(there)]
    for name in there:
        if name in inside:
            job.wait_output(f"{name} held\n", SLOW)
            survives(job)
            job.requeue("hpccr")
        job.cluster.write(job.directory / f"go-{name}", "", job.user)
    job.wait_success()
    assert job.slurm().restarts == len(inside)
    assert by_feature(results(job.said(), there)) == by_feature(line for line in twin if line.split()[0] in there)
    return lacks


def alone(jobs: Jobs, library: Library, name: str, twin: list[str], dice: random.Random) -> dict[str, str]:
    """The same of a feature in which the library's mpirun crashes by itself (mpis.py): then it is tried again."""
    for _ in range(2):
        try:
            return carried(jobs, library, [name], twin, dice)
        except (Failure, Late):
            if jobs.all[-1].slurm().signal not in library.alone[name]:
                raise
    return carried(jobs, library, [name], twin, dice)


def survives(job: Job) -> None:
    """No connection of the job gives up within the longest time that it may be held, or is quiet for long after it."""
    found = [row for node in job.slurm().nodes for row in deadlines(job.cluster, node)]
    assert len(found) >= 4, "the ranks have no connections?"
    assert [row for row in found if row.seconds < HOLD or row.pause > PAUSE] == []


def lacking(said: str) -> dict[str, str]:
    """Features that the program found the library without, and the library's reason."""
    rows = [line.split(LACKS, 1) for line in said.splitlines() if LACKS in line]
    return {row[0]: f"not in this library: {row[1]}" for row in rows}


def results(said: str, names: list[str]) -> list[str]:
    """The lines with the results of these features; libraries say other things beside them."""
    lines = said.splitlines()
    assert "finalized" in lines, said
    return [line for line in lines if RESULT.match(line) and line.split()[0] in names]


def by_feature(lines: Iterable[str]) -> list[str]:
    """Where a feature has a run of its own its lines come later: each one's in their order."""
    return sorted(lines, key=lambda line: line.split()[0])


def expected(workloads: Workloads) -> list[str]:
    """The lines of an undisturbed run. All libraries print the same, so that one stands for all: MPICH, but for spawn,
    for which neither of the two has its children on several nodes."""
    debian, pypi = (next(one for one in LIBRARIES if one.key == f"mpich-{kind}") for kind in ("debian", "pypi"))
    rest = [name for name in features() if name != "spawn"]
    lines = results(undisturbed(workloads, debian, rest), rest)
    return lines + results(undisturbed(workloads, pypi, ["spawn"], nodes=1), ["spawn"])


def undisturbed(workloads: Workloads, library: Library, only: list[str], *, nodes: int = 2) -> str:
    exported = " ".join(f"{key}={value}" for key, value in library.variables.items())
    command = library.features(only, nodes=nodes)
    return workloads.twin(f"env {exported} {command}", nodes=nodes, tasks=TASKS)


def version(jobs: Jobs, library: Library) -> str:
    """What the library says it is, in a few words."""
    program = "'from mpi4py import MPI; print(MPI.Get_library_version())'"
    command = library.python(f"-c {program}", ranks=1, nodes=1)
    job = jobs.submit(command, nodes=1, tasks=1, environment=library.variables)
    job.wait_success()
    words = job.said().replace(",", " ").split()
    return next(word.removeprefix("v") for word in words if word.removeprefix("v")[:1].isdigit())
