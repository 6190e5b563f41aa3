"""Changes files in every way that programs have, all at once: what they hold at the end follows from the arguments.

    mpirun -n N python3 files.py --seed S --steps T [--tree DIR] DIR

Below DIR all ranks write into one file with MPI-IO, and each rank has a directory of its own: a log that is appended
to, files written at random places, mapped, truncated and made again, renamed over, removed; rank 0 has a database too.
In the directory --tree nothing stays open: a counter that is read and written anew, and files that must not be there
yet when they are made. A line is printed every 10 steps. Before the last 20 it waits until there is a file --gate.
"""

import argparse
import mmap
import os
import random
import sqlite3
import time
from typing import TextIO

import numpy as np
from mpi4py import MPI

BLOCK = 4096
MAPPED = 1 << 20


def create(path: str) -> TextIO:
    """To be closed by whoever takes it."""
    return open(path, "w")


class Own:
    """The files of one rank."""

    def __init__(self, directory: str, dice: random.Random, database: bool) -> None:
        os.makedirs(directory)
        self.directory = directory
        self.dice = dice
        self.log = os.open(self.path("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        self.inplace = os.open(self.path("in place"), os.O_RDWR | os.O_CREAT, 0o600)
        with open(self.path("mapped"), "w+b") as file:
            file.truncate(MAPPED)
            self.map = mmap.mmap(file.fileno(), MAPPED)
        self.again = create(self.path("again"))
        self.replaced = create(self.path("replaced"))
        self.removed = create(self.path("removed 0"))
        self.database = sqlite3.connect(self.path("data.db"), isolation_level=None) if database else None
        if self.database:
            self.database.execute("pragma synchronous=off")
            self.database.execute("create table steps (step integer, text)")

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def step(self, number: int) -> None:
        dice = self.dice
        data = dice.randbytes(dice.randrange(1, 3 * BLOCK))
        os.write(self.log, f"{number} {data[:16].hex()}\n".encode())
        # Far apart, so that it has holes.
        os.pwrite(self.inplace, data, dice.randrange(1 << 26))
        at = dice.randrange(MAPPED - len(data))
        self.map[at : at + len(data)] = data
        if number % 13 == 0:
            os.ftruncate(self.inplace, dice.randrange(1 << 26))
        if number % 7 == 0:
            self.again.close()
            self.again = create(self.path("again"))
        self.again.write(f"{number}\n" * dice.randrange(50))
        self.again.flush()
        if number % 5 == 0:
            # The old one stays open, without a name, until the next is there.
            old, self.replaced = self.replaced, create(self.path("temporary"))
            os.rename(self.path("temporary"), self.path("replaced"))
            old.close()
        self.replaced.write(f"{number}\n")
        self.replaced.flush()
        if number % 11 == 0:
            os.unlink(self.removed.name)
            self.removed.close()
            self.removed = create(self.path(f"removed {number}"))
        self.removed.write("x" * dice.randrange(20_000))
        self.removed.flush()
        if self.database:
            if number % 4 == 1:
                self.database.execute("begin")
            self.database.execute("insert into steps values (?, ?)", (number, data.hex()))
            if number % 4 == 0:
                self.database.execute("commit")

    def close(self) -> None:
        if self.database:
            if self.database.in_transaction:
                self.database.execute("commit")
            (count,) = self.database.execute("select count(*) from steps").fetchone()
            (verdict,) = self.database.execute("pragma integrity_check").fetchone()
            print("database", count, verdict, flush=True)
            self.database.close()
        for file in (self.again, self.replaced, self.removed, self.map):
            file.close()
        os.close(self.log)
        os.close(self.inplace)


def change_tree(directory: str, number: int) -> None:
    """Everything is closed again when this returns."""
    counter = os.path.join(directory, "counter")
    count = 0
    if os.path.exists(counter):
        with open(counter) as file:
            count = int(file.read())
    with open(counter, "w") as file:
        file.write(str(count + 1))
    os.mkdir(os.path.join(directory, f"step-{number}"))
    with open(os.path.join(directory, f"step-{number}", "file"), "x") as file:
        file.write(f"{number}" * 100)
    if number > 3:
        os.unlink(os.path.join(directory, f"step-{number - 3}", "file"))
        if number % 2:
            os.rmdir(os.path.join(directory, f"step-{number - 3}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tree", help="existing directory in which rank 0 leaves nothing open")
    parser.add_argument("--gate", required=True)
    parser.add_argument("directory")
    args = parser.parse_args()

    world = MPI.COMM_WORLD
    dice = random.Random(args.seed * 1000 + world.rank)
    if world.rank == 0:
        os.mkdir(args.directory)
    world.Barrier()
    own = Own(os.path.join(args.directory, f"rank-{world.rank}"), dice, world.rank == 0)
    shared = MPI.File.Open(world, os.path.join(args.directory, "shared"), MPI.MODE_CREATE | MPI.MODE_RDWR)
    for number in range(1, args.steps + 1):
        while number == args.steps - 20 and not os.path.exists(args.gate):
            time.sleep(0.05)
        own.step(number)
        block = np.frombuffer(dice.randbytes(BLOCK), dtype=np.uint8)
        # Blocks of the ranks take turns in the file, and each is written often.
        shared.Write_at((dice.randrange(64) * world.size + world.rank) * BLOCK, block)
        if args.tree and world.rank == 0:
            change_tree(args.tree, number)
        world.Barrier()
        if world.rank == 0 and number % 10 == 0:
            print("step", number, flush=True)
    shared.Close()
    own.close()
    world.Barrier()
    if world.rank == 0:
        print("done", flush=True)


main()
