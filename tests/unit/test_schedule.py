"""When checkpoints are due."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccr.coordinator.schedule import (
    RECENT,
    SHORTEST,
    Costs,
    Interval,
    costs_so_far,
    last_moment,
    next_periodic,
    next_trial,
    optimal,
    parse_interval,
)
from hpccr.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("90s", 90), ("30m", 1800), ("2h", 7200), ("1:30", 5400), ("00:01:30", 90), ("1-0:00:00", 86400)],
)
def test_intervals(text: str, seconds: float) -> None:
    assert parse_interval(text) == Interval(seconds)


def test_auto_and_none() -> None:
    assert parse_interval("auto") == Interval(None)
    assert parse_interval("none") is None and parse_interval("requeue") is None


@pytest.mark.parametrize("text", ["soon", "-5", "5x", "1:2:3:4", "1s", "0"])
def test_bad_intervals_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_interval(text)


def test_youngs_interval() -> None:
    assert optimal(10, 86400) == pytest.approx(math.sqrt(2 * 10 * 86400) - 10)


@given(st.floats(0, 1e5), st.floats(60, 1e9))
def test_the_optimum_is_never_silly(cost: float, mtbf: float) -> None:
    assert SHORTEST <= optimal(cost, mtbf) <= max(mtbf, SHORTEST)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e4))
def test_the_last_moment_leaves_time_to_work(since: float, limit: float, whole: float) -> None:
    end = since + limit
    moment = last_moment(end, running_since=since, costs=Costs(whole=whole))
    assert since + limit / 2 - 1e-3 <= moment <= end + 1e-3


def test_periodic_counts_from_the_last() -> None:
    assert next_periodic(Interval(60), last=1000, costs=Costs(), mtbf=1e6) == 1060
    longer = next_periodic(Interval(None), last=0, costs=Costs(frozen=4), mtbf=1e6)
    assert longer == pytest.approx(2 * next_periodic(Interval(None), last=0, costs=Costs(frozen=1), mtbf=1e6), rel=0.01)


def made(number: int, at: float, *, total: float, durable: float | None) -> list[dict[str, Any]]:
    costs = {"freeze_seconds": total / 2, "total_seconds": total}
    happened = [{"event": "checkpoint", "time": at - total}, {"event": "released", "time": at, **costs}]
    if durable is not None:
        happened.append({"event": "durable", "time": durable})
    return [{**event, "sequence": number} for event in happened]


def test_what_checkpoints_took_is_known_after_a_requeue() -> None:
    assert costs_so_far([{"event": "started", "time": 1.0}]) == Costs()
    happened = made(1, 100, total=4, durable=130) + made(2, 200, total=6, durable=None)
    assert costs_so_far(happened) == Costs(frozen=3, whole=34)
    assert costs_so_far(made(1, 100, total=4, durable=None)) == Costs(frozen=2, whole=4)
    # How long the job was suspended meanwhile, nobody has measured.
    stopped = made(1, 100, total=4, durable=5000)
    stopped.insert(2, {"event": "suspended", "time": 101})
    assert costs_so_far(stopped) == Costs(frozen=2, whole=4)
    later = [event for number in range(RECENT) for event in made(number + 3, 1000, total=1, durable=1002)]
    assert costs_so_far(happened + later) == Costs(frozen=0.5, whole=3)


def test_the_first_checkpoint_comes_early_where_nothing_is_known() -> None:
    assert next_trial(1000, running_since=0, costs=Costs(), trials=0) == 100
    assert next_trial(1000, running_since=0, costs=Costs(), trials=1) == 200
    assert next_trial(1000, running_since=0, costs=Costs(frozen=1), trials=0) is None
    assert next_trial(1000, running_since=0, costs=Costs(), trials=9) is None
