"""Checkpoints by the clock: every interval, and a last one before the job's time limit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from hpccr.coordinator.schedule import Costs, Interval, last_moment, next_periodic
from hpccr.errors import HpccrError

log = logging.getLogger(__name__)

LOOK_AGAIN = 300.0
"""Seconds between two questions to Slurm for the end time, which an administrator may move."""
RETRY = 10.0
"""Seconds after a failed checkpoint before the time limit until the next attempt."""


class Timekeeper:
    """Serves one Boot from the moment that it runs; cancel run() to stop."""

    def __init__(
        self,
        *,
        interval: Interval | None,
        mtbf: float,
        costs: Callable[[], Costs],
        end_time: Callable[[], float | None] | None,
        checkpoint: Callable[[], Awaitable[object]],
        leave: Callable[[], Awaitable[object]],
        log_choice: Callable[[str], None],
    ) -> None:
        """mtbf: of the whole job, seconds. end_time: asks when the time limit ends the job (blocking, may raise
        HpccrError); None: nothing is to be done about it. checkpoint, leave: make a checkpoint that the job runs on
        after, or the last one with a requeue; both raise HpccrError."""
        self._interval = interval
        self._mtbf = mtbf
        self._costs = costs
        self._end_time = end_time
        self._checkpoint = checkpoint
        self._leave = leave
        self._log_choice = log_choice

    async def run(self) -> None:
        """Never returns by itself but after the job has left."""
        since = last = time.time()
        told: float | None = None
        while True:
            now = time.time()
            due = self._due(last)
            if due is not None and self._interval is not None and self._interval.seconds is None:
                chosen = round(due - last)
                if told is None or abs(chosen - told) > told / 10:
                    told = chosen
                    self._log_choice(f"a checkpoint every {chosen} s, for a failure every {self._mtbf:.0f} s")
            limit = await self._limit(since)
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

    def _due(self, last: float) -> float | None:
        if self._interval is None:
            return None
        return next_periodic(self._interval, last=last, costs=self._costs(), mtbf=self._mtbf)

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
