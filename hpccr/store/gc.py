"""Removing checkpoints that are not needed any more. Never the newest complete one, never one that is being written.

Every checkpoint directory has links to all packs that it refers to (store.lineage), so a removal takes nothing from
any other checkpoint. There is no lock: flushes need not be kept out, and gcs at the same time remove what each of them
may remove; so nothing that a node which died may have held stops later ones.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpccr.store import publish
from hpccr.store.layout import Checkpoint, State, Step

log = logging.getLogger(__name__)

GRACE = 300.0
"""Seconds that an incomplete checkpoint is left alone after its last change: its flush may not have begun yet."""


@dataclass(frozen=True)
class Entry:
    """A checkpoint as the decision sees it. changed: when anything in it last changed (seconds since the epoch).
    abandoned: the job has gone on from an older one."""

    sequence: int
    state: State
    changed: float
    abandoned: bool = False


@dataclass(frozen=True)
class Collected:
    """Numbers of the checkpoints that were removed, newest first, and the bytes that their files had."""

    removed: tuple[int, ...]
    freed: int


def superfluous(entries: Sequence[Entry], *, keep: int, now: float) -> list[int]:
    """The numbers of the checkpoints to remove, newest first.

    Kept: the `keep` (at least one) newest complete ones; the one with the highest number, whatever its state; and
    everything that is being flushed or changed within GRACE. An abandoned one stays until it would have to go if the
    job had gone on from it.
    """
    entries = sorted(entries, key=lambda entry: entry.sequence, reverse=True)
    complete = [entry.sequence for entry in entries if entry.state is State.COMPLETE and not entry.abandoned]
    keep = max(keep, 1)
    last = complete[keep - 1] if len(complete) >= keep else 0
    kept = set(complete[:keep])
    kept |= {e.sequence for e in entries if e.abandoned and e.state is State.COMPLETE and e.sequence > last}
    return [
        entry.sequence
        for entry in entries[1:]
        if entry.sequence not in kept
        and (entry.state is State.COMPLETE or (entry.state is State.INCOMPLETE and now - entry.changed > GRACE))
    ]


def collect(step: Step, *, keep: int, now: float | None = None, dry: bool = False) -> Collected:
    """Remove what superfluous() names, and what earlier ones left half removed. dry: only say what would go.

    Raises OSError.
    """
    now = time.time() if now is None else now
    if not step.path.is_dir():
        return Collected((), 0)
    entries = []
    for checkpoint in step.checkpoints():
        state = checkpoint.state(now=now)
        entries.append(Entry(checkpoint.sequence, state.state, _changed(checkpoint), bool(state.abandoned)))
    removed = superfluous(entries, keep=keep, now=now)
    doomed = [step.checkpoint(sequence).path for sequence in removed]
    space = _Space()
    freed = sum(map(space.add, doomed))
    for path in doomed if not dry else ():
        log.debug("removing %s", path)
        publish.remove_tree(path)
    if not dry:
        sweep(step.path, now=now)
    return Collected(tuple(removed), freed)


def sweep(directory: Path, *, now: float | None = None) -> None:
    """Remove temporary names that a writer which died has left behind in a directory of the store. Raises OSError."""
    now = time.time() if now is None else now
    for name in os.listdir(directory):
        path = directory / name
        try:
            if not name.startswith(publish.TEMPORARY) or now - path.lstat().st_mtime < GRACE:
                continue
            if path.is_dir() and not path.is_symlink():
                publish.remove_tree(path)
            else:
                publish.remove(path)
        except FileNotFoundError:
            continue  # its writer is alive after all


def _changed(checkpoint: Checkpoint) -> float:
    latest = 0.0
    for path in (checkpoint.path, *map(checkpoint.capsule_path, checkpoint.capsules_there())):
        try:
            latest = max(latest, path.stat().st_mtime)
        except FileNotFoundError:
            continue
    return latest


class _Space:
    """Bytes that come back when directories are removed: a pack that others still refer to keeps its own."""

    def __init__(self) -> None:
        self._links: dict[tuple[int, int], int] = {}

    def add(self, directory: Path) -> int:
        freed = 0
        for parent, _, names in os.walk(directory):
            for name in names:
                try:
                    status = os.lstat(os.path.join(parent, name))
                except FileNotFoundError:
                    continue
                inode = status.st_dev, status.st_ino
                self._links[inode] = self._links.get(inode, 0) + 1
                if self._links[inode] >= status.st_nlink:
                    freed += status.st_size
        return freed
