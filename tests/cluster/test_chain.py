"""One job through many checkpoints, losses and restarts: nothing that it prints is lost, doubled or out of order."""

from __future__ import annotations

import random
import re
from collections import defaultdict

import conftest
from jobs import Job, Jobs
from nodes import Cluster
from test_files import lose_a_part
from waiting import rounds, wait_for
from workloads import MPICH, SOURCES


def check(job: Job) -> None:
    """Each rank's lines are all there, whole and in their order, in both files."""
    for name, word, step in (("out.txt", "line", 1), ("err.txt", "error", 40)):
        last: dict[str, int] = defaultdict(int)
        printed = {}
        for line in (job.directory / name).read_text().splitlines():
            match = re.fullmatch(r"rank (\d) (line|error|printed) (\d+) \.*", line)
            assert match and len(line) == 63, f"{name}: {line[:200]!r}"
            rank, kind, number = match[1], match[2], int(match[3])
            if kind == "printed":
                printed[rank] = number
                continue
            assert (kind, number) == (word, last[rank] + step), f"{name}: {line!r} after {last[rank]}"
            last[rank] = number
        assert sorted(last) == ["0", "1", "2", "3"]
        assert name == "err.txt" or printed == last


def test_a_chain_of_restarts(jobs: Jobs, cluster: Cluster) -> None:
    """On changing nodes; with a checkpoint right after each restore, and the same one restored twice."""
    dice = random.Random(conftest.SEED)
    job = jobs.submit(f"{MPICH.format(ranks=4)} python3 {SOURCES}/printer.py gate", stderr=True)
    job.wait_output(" line 1000 ")
    for cycle in range(rounds(2, 20)):
        job.requeue(dice.choice(["hpccr", "scontrol"]))
        newest = job.checkpoint()["sequence"]
        if cycle % 5 == 0:
            # What it prints from here on is taken back, twice.
            for _ in range(2):
                size = job.output.stat().st_size
                wait_for("more output", lambda size=size: job.output.stat().st_size > size + 20_000)  # type: ignore[misc]
                lose_a_part(job, cluster)
                assert job.events("restored")[-1]["sequence"] == newest
    job.open_gate()
    job.wait_success()
    check(job)
