"""Which boots of a step count as failed, by its events; and the runs that own a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpccr.coordinator.candidates import MAX_BOOTS, fruitless
from hpccr.coordinator.succession import Succession
from hpccr.errors import LockedError
from hpccr.model import StepKey
from hpccr.store.layout import Store
from hpccr.store.steps import claim_step, last_run


def boot(sequence: int) -> dict[str, Any]:
    return {"event": "boot", "sequence": sequence}


RESTORED = {"event": "restored"}
REQUEUED = {"event": "terminate", "why": "requeue"}
SIGNALLED = {"event": "terminate", "why": "unknown"}
LOST = {"event": "lost"}


@pytest.mark.parametrize(
    ("happened", "expected"),
    [
        ([], {}),
        ([boot(0)], {0: 1}),
        ([boot(3), boot(3), LOST, boot(2)], {3: 2, 2: 1}),
        ([boot(3), boot(3), RESTORED, boot(3)], {3: 1}),
        ([boot(3), REQUEUED, REQUEUED, boot(3), REQUEUED, boot(3), REQUEUED], {}),
        ([boot(3), LOST, REQUEUED], {}),
        ([boot(3), SIGNALLED], {3: 1}),
        ([boot(3), boot(3), {"event": "checkpoint", "sequence": 3}], {}),
        ([boot(3)] * MAX_BOOTS, {3: MAX_BOOTS}),
    ],
)
def test_boots_that_came_to_nothing(happened: list[dict[str, Any]], expected: dict[int, int]) -> None:
    assert {sequence: count for sequence, count in fruitless(happened).items() if count} == expected


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
