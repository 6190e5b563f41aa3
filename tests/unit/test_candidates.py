"""Which checkpoint is restored when others are passed over; and the runs that own a step."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from test_store import with_two_checkpoints, write

from hpccr.coordinator.candidates import Candidates
from hpccr.coordinator.recovery import MAX_BOOTS
from hpccr.coordinator.succession import Succession
from hpccr.errors import CorruptError, ExitCode, HpccrError, LockedError
from hpccr.model import StepKey
from hpccr.store import abandoned
from hpccr.store.layout import Step, Store
from hpccr.store.steps import claim_step, last_run


def test_the_last_run_owns_the_step(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    step = claim_step(store, "tb", "17", 0)
    assert step.key == StepKey("tb", "17", "0") and last_run(step) == 0
    first = Succession(step, 0)
    first.check()
    for run in (1, 10):
        claim_step(store, "tb", "17", run)
    assert last_run(step) == 10
    Succession(step, 10).check()
    with pytest.raises(LockedError, match="started again elsewhere"):
        first.check()


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return with_two_checkpoints(tmp_path)


def newest(step: Step) -> int | None:
    found = asyncio.run(Candidates(step, lambda text: None).newest())
    return found.sequence if found else None


def test_what_the_job_did_not_go_on_from(step: Step) -> None:
    assert abandoned.go_on(step, 2) == [] and newest(step) == 2
    assert abandoned.go_on(step, 1) == [2] and newest(step) == 1
    assert step.checkpoint(2).state().abandoned == "the job went on from checkpoint 1"
    assert [checkpoint.sequence for checkpoint in step.complete()] == [1]
    write(step.checkpoint(3), capsules=1)
    assert abandoned.go_on(step, 3) == [] and newest(step) == 3
    # Somebody names the one that was abandoned.
    assert asyncio.run(Candidates(step, lambda text: None).exactly(2)).sequence == 2
    assert abandoned.go_on(step, 2) == [3] and newest(step) == 2
    # From the beginning: what there is left is no reason not to begin anew.
    assert abandoned.go_on(step, 0) == [1, 2] and newest(step) is None
    assert step.checkpoint(1).state().abandoned == "the job began anew"


def nothing_left(step: Step, fruitless: dict[int, int], refusals: dict[int, HpccrError]) -> HpccrError:
    candidates = Candidates(step, lambda text: None, afresh="AFRESH", again="AGAIN", fruitless=fruitless)
    for sequence, why in refusals.items():
        candidates.refuse(sequence, why)
    with pytest.raises(HpccrError) as raised:
        asyncio.run(candidates.newest())
    return raised.value


def test_the_newest_that_was_not_refused(step: Step) -> None:
    candidates = Candidates(step, lambda text: None, fruitless={2: MAX_BOOTS - 1})
    newest = asyncio.run(candidates.newest())
    assert newest is not None and newest.sequence == 2
    candidates.refuse(2, HpccrError("does not restore"))
    older = asyncio.run(candidates.newest())
    assert older is not None and older.sequence == 1


def test_damage_and_trouble_are_told_apart_when_nothing_is_left(step: Step) -> None:
    """Nobody is told to remove checkpoints that are whole."""
    damaged = nothing_left(step, {2: MAX_BOOTS}, {1: CorruptError("bad digest")})
    assert damaged.code == ExitCode.CORRUPT and damaged.hint == "AFRESH" and "bad digest" in damaged.message
    trouble = nothing_left(step, {2: MAX_BOOTS}, {1: HpccrError("the spool is full")})
    assert trouble.code == ExitCode.PEER_LOST and trouble.hint.endswith("AGAIN")
