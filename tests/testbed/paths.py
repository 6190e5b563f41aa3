"""Where things are: the checkout, the cache shared by all clusters, and what belongs to one cluster."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
CACHE = Path("/var/cache/hpccr-testbed")
LOCKS = Path("/run/lock")
RUN = Path("/run/hpccr-testbed")
DISKS = Path("/var/lib/hpccr-testbed")

CTL = "ctl"


class TestbedError(Exception):
    """What was attempted and what happened; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Instance:
    """One cluster: nothing but the cached root file system is shared between two of different names."""

    name: str

    @property
    def run(self) -> Path:
        return RUN / self.name

    @property
    def disks(self) -> Path:
        return DISKS / self.name

    @property
    def shared(self) -> Path:
        return self.disks / "shared"

    @property
    def lock(self) -> Path:
        return LOCKS / f"hpccr-testbed-{self.name}"

    def disk(self, node: str) -> Path:
        return self.disks / node


def current_instance() -> Instance:
    """The instance that HPCCR_TESTBED names (default "tb"); raises TestbedError for an unusable name."""
    name = os.environ.get("HPCCR_TESTBED") or "tb"
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name):
        raise TestbedError(
            f"HPCCR_TESTBED={name!r} is not a usable name",
            "use a lower-case letter, then lower-case letters, digits and '-', 31 characters at most",
        )
    return Instance(name)


def say(text: str) -> None:
    """A line of progress on standard error."""
    os.write(2, f"testbed: {text}\n".encode())


@contextlib.contextmanager
def common() -> Iterator[None]:
    """In this block nobody else makes or removes the directories that all instances have in common: one that makes its
    own in them must not see them removed by another, which takes itself for the last."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    fd = os.open(LOCKS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
