"""Waiting system calls in CRIU's images: made again at a restore, where CRIU would let them fail.

A task that was stopped in poll(2), or in a sleep or a futex(2) with a time limit, goes on by restart_syscall(2), whose
state is the kernel's and in no image. CRIU restores such a task with EINTR, which no program expects that has no signal
handler: some end. So the registers in the images are set as CRIU sets them for all other calls, to make the call again:
a sleep with what was left of it, where the kernel has told the program that, else with its whole limit.

Only x86-64, where the registers are known; elsewhere images stay as CRIU has made them.
"""

from __future__ import annotations

import errno
import platform
from typing import Any

_POLL, _NANOSLEEP, _FUTEX, _CLOCK_NANOSLEEP = 7, 35, 202, 230
_INTERRUPTED = (1 << 64) - errno.EINTR
_INSTRUCTION = 2
"""Bytes of SYSCALL."""
_NATIVE = 1
"""user_x86_regs_mode of CRIU's images (images/core-x86.proto)."""


def repair(entry: Any) -> bool:
    """Change a thread's entry of a core image (core_entry); whether there was anything to change."""
    if platform.machine() != "x86_64" or not entry.HasField("thread_info"):
        return False
    registers = entry.thread_info.gpregs
    call = registers.orig_ax
    if registers.ax != _INTERRUPTED or registers.mode != _NATIVE:
        return False
    if call not in (_POLL, _NANOSLEEP, _FUTEX, _CLOCK_NANOSLEEP) or _has_signals(entry):
        return False
    # Where the kernel has put what was left becomes what is asked for.
    if call == _NANOSLEEP and registers.si:
        registers.di = registers.si
    elif call == _CLOCK_NANOSLEEP and registers.r10:
        registers.dx = registers.r10
    registers.ax = call
    registers.ip -= _INSTRUCTION
    return True


def _has_signals(entry: Any) -> bool:
    """Whether a signal waits for it, which may be what ends the call."""
    return bool(entry.tc.signals_s.signals or entry.thread_core.signals_p.signals)
