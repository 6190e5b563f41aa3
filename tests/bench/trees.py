"""How long a job stands still for the directories of --files, by their size: files that rest, and files just changed.

What rests is copied before everything stands still; what changed within the last seconds is copied then, as all of it
would be without that.
"""

from __future__ import annotations

import os
import statistics
import time

from jobs import Job, Jobs
from nodes import USERS, Cluster

SIZES = (0, 64, 256)
"""MiB, in files of 1 MiB."""
SETTLED = 2.0
"""hpccr.noded.ahead's."""


def measure(cluster: Cluster, repetitions: int) -> None:
    """Print the table."""
    jobs = Jobs(cluster, "bench")
    found: dict[int, tuple[list[float], list[float]]] = {}
    try:
        for size in SIZES:
            job = jobs.submit("--files=tree sh -c 'echo ready; sleep 100000'", nodes=1, tasks=1, before="mkdir -p tree")
            job.wait_output("ready")
            fill(job, size)
            pairs = []
            for _ in range(repetitions + 1):
                time.sleep(1.5 * SETTLED)
                rests = job.checkpoint()["freeze_seconds"]
                for path in (job.directory / "tree").iterdir():
                    os.utime(path)
                pairs.append((rests, job.checkpoint()["freeze_seconds"]))
            # The first ones fill caches.
            found[size] = ([rests for rests, _ in pairs[1:]], [fresh for _, fresh in pairs[1:]])
            job.cancel()
    finally:
        jobs.clear()
    print(f"\nfreeze time, medians of {repetitions}, and ratios to those of an empty directory:\n")
    print(f"{'MiB in --files':>14}{'all rests':>14}{'ratio':>8}{'all changed':>14}{'ratio':>8}")
    base = statistics.median(found[0][0])
    for size, columns in found.items():
        rests, fresh = map(statistics.median, columns)
        print(f"{size:14}{rests * 1e3:11.1f} ms{rests / base:8.2f}{fresh * 1e3:11.1f} ms{fresh / base:8.2f}")


def fill(job: Job, size: int) -> None:
    for number in range(size):
        path = job.directory / "tree" / f"file-{number}"
        path.write_bytes(os.urandom(1 << 20))
        os.chown(path, USERS[job.user], USERS[job.user])
