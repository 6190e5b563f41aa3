"""How much a running job is slowed down while its checkpoint is copied to the store, at the default priorities.

A program with one thread and half a gigabyte of memory on one node notes when it has finished each small piece of work.
Compared pair by pair: pieces between a checkpoint's release and its being durable, and in as much time right after.
"""

from __future__ import annotations

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
MARGIN = 0.3
"""Seconds after the flush that belong to neither."""


def measure(cluster: Cluster, repetitions: int) -> None:
    """Print the slow-down."""
    jobs = Jobs(cluster, "bench")
    try:
        job = jobs.submit("python3 program.py", nodes=1, tasks=1, files={"program.py": PROGRAM}, environment=WHOLE)
        wait_for("work", lambda: done(job))
        found = [pair(job) for _ in range(repetitions)]
    finally:
        jobs.clear()
    low, middle, high = quartiles([1 - beside / alone for beside, alone, _ in found])
    print(
        f"\nslow-down of a job beside its flush ({quartiles([length for *_, length in found])[1]:.1f} s each): median "
        f"{middle:.1%} (quartiles {low:.1%} to {high:.1%}, {len(found)} pairs)"
    )


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
