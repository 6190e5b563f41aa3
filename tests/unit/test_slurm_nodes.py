"""How often nodes fail, by what Slurm's records show of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccr.slurm.nodes import USUAL_MTBF, YEAR, NodeInfo, estimate_mtbf

NOW = 50 * YEAR


def node(up: float | None, *states: str, since: float | None = None) -> NodeInfo:
    """up: seconds since its boot; since: for how long it has had a reason."""
    return NodeInfo(
        name="n",
        states=frozenset(states or {"IDLE"}),
        partitions=("main",),
        reason="",
        boot_time=None if up is None else NOW - up,
        reason_time=None if since is None else NOW - since,
    )


def test_nothing_known() -> None:
    assert estimate_mtbf([], NOW).mtbf == USUAL_MTBF
    assert estimate_mtbf([node(None), node(None, "FUTURE")], NOW).mtbf == USUAL_MTBF


def test_all_were_booted_together_and_nothing_has_failed_since() -> None:
    found = estimate_mtbf([node(YEAR + k) for k in range(100)], NOW)
    assert found.mtbf == pytest.approx(USUAL_MTBF + 100 * YEAR, rel=1e-4)
    assert "0 failures in 100.0 node years" in found.basis


def test_each_boot_of_its_own_is_a_failure() -> None:
    """1000 nodes that fail about once a year each, looked at some day."""
    nodes = [node(YEAR * (k + 0.5) / 500) for k in range(1000)]
    assert estimate_mtbf(nodes, NOW).mtbf == pytest.approx(YEAR, rel=0.05)


def test_a_node_that_is_down_has_failed_and_one_that_was_sent_away_has_not() -> None:
    healthy = [node(YEAR + k) for k in range(100)]
    failed = node(2 * YEAR, "DOWN", "NOT_RESPONDING", since=YEAR)
    assert estimate_mtbf([*healthy, failed], NOW).mtbf == pytest.approx((USUAL_MTBF + 101 * YEAR) / 2, rel=1e-3)
    for states in (("IDLE", "DRAIN"), ("DOWN", "MAINTENANCE"), ("DOWN", "POWERED_DOWN")):
        assert estimate_mtbf([*healthy, node(YEAR, *states, since=9)], NOW).mtbf > 100 * YEAR


@given(st.lists(st.floats(0, 20 * YEAR), max_size=50))
def test_never_silly(ups: list[float]) -> None:
    assert 0 < estimate_mtbf([node(up) for up in ups], NOW).mtbf < 1000 * YEAR
