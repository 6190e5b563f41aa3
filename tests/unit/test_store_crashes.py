"""Every way to change a store, ended at every one of its system calls in turn: no complete checkpoint is lost by it,
none is listed complete that is not, and what it leaves does not hinder the next one.

tests/unit/test_store_machine.py draws from all this at once; here nothing is left out.
"""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import test_store_machine as machine
from test_store import KEY, crashes_at, manifest, write, write_manifest

from hpccr.store import archive, damage, gc, publish
from hpccr.store.layout import Checkpoint, Step, Store
from hpccr.store.verify import verify

LATER = 2 * gc.GRACE


def each_crash(tmp_path: Path, prepare: Callable[[Step], None], act: Callable[[Step], object]) -> Iterator[Step]:
    """The step in a store after `act` has ended before its first call, its second, ... and at last not at all."""
    for call in itertools.count():
        step = Store.at(tmp_path / f"store-{call}").step(KEY)
        publish.make_directory(step.path)
        prepare(step)
        crashed = crashes_at(call, lambda step=step: act(step) and None)  # type: ignore[misc]
        for checkpoint in step.complete():
            assert verify(checkpoint) == [], f"call {call}"
        yield step
        if not crashed:
            assert call > 5, "nothing was changed"
            return


def complete(step: Step) -> list[int]:
    return [checkpoint.sequence for checkpoint in step.complete()]


FILES = [{"pages-1.img": os.urandom(70_000), "core.img": b"core"} for _ in range(machine.CAPSULES)]


def flush(checkpoint: Checkpoint, capsule: int) -> None:
    assert machine.flush(checkpoint, capsule, FILES[capsule]) == 0


def test_a_flush(tmp_path: Path) -> None:
    """Of the last capsule of checkpoint 2, which refers to what is in checkpoint 1."""

    def prepare(step: Step) -> None:
        for sequence in (1, 2):
            write_manifest(step.checkpoint(sequence), machine.CAPSULES)
        flush(step.checkpoint(1), 0)
        flush(step.checkpoint(1), 1)
        flush(step.checkpoint(2), 0)

    for step in each_crash(tmp_path, prepare, lambda step: flush(step.checkpoint(2), 1)):
        assert complete(step) in ([1], [2, 1])
        if complete(step) == [1]:
            flush(step.checkpoint(2), 1)  # hpccrd tries it again
        assert complete(step) == [2, 1]
        assert all(verify(checkpoint) == [] for checkpoint in step.complete())
        assert machine.restored(step.checkpoint(2), 1) == FILES[1]


def test_gc(tmp_path: Path) -> None:
    def prepare(step: Step) -> None:
        for sequence in (1, 2, 4):
            write(step.checkpoint(sequence))
        write_manifest(step.checkpoint(3), 2)

    def collect(step: Step) -> object:
        return gc.collect(step, keep=1, now=time.time() + LATER)

    for step in each_crash(tmp_path, prepare, collect):
        assert complete(step)[0] == 4
        collect(step)
        collect(step)  # what the one that died had renamed is old enough as well
        assert [checkpoint.sequence for checkpoint in step.checkpoints()] == [4]
        assert os.listdir(step.path) == ["ckpt-000004"]


def test_an_import(tmp_path: Path) -> None:
    source = Store.at(tmp_path / "source").step(KEY)
    write(source.checkpoint(1))
    out = io.BytesIO()
    archive.write(source.checkpoint(1), out)

    def read(step: Step) -> object:
        return archive.read(io.BytesIO(out.getvalue()), Store(step.root))

    for step in each_crash(tmp_path, lambda step: None, read):
        assert complete(step) in ([], [1])
        assert [checkpoint.sequence for checkpoint in step.checkpoints()] == complete(step)
        gc.sweep(step.root, now=time.time() + LATER)
        assert os.listdir(step.root) == [step.path.parent.name]
        if not complete(step):
            read(step)
        assert step.checkpoint(1).manifest() == manifest(step.checkpoint(1), 2)


def test_a_removal(tmp_path: Path) -> None:
    def prepare(step: Step) -> None:
        write(step.checkpoint(1))
        write(step.checkpoint(2))

    for step in each_crash(tmp_path, prepare, lambda step: publish.remove_tree(step.checkpoint(1).path)):
        assert complete(step) in ([2], [2, 1])


def test_a_mark(tmp_path: Path) -> None:
    for step in each_crash(
        tmp_path,
        lambda step: write(step.checkpoint(1)) and None,
        lambda step: damage.mark(step.checkpoint(1).path, "changed") or damage.unmark(step.checkpoint(1).path),
    ):
        damage.unmark(step.checkpoint(1).path)
        assert complete(step) == [1]
