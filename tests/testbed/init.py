"""Pid 1 of a node: starts the daemons, reaps what is left to it and starts hpccrd again when it died.

Runs inside the node with the node's Python. SIGHUP restarts hpccrd, for a developer who has changed it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

HPCCRD_SOCKET = Path("/run/hpccr/hpccrd.sock")
HPCCRD_MODULE = Path("/src/hpccr/noded/daemon.py")

# As systemd's StartLimitBurst=5 in StartLimitIntervalSec=10.
_START_LIMIT = 5
_START_INTERVAL = 10.0


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def start(name: str, argv: list[str], user: str | None = None) -> int:
    """Start a daemon in a session of its own, with its output in /var/log/NAME.log; its pid."""
    path = Path("/var/log", f"{name}.log")
    with path.open("ab") as log:
        process = subprocess.Popen(  # reaped by the loop below, not through this object
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, user=user, group=user
        )
    process.returncode = 0  # keeps Popen from waiting for it
    note(f"{name} started, pid {process.pid}")
    return process.pid


def wait_for_socket(path: Path, within: float = 10.0) -> None:
    """Wait until something accepts connections on the unix socket; note it when nothing does in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
                return
            except OSError:
                time.sleep(0.005)
    note(f"nothing listens on {path} after {within:.0f} s")


class Hpccrd:
    """The one daemon that is started again: as systemd's Restart=on-failure would, and no more often."""

    def __init__(self) -> None:
        self.pid = 0
        self._starts: deque[float] = deque(maxlen=_START_LIMIT)
        self._wanted = False

    def start(self) -> None:
        if not HPCCRD_MODULE.is_file():
            note(f"hpccrd is not started: {HPCCRD_MODULE} does not exist")
            return
        now = time.monotonic()
        if len(self._starts) == _START_LIMIT and now - self._starts[0] < _START_INTERVAL:
            note(f"hpccrd died {_START_LIMIT} times in {_START_INTERVAL:.0f} s: not started again")
            return
        self._starts.append(now)
        self.pid = start("hpccrd", ["/usr/local/bin/hpccrd"])

    def restart(self) -> None:
        self._starts.clear()
        if self.pid:
            self._wanted = True
            os.kill(self.pid, signal.SIGTERM)
        else:
            self.start()

    def ended(self, code: int) -> None:
        note(f"hpccrd ended with {code}")
        self.pid = 0
        clean = code in (0, -signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM, -signal.SIGPIPE)
        if self._wanted or not clean:
            self._wanted = False
            self.start()


def reap(hpccrd: Hpccrd, daemons: dict[int, str]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        code = os.waitstatus_to_exitcode(status)
        if pid == hpccrd.pid:
            hpccrd.ended(code)
        elif pid in daemons:
            note(f"{daemons.pop(pid)} ended with {code}")


def main(role: str) -> None:
    # A machine boots with all signals at their defaults, whatever the shell that started this one ignores.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    watched = {signal.SIGCHLD, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    # A blocked signal mask is inherited: daemons get an empty one.
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, set()))
    hpccrd = Hpccrd()
    daemons = {start("munged", ["munged", "--foreground"], user="munge"): "munged"}
    wait_for_socket(Path("/run/munge/munge.socket.2"))
    if role == "ctl":
        daemons[start("slurmctld", ["slurmctld", "-D"])] = "slurmctld"
    else:
        daemons[start("slurmd", ["slurmd", "-D"])] = "slurmd"
        hpccrd.start()
    while True:
        reap(hpccrd, daemons)
        if signal.sigwait(watched) == signal.SIGHUP:
            hpccrd.restart()


if __name__ == "__main__":
    main(sys.argv[1])
