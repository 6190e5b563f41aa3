"""Things measured in turn, and compared pair by pair: what else the machine does then falls on both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one or two values the least, the median and the greatest."""
    if len(values) < 3:
        return min(values), statistics.median(values), max(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(over: Sequence[float], under: Sequence[float]) -> str:
    """Median of the ratios of pairs measured one after the other, with their quartiles."""
    low, middle, high = quartiles([a / b for a, b in zip(over, under, strict=True)])
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f}, {len(over)} pairs)"
