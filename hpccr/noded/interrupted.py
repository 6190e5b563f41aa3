"""Waiting system calls: made again after a dump and at a restore, where CRIU would let them fail.

A task that was stopped in poll(2), or in a sleep or a futex(2) with a time limit, goes on by restart_syscall(2), whose
state is the kernel's and in no image. CRIU lets such a call end with EINTR, at a restore and where the tasks run on,
which no program expects that has no signal handler: some end. So the registers are set as CRIU sets them for all other
calls, to make the call again, in the images (repair) and of the tasks that run on (mend): a sleep with what was left of
it, where the kernel has told the program that, a poll with what was left of it where that can be known (look, still), a
futex with its whole limit.

No file says when a call began, but /proc/PID/sched when a thread last ran (kernel/sched/debug.c), which it does not
while it waits: in its processor's own time, which stands still for interrupts and for what a hypervisor takes away.

Only x86-64, where the registers are known; elsewhere images stay as CRIU has made them.
"""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from hpccr.noded import tracer
from hpccr.noded.scan import GONE, Tree, lines

_REPEATED = _POLL, _NANOSLEEP, _FUTEX, _CLOCK_NANOSLEEP = 7, 35, 202, 230
_INTERRUPTED = (1 << 64) - errno.EINTR
_RESTART = (1 << 64) - 516
"""ERESTART_RESTARTBLOCK (include/linux/errno.h)."""
_INSTRUCTION = 2
"""Bytes of SYSCALL."""
_USER_CS = 0x33
"""Of 64-bit programs (arch/x86/include/asm/segment.h)."""
_NATIVE = 1
"""user_x86_regs_mode of CRIU's images (images/core-x86.proto)."""


class Poll(msgspec.Struct, frozen=True):
    """A thread that waits in poll(2) with a limit."""

    process: int
    thread: int
    arguments: tuple[int, int, int]
    """As in its registers."""
    processor: int
    ran: float
    """When it last ran, in milliseconds of its processor's time."""
    waits: int
    """How often it has given its processor away to wait for something."""
    began: float = 0.0
    """When it last ran, by time.monotonic()."""

    def left(self, now: float) -> int:
        """Milliseconds."""
        return max(0, _limit(self.arguments) - round((now - self.began) * 1000))


def look(whole: Tree) -> list[Poll]:
    """Threads that wait in poll(2) with a limit; none where the kernel does not tell. To be called in a helper of its
    own, which goes from processor to processor to read their clocks, while the tasks run."""
    found = [poll for task in whole.tasks for poll in _polls(task.pid)] if platform.machine() == "x86_64" else []
    result = []
    for processor in {poll.processor for poll in found}:
        try:
            os.sched_setaffinity(0, {processor})
        except OSError:
            continue
        os.sched_yield()  # its time is written down up to here
        # In this order: who is interrupted in between waits longer, not shorter.
        clock, now = last_ran(lines("/proc/thread-self/sched")), time.monotonic()
        result += [
            msgspec.structs.replace(poll, began=now - (clock - poll.ran) / 1000)
            for poll in found
            if poll.processor == processor and clock >= poll.ran
        ]
    return result


def _polls(pid: int) -> Iterator[Poll]:
    for thread in _threads(pid):
        place = f"/proc/{pid}/task/{thread}"
        arguments = polled(lines(f"{place}/syscall"))
        if arguments is None:
            continue
        # Before the rest: if it returns from the call only to make it again, that is noticed (still).
        waits = _waits(place)
        ran, status = last_ran(lines(f"{place}/sched")), lines(f"{place}/stat")
        if ran and status and waits:
            yield Poll(pid, int(thread), arguments, int(status[-1].rpartition(")")[2].split()[36]), ran, waits)


def _waits(place: str) -> int:
    facts = lines(f"{place}/status")
    return next((int(line.split()[1]) for line in facts if line.startswith("voluntary_ctxt_switches:")), 0)


def polled(call: list[str]) -> tuple[int, int, int] | None:
    """The arguments, if a thread's /proc file syscall shows a poll(2) with a limit."""
    words = call[0].split() if call else []
    if len(words) < 4 or words[0] != str(_POLL):
        return None
    arguments = int(words[1], 16), int(words[2], 16), int(words[3], 16)
    return arguments if 0 < _limit(arguments) < 1 << 31 else None


def _limit(arguments: tuple[int, int, int]) -> int:
    return arguments[2] & 0xFFFFFFFF


def last_ran(facts: list[str]) -> float:
    """Milliseconds, from a /proc file sched; 0 where it does not say."""
    for line in facts:
        name, _, value = line.partition(":")
        if name.strip() == "se.exec_start":
            return float(value)
    return 0.0


def still(polls: Iterable[Poll]) -> dict[int, Poll]:
    """By thread: those that have been in the same call since look(). They are stopped by now, which is counted too."""
    return {poll.thread: poll for poll in polls if _waits(f"/proc/{poll.process}/task/{poll.thread}") == poll.waits + 1}


def waiting(whole: Tree) -> list[int]:
    """Threads of stopped tasks in a call that the kernel would make again by restart_syscall(2), unless a signal waits
    for them."""
    if platform.machine() != "x86_64":
        return []
    threads = [int(name) for task in whole.tasks for name in _threads(task.pid)]
    return [thread for thread in threads if repeated(lines(f"/proc/{thread}/syscall")) and not _expects_signal(thread)]


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except GONE:
        return []


def repeated(call: list[str]) -> bool:
    """Whether a thread's /proc file syscall shows one of these calls; of futex(2) only with a limit."""
    words = call[0].split() if call else []
    if len(words) < 7 or not words[0].isdecimal() or int(words[0]) not in _REPEATED:
        return False
    return int(words[0]) != _FUTEX or int(words[4], 16) != 0


def _expects_signal(thread: int) -> bool:
    """Whether a signal waits for it that it has a handler for, and so ends the call."""
    facts = dict(line.split(":", 1) for line in lines(f"/proc/{thread}/status") if line.startswith(("Sig", "Shd")))
    pending, shared, blocked, caught = (int(facts.get(f, "0"), 16) for f in ("SigPnd", "ShdPnd", "SigBlk", "SigCgt"))
    return bool((pending | shared) & ~blocked & caught)


def mend(criu: int, threads: Iterable[int], polls: Mapping[int, Poll], stopped: float) -> None:
    """Before CRIU, which waits for an answer after its dump, lets these threads (waiting) run on: they make their calls
    again. polls, stopped: as for repair(). Raises OSError, HpccrError where it cannot: their calls end with EINTR."""
    with tracer.borrowed(criu) as borrowed:
        for thread in threads:
            registers = borrowed.registers(thread)
            # CRIU has put the second in the place of the first, where it has been in the task.
            native = registers.cs == _USER_CS
            if native and registers.ax in (_RESTART, _INTERRUPTED) and not _expects_signal(thread):
                _make_again(registers, polls.get(thread), stopped)
                registers.orig_ax = -1  # in no call, so that the kernel changes nothing
                borrowed.change(thread, registers)


def repair(entry: Any, poll: Poll | None = None, stopped: float = 0.0) -> bool:
    """Change a thread's entry of a core image (core_entry); whether there was anything to change.

    poll: what is known of the thread (still). stopped: when it was stopped, by time.monotonic().
    """
    if platform.machine() != "x86_64" or not entry.HasField("thread_info"):
        return False
    registers = entry.thread_info.gpregs
    if registers.ax != _INTERRUPTED or registers.mode != _NATIVE:
        return False
    if registers.orig_ax not in _REPEATED or _has_signals(entry):
        return False
    _make_again(registers, poll, stopped)
    return True


def _make_again(registers: Any, poll: Poll | None, stopped: float) -> None:
    call = registers.orig_ax
    # Where the kernel has put what was left becomes what is asked for.
    if call == _NANOSLEEP and registers.si:
        registers.di = registers.si
    elif call == _CLOCK_NANOSLEEP and registers.r10:
        registers.dx = registers.r10
    elif call == _POLL and poll is not None and poll.arguments == (registers.di, registers.si, registers.dx):
        registers.dx = poll.left(stopped)
    registers.ax = call
    registers.ip -= _INSTRUCTION


def _has_signals(entry: Any) -> bool:
    """Whether a signal waits for it, which may be what ends the call."""
    return bool(entry.tc.signals_s.signals or entry.thread_core.signals_p.signals)
