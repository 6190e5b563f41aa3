"""Checkpoints by the clock: every interval, and a last one before the job's time limit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from hpccr.config import CheckpointConfig
from hpccr.coordinator.schedule import Costs, Interval, last_moment, next_periodic
from hpccr.errors import HpccrError
from hpccr.slurm.nodes import USUAL_MTBF, FailureRate

log = logging.getLogger(__name__)

LOOK_AGAIN = 300.0
"""Seconds between two questions to Slurm for the end time, which an administrator may move."""
RETRY = 10.0
"""Seconds after a failed checkpoint before the time limit until the next attempt."""


async def failure_rate(config: CheckpointConfig, ask: Callable[[], FailureRate]) -> FailureRate:
    """How often a node fails, for the interval "auto": as configured, or what `ask` (blocking, may raise HpccrError)
    finds out."""
    if config.interval != "auto":
        return FailureRate(USUAL_MTBF, "")  # nobody looks at it
    if config.node_mtbf > 0:
        return FailureRate(config.node_mtbf, "checkpoint.node_mtbf")
    try:
        return await asyncio.to_thread(ask)
    except HpccrError as error:
        log.warning("Slurm does not tell of its nodes: %s", error.message)
        return FailureRate(USUAL_MTBF, "what is usual for a node")


class Timekeeper:
    """Serves one Boot from the moment that it runs; cancel run() to stop."""

    def __init__(
        self,
        *,
        interval: Interval | None,
        rate: FailureRate,
        nodes: int,
        costs: Callable[[], Costs],
        end_time: Callable[[], float | None] | None,
        checkpoint: Callable[[], Awaitable[object]],
        leave: Callable[[], Awaitable[object]],
        log_choice: Callable[[str], None],
        planned: Callable[[float | None], None],
    ) -> None:
        """rate: of one of the job's nodes, of which it has `nodes`. log_choice: told what "auto" has chosen. planned:
        told when the next checkpoint will begin, None if none is due. end_time: asks when the time limit ends the job
        (blocking, may raise HpccrError); None: nothing is to be done about it. checkpoint, leave: make a checkpoint
        that the job runs on after, or the last one with a requeue; both raise HpccrError."""
        self._interval = interval
        self._rate = rate
        self._nodes = nodes
        self._costs = costs
        self._end_time = end_time
        self._checkpoint = checkpoint
        self._leave = leave
        self._log_choice = log_choice
        self._planned = planned

    async def run(self) -> None:
        """Never returns by itself but after the job has left."""
        since = last = time.time()
        told: float | None = None
        planned: float | None = None
        while True:
            now = time.time()
            due = self._due(last)
            if due is not None and self._interval is not None and self._interval.seconds is None:
                chosen = round(due - last)
                if told is None or abs(chosen - told) > told / 10:
                    told = chosen
                    self._log_choice(self._choice(chosen))
            limit = await self._limit(since)
            following = min((moment for moment in (due, limit) if moment is not None), default=None)
            if following != planned:
                planned = following
                self._planned(planned)
            if limit is not None and now >= limit:
                if await self._try(self._leave, "before the time limit"):
                    return
                since = time.time() - RETRY  # last_moment() then falls into what is left
                await asyncio.sleep(RETRY)
                continue
            if due is not None and now >= due:
                await self._try(self._checkpoint, "by interval")
                last = time.time()
                continue
            moments = [moment for moment in (due, limit, now + LOOK_AGAIN) if moment is not None]
            await asyncio.sleep(max(0.0, min(moments) - now))

    def _choice(self, seconds: int) -> str:
        cost = self._costs().frozen
        stops = f"it stops the job for {cost:.2g} s" if cost else "nobody knows yet for how long it stops the job"
        return (
            f"auto: a checkpoint every {seconds} s: {stops}, and one of {self._nodes} nodes fails every "
            f"{self._rate.mtbf / self._nodes / 86400:.3g} days ({self._rate.basis})"
        )

    def _due(self, last: float) -> float | None:
        if self._interval is None:
            return None
        return next_periodic(self._interval, last=last, costs=self._costs(), mtbf=self._rate.mtbf / self._nodes)

    async def _limit(self, since: float) -> float | None:
        if self._end_time is None:
            return None
        try:
            end = await asyncio.to_thread(self._end_time)
        except HpccrError as error:
            log.warning("Slurm does not say when the job ends: %s", error.message)
            return None
        return None if end is None else last_moment(end, running_since=since, costs=self._costs())

    async def _try(self, act: Callable[[], Awaitable[object]], what: str) -> bool:
        try:
            await act()
        except HpccrError as error:
            log.warning("no checkpoint %s: %s", what, error.message)
            return False
        return True
