"""Heat in a square plate (Jacobi), rows shared out among the ranks, with a safe point in every step and hooks.

    mpirun -n 4 python3 stencil.py [--steps N] [--points N] [--log FILE] [--pause SECONDS] [--ask STEP]

--ask: rank 0 asks for a checkpoint at that step. What it prints is the same however often it is checkpointed.
"""

import argparse
import math
import time

import numpy as np
from mpi4py import MPI

import hpccr.mpi


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--points", type=int, default=200, help="per side")
    parser.add_argument("--log", help="file that rank 0 appends to; FILE.events gets what happened at safe points")
    parser.add_argument("--pause", type=float, default=0, help="seconds of rest per step")
    parser.add_argument("--ask", type=int, default=0)
    args = parser.parse_args()

    comm = MPI.COMM_WORLD
    first = args.points * comm.rank // comm.size
    last = args.points * (comm.rank + 1) // comm.size
    field = np.zeros((last - first + 2, args.points))
    if comm.rank == 0:
        field[1, :] = 100
    cache: dict[str, np.ndarray] = {}
    log = open(args.log, "a", encoding="ascii") if args.log and comm.rank == 0 else None  # noqa: SIM115 - to the end

    def said(what: str) -> None:
        if log is not None:
            with open(args.log + ".events", "a", encoding="ascii") as events:
                events.write(what + "\n")

    if log is not None:

        @hpccr.mpi.on_quiesce
        def flush() -> None:
            log.flush()
            said("log flushed")

    @hpccr.mpi.on_quiesce  # registered last, called first
    def drop_cache() -> None:
        """What can be made again need not be in the checkpoint."""
        cache.clear()
        said("cache dropped")

    hpccr.mpi.on_resume(lambda: said("on resume"))
    hpccr.mpi.on_restart(lambda: said("on restart"))

    for step in range(1, args.steps + 1):
        exchange(comm, field)
        top, bottom = int(comm.rank == 0), int(comm.rank == comm.size - 1)
        inner = field[1 + top : len(field) - 1 - bottom, 1:-1]
        mean = cache.setdefault("mean", np.empty_like(inner))
        mean[:] = 0.25 * (
            field[top : len(field) - 2 - bottom, 1:-1]
            + field[2 + top : len(field) - bottom, 1:-1]
            + field[1 + top : len(field) - 1 - bottom, :-2]
            + field[1 + top : len(field) - 1 - bottom, 2:]
        )
        change = float(np.abs(mean - inner).sum())
        inner[:] = mean
        changes = comm.gather(change)
        if comm.rank == 0:
            line = f"step {step} change {math.fsum(changes)!r}"
            print(line, flush=True)
            if log is not None:
                log.write(line + "\n")
            if step == args.ask and not hpccr.mpi.request_checkpoint():
                said("nobody to ask for a checkpoint")
        time.sleep(args.pause)
        if outcome := hpccr.mpi.safe_point(comm):
            said(outcome.name.lower())
    if log is not None:
        log.close()


def exchange(comm: MPI.Comm, field: np.ndarray) -> None:
    """Fill the rows above and below with the neighbours' edges."""
    north = comm.rank - 1 if comm.rank > 0 else MPI.PROC_NULL
    south = comm.rank + 1 if comm.rank + 1 < comm.size else MPI.PROC_NULL
    comm.Sendrecv(field[1], north, 1, field[-1], south, 1)
    comm.Sendrecv(field[-2], south, 2, field[0], north, 2)


if __name__ == "__main__":
    main()
