"""Ranks that add up a number per step and hold some memory; rank 0 prints the sum. Takes next to no processor time.

    mpirun -n N python3 ticker.py [--hold MIB]

Line n of the output is `tick n S`, S = n * (1 + 2 + ... + N): no twin is needed to see that none is lost or doubled.
"""

import argparse
import os
import time

from mpi4py import MPI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hold", type=int, default=8, help="MiB of random numbers per rank")
    args = parser.parse_args()
    world = MPI.COMM_WORLD
    held = os.urandom(args.hold << 20)
    step = 0
    while held:
        step += 1
        total = world.allreduce(step * (world.rank + 1))
        if world.rank == 0:
            print("tick", step, total, flush=True)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
