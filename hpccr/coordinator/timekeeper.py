"""Checkpoints by the clock: every interval, and a last one before the job's time limit.

Neither waits for the other, and nothing that goes wrong with a checkpoint, the store or Slurm ends them: this is what
keeps a job from being lost when nobody looks.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable

from hpccr.config import CheckpointConfig
from hpccr.coordinator.schedule import Costs, Interval, last_moment, next_periodic, next_trial
from hpccr.errors import HpccrError
from hpccr.slurm.nodes import USUAL_MTBF, FailureRate

log = logging.getLogger(__name__)

LOOK_AGAIN = 300.0
"""Seconds between two questions to Slurm for the end time, which an administrator may move."""
RETRY = 10.0
"""Seconds after a failed checkpoint before the time limit until the next attempt, and after a question that Slurm did
not answer until it is asked again."""
ANSWER = (5.0, 30.0)
"""Seconds that Slurm has for an answer: at least, and at most where the time limit is far enough."""


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
        end: float | None,
        end_time: Callable[[], float | None] | None,
        checkpoint: Callable[[str], Awaitable[object]],
        leave: Callable[[float], Awaitable[object]],
        log_choice: Callable[[str], None],
        planned: Callable[[float | None], None],
    ) -> None:
        """rate: of one of the job's nodes, of which it has `nodes`. log_choice: told what "auto" has chosen. planned:
        told when the next checkpoint will begin, None if none is due. end: when the time limit ends the job, as far as
        is known without asking. end_time: asks (blocking, may raise HpccrError); None: nothing is to be done about it.
        checkpoint: make one that the job runs on after, given the reason. leave: make the last one and have the job
        requeued, given when its time is over. Both and `planned` may raise HpccrError and OSError."""
        self._interval = interval
        self._rate = rate
        self._nodes = nodes
        self._costs = costs
        self._end = end if end_time is not None else None
        self._end_time = end_time
        self._checkpoint = checkpoint
        self._leave = leave
        self._log_choice = log_choice
        self._tell_planned = planned
        self._due: float | None = None
        self._limit: float | None = None
        self._planned: float | None = None
        self._chosen: float | None = None

    async def run(self) -> None:
        """Never returns by itself but after the job has left."""
        since = time.time()
        limit = asyncio.create_task(self._serve_limit(since))
        periodic = asyncio.create_task(self._serve_interval(since))
        try:
            await asyncio.wait((limit, periodic), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (limit, periodic):
                task.cancel()
            results = await asyncio.gather(limit, periodic, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    # --- by interval --------------------------------------------------------------------------------------------

    async def _serve_interval(self, since: float) -> None:
        last = since
        trials = 0
        while True:
            due = trial = None
            if self._interval is not None:
                due = next_periodic(self._interval, last=last, costs=self._costs(), mtbf=self._rate.mtbf / self._nodes)
                self._choose(due - last)
            if self._end is not None:
                trial = next_trial(self._end, running_since=since, costs=self._costs(), trials=trials)
            self._due = _first(due, trial)
            self._plan()
            now = time.time()
            if self._due is not None and now >= self._due:
                if self._due == due:
                    await self._try(self._checkpoint("interval"), "by interval")
                else:
                    await self._try(self._checkpoint("trial"), "to learn what one takes")
                trials += 1
                last = time.time()
                continue
            await asyncio.sleep(min(LOOK_AGAIN, max(0.0, (self._due or math.inf) - now)))

    def _choose(self, seconds: float) -> None:
        if self._interval is None or self._interval.seconds is not None:
            return
        if self._chosen is None or abs(seconds - self._chosen) > self._chosen / 10:
            self._chosen = seconds
            self._log_choice(self._choice(round(seconds)))

    def _choice(self, seconds: int) -> str:
        cost = self._costs().frozen
        stops = f"it stops the job for {cost:.2g} s" if cost else "nobody knows yet for how long it stops the job"
        return (
            f"auto: a checkpoint every {seconds} s: {stops}, and one of {self._nodes} nodes fails every "
            f"{self._rate.mtbf / self._nodes / 86400:.3g} days ({self._rate.basis})"
        )

    # --- before the time limit ----------------------------------------------------------------------------------

    async def _serve_limit(self, since: float) -> None:
        """Returns when the job has left."""
        while True:
            answered = await self._ask()
            now = time.time()
            self._limit = None
            if self._end is not None:
                self._limit = last_moment(self._end, running_since=since, costs=self._costs())
            self._plan()
            if self._end is not None and self._limit is not None and now >= self._limit:
                if await self._try(self._leave(self._end), "before the time limit"):
                    return
                since = time.time() - RETRY  # last_moment() then falls into what is left
                await asyncio.sleep(RETRY)
                continue
            pause = LOOK_AGAIN if answered else RETRY
            await asyncio.sleep(min(pause, max(0.0, (self._limit or math.inf) - now)))

    async def _ask(self) -> bool:
        """Learn when the job ends, which an administrator may move; False if Slurm does not say: what was known before
        then counts."""
        if self._end_time is None:
            return True
        shortest, longest = ANSWER
        patience = max(shortest, min(longest, (self._limit or math.inf) - time.time()))
        try:
            self._end = await asyncio.wait_for(asyncio.to_thread(self._end_time), patience)
        except (HpccrError, OSError) as error:
            # TimeoutError is an OSError.
            log.warning("Slurm does not say when the job ends: %s", error or f"no answer within {patience:.0f} s")
            return False
        return True

    # --- both ---------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        following = _first(self._due, self._limit)
        if following != self._planned:
            self._planned = following
            try:
                self._tell_planned(following)
            except (HpccrError, OSError) as error:
                log.warning("cannot record when the next checkpoint is due: %s", error)

    async def _try(self, act: Awaitable[object], what: str) -> bool:
        try:
            await act
        except (HpccrError, OSError) as error:
            log.warning("no checkpoint %s: %s", what, error)
            return False
        return True


def _first(*moments: float | None) -> float | None:
    return min((moment for moment in moments if moment is not None), default=None)
