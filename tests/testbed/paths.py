"""Where things are: the checkout, the cache shared by all clusters, and what belongs to one cluster."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
CACHE = Path("/var/cache/hpccr-testbed")
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
        return Path("/run/lock") / f"hpccr-testbed-{self.name}"

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
