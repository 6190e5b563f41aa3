"""Whether a later run of the job has taken a step over: then this one is a ghost on a node that is cut off.

Slurm starts a job again when it has lost one of its nodes; what runs on that node does not know, and may still reach
the store. Each run marks the step when it claims it (store.steps.claim_step), and the highest mark owns the step.
"""

from __future__ import annotations

import asyncio
import logging

from hpccr.errors import SupersededError
from hpccr.store.layout import Step
from hpccr.store.steps import last_run

log = logging.getLogger(__name__)

POLL = 5.0
"""Seconds between looks: shared storage has no events."""


class Succession:
    """run: this run's mark, its SLURM_RESTART_COUNT; for `hpccr restore` that of the last run."""

    def __init__(self, step: Step, run: int) -> None:
        self._step = step
        self._run = run

    def check(self) -> None:
        """Raises SupersededError if this run has been superseded."""
        try:
            last = last_run(self._step)
        except OSError as error:
            log.warning("cannot see who owns the step: %s", error)
            return
        if last > self._run:
            raise SupersededError(f"job {self._step.key.job} has been started again elsewhere: this run of it ends")

    async def superseded(self) -> SupersededError:
        """Returns when it has."""
        while True:
            try:
                await asyncio.to_thread(self.check)
            except SupersededError as error:
                return error
            await asyncio.sleep(POLL)
