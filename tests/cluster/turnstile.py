"""Making a phase of a checkpoint last, by letting only one of two nodes' hpccrd go on at a time.

A phase ends when both capsules have answered. With one hpccrd stopped it cannot end; once the other has answered, it is
stopped and the first one let go: so exactly one phase goes by, and the next one lasts.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from jobs import Job
from nodes import Cluster, send
from waiting import wait_for

PHASES = ("preparing", "asking", "freezing", "surveying", "dumping", "releasing", "flush")
"""As `hpccr status` names them, in their order."""

QUIET = 0.25
"""Seconds without a context switch after which a node's daemon and its children are taken to wait for somebody else."""
_OURS = r"/usr/local/bin/hpccrd|hpccr\.noded|hpccr\.store|^criu "


class Turnstile:
    """Holds a checkpoint of a job on two nodes, asked for after __enter__, in a phase. On exit all goes on."""

    def __init__(self, cluster: Cluster, job: Job, nodes: tuple[str, ...]) -> None:
        self._cluster, self._job = cluster, job
        self._running, self._waiting = nodes
        self._pids = {node: cluster.hpccrd(node) for node in nodes}

    def __enter__(self) -> Turnstile:
        os.kill(self._pids[self._waiting], signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        send(signal.SIGCONT, self._pids.values())

    def hold_in(self, phase: str) -> None:
        """Returns when the checkpoint is in that phase, where it stays."""
        self._wait_phase(PHASES[0])
        for following in PHASES[1 : PHASES.index(phase) + 1]:
            self._wait_quiet(self._running)
            os.kill(self._pids[self._running], signal.SIGSTOP)
            os.kill(self._pids[self._waiting], signal.SIGCONT)
            self._running, self._waiting = self._waiting, self._running
            self._wait_phase(following)

    def _wait_phase(self, phase: str) -> None:
        wait_for(f"phase {phase}", lambda: self._job.status()["status"]["phase"] == phase, within=20)

    def _wait_quiet(self, node: str) -> None:
        state: dict[int, str] = {}
        since = time.monotonic()

        def quiet() -> bool:
            nonlocal state, since
            now = {pid: _activity(pid) for pid in self._cluster.pids(node, _OURS)}
            if now != state or any(word.startswith("R") for word in now.values()):
                state, since = now, time.monotonic()
            return time.monotonic() - since >= QUIET

        wait_for(f"quiet on {node}", quiet, within=20)


def _activity(pid: int) -> str:
    """State and context switches of a process's main thread."""
    try:
        fields = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return f"{fields['State']} {fields['voluntary_ctxt_switches']} {fields['nonvoluntary_ctxt_switches']}"
