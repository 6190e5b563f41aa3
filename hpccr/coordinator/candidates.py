"""Which checkpoint a boot may start from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from hpccr.errors import CorruptError, NoCheckpointError
from hpccr.model import Manifest
from hpccr.store.layout import Checkpoint, State, Step

log = logging.getLogger(__name__)

FLUSH_POLL = 0.5
"""Seconds between looks at a flush that another node is still doing."""


class Candidates:
    """The complete checkpoints of a step but for those that were refused. warn: tells the user of one passed over."""

    def __init__(self, step: Step, warn: Callable[[str], None]) -> None:
        self._step = step
        self._warn = warn
        self._refused: set[int] = set()

    def refuse(self, sequence: int) -> None:
        """Never offer this one again: it did not verify or did not restore."""
        self._refused.add(sequence)

    async def exactly(self, sequence: int) -> Manifest:
        """That one, waiting for its flush. Raises NoCheckpointError, CorruptError."""
        checkpoint = self._step.checkpoint(sequence)
        if await self._settled(checkpoint) is not State.COMPLETE:
            raise NoCheckpointError(
                f"checkpoint {sequence} of {self._step.key} is not complete",
                hint=f"`hpccr list {self._step.key.job}` shows the checkpoints there are",
            )
        return await asyncio.to_thread(checkpoint.manifest)

    async def newest(self) -> Manifest | None:
        """The newest complete one, waiting for one whose flush is still going on; None if there is none.

        Raises CorruptError if there were checkpoints, but nothing is left that is as it was written.
        """
        damaged = ""
        for checkpoint in await asyncio.to_thread(self._step.checkpoints):
            if checkpoint.sequence in self._refused:
                continue
            try:
                if await self._settled(checkpoint) is State.COMPLETE:
                    return await asyncio.to_thread(checkpoint.manifest)
                found = await asyncio.to_thread(checkpoint.state)
                problem = found.problem
                if not found.missing:
                    damaged = damaged or problem
            except (CorruptError, NoCheckpointError) as error:
                problem = damaged = error.message
            self._warn(f"checkpoint {checkpoint.sequence} is passed over: {problem}")
        if damaged:
            raise CorruptError(
                f"no checkpoint can be used: {damaged}", hint="`hpccr run --fresh` starts from the beginning"
            )
        return None

    async def _settled(self, checkpoint: Checkpoint) -> State:
        """complete or incomplete: a flush that makes progress on whatever node is waited for."""
        while True:
            found = await asyncio.to_thread(checkpoint.state)
            if found.state is not State.FLUSHING:
                return found.state
            log.info("checkpoint %d is being written: %d of %d bytes", checkpoint.sequence, found.done, found.total)
            await asyncio.sleep(FLUSH_POLL)
