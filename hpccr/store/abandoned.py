"""The mark on a checkpoint of a past that did not come to be: the job went on from an older one, or from the beginning.

Whatever becomes of such a checkpoint (its flush may come to its end later), no run of the job takes it by itself: the
job's files and output are another history's by then. Who names it gets it, and that history is the job's again. gc
does not count it among those that are kept.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from hpccr.errors import CorruptError
from hpccr.store import publish

if TYPE_CHECKING:
    from pathlib import Path

    from hpccr.store.layout import Step

ABANDONED_NAME = "abandoned.json"


class Abandoned(msgspec.Struct, frozen=True):
    """since: when, in seconds since the epoch. source: the checkpoint that the job went on from; 0: its beginning."""

    since: float
    source: int


def go_on(step: Step, source: int) -> list[int]:
    """Before the job's files become those of checkpoint `source` of the step (0: before it begins anew): mark all that
    come after it.

    Gives the numbers of those that were not marked before. Raises OSError."""
    marked = []
    # The newest is the last: should this be cut short, it is still the one that the files are of.
    for checkpoint in reversed(step.checkpoints()):
        mark = checkpoint.path / ABANDONED_NAME
        if checkpoint.sequence > source and not mark.exists():
            try:
                publish.publish(mark, Abandoned(time.time(), source))
            except FileNotFoundError:
                continue  # it has been removed meanwhile
            marked.append(checkpoint.sequence)
        elif checkpoint.sequence == source and mark.exists():
            publish.remove(mark)
            publish.fsync_directory(checkpoint.path)
    return marked


def found(checkpoint: Path) -> str:
    """In words, "" if it is not abandoned. Raises OSError."""
    try:
        record = publish.read_if_there(checkpoint / ABANDONED_NAME, Abandoned)
    except CorruptError:
        return "the job went on from an older one"
    if record is None:
        return ""
    return f"the job went on from checkpoint {record.source}" if record.source else "the job began anew"
