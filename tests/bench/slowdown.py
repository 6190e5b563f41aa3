"""How much a running job is slowed down while its checkpoint is copied to the store, at the default priorities.

A program with one thread and half a gigabyte of memory on one node notes when it has finished each small piece of work.
Compared pair by pair: pieces between a checkpoint's release and its being durable, and in as much time right after.
"""

from __future__ import annotations

import os
import signal
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
    out.write(f'{time.time()}\\n')
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
    low, middle, high = quartiles([1 - beside / alone for beside, alone, _ in found])
    print(
        f"\nslow-down of a job beside its flush ({quartiles([length for *_, length in found])[1]:.1f} s each): median "
        f"{middle:.1%} (quartiles {low:.1%} to {high:.1%}, {len(found)} pairs)"
    )


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


def pair(job: Job) -> tuple[float, float, float]:
    """Pieces per second beside a flush and alone; how long the flush took."""
    before = len(job.events("durable"))
    job.hpccr_ok("checkpoint")
    ended = job.wait_event("durable", before + 1)["time"]
    began = job.wait_event("released", before + 1)["time"]
    length = ended - began
    wait_for("as much time alone", lambda: max(done(job), default=0.0) > ended + MARGIN + length)
    times = done(job)
    beside = sum(began < moment <= ended for moment in times)
    alone = sum(ended + MARGIN < moment <= ended + MARGIN + length for moment in times)
    return beside / length, alone / length, length


def done(job: Job) -> list[float]:
    path = job.directory / "done"
    return [float(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
