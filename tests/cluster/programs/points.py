"""A rank that does not come to its safe point, one whose hook lasts, and safe points on communicators of all kinds.

mpirun -n 4 python3 points.py late|hook|comms --steps N --log FILE
"""

import argparse
import time
from pathlib import Path

import hpccr.mpi
from mpi4py import MPI

PAUSE = 0.01
SLOW = 0.5
"""Seconds per step: of a rank in the ordinary case, and while the test is not done with this part."""
LATE_FROM = 20


def late(world: MPI.Intracomm, steps: int, log: str) -> None:
    """From step LATE_FROM on rank 1 calls no safe point, until the file `on` is there; then it makes up for them.

    No rank waits for another one but in a safe point.
    """
    behind = 0
    for step in range(1, steps + 1):
        if world.rank == 0:
            print(f"step {step}", flush=True)
            if step == LATE_FROM:
                print("late", flush=True)
            if world.iprobe(1, 7):
                print(world.recv(source=1, tag=7), flush=True)
                world.send(step, 1, 8)
        if world.rank == 1 and step == LATE_FROM:
            while not Path("on").exists():
                time.sleep(PAUSE)
            world.send("on time", 0, 7)
            behind = world.recv(source=0, tag=8)
        if step >= behind:
            time.sleep(PAUSE if step < LATE_FROM or Path("on").exists() else SLOW)
        outcome = hpccr.mpi.safe_point(world)
        if outcome and world.rank == 0:
            with open(log + ".events", "a", encoding="ascii") as events:
                events.write(outcome.name.lower() + "\n")


def hook(world: MPI.Intracomm, steps: int, log: str) -> None:
    """The hook of rank 1 does not end until the file `on` is there."""

    def note(word: str) -> None:
        with open(f"{log}.{world.rank}", "a", encoding="ascii") as events:
            events.write(word + "\n")

    def quiesce() -> None:
        note("hook begins")
        while world.rank == 1 and not Path("on").exists():
            time.sleep(PAUSE)
        note("hook ends")

    hpccr.mpi.on_quiesce(quiesce)
    hpccr.mpi.on_resume(lambda: note("on resume"))
    hpccr.mpi.on_restart(lambda: note("on restart"))
    for step in range(1, steps + 1):
        if world.rank == 0:
            print(f"step {step}", flush=True)
        time.sleep(PAUSE)
        if outcome := hpccr.mpi.safe_point(world):
            note(outcome.name.lower())
        world.barrier()


def comms(world: MPI.Intracomm, steps: int) -> None:
    """Steps of a kind are slow until the file `on.KIND` is there."""
    rank, half = world.rank, world.rank % 2
    twin = world.Dup()
    own = world.Split(half, rank)
    inter = own.Create_intercomm(0, world, 1 - half, 5)

    def run(word: str, count: int, *points: MPI.Comm) -> None:
        for step in range(1, count + 1):
            if rank == 0:
                print(f"{word} step {step}", flush=True)
            time.sleep(PAUSE if Path(f"on.{word}").exists() else SLOW)
            # A ring within the half: no rank gets far ahead of its own.
            own.sendrecv(step, (own.rank + 1) % own.size, source=(own.rank - 1) % own.size)
            for comm in points:
                hpccr.mpi.safe_point(comm)
        world.barrier()

    run("dup", steps, world, twin)
    # Twice as many points in one half as in the other, and none of all ranks together.
    run("halves", steps * (1 + half), own)
    run("inter", steps, inter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("late", "hook", "comms"))
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--log", required=True)
    args = parser.parse_args()
    if args.what == "late":
        late(MPI.COMM_WORLD, args.steps, args.log)
    elif args.what == "hook":
        hook(MPI.COMM_WORLD, args.steps, args.log)
    else:
        comms(MPI.COMM_WORLD, args.steps)


if __name__ == "__main__":
    main()
