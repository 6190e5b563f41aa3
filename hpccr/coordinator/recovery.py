"""What to do when the job could not be started, restored, or was lost: pure, over what has happened to the step.

A checkpoint is passed over when it is damaged, or when it was tried several times and never came to a running job; a
node's trouble is no reason for that: Slurm has others.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpccr.coordinator import plan
from hpccr.coordinator.plan import Phase
from hpccr.errors import ExitCode

MAX_BOOTS = 3
"""Attempts to restore a checkpoint, or to start, over all requeues of the job, that may come to nothing."""
MAX_ASTRAY = 5
"""Allocations in a row on which no attempt got as far as the images."""
MAX_RESTARTS = 3
"""Restores in place without a new complete checkpoint between them; then the cause is not going away."""
MAKING = (Phase.CREATING, Phase.CONNECTING)
"""Phases of a boot in which it does not matter what the capsules are for."""
DAMAGED = (ExitCode.CORRUPT, ExitCode.NO_CHECKPOINT)
"""Codes of failures that are the checkpoint's own, whichever node it is."""


@dataclass
class Past:
    """The boots of a step so far that came to nothing and were not ended by Slurm.

    fruitless: by checkpoint, how often it was being restored since it last came to a running job; by 0: starts from the
    beginning. astray: boots in a row that did not get that far.
    """

    fruitless: Counter[int] = field(default_factory=Counter)
    astray: int = 0


def past(happened: Iterable[Mapping[str, Any]]) -> Past:
    """From the events of the step. When it has ended with an error, whoever starts it again may try as often anew."""
    found = Past()
    booting = restoring = None
    for event in happened:
        match event["event"]:
            case "boot":
                booting, restoring = int(event.get("sequence", 0)), None
                found.astray += 1
                if booting == 0:
                    restoring = 0
                    found.fruitless[0] += 1
            case "restoring":
                restoring = int(event.get("sequence", 0))
                found.fruitless[restoring] += 1
                found.astray = 0
            case "restored":
                found.fruitless[int(event.get("sequence", booting or 0))] = 0
                found.astray = 0
            case "started":
                found.astray = 0
            case "checkpoint":
                found.fruitless.pop(int(event.get("sequence", 0)), None)  # another one of that number was removed
            case "terminate" if event.get("why") != "unknown" and booting is not None:
                if restoring is not None:
                    found.fruitless[restoring] = max(0, found.fruitless[restoring] - 1)
                found.astray = max(0, found.astray - 1)
                booting = restoring = None  # Slurm may signal more than once
            case "failed":
                found = Past()
    return found


class Next(enum.Enum):
    """RAISE: the step ends with the error. REFUSE: pass this checkpoint over for the one before. MOVE: requeue the job,
    if that is possible. AGAIN: restore the newest checkpoint in place."""

    RAISE = enum.auto()
    REFUSE = enum.auto()
    MOVE = enum.auto()
    AGAIN = enum.auto()


def after(
    outcome: plan.BootFailed | plan.StepLost, *, target: int | None, before: Past, restarts: int
) -> tuple[Next, Next]:
    """What to do after a boot has come to nothing or its job was lost, and what, should that be MOVE and impossible.

    target: the checkpoint to restore next: the one that the boot was from, or the newest after a loss; None: there is
    none. before: of earlier runs of the job. restarts: restores of target in place so far, with the next one.
    """
    if isinstance(outcome, plan.StepLost):
        if target is None:
            # As Slurm does itself with a job that has lost a node.
            return (Next.MOVE if before.fruitless[0] + 1 < MAX_BOOTS else Next.RAISE), Next.RAISE
        return (Next.AGAIN if restarts <= MAX_RESTARTS else Next.RAISE), Next.RAISE
    if target is None:
        return Next.RAISE, Next.RAISE
    code = outcome.failure.code
    if outcome.phase in MAKING:
        return (Next.MOVE if before.astray + 1 < MAX_ASTRAY else Next.RAISE), Next.RAISE
    if code in DAMAGED or before.fruitless[target] + 1 >= MAX_BOOTS:
        return Next.REFUSE, Next.RAISE
    if code != ExitCode.PEER_LOST:
        return Next.MOVE, Next.REFUSE
    if restarts == 1:
        return Next.AGAIN, Next.RAISE  # whoever is gone may be back at once, and a queue is long
    return Next.MOVE, Next.AGAIN if restarts <= MAX_RESTARTS else Next.RAISE
