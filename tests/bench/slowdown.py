"""How much a running job is slowed down while its checkpoint is copied to the store, at the default priorities.

A program with one thread and half a gigabyte of memory on one node notes when it has finished each small piece of work,
and how much processor time it has taken by then. Compared pair by pair: between a checkpoint's release and its being
durable, and in as much time right after, the number of pieces, and the processor time of one. The first counts what the
job waits for a processor, so it means something only where there is one to spare; the second (caches, memory) anywhere.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from jobs import Job, Jobs
from nodes import Cluster
from pairs import quartiles
from waiting import wait_for

PROGRAM = """import os, time
import numpy as np
held = np.frombuffer(os.urandom(512 << 20), dtype=np.uint8).copy()
work = np.random.default_rng(1).random(20000)
out = open('done', 'a')
n = 0
while True:
    for _ in range(20):
        work = np.sqrt(work * 1.0001 + 0.1)
    n += 1
    held[(n * 4096 * 7) % held.size] += 1
    out.write(f'{time.time()} {time.process_time()}\\n')
    if n % 20 == 0:
        out.flush()
"""
WHOLE = {"HPCCR_STORE_SHARE": "1"}
"""What did not change is stored again: each flush is a whole one."""
FULL = "flush_nice = 0\n"
"""The line of the test cluster's hpccr.toml, the last one of its section, that takes the low priority away."""
MARGIN = 0.3
"""Seconds after the flush that belong to neither."""


def measure(cluster: Cluster, repetitions: int) -> None:
    """Print the slow-down."""
    jobs = Jobs(cluster, "bench")
    before = configurations(cluster)
    try:
        default_priorities(cluster)
        job = jobs.submit("python3 program.py", nodes=1, tasks=1, files={"program.py": PROGRAM}, environment=WHOLE)
        wait_for("work", lambda: done(job))
        found = [pair(job) for _ in range(repetitions)]
    finally:
        jobs.clear()
        restart(cluster, before)
    lengths = quartiles([one.length for one in found])
    print(f"\na job beside its flush ({lengths[1]:.1f} s each, {len(found)} pairs)")
    for what, values in (
        ("fewer pieces of work", [one.fewer for one in found]),
        ("more processor time for one", [one.dearer for one in found]),
    ):
        low, middle, high = quartiles(values)
        print(f"{what}: median {middle:.1%} (quartiles {low:.1%} to {high:.1%})")


def default_priorities(cluster: Cluster) -> None:
    """The test cluster's flushes are in a hurry; these are not."""
    restart(cluster, {path: text.replace(FULL, "") for path, text in configurations(cluster).items()})


def configurations(cluster: Cluster) -> dict[Path, str]:
    paths = [cluster.root(node) / "etc/hpccr/hpccr.toml" for node in cluster.nodes]
    return {path: path.read_text() for path in paths}


def restart(cluster: Cluster, files: dict[Path, str]) -> None:
    """Write the configurations and let every hpccrd read them."""
    for path, text in files.items():
        path.write_text(text)
    old = {node: cluster.hpccrd(node) for node in cluster.nodes}
    for node in cluster.nodes:
        os.kill(cluster.pid_one(node), signal.SIGHUP)
    for node, pid in old.items():
        wait_for("a new hpccrd", lambda: cluster.hpccrd(node) != pid)  # noqa: B023
        wait_for("its socket", (cluster.root(node) / "run/hpccr/hpccrd.sock").exists)


@dataclass(frozen=True)
class Pair:
    """fewer: pieces of work beside a flush than alone, as a part. dearer: processor time of one. length: seconds."""

    fewer: float
    dearer: float
    length: float


def pair(job: Job) -> Pair:
    """One flush, and as much time alone."""
    before = len(job.events("durable"))
    job.hpccr_ok("checkpoint")
    ended = job.wait_event("durable", before + 1)["time"]
    began = job.wait_event("released", before + 1)["time"]
    length = ended - began
    wait_for("as much time alone", lambda: max(done(job), default=(0.0, 0.0))[0] > ended + MARGIN + length)
    notes = done(job)
    beside = [processor for moment, processor in notes if began < moment <= ended]
    alone = [processor for moment, processor in notes if ended + MARGIN < moment <= ended + MARGIN + length]
    return Pair(1 - len(beside) / len(alone), each(beside) / each(alone) - 1, length)


def each(processor: list[float]) -> float:
    """Processor time of one piece, by what the clock was after each."""
    return (processor[-1] - processor[0]) / (len(processor) - 1)


def done(job: Job) -> list[tuple[float, float]]:
    """When a piece was done, and the processor time taken until then."""
    path = job.directory / "done"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(float(moment), float(processor)) for moment, processor in map(str.split, lines)]
