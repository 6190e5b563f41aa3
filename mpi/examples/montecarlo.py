"""Pi by throwing points, from a queue of tasks that rank 0 hands out: fast ranks do more of them.

    mpirun -n 4 python3 montecarlo.py [--rounds N] [--tasks N] [--points N]

Ranks of a work queue do not pass through the same steps. So the tasks come in rounds: at the end of one the queue is
empty and no message is under way, and there all ranks, the one with the queue too, call the safe point. It is no
barrier: a worker may be in the next round while others finish this one, so messages to rank 0 are tagged by round.
"""

import argparse

import numpy as np
from mpi4py import MPI

import hpccr.mpi

TASK = 0


def serve(comm: MPI.Comm, first: int, tasks: int, tag: int) -> int:
    """Rank 0: one round; the points inside the circle."""
    total, given, left = 0, 0, comm.size - 1
    status = MPI.Status()
    while left:
        total += comm.recv(source=MPI.ANY_SOURCE, tag=tag, status=status)
        if given < tasks:
            comm.send(first + given, dest=status.source, tag=TASK)
            given += 1
        else:
            comm.send(None, dest=status.source, tag=TASK)
            left -= 1
    return total


def work(comm: MPI.Comm, points: int, tag: int) -> None:
    result = 0  # with the first message of a round comes none
    while True:
        comm.send(result, dest=0, tag=tag)
        task = comm.recv(source=0, tag=TASK)
        if task is None:
            return
        x, y = np.random.default_rng(task).random((2, points))
        result = int(np.count_nonzero(x * x + y * y < 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--tasks", type=int, default=100, help="per round")
    parser.add_argument("--points", type=int, default=10000, help="per task")
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    if comm.size < 2:
        raise SystemExit("montecarlo.py: error: it takes two ranks or more")
    inside = 0
    for number in range(args.rounds):
        tag = 1 + number % 1000
        if comm.rank == 0:
            inside += serve(comm, number * args.tasks, args.tasks, tag)
            print(f"round {number + 1} inside {inside}", flush=True)
        else:
            work(comm, args.points, tag)
        hpccr.mpi.safe_point(comm)
    if comm.rank == 0:
        print(f"pi is about {4 * inside / (args.rounds * args.tasks * args.points):.10f}")


if __name__ == "__main__":
    main()
