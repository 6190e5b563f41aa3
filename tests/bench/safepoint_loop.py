"""What a safe point costs in Python when nothing is asked: as safepoint.c."""

import time

from mpi4py import MPI

import hpccr.mpi

CALLS, TURNS, WORK = 200_000, 20_000, 200


def per(count: int, body) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter_ns()
    body()
    return (time.perf_counter_ns() - start) / count


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
found = per(CALLS, calls), per(TURNS, without), per(TURNS, with_safe_points)
if MPI.COMM_WORLD.rank == 0:
    print(*(f"{value:.1f}" for value in found))
