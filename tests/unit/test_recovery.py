"""What follows a boot that came to nothing, by its failure and by what has happened to the step before."""

from __future__ import annotations

from typing import Any

import pytest

from hpccr.coordinator import deadlines, plan
from hpccr.coordinator.plan import Phase
from hpccr.coordinator.recovery import MAX_ASTRAY, MAX_BOOTS, MAX_RESTARTS, Next, Past, after, past
from hpccr.errors import ExitCode
from hpccr.noded import checkpoint, lease
from hpccr.wire import messages as m


def boot(sequence: int) -> dict[str, Any]:
    return {"event": "boot", "sequence": sequence}


def restoring(sequence: int) -> list[dict[str, Any]]:
    return [boot(sequence), {"event": "restoring", "sequence": sequence}]


RESTORED = {"event": "restored"}
REQUEUED = {"event": "terminate", "why": "requeue"}
SIGNALLED = {"event": "terminate", "why": "unknown"}
LOST = {"event": "lost"}
FAILED = {"event": "failed"}


@pytest.mark.parametrize(
    ("happened", "fruitless", "astray"),
    [
        ([], {}, 0),
        ([boot(0)], {0: 1}, 1),
        ([boot(0), {"event": "started"}, LOST], {0: 1}, 0),
        ([*restoring(3), *restoring(3), LOST, *restoring(2)], {3: 2, 2: 1}, 0),
        ([*restoring(3), *restoring(3), RESTORED, *restoring(3)], {3: 1}, 0),
        ([boot(3), LOST, boot(3), LOST], {}, 2),  # nobody looked at the images
        ([*restoring(3), boot(3)], {3: 1}, 1),
        ([*restoring(3), REQUEUED, REQUEUED, *restoring(3), REQUEUED], {}, 0),
        ([*restoring(3), LOST, REQUEUED], {}, 0),
        ([boot(3), REQUEUED, boot(3)], {}, 1),
        ([*restoring(3), SIGNALLED], {3: 1}, 0),
        ([*restoring(3) * MAX_BOOTS, boot(3), FAILED, *restoring(3)], {3: 1}, 0),
    ],
)
def test_boots_that_came_to_nothing(happened: list[dict[str, Any]], fruitless: dict[int, int], astray: int) -> None:
    found = past(happened)
    assert {sequence: count for sequence, count in found.fruitless.items() if count} == fruitless
    assert found.astray == astray


def failed(phase: Phase, code: int) -> plan.BootFailed:
    return plan.BootFailed(phase, m.Failed(code, "x"))


def decided(outcome: plan.BootFailed | plan.StepLost, *, before: Past | None = None, restarts: int = 1) -> list[Next]:
    return list(after(outcome, target=3, before=before or Past(), restarts=restarts))


@pytest.mark.parametrize("phase", [Phase.FETCHING, Phase.ROLLING_BACK, Phase.RESTORING, Phase.RESUMING])
def test_only_a_damaged_checkpoint_is_passed_over_at_once(phase: Phase) -> None:
    assert decided(failed(phase, ExitCode.CORRUPT))[0] is Next.REFUSE
    assert decided(failed(phase, ExitCode.NO_CHECKPOINT))[0] is Next.REFUSE
    for code in (ExitCode.FAILED, ExitCode.UNSUPPORTED):  # a full spool, another CPU, a mount that is missing
        assert decided(failed(phase, code)) == [Next.MOVE, Next.REFUSE]
        tried = Past()
        tried.fruitless[3] = MAX_BOOTS - 1
        assert decided(failed(phase, code), before=tried)[0] is Next.REFUSE
    assert decided(failed(phase, ExitCode.PEER_LOST))[0] is Next.AGAIN
    assert decided(failed(phase, ExitCode.PEER_LOST), restarts=2) == [Next.MOVE, Next.AGAIN]
    assert decided(failed(phase, ExitCode.PEER_LOST), restarts=MAX_RESTARTS + 1) == [Next.MOVE, Next.RAISE]


@pytest.mark.parametrize("code", [ExitCode.PEER_LOST, ExitCode.UNSUPPORTED, ExitCode.FAILED])
def test_a_node_that_cannot_make_capsules_is_left_for_others(code: int) -> None:
    for phase in (Phase.CREATING, Phase.CONNECTING):
        assert decided(failed(phase, code)) == [Next.MOVE, Next.RAISE]
        assert decided(failed(phase, code), before=Past(astray=MAX_ASTRAY - 1))[0] is Next.RAISE
        assert after(failed(phase, code), target=None, before=Past(), restarts=0)[0] is Next.RAISE


def test_a_job_that_lost_a_node_goes_on_in_place_and_without_a_checkpoint_elsewhere() -> None:
    lost = plan.StepLost(m.Failed(ExitCode.PEER_LOST, "x"))
    assert decided(lost)[0] is Next.AGAIN
    assert decided(lost, restarts=MAX_RESTARTS + 1)[0] is Next.RAISE
    assert after(lost, target=None, before=Past(), restarts=0) == (Next.MOVE, Next.RAISE)
    tried = Past()
    tried.fruitless[0] = MAX_BOOTS - 1
    assert after(lost, target=None, before=tried, restarts=0)[0] is Next.RAISE


def test_who_gives_up_first() -> None:
    """A large dump comes late to its next barrier. The one who knows what that means decides first."""
    assert checkpoint.ABORT_SECONDS < lease.ABORT_TIMEOUT < deadlines.ABORT_TIMEOUT
