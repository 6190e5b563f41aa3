"""Making a process that CRIU is about to give children a child subreaper before it has any.

CRIU sets that flag on the restored launch root only after all tasks exist. A task whose session leader had ended is by
then re-parented to pid 1, out of the job's tree, and no later checkpoint could have it. So the root is made to call
prctl(2) itself at a moment when it waits inside a system call: for that one call it is traced. x86-64 only; elsewhere
such tasks still come back, but the next checkpoint is refused for them.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import signal
import time

from hpccr.errors import HpccrError
from hpccr.noded import syscalls
from hpccr.noded.tracer import Registers

SUPPORTED = platform.machine() == "x86_64"

_PATIENCE = 60.0
"""Seconds the process has to come to its wait."""
_SYS_PRCTL, _SYS_FUTEX = 157, 202
_PR_SET_CHILD_SUBREAPER = 36
_SYSCALL_INSTRUCTION = b"\x0f\x05"
_WALL = 0x40000000


async def make(pid: int) -> None:
    """Have process `pid` call prctl(PR_SET_CHILD_SUBREAPER, 1). Raises HpccrError.

    Nobody may trace it, and it must be waiting in futex(2), or be about to, until this returns.
    """
    try:
        await _until_waiting(pid)
        syscalls.ptrace_seize(pid)
        try:
            syscalls.ptrace_interrupt(pid)
            _wait(pid)
            _call(pid, _SYS_PRCTL, _PR_SET_CHILD_SUBREAPER, 1)
        finally:
            syscalls.ptrace_detach(pid)
    except OSError as error:
        raise HpccrError(f"cannot make the restored root {pid} a subreaper: {error}") from None


async def _until_waiting(pid: int) -> None:
    limit = time.monotonic() + _PATIENCE
    while True:
        with open(f"/proc/{pid}/syscall") as file:
            if file.read().split()[0] == str(_SYS_FUTEX):
                return
        if time.monotonic() > limit:
            raise HpccrError(f"the restored root {pid} does not come to wait for CRIU")
        # Nothing tells that a process has begun to wait; it is a few instructions away.
        await asyncio.sleep(0.001)


def _call(pid: int, number: int, first: int, second: int) -> None:
    before = Registers()
    syscalls.ptrace_get_registers(pid, before)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(before.ip - len(_SYSCALL_INSTRUCTION))
        inside = memory.read(len(_SYSCALL_INSTRUCTION)) == _SYSCALL_INSTRUCTION
    if not inside or ctypes.c_longlong(before.orig_ax).value < 0:
        raise HpccrError(f"the restored root {pid} does not wait in a system call")
    during = Registers.from_buffer_copy(before)
    during.ip -= len(_SYSCALL_INSTRUCTION)
    during.ax, during.di, during.si = number, first, second
    during.dx = during.r10 = during.r8 = 0
    during.orig_ax = ctypes.c_ulonglong(-1).value  # not inside a call that the kernel would restart
    syscalls.ptrace_set_registers(pid, during)
    syscalls.ptrace_step(pid)
    _wait(pid)
    after = Registers()
    syscalls.ptrace_get_registers(pid, after)
    # The call it was in starts anew, with the arguments still in its registers.
    again = Registers.from_buffer_copy(before)
    again.ip -= len(_SYSCALL_INSTRUCTION)
    again.ax = before.orig_ax
    again.orig_ax = ctypes.c_ulonglong(-1).value
    syscalls.ptrace_set_registers(pid, again)
    result = ctypes.c_longlong(after.ax).value
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def _wait(pid: int) -> None:
    _, status = os.waitpid(pid, _WALL)
    if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
        raise HpccrError(f"the restored root {pid} is not where it should be: wait status {status:#x}")
