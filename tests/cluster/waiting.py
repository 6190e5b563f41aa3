"""Waiting for something to become true, with a deadline. Never sleeping instead of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PAUSE = 0.05


class Late(AssertionError):
    """What was waited for did not come in time."""


def wait_for(what: str, look: Callable[[], T | None], *, within: float = 60.0, every: float = PAUSE) -> T:
    """What `look` gives once that counts as true. Raises Late saying `what`."""
    deadline = time.monotonic() + within
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Late(f"{what}: not within {within:.0f} s")
        time.sleep(every)


def soak() -> bool:
    """Whether the long form of the tests was asked for."""
    return os.environ.get("HPCCR_SOAK") == "1"


def rounds(short: int, long: int) -> int:
    """How often, or how long, something is done."""
    return long if soak() else short
