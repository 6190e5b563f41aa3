"""Giving up root's rights for a user's, for good, within a process."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Sequence

DESCRIPTORS = 4096
"""Enough for the packs of the largest checkpoints."""
DATA = 4 << 30
"""Bytes of memory, which are not the job's: enough for the index of the largest checkpoints and the blocks in hand.
What a user puts in the place of his files is read into memory, and must not take other users' jobs with it."""
_LIMITS = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_DATA: DATA,
    resource.RLIMIT_MEMLOCK: 64 << 10,
    resource.RLIMIT_NOFILE: DESCRIPTORS,
}

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 1, 4, 28, 38
_NOROOT_AND_LOCKED = 0b11
_CAPABILITY_VERSION_3 = 0x20080522


def take(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Take a user's ids (root's for root), with no capability, none to gain, no core file, and limits; the process dies
    with its parent, and nobody without CAP_SYS_PTRACE can trace it.

    Call it before any thread is made. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(*arguments: int) -> None:
        padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:5]]
        if libc.prctl(*padded):
            raise OSError(ctypes.get_errno(), "prctl")

    for limit, most in _LIMITS.items():
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    if uid == 0:
        prctl(_PR_SET_SECUREBITS, _NOROOT_AND_LOCKED)  # so that exec gives root nothing back
    if os.geteuid() == 0:
        os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    # capset(2): effective, permitted, inheritable, in two halves.
    if libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    prctl(_PR_SET_DUMPABLE, 0)
    # Last: a change of ids takes it back (prctl(2)).
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
