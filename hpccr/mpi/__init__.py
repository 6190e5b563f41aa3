"""Safe points of mpi4py programs for checkpoints by hpccr; see docs/user/mpi.md.

    import hpccr.mpi

    hpccr.mpi.on_quiesce(log.flush)
    for step in range(steps):
        ...
        if hpccr.mpi.safe_point(comm) is hpccr.mpi.Outcome.RESTARTED:
            ...

Outside of hpccr all of this does nothing. mpi4py is imported by the first safe point, never by importing this.
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Callable
from typing import Any

from hpccr.mpi import page as _page

Hook = Callable[[], object]


class Outcome(enum.IntEnum):
    """What happened at a safe point."""

    NOTHING = 0
    """No checkpoint was made while this rank stood here. The only one that counts as false."""
    RESUMED = 1
    """One was made, and the program goes on."""
    RESTARTED = 2
    """The program has been restored since this rank's last safe point, perhaps on other nodes."""
    ABANDONED = 3
    """One was begun and given up; the program goes on."""


NOTHING = Outcome.NOTHING
_quiesce_hooks: list[Hook] = []
_resume_hooks: list[Hook] = []
_restart_hooks: list[Hook] = []
_last: tuple[Any, Callable[[], Outcome]] = (object(), lambda: Outcome.NOTHING)
"""The communicator of the newest safe point, and what a safe point on it calls."""


def safe_point(comm: Any) -> Outcome:
    """A place where all ranks of `comm` (both groups of an inter-communicator) could call comm.Barrier().

    All of them call it equally often. The first call on a communicator is collective; later ones do not communicate
    unless a checkpoint has been asked for: then it returns when that is over. One thread at a time. What a hook raises
    is raised here, after the checkpoint.

    Every rank is told of every restart once, but not all at the same safe point if they did not all stand at one when
    the checkpoint was made: the outcome may differ between ranks, and must not decide whether they communicate.
    """
    global _last
    known, point = _last
    if comm is not known:
        from hpccr.mpi import _safepoint

        point = _safepoint.enter(comm)
        _last = comm, point
    return point()


def on_quiesce(hook: Hook) -> Hook:
    """Call hook() in safe_point before the job is frozen, the last registered first.

    No hook may communicate with other ranks. This and the two below are decorators as well.
    """
    _quiesce_hooks.insert(0, hook)
    return hook


def on_resume(hook: Hook) -> Hook:
    """Call hook() in safe_point after a checkpoint that the program goes on from, the first registered first."""
    _resume_hooks.append(hook)
    return hook


def on_restart(hook: Hook) -> Hook:
    """Call hook() in safe_point when the program was restored, instead of those of on_resume.

    After every restart, also where the checkpoint was made without the ranks standing still.
    """
    _restart_hooks.append(hook)
    return hook


def request_checkpoint() -> bool:
    """Ask for a checkpoint; it is made at one of the next safe points. Any rank may ask; within a second that is one.

    False where nobody listens: the program does not run under hpccr.
    """
    if not _page.in_capsule():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(b"c", socket.MSG_DONTWAIT, _page.WISHES)
        except BlockingIOError:
            pass  # so many wishes are waiting already
        except OSError:
            return False
    return True


__all__ = ["NOTHING", "Outcome", "on_quiesce", "on_restart", "on_resume", "request_checkpoint", "safe_point"]
