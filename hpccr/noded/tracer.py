"""Registers of stopped tasks, through CRIU: it traces them all while it waits for an answer, and nobody else can.

CRIU itself is stopped where it waits, made to call ptrace(2) (one instruction each, on a page of its own stack that it
does not use), and goes on waiting as if nothing had been. Only x86-64, where the registers are known.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar

from hpccr.errors import HpccrError
from hpccr.noded import syscalls

_GETREGS, _SETREGS = 12, 13
"""Requests of ptrace(2), for CRIU to make."""
_EVENT_STOP = 128
_SYS_PTRACE = 101
_INSTRUCTION = b"\x0f\x05"
"""SYSCALL."""
_UNUSED = 1024
"""Bytes below the stack pointer at which nothing lies: the red zone has 128, and signals are held back."""


class Registers(ctypes.Structure):
    """struct user_regs_struct (sys/user.h), by the names that CRIU's images use."""

    _fields_: ClassVar = [
        (name, ctypes.c_uint64)
        for names in (
            "r15 r14 r13 r12 bp bx r11 r10 r9 r8 ax cx dx si di orig_ax ip cs flags sp ss",
            "fs_base gs_base ds es fs gs",
        )
        for name in names.split()
    ]


class Tracer:
    """CRIU while it is stopped (see borrowed)."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._own = self._get()
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self._buffer = (self._own.sp - _UNUSED) & ~15
        try:
            self._instruction = self._find()
        except BaseException:
            os.close(self._memory)
            raise
        self.held: list[int] = []
        """Signals that came meanwhile."""

    def registers(self, task: int) -> Registers:
        """A stopped thread's. Raises OSError as ptrace(2) does for CRIU, HpccrError when CRIU has ended."""
        self._call(_GETREGS, task)
        return Registers.from_buffer_copy(os.pread(self._memory, ctypes.sizeof(Registers), self._buffer))

    def change(self, task: int, registers: Registers) -> None:
        """Raises as registers() does."""
        os.pwrite(self._memory, bytes(registers), self._buffer)
        self._call(_SETREGS, task)

    def close(self) -> None:
        """It will go on as it was."""
        os.close(self._memory)
        self._set(self._own)

    def _call(self, request: int, task: int) -> None:
        registers = Registers.from_buffer_copy(self._own)
        registers.ax, registers.orig_ax, registers.ip = _SYS_PTRACE, -1, self._instruction
        registers.di, registers.si, registers.dx, registers.r10 = request, task, 0, self._buffer
        self._set(registers)
        syscalls.ptrace_step(self._pid)
        while (stop := _stopped(self._pid)) != signal.SIGTRAP:
            self.held.append(stop & 0xFF)
            syscalls.ptrace_step(self._pid)
        result = self._get().ax
        if result > 1 << 63:
            number = (1 << 64) - result
            raise OSError(number, f"CRIU's ptrace of {task}: {os.strerror(number)}")

    def _find(self) -> int:
        """Where CRIU has the instruction: the kernel's own page of code has it, for what it does not do itself."""
        with open(f"/proc/{self._pid}/maps") as file:
            (place,) = (line.split()[0] for line in file if line.rstrip().endswith("[vdso]"))
        start, end = (int(word, 16) for word in place.split("-"))
        at = os.pread(self._memory, end - start, start).find(_INSTRUCTION)
        if at < 0:
            raise HpccrError("the kernel's vdso has no system call")
        return start + at

    def _get(self) -> Registers:
        registers = Registers()
        syscalls.ptrace_get_registers(self._pid, registers)
        return registers

    def _set(self, registers: Registers) -> None:
        syscalls.ptrace_set_registers(self._pid, registers)


@contextmanager
def borrowed(pid: int) -> Iterator[Tracer]:
    """CRIU, a child of this process that waits for an answer, is stopped in this block. Raises OSError, HpccrError when
    it has ended, which is for others to wait for."""
    syscalls.ptrace_seize(pid)
    held: list[int] = []
    try:
        syscalls.ptrace_interrupt(pid)
        while (stop := _stopped(pid)) >> 8 != _EVENT_STOP:
            syscalls.ptrace_continue(pid, stop & 0xFF)  # a signal that came first
        tracer = Tracer(pid)
        held = tracer.held
        try:
            yield tracer
        finally:
            tracer.close()
    finally:
        with suppress(ProcessLookupError):  # it has ended
            syscalls.ptrace_detach(pid)
            for number in held:
                os.kill(pid, number)


def _stopped(pid: int) -> int:
    """Wait until the child stops: the signal, and the event in the bits above. Raises HpccrError when it has ended."""
    found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if found is None or found.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
        raise HpccrError("CRIU has ended")
    _, status = os.waitpid(pid, os.WUNTRACED)
    return status >> 8
