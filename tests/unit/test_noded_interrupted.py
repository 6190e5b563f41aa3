"""Registers of threads that were stopped in a system call, as CRIU's images have them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pycriu.images import core_pb2

from hpccr.noded import child, interrupted, scan

EINTR = (1 << 64) - 4
LEFT, ASKED = 0x7000, 0x6000


@pytest.fixture(autouse=True)
def x86_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def thread(call: int, result: int = EINTR, **changes: int) -> Any:
    entry = core_pb2.core_entry()
    registers = {"ip": 1002, "ax": result, "orig_ax": call, "di": ASKED, "si": LEFT, "dx": ASKED, "r10": LEFT}
    for name, value in (registers | {"mode": 1} | changes).items():
        setattr(entry.thread_info.gpregs, name, value)
    return entry


def with_signal(where: str) -> Any:
    entry = thread(7)
    queue = entry.tc.signals_s if where == "process" else entry.thread_core.signals_p
    queue.signals.add().siginfo = b""
    return entry


def zombie() -> Any:
    entry = core_pb2.core_entry()
    entry.tc.task_state = 6
    return entry


@pytest.mark.parametrize(
    ("call", "changes"),
    [
        (7, {}),
        (202, {}),
        (35, {"di": LEFT}),
        (230, {"dx": LEFT}),
    ],
)
def test_the_call_is_made_again(call: int, changes: dict[str, int]) -> None:
    entry = thread(call)
    assert interrupted.repair(entry)
    assert entry == thread(call, call, ip=1000, **changes)


def test_a_sleep_that_does_not_ask_what_is_left_begins_again() -> None:
    entry = thread(35, si=0)
    assert interrupted.repair(entry) and entry == thread(35, 35, ip=1000, si=0)


@pytest.mark.parametrize(
    "entry",
    [
        thread(7, 0),
        thread(232),  # epoll_wait(2) is interrupted by every stop
        thread(219),  # nobody knows what is gone on with
        thread((1 << 64) - 1),
        thread(7, mode=2),
        with_signal("process"),
        with_signal("thread"),
        zombie(),
    ],
)
def test_everything_else_stays(entry: Any) -> None:
    before = repr(entry)
    assert not interrupted.repair(entry) and repr(entry) == before


def test_other_processors_registers_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not interrupted.repair(thread(7))


WAITED = interrupted.Poll(300, 301, (ASKED, LEFT, 5000), 1, 100.0, 7, began=50.0)


@pytest.mark.parametrize(("stopped", "left"), [(52.0, 3000), (54.9996, 0), (60.0, 0), (50.0, 5000)])
def test_a_poll_goes_on_with_what_was_left(stopped: float, left: int) -> None:
    entry = thread(7, dx=5000)
    assert interrupted.repair(entry, WAITED, stopped) and entry == thread(7, 7, ip=1000, dx=left)


@pytest.mark.parametrize("changes", [{"di": LEFT}, {"si": ASKED}, {"dx": 4000}])
def test_another_poll_waits_for_its_whole_limit(changes: dict[str, int]) -> None:
    entry = thread(7, **({"dx": 5000} | changes))
    assert interrupted.repair(entry, WAITED, 52.0)
    assert entry == thread(7, 7, ip=1000, **({"dx": 5000} | changes))


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("7 0x7ffe9543fe88 0x1 0xea60 0x0 0x0 0x0 0x7ffe9543fe30 0x7f950d3bb3a7", (0x7FFE9543FE88, 1, 60000)),
        ("7 0x7ffe9543fe88 0x1 0xffffffffffffffff 0x0 0x0 0x0 0x7ffe9543fe30 0x7f950d3bb3a7", None),
        ("7 0x7ffe9543fe88 0x1 0xffffffff 0x0 0x0 0x0 0x7ffe9543fe30 0x7f950d3bb3a7", None),
        ("7 0x7ffe9543fe88 0x1 0x0 0x0 0x0 0x0 0x7ffe9543fe30 0x7f950d3bb3a7", None),
        ("271 0x7ffe9543fe88 0x1 0xea60 0x0 0x0 0x0 0x7ffe9543fe30 0x7f950d3bb3a7", None),
        ("running", None),
        ("-1 0x7ffe9543fe30 0x7f950d3bb3a7", None),
        ("", None),
    ],
)
def test_polls_with_a_limit_are_known(line: str, arguments: tuple[int, int, int] | None) -> None:
    assert interrupted.polled([line] if line else []) == arguments


@pytest.mark.parametrize(
    ("line", "whether"),
    [
        ("7 0x7ffe9543fe88 0x1 0xffffffff 0x0 0x0 0x0 0x7ffe9543fe30 0x7f950d3bb3a7", True),
        ("35 0x7ffe9543fe88 0x0 0x0 0x0 0x0 0x0 0x7ffe9543fe30 0x7f950d3bb3a7", True),
        ("202 0x7ffe9543fe88 0x80 0x2 0x7ffe9543fe30 0x0 0x0 0x7ffe9543fe30 0x7f950d3bb3a7", True),
        ("202 0x7ffe9543fe88 0x80 0x2 0x0 0x0 0x0 0x7ffe9543fe30 0x7f950d3bb3a7", False),  # the kernel makes it again
        ("232 0x3 0x7ffe9543fe88 0x10 0x3e8 0x0 0x0 0x7ffe9543fe30 0x7f950d3bb3a7", False),
        ("-1 0x7ffe9543fe30 0x7f950d3bb3a7", False),
        ("running", False),
        ("", False),
    ],
)
def test_calls_that_are_made_again_are_known(line: str, whether: bool) -> None:
    assert interrupted.repeated([line] if line else []) is whether


def test_when_a_thread_last_ran() -> None:
    facts = [
        "head (5798, #threads: 1)",
        "-" * 20,
        "se.exec_start           :       3779861.240548",
        "se.vruntime : 1.0",
    ]
    assert interrupted.last_ran(facts) == 3779861.240548
    assert interrupted.last_ran(facts[:2]) == 0.0


POLLS = "import select; pair = select.poll(); pair.register(0, 1); pair.poll(1_000_000)"


def test_a_waiting_thread_is_found_with_what_is_left() -> None:
    with subprocess.Popen([sys.executable, "-c", POLLS], stdin=subprocess.PIPE) as process:
        started, place = time.monotonic(), Path(f"/proc/{process.pid}/syscall")
        while interrupted.polled([place.read_text()]) is None:
            time.sleep(0.001)
        # Time has to pass: not less than this of it counts, whatever a hypervisor takes away.
        time.sleep(0.3)
        task = scan.read_task(process.pid)
        assert task is not None
        found = child.call(lambda: msgspec.to_builtins(interrupted.look(scan.Tree(task.pid, [task]))))
        (poll,) = msgspec.convert(found, list[interrupted.Poll])
        left, passed = poll.left(now := time.monotonic()), (now - started) * 1000
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        stopped = interrupted.still([poll])
        process.kill()
    assert poll.arguments[1:] == (1, 1_000_000) and 1_000_000 - passed - 10 <= left < 1_000_000
    assert stopped == {process.pid: poll}
