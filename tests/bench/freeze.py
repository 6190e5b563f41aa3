"""How long a job stands still for a checkpoint, beside what CRIU alone takes for the same tasks.

LAMMPS with 4 ranks on two nodes under `hpccr run`. In turn: one `hpccr checkpoint`; and, by hand and at the same moment
on both nodes, one bare `criu dump` in each capsule's namespaces with the options that hpccr uses, without its protocol.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from dataclasses import dataclass

from jobs import Job, Jobs
from nodes import Cluster
from waiting import wait_for
from workloads import OPEN_MPI, SOURCES

BARE = "/src/tests/bench/bare.py"


@dataclass(frozen=True)
class Sample:
    """Seconds; of the slower node where they differ. criu: CRIU's own measure of the time the tasks are stopped."""

    frozen: float
    criu: float
    total: float
    bytes: int


def measure(cluster: Cluster, repetitions: int) -> None:
    """Print the table."""
    jobs = Jobs(cluster, "bench")
    try:
        mpirun = OPEN_MPI.format(each=2, ranks=4)
        melt = f"lmp -in {SOURCES}/melt.in -var size 10 -var steps 10000000 -var every 1000 -log none"
        job = jobs.submit(f"{mpirun} {melt}")
        job.wait_event("started")
        job.wait_output("Step")
        nodes = job.slurm().nodes
        ours: list[Sample] = []
        bare: list[Sample] = []
        for repetition in range(repetitions + 1):
            pair = with_hpccr(job), by_hand(cluster, nodes)
            if repetition:  # the first ones fill caches
                ours.append(pair[0])
                bare.append(pair[1])
    finally:
        jobs.clear()
    report(ours, bare)


def with_hpccr(job: Job) -> Sample:
    event = job.checkpoint()  # returns when it is durable, so that no flush runs beside the next measurement
    return Sample(event["freeze_seconds"], event["criu_freeze_seconds"], event["total_seconds"], event["bytes"])


def by_hand(cluster: Cluster, nodes: tuple[str, ...]) -> Sample:
    """A bare `criu dump` on every node at the same moment."""
    processes = []
    for node in nodes:
        (init,) = cluster.pids(node, r"hpccr\.noded\.init")
        number = str(cluster.pid_on_node(init))
        processes.append(cluster.popen(node, "/opt/hpccr/bin/python3", BARE, number, stdin=subprocess.PIPE))
    for process in processes:
        assert process.stdout is not None
        ready = wait_for("CRIU to be ready", process.stdout.readline)
        assert ready == "ready\n", ready
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        found.append(json.loads(output))
    return Sample(
        max(one["frozen"] for one in found),
        max(one["frozen"] for one in found),
        max(one["ended"] for one in found) - min(one["began"] for one in found),
        sum(one["bytes"] for one in found),
    )


def report(ours: list[Sample], bare: list[Sample]) -> None:
    print(
        f"\nmedians of {len(ours)} checkpoints of 4 LAMMPS ranks on two nodes, each followed by two bare criu dumps:\n"
    )
    print(f"{'':32}{'hpccr':>12}{'bare CRIU':>12}{'ratio':>8}")
    rows = [
        ("tasks stopped (freeze time)", [s.frozen for s in ours], [s.frozen for s in bare]),
        ("  of it, by CRIU's own measure", [s.criu for s in ours], [s.criu for s in bare]),
        ("total, request to release", [s.total for s in ours], [s.total for s in bare]),
    ]
    for name, left, right in rows:
        a, b = statistics.median(left), statistics.median(right)
        print(f"{name:32}{a * 1e3:9.1f} ms{b * 1e3:9.1f} ms{a / b:8.2f}")
    a, b = statistics.median(s.bytes for s in ours), statistics.median(s.bytes for s in bare)
    print(f"{'images':32}{a / 1e6:9.1f} MB{b / 1e6:9.1f} MB{a / b:8.2f}")
    spread = statistics.quantiles([s.frozen / t.frozen for s, t in zip(ours, bare, strict=True)], n=4)
    print(f"\nfreeze time, ratio pair by pair: quartiles {spread[0]:.2f} {spread[1]:.2f} {spread[2]:.2f}")
