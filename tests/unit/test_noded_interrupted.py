"""Registers of threads that were stopped in a system call, as CRIU's images have them."""

from __future__ import annotations

from typing import Any

import pytest
from pycriu.images import core_pb2

from hpccr.noded import interrupted

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
