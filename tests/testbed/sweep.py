"""Leftovers of the whole cluster: a snapshot of every running node, and the comparison with an earlier one."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import boot
from leftovers import Snapshot, diff
from paths import HERE, Instance, TestbedError


def take(instance: Instance) -> dict[str, Snapshot]:
    """A snapshot of each node that is on."""
    running = {}
    for node in boot.load_cluster(instance).nodes:
        if not boot.is_on(instance, node):
            continue
        inside = ["exec", node, "--", "python3", "/src/tests/testbed/leftovers.py"]
        command = [sys.executable, str(HERE / "testbed"), *inside]
        running[node] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    # All are collected before any failure is told: none may be left running.
    outputs = {node: process.communicate()[0] for node, process in running.items()}
    failed = [node for node, process in running.items() if process.returncode]
    if failed:
        raise TestbedError(f"could not look for leftovers on {', '.join(failed)}")
    return {node: json.loads(output) for node, output in outputs.items()}


def check(instance: Instance, before: dict[str, Snapshot], wait: float) -> list[str]:
    """What still differs from `before` after at most `wait` seconds (Slurm cleans up in the background)."""
    deadline = time.monotonic() + wait
    while (lines := diff(before, take(instance))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return lines
