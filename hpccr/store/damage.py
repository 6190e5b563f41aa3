"""The mark on a checkpoint that was found damaged. With it the checkpoint is incomplete for everybody: it is not
restored, the next one does not refer to it, and gc does not count it among those that are kept.

A restore that finds damage leaves the mark, a flush that finds it in what it would refer to, and `hpccr verify`, which
also takes it away from a checkpoint that is whole after all.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from hpccr.errors import CorruptError
from hpccr.store import publish

DAMAGED_NAME = "damaged.json"


class Damage(msgspec.Struct, frozen=True):
    """found: when, in seconds since the epoch. what: as an error says it."""

    found: float
    what: str


def mark(checkpoint: Path, what: str) -> None:
    """Mark a checkpoint's directory, unless it is gone. Raises OSError."""
    try:
        publish.publish(checkpoint / DAMAGED_NAME, Damage(time.time(), what))
    except FileNotFoundError:
        pass  # it has been removed meanwhile


def unmark(checkpoint: Path) -> None:
    """It is whole. Raises OSError."""
    if (checkpoint / DAMAGED_NAME).exists():
        publish.remove(checkpoint / DAMAGED_NAME)
        publish.fsync_directory(checkpoint)


def found(checkpoint: Path) -> str:
    """What was found, "" if nothing was. Raises OSError."""
    try:
        record = publish.read_if_there(checkpoint / DAMAGED_NAME, Damage)
    except CorruptError:
        return "it was found damaged"
    return f"it was found damaged: {record.what}" if record else ""
