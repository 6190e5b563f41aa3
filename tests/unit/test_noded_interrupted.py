"""Registers of threads that were stopped in a system call, as CRIU's images have them."""

from __future__ import annotations

from typing import Any

import pytest

from hpccr.noded import interrupted

EINTR = (1 << 64) - 4
LEFT, ASKED = 0x7000, 0x6000


@pytest.fixture(autouse=True)
def x86_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def thread(call: int, result: int = EINTR, **changes: int | str) -> dict[str, Any]:
    registers = {"ip": 1002, "ax": result, "orig_ax": call, "di": ASKED, "si": LEFT, "dx": ASKED, "r10": LEFT}
    return {"thread_info": {"gpregs": registers | {"mode": "NATIVE"} | changes}, "thread_core": {}}


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
        thread(7, mode="COMPAT"),
        thread(7) | {"tc": {"signals_s": {"signals": [{}]}}},
        thread(7) | {"thread_core": {"signals_p": {"signals": [{}]}}},
        {"tc": {"task_state": 6}},
    ],
)
def test_everything_else_stays(entry: dict[str, Any]) -> None:
    before = repr(entry)
    assert not interrupted.repair(entry) and repr(entry) == before


def test_other_processors_registers_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not interrupted.repair(thread(7))
