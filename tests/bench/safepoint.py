"""What a safe point costs when no checkpoint is asked for: in C and Python, in a capsule and outside of hpccr.

Two ranks on one node in each case; a loop of some work is timed with and without a safe point in each turn. Processor
time, the least of many rounds: how long others keep the processor is not what a safe point costs.
"""

from __future__ import annotations

import statistics

from jobs import Jobs
from nodes import Cluster

OUT = "/shared/programs/bench-safepoint"
PROGRAMS = {
    "C": f"mpirun.mpich -n 2 {OUT}/safepoint",
    "Python": "mpirun.openmpi -n 2 env PYTHONPATH=/src python3 /src/tests/bench/safepoint_loop.py",
}
LIMITS = {"C": 100.0, "Python": 2000.0}
"""Nanoseconds per call that design and issue allow."""


def measure(cluster: Cluster, repetitions: int) -> None:
    """Print the table."""
    node = cluster.nodes[0]
    cluster.check(node, "make", "-s", "-C", "/src/mpi", "MPICC=mpicc.mpich", f"OUT={OUT}", "all")
    source, library = "/src/tests/bench/safepoint.c", f"{OUT}/libhpccr_mpi.a"
    cluster.check(node, "mpicc.mpich", "-O2", "-I/src/mpi", "-o", f"{OUT}/safepoint", source, library)
    print(f"safe point, nothing asked: median of {repetitions} runs of 2 ranks on one node")
    print(f"{'':8}{'where':12}{'CPU ns/call':>12}{'limit':>8}{'ns per turn':>14}{'loop with / without':>22}")
    for language, command in PROGRAMS.items():
        for where, plain in (("capsule", False), ("no hpccr", True)):
            rows = samples(cluster, command, repetitions, plain=plain)
            call = statistics.median(row[0] for row in rows)
            ratio = statistics.median(row[2] / row[1] for row in rows)
            turn = statistics.median(row[1] for row in rows)
            print(f"{language:8}{where:12}{call:12.1f}{LIMITS[language]:8.0f}{turn:14.0f}{ratio:22.3f}")


def samples(cluster: Cluster, command: str, repetitions: int, *, plain: bool) -> list[list[float]]:
    """ns per call, ns per turn without and with a safe point, of each run."""
    jobs = Jobs(cluster, "bench")
    try:
        loop = f"bash -c 'for i in $(seq {repetitions}); do {command}; done'"
        job = jobs.submit(loop, nodes=1, tasks=2, plain=plain)
        job.wait_success(within=600)
        return [[float(word) for word in line.split()] for line in job.said().splitlines()]
    finally:
        jobs.clear()
