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


def given_up(state: State, *, stopped: float = 0.0, ends: bool, rest: float) -> list[str]:
    """The reasons for which a Patience gave up. stopped: seconds after its begin in which nothing runs; then the next
    request comes (ends), and it has `rest` seconds more to do wrong, or it is waited for to give up."""

    async def run() -> list[str]:
        reasons: list[str] = []
        over = asyncio.Event()

        async def give_up(reason: str) -> None:
            reasons.append(reason)
            over.set()

        waiting = patience.Patience(QUICK, give_up)
        waiting.begin(state)
        if stopped:
            time.sleep(stopped)  # of the whole process, as by SIGSTOP
            await asyncio.sleep(0)
        if ends:
            waiting.end()
            asyncio.get_running_loop().call_later(rest, over.set)
        async with asyncio.timeout(10):
            await over.wait()
        return reasons

    return asyncio.run(run())


@pytest.mark.parametrize("ends", [True, False])
def test_it_ends_with_the_next_request(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    monkeypatch.setattr(patience, "limit", lambda state, config: 0.0)
    found = given_up(State.PREPARED, ends=ends, rest=0.01)
    assert found == ([] if ends else ["the next request did not come within 0 s"])


@pytest.mark.parametrize("comes", [True, False])
def test_a_stop_of_the_whole_process_is_no_delay_of_others(monkeypatch: pytest.MonkeyPatch, comes: bool) -> None:
    """What came while it was stopped is read first; what does not come is late once more after that."""
    monkeypatch.setattr(patience, "limit", lambda state, config: 0.1)
    monkeypatch.setattr(patience, "STOPPED", 0.1)
    assert len(given_up(State.FROZEN, stopped=0.3, ends=comes, rest=0.3)) == (0 if comes else 1)
