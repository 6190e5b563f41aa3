"""Checkpoints that nobody goes on with."""

from __future__ import annotations

import asyncio
import time

import pytest

from hpccr.config import CheckpointConfig
from hpccr.coordinator import deadlines
from hpccr.noded import patience
from hpccr.noded.lifecycle import State

QUICK = CheckpointConfig(prepare_timeout=1, freeze_timeout=1, dump_timeout=1, silence_timeout=10)


def test_a_node_waits_longer_than_its_coordinator() -> None:
    """Else a node's own deadline would be a failure of the checkpoint, or undo what is about to go on."""
    assert patience.SHORT > deadlines.BARRIER_TIMEOUT
    config = CheckpointConfig()
    for state, phase in {
        State.PREPARED: config.prepare_timeout + config.dump_timeout,
        State.FROZEN: config.freeze_timeout,
        State.DUMPED: config.dump_timeout,
    }.items():
        found = patience.limit(state, config)
        assert found is not None and found > phase + deadlines.BARRIER_TIMEOUT
    assert patience.limit(State.RUNNING, config) is None


@pytest.mark.parametrize("ends", [True, False])
def test_it_ends_with_the_next_request(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    monkeypatch.setattr(patience, "limit", lambda state, config: 0.0)

    async def run() -> list[str]:
        given_up: list[str] = []
        over = asyncio.Event()

        async def give_up(reason: str) -> None:
            given_up.append(reason)
            over.set()

        waiting = patience.Patience(QUICK, give_up)
        waiting.begin(State.PREPARED)
        if ends:
            waiting.end()
            asyncio.get_running_loop().call_later(0.01, over.set)
        async with asyncio.timeout(10):
            await over.wait()
        return given_up

    assert asyncio.run(run()) == ([] if ends else ["the next request did not come within 0 s"])


@pytest.mark.parametrize("comes", [True, False])
def test_a_stop_of_the_whole_process_is_no_delay_of_others(monkeypatch: pytest.MonkeyPatch, comes: bool) -> None:
    """What came while it was stopped is read first; what does not come is late once more after that."""
    monkeypatch.setattr(patience, "limit", lambda state, config: 0.1)
    monkeypatch.setattr(patience, "STOPPED", 0.1)

    async def run() -> list[str]:
        given_up: list[str] = []
        over = asyncio.Event()

        async def give_up(reason: str) -> None:
            given_up.append(reason)
            over.set()

        waiting = patience.Patience(QUICK, give_up)
        waiting.begin(State.FROZEN)
        time.sleep(0.3)  # nothing runs meanwhile, as when it is stopped
        await asyncio.sleep(0)
        if comes:
            waiting.end()
            asyncio.get_running_loop().call_later(0.3, over.set)
        async with asyncio.timeout(10):
            await over.wait()
        return given_up

    assert len(asyncio.run(run())) == (0 if comes else 1)
