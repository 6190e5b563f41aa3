"""Registers of a task through the process that traces it, with a program in CRIU's place."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hpccr.errors import HpccrError
from hpccr.noded import tracer

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="registers are known of x86-64 only")

TRACED = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"signal\\n"))
reading, writing = os.pipe()
task = os.fork()
if task == 0:
    os.write(writing, b"x")
    while True:
        pass
os.read(reading, 1)
assert libc.ptrace(0x4206, task, None, None) == 0 and libc.ptrace(0x4207, task, None, None) == 0
os.waitpid(task, 0)
print(task, flush=True)
for line in sys.stdin:
    print("said", line, end="", flush=True)
assert libc.ptrace(17, task, None, None) == 0
print("ended", os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]), flush=True)
"""


@pytest.fixture
def tracing() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", TRACED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process
        process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.flush()


def test_registers_are_read_and_changed_and_the_tracer_notices_nothing(tracing: subprocess.Popen[str]) -> None:
    task = int(line(tracing))
    with tracer.borrowed(tracing.pid) as borrowed:
        before = borrowed.registers(task)
        changed = tracer.Registers.from_buffer_copy(before)
        changed.r15 = before.r15 ^ 1
        borrowed.change(task, changed)
        assert bytes(borrowed.registers(task)) == bytes(changed) != bytes(before)
        borrowed.change(task, before)
        os.kill(tracing.pid, signal.SIGUSR1)  # waits until it goes on
        assert bytes(borrowed.registers(task)) == bytes(before)
    assert line(tracing) == "signal"
    write(tracing, "hello\n")
    assert line(tracing) == "said hello"
    with tracer.borrowed(tracing.pid) as borrowed:
        changed = borrowed.registers(task)
        changed.ax, changed.orig_ax, changed.di = 231, -1, 5  # exit_group(5), by the next instruction that calls
        changed.ip = borrowed._instruction
        borrowed.change(task, changed)
    assert tracing.stdin is not None
    tracing.stdin.close()
    assert line(tracing) == "ended 5"


def test_a_task_that_is_not_traced(tracing: subprocess.Popen[str]) -> None:
    line(tracing)
    with tracer.borrowed(tracing.pid) as borrowed, pytest.raises(OSError) as caught:
        borrowed.registers(os.getpid())
    assert caught.value.errno == errno.ESRCH
    write(tracing, "hello\n")
    assert line(tracing) == "said hello"


def test_a_tracer_that_has_ended(tracing: subprocess.Popen[str]) -> None:
    line(tracing)
    tracing.kill()
    os.waitid(os.P_PID, tracing.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises((HpccrError, OSError)), tracer.borrowed(tracing.pid):
        pytest.fail("it is stopped")
    assert tracing.wait(10) == -signal.SIGKILL
