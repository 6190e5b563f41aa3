"""Which steps have which CPUs of the job: kept by the launch root of capsule 0 for as long as their srun is connected.

Steps that find no room wait and are served in the order of their requests, those that fit first, as by slurmctld.
"""

from __future__ import annotations

import os

from hpccr.capsule.step import layout

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

IMPOSSIBLE = b"More processors requested than permitted"
"""Slurm's words for a step that the whole job has no room for."""


class Step:
    """A step's demand and, once it runs, what it has. answer: called with the result, None while it has to wait."""

    def __init__(self, demand: layout.Demand, answer: Callable[[bytes | None], None]) -> None:
        self.demand, self.answer = demand, answer
        self.taken: dict[int, int] = {}
        self.running = False


class Ledger:
    """The job's CPUs. cpus: of each capsule."""

    def __init__(self, cpus: Sequence[int]) -> None:
        self._cpus = tuple(cpus)
        self._used = [0] * len(self._cpus)
        self._steps: list[Step] = []
        self._next = 0

    def possible(self, demand: layout.Demand) -> bool:
        """Whether the job with nothing else in it has room for the step."""
        if any(index >= len(self._cpus) for index in demand.candidates):
            return False
        return layout.place(demand, self._cpus, [0] * len(self._cpus)) is not None

    def enter(self, step: Step) -> None:
        """Start it if there is room, else let it wait."""
        self._steps.append(step)
        self._serve()
        if not step.running:
            step.answer(None)

    def leave(self, step: Step) -> None:
        """It has ended, or is not wanted any more."""
        if step not in self._steps:
            return
        self._steps.remove(step)
        for index, count in step.taken.items():
            self._used[index] -= count
        self._serve()

    def _serve(self) -> None:
        for step in self._steps:
            if step.running:
                continue
            counts = layout.place(step.demand, self._cpus, self._used)
            if counts is None:
                continue
            step.running = True
            step.taken = layout.taken(step.demand, counts, self._cpus)
            for index, count in step.taken.items():
                self._used[index] += count
            placed = ",".join(f"{index}:{count}" for index, count in counts.items())
            number, self._next = self._next, self._next + 1
            step.answer(f"{number} {placed}".encode())


def job_cpus(environ: Mapping[bytes, bytes]) -> list[int]:
    """CPUs of each of the job's nodes; one node with this process's CPUs outside of Slurm."""
    count = int(environ.get(b"SLURM_JOB_NUM_NODES", b"1"))
    try:
        cpus = layout.expand_counts(environ[b"SLURM_JOB_CPUS_PER_NODE"].decode())
    except (KeyError, ValueError):
        cpus = [len(os.sched_getaffinity(0))]
    return (cpus + [cpus[-1]] * count)[:count]


def decode_answer(data: bytes) -> tuple[int, dict[int, int]]:
    """The step's number, and its tasks on each capsule."""
    number, _, placed = data.decode("ascii").partition(" ")
    pairs = (pair.partition(":") for pair in placed.split(","))
    return int(number), {int(index): int(count) for index, _, count in pairs}
