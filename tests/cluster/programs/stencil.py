"""Jacobi iteration on a square, halos exchanged between neighbours: residual per step, log file, checksum of the field.

    mpirun -n N python3 stencil.py [--size 400] [--steps 500] [--every 1] [--log FILE] [--rate 100] [--gate FILE]

Everything printed (and logged) is exact and the same in every run with the same arguments and number of ranks: the
partial residuals are added by rank 0 in a fixed way, not by MPI in whatever order they come. With --gate the last 20
steps begin only when there is a file of that name, and from then on --rate does not hold any more.
"""

import argparse
import hashlib
import math
import os
import time

import numpy as np
from mpi4py import MPI

LAST = 20


def shut(gate: str | None) -> bool:
    return gate is not None and not os.path.exists(gate)


def share(size: int, parts: int, index: int) -> tuple[int, int]:
    """First and one past the last of `size` rows that part `index` of `parts` owns."""
    return size * index // parts, size * (index + 1) // parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=400, help="points per side of the square")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=1, help="steps between two printed residuals")
    parser.add_argument("--log", help="file that rank 0 appends the residual of every step to")
    parser.add_argument("--rate", type=float, help="steps per second, at most")
    parser.add_argument("--gate", help="file that the last steps wait for")
    args = parser.parse_args()

    world = MPI.COMM_WORLD
    cart = world.Create_cart(MPI.Compute_dims(world.size, 2), reorder=False)
    (row, column), (rows, columns) = cart.Get_coords(cart.rank), cart.Get_topo()[0]
    top, bottom = share(args.size, rows, row)
    left, right = share(args.size, columns, column)
    north, south = cart.Shift(0, 1)
    west, east = cart.Shift(1, 1)

    # The boundary of the square is fixed; a rank's own points are field[1:-1, 1:-1], around them its neighbours'.
    y, x = np.meshgrid(np.arange(top - 1, bottom + 1), np.arange(left - 1, right + 1), indexing="ij")
    field = np.where((x < 0) | (y < 0), 1.0 + 0.25 * np.sin(0.05 * (x + y)), 0.0)
    field[1:-1, 1:-1] = ((x * 7919 + y * 104729) % 1000 / 1000.0)[1:-1, 1:-1]

    log = open(args.log, "a", encoding="ascii") if args.log and cart.rank == 0 else None  # noqa: SIM115 - until the end
    for step in range(1, args.steps + 1):
        while step > args.steps - LAST and shut(args.gate):
            time.sleep(0.05)
        if args.rate and (not args.gate or shut(args.gate)):
            time.sleep(1 / args.rate)
        exchange(cart, field, north, south, west, east)
        inner = 0.25 * (field[:-2, 1:-1] + field[2:, 1:-1] + field[1:-1, :-2] + field[1:-1, 2:])
        partial = float(np.sum((inner - field[1:-1, 1:-1]) ** 2))
        field[1:-1, 1:-1] = inner
        partials = cart.gather(partial, root=0)
        if cart.rank == 0:
            line = f"step {step} residual {math.sqrt(math.fsum(partials))!r}"
            if step % args.every == 0:
                print(line, flush=True)
            if log is not None:
                log.write(line + "\n")
                log.flush()
    parts = cart.gather(np.ascontiguousarray(field[1:-1, 1:-1]).tobytes(), root=0)
    if cart.rank == 0:
        digest = hashlib.sha256(b"".join(parts)).hexdigest()
        print(f"done steps {args.steps} field {digest}", flush=True)
        if log is not None:
            log.write(f"field {digest}\n")
            log.close()


def exchange(cart: MPI.Cartcomm, field: np.ndarray, north: int, south: int, west: int, east: int) -> None:
    """Fill the halo of `field` with the neighbours' edges."""
    north_in, south_in = np.empty_like(field[0, :]), np.empty_like(field[-1, :])
    west_in, east_in = np.empty_like(field[:, 0]), np.empty_like(field[:, -1])
    requests = [
        cart.Irecv(north_in, north, 1),
        cart.Irecv(south_in, south, 2),
        cart.Irecv(west_in, west, 3),
        cart.Irecv(east_in, east, 4),
        cart.Isend(field[1, :].copy(), north, 2),
        cart.Isend(field[-2, :].copy(), south, 1),
        cart.Isend(field[:, 1].copy(), west, 4),
        cart.Isend(field[:, -2].copy(), east, 3),
    ]
    MPI.Request.Waitall(requests)
    # At the edge of the square there is no neighbour and the halo is the boundary.
    if north != MPI.PROC_NULL:
        field[0, :] = north_in
    if south != MPI.PROC_NULL:
        field[-1, :] = south_in
    if west != MPI.PROC_NULL:
        field[:, 0] = west_in
    if east != MPI.PROC_NULL:
        field[:, -1] = east_in


if __name__ == "__main__":
    main()
