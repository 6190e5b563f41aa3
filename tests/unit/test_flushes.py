"""Flushes that fail: repeated for a job that has nothing else left, with room made for them."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from pathlib import Path

import pytest
from test_store import write

from hpccr.config import StoreConfig
from hpccr.coordinator import flushes
from hpccr.coordinator.flushes import Flushes
from hpccr.errors import CorruptError
from hpccr.model import StepKey
from hpccr.store.layout import Step, Store
from hpccr.wire import messages as m

FULL = m.Failed(1, f"the flush failed: capsule-0: {os.strerror(errno.ENOSPC)}", "", "node1")
GONE = m.Failed(1, "the store made no progress for 600 s", "", "node1")


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return Store.at(tmp_path).step(StepKey("tb", "17", "0"))


class Node:
    """Takes requests to flush, and what is said to have been answered."""

    def __init__(self, step: Step) -> None:
        self.requests: list[m.Message] = []
        self.answers: list[m.Message] = []
        self.flushes = Flushes(
            step=step,
            config=StoreConfig(),
            post=lambda capsule, message: self.requests.append(message),
            done=lambda capsule, message: self.answers.append(message),
        )


def sequences(step: Step) -> list[int]:
    return [checkpoint.sequence for checkpoint in step.checkpoints()]


def test_what_is_left_of_a_job_is_flushed_again(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flushes, "pauses", lambda: itertools.repeat(0.0))
    for sequence in (1, 2, 3):
        write(step.checkpoint(sequence), capsules=1)
    (step.checkpoint(3).capsule_path(0) / "fragment.json").unlink()

    async def run() -> None:
        node = Node(step)
        node.flushes.begin(step.checkpoint(3).manifest(), [10])
        await node.flushes.again(3, 0, GONE)
        assert sequences(step) == [3, 2, 1]  # no room is needed
        await node.flushes.again(3, 0, FULL)
        assert sequences(step) == [3, 2]  # one complete one stays
        assert len(node.requests) == 3 and len(set(map(repr, node.requests))) == 1 and not node.answers

    asyncio.run(run())


def test_a_fragment_that_is_there_is_not_flushed_again(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flush had been done when its answer was lost."""
    monkeypatch.setattr(flushes, "pauses", lambda: itertools.repeat(0.0))
    write(step.checkpoint(1), capsules=1)

    async def run() -> None:
        node = Node(step)
        node.flushes.begin(step.checkpoint(1).manifest(), [10])
        await node.flushes.again(1, 0, GONE)
        (answer,) = node.answers
        assert isinstance(answer, m.Flushed) and answer.sequence == 1 and len(node.requests) == 1

    asyncio.run(run())


def test_whoever_waits_for_a_flush_hears_how_it_ended(step: Step) -> None:
    async def run() -> None:
        node = Node(step)
        for sequence in (1, 2):
            node.flushes.expect(sequence)
        waiting = asyncio.ensure_future(node.flushes.durable(1))
        assert node.flushes.pending(1) is not None
        node.flushes.settle(1, None)
        await waiting
        node.flushes.give_up(CorruptError("the job is lost"))
        assert node.flushes.pending(2) is None
        with pytest.raises(CorruptError):
            await node.flushes.durable(2)
        await node.flushes.durable(1)

    asyncio.run(run())


def test_pauses_grow_and_never_end() -> None:
    first = list(itertools.islice(flushes.pauses(), 10))
    assert first == sorted(first) and 0 < first[0] < first[-1] <= 60
