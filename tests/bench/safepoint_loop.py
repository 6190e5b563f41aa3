"""What a safe point costs in Python when nothing is asked: as safepoint.c."""

import time

from mpi4py import MPI

import hpccr.mpi

ROUNDS, CALLS, TURNS, WORK = 30, 10_000, 1_000, 2000


def per(count: int, body) -> float:  # type: ignore[no-untyped-def]
    start = time.process_time_ns()
    body()
    return (time.process_time_ns() - start) / count


def calls() -> None:
    for _ in range(CALLS):
        hpccr.mpi.safe_point(MPI.COMM_WORLD)


def without() -> None:
    for _ in range(TURNS):
        sum(range(WORK))


def with_safe_points() -> None:
    for _ in range(TURNS):
        sum(range(WORK))
        hpccr.mpi.safe_point(MPI.COMM_WORLD)


hpccr.mpi.safe_point(MPI.COMM_WORLD)  # the first is collective
rounds = [(per(CALLS, calls), per(TURNS, without), per(TURNS, with_safe_points)) for _ in range(ROUNDS)]
found = map(min, zip(*rounds, strict=True))
if MPI.COMM_WORLD.rank == 0:
    print(*(f"{value:.1f}" for value in found))
