"""What a dead hpccrd left on the node, found at the start of the next one and removed."""

from __future__ import annotations

import logging
import os
import re
import select
import signal

import msgspec

from hpccr.noded.network import Plumber
from hpccr.noded.spool import Area, Directory

log = logging.getLogger(__name__)

RECORD = "init.json"
KILL_TIMEOUT = 10.0
"""Seconds for the processes of a killed capsule to end."""

_NAME = re.compile(r"^[0-9a-f]{8}$")


class InitRecord(msgspec.Struct, frozen=True):
    """A capsule's init: its pid, and its start time in clock ticks since boot, which tells it from a successor."""

    pid: int
    started: int


def record_init(runtime: Directory, pid: int) -> None:
    """Note a capsule's init in its runtime directory. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(RECORD, flags, 0o600, dir_fd=runtime.fd), "wb") as file:
        file.write(msgspec.json.encode(InitRecord(pid=pid, started=_started(pid))))


def _started(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        # The command's name may contain anything: fields count from the last parenthesis. starttime is number 22.
        return int(file.read().rpartition(")")[2].split()[19])


def sweep(runtime: Area, spool: Area, plumber: Plumber) -> None:
    """Remove the capsules, devices, tables and directories whose hpccrd is gone. What a living one or a transfer owns
    is locked and stays. Call it before serving; blocks."""
    dead = runtime.leftovers()
    for directory in dead:
        _kill_init(directory)
    names = {directory.name for directory in dead if _NAME.match(directory.name)}
    for removed in plumber.sweep(names):
        log.info("removed %s, left by a dead hpccrd", removed)
    for directory in [*dead, *spool.leftovers()]:
        log.info("removing %s, left by a dead hpccrd", directory.path)
        directory.remove()


def _kill_init(directory: Directory) -> None:
    try:
        with open(os.path.join(directory.path, RECORD), "rb") as file:
            record = msgspec.json.decode(file.read(), type=InitRecord)
        pidfd = os.pidfd_open(record.pid)
    except (FileNotFoundError, ProcessLookupError, msgspec.MsgspecError, UnicodeDecodeError):
        return  # it has ended with the end of its socket, as it should
    try:
        # Pinned first, compared second: if the start time is right, the pinned process is that init.
        if _started(record.pid) == record.started:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not select.select([pidfd], [], [], KILL_TIMEOUT)[0]:
                log.warning("capsule init %d of a dead hpccrd does not end", record.pid)
    except (FileNotFoundError, ProcessLookupError):
        pass  # it ended while we looked
    finally:
        os.close(pidfd)
