"""When the next checkpoint is due. Pure: times come in, times go out.

Young's interval sqrt(2 C M) - C balances the time spent on checkpoints against the work lost at a failure, for a cost C
of one checkpoint and a mean time M between failures of the job (J. W. Young 1974; J. T. Daly 2006, first order).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpccr.errors import UsageError

SHORTEST = 10.0
"""Seconds; a shorter interval is refused: the job would do little else."""
MARGIN = 20.0
"""Seconds before the time limit that are kept whatever the last checkpoint took: Slurm's clock ticks in such steps."""
FACTOR = 2.0
"""How much longer than the slowest checkpoint so far the last one may take."""
RECENT = 10
"""Checkpoints of earlier runs of the job that tell what one takes: storage that once hung does not count for ever."""
TRIALS = 10
"""Into how many parts a run's time is cut; at the end of the first one a checkpoint tells what one takes."""

_UNITS = {"": 60.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIMPLE = re.compile(r"^(\d+(?:\.\d+)?)([smhd]?)$")
_CLOCK = re.compile(r"^(?:(\d+)-)?(\d+):(\d{1,2})(?::(\d{1,2}))?$")


@dataclass(frozen=True)
class Interval:
    """Seconds between two checkpoints; None: choose by cost and failure rate."""

    seconds: float | None


def parse_interval(text: str) -> Interval | None:
    """The interval in "30" (minutes), "90s", "30m", "2h", "1d", "H:MM", "H:MM:SS", "D-H:MM:SS", "auto".

    None for "none" and "requeue": no checkpoints by the clock.

    Raises UsageError.
    """
    word = text.strip().lower()
    if word in ("none", "requeue", ""):
        return None
    if word == "auto":
        return Interval(None)
    if match := _SIMPLE.match(word):
        seconds = float(match[1]) * _UNITS[match[2]]
    elif match := _CLOCK.match(word):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60.0 + rest
    else:
        raise UsageError(
            f"{text!r} is no interval between checkpoints",
            hint="30 (minutes), 90s, 30m, 2h, HH:MM:SS, auto, requeue or none",
        )
    if seconds < SHORTEST:
        raise UsageError(f"an interval of {seconds:g} s is shorter than {SHORTEST:g} s")
    return Interval(seconds)


def optimal(cost: float, mtbf: float) -> float:
    """Seconds of work between checkpoints that cost `cost` seconds each, for failures every `mtbf` seconds."""
    cost = max(cost, 0.001)
    if cost >= mtbf / 2:
        return mtbf
    return max(SHORTEST, math.sqrt(2 * cost * mtbf) - cost)


@dataclass(frozen=True)
class Costs:
    """What checkpoints of this step have taken so far, seconds; zeros before the first."""

    frozen: float = 0.0
    """Longest freeze: what the job loses."""
    whole: float = 0.0
    """Longest time from the request until durable: what must fit before the time limit."""

    def with_freeze(self, seconds: float) -> Costs:
        return Costs(max(self.frozen, seconds), self.whole)

    def with_whole(self, seconds: float) -> Costs:
        return Costs(self.frozen, max(self.whole, seconds))


def costs_so_far(happened: Iterable[Mapping[str, Any]]) -> Costs:
    """What the last RECENT checkpoints of a step took, by its events. One whose end was not seen, or came after the job
    had been suspended, took at least the time until its release."""
    freezes: dict[int, float] = {}
    wholes: dict[int, float] = {}
    ends: dict[int, float] = {}
    for event in happened:
        if event["event"] == "suspended":
            ends.clear()
        number = event.get("sequence")
        if not isinstance(number, int):
            continue
        if event["event"] == "released":
            freezes.pop(number, None)
            freezes[number] = float(event.get("freeze_seconds", 0))
            wholes[number] = float(event.get("total_seconds", 0))
            ends[number] = float(event["time"])
        elif event["event"] == "durable" and number in ends:
            wholes[number] += max(0.0, float(event["time"]) - ends.pop(number))
    recent = list(freezes)[-RECENT:]
    return Costs(
        frozen=max((freezes[number] for number in recent), default=0.0),
        whole=max((wholes[number] for number in recent), default=0.0),
    )


def next_periodic(interval: Interval, *, last: float, costs: Costs, mtbf: float) -> float:
    """When the next periodic checkpoint is due. last: when the last was released, or the job began to run."""
    seconds = interval.seconds if interval.seconds is not None else optimal(costs.frozen or 1.0, mtbf)
    return last + seconds


def last_moment(end_time: float, *, running_since: float, costs: Costs) -> float:
    """When the final checkpoint before the time limit must begin.

    Never before half of the time that this run of the job has: a job must get on.
    """
    margin = MARGIN + FACTOR * costs.whole
    return max(end_time - margin, running_since + (end_time - running_since) / 2)


def next_trial(end_time: float, *, running_since: float, costs: Costs, trials: int) -> float | None:
    """When to make a checkpoint for no other reason than that none has been made, after `trials` that failed; None
    where it is known what one takes.

    What the one before the time limit takes could not be guessed: a job may have filled its nodes' memory or not. And
    what keeps a job from being checkpointed at all is told while there is time to do something about it.
    """
    if costs.frozen or trials >= TRIALS - 1:
        return None
    return running_since + max(SHORTEST, (end_time - running_since) * (trials + 1) / TRIALS)
