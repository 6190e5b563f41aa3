"""When checkpoints are due."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccr.coordinator.schedule import SHORTEST, Costs, Interval, last_moment, next_periodic, optimal, parse_interval
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
