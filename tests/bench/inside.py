"""Runs flush.py on a node of a running cluster."""

from __future__ import annotations

from nodes import Cluster


def speed(cluster: Cluster, repetitions: int) -> None:
    """Throughput, each repetition a pair; and what a few checkpoints take."""
    run(cluster, "--size", "1024", "--rounds", str(repetitions), "--checkpoints", "3")


def memory(cluster: Cluster, repetitions: int) -> None:
    """Two flushes of 4 GiB, of which the second refers to the first."""
    del repetitions
    run(cluster, "--size", "4096", "--rounds", "0", "--checkpoints", "2")


def run(cluster: Cluster, *options: str) -> None:
    print(cluster.check("node1", "/opt/hpccr/bin/python", "/src/tests/bench/flush.py", *options, timeout=3600))
