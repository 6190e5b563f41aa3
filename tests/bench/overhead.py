"""What it costs a job to run in capsules while nothing is checkpointed: the same program in turns inside and outside.

Latency and bandwidth of two ranks, on one node and on two; the loop time of LAMMPS with two ranks on two nodes.
Outside, MPI runs as the site has it, and once more with what `hpccr run` chooses (TCP and shared memory without single
copies), so that the network's part can be told from the choice's.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from jobs import Jobs
from nodes import Cluster
from pairs import ratio
from workloads import SOURCES

# Two ranks have this machine's two processors for themselves: none gives its own away while it waits.
MPIRUN = "mpirun.openmpi --mca mpi_yield_when_idle 0 --map-by ppr:{each}:node -n 2"
CHOICE = "--mca pml ob1 --mca smsc ^cma,knem,xpmem"
CHOICES = (("", "as the site has it"), (f" {CHOICE}", "with hpccr's choice of transports"))
PINGPONG = "python3 /src/tests/bench/pingpong.py"
STEPS = 300
MELT = f"lmp -in {SOURCES}/melt.in -var size 20 -var steps {STEPS} -var every 100 -log none"
"""32000 atoms, as in LAMMPS's own benchmark of this system."""
RUNS = 3
"""Of LAMMPS in a job, of which the fastest counts: what else the machine does only ever makes one slower."""


def measure(cluster: Cluster, repetitions: int) -> None:
    """Print the table."""
    print("\nin capsules to outside of hpccr, medians of pairs:\n")
    for nodes in (1, 2):
        where = "within a node" if nodes == 1 else "between two nodes"
        for choice, what in CHOICES:
            found = pairs(cluster, repetitions, nodes, choice, PINGPONG, pingpong)
            for name, at in (("latency, 8 bytes", 0), ("bandwidth, 1 MiB", 1)):
                inside, outside = ([row[side][at] for row in found] for side in (0, 1))
                print(f"{name}, {where}, outside {what}: {ratio(inside, outside)}", flush=True)
    for choice, what in CHOICES:
        found = pairs(cluster, repetitions, 2, choice, MELT, loop_time, RUNS)
        inside, outside = ([row[side][0] for row in found] for side in (0, 1))
        print(f"LAMMPS, loop time, two ranks on two nodes, outside {what}: {ratio(inside, outside)}", flush=True)


Result = tuple[float, ...]


def pairs(
    cluster: Cluster,
    repetitions: int,
    nodes: int,
    choice: str,
    program: str,
    read: Callable[[str], Result],
    runs: int = 1,
) -> list[tuple[Result, Result]]:
    """What `read` makes of the output of a job inside and one outside, in turns; `choice` is the outer one's alone.
    runs: of the program, one after the other."""
    mpirun = MPIRUN.format(each=2 // nodes)
    turns = " ".join(map(str, range(runs)))
    commands = {
        plain: f"sh -c 'for turn in {turns}; do {mpirun}{choice if plain else ''} {program}; done'"
        for plain in (False, True)
    }
    found = []
    for number in range(repetitions):
        both: dict[bool, Result] = {}
        for plain in (False, True) if number % 2 else (True, False):
            jobs = Jobs(cluster, "bench")
            try:
                job = jobs.submit(commands[plain], nodes=nodes, tasks=2, plain=plain)
                job.wait_success(within=600)
                both[plain] = read(job.said())
            finally:
                jobs.clear()
        found.append((both[False], both[True]))
    return found


def pingpong(said: str) -> Result:
    (words,) = re.findall(r"^pingpong (\S+) (\S+)$", said, re.MULTILINE)
    return tuple(map(float, words))


def loop_time(said: str) -> Result:
    found = re.findall(r"^Loop time of (\S+) on", said, re.MULTILINE)
    assert len(found) == RUNS, said
    return (min(map(float, found)),)
