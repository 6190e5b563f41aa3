"""Which checkpoint a boot may start from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from hpccr.coordinator.recovery import DAMAGED, MAX_BOOTS
from hpccr.errors import CorruptError, ExitCode, HpccrError, NoCheckpointError, PeerLostError, error_for
from hpccr.model import Manifest
from hpccr.store import abandoned
from hpccr.store.layout import Checkpoint, State, Step

log = logging.getLogger(__name__)

FLUSH_POLL = 0.5
"""Seconds between looks at a flush that another node is still doing."""


class Candidates:
    """The complete checkpoints of a step but for those that were refused. warn: tells the user of one passed over;
    afresh, again: how the job is started from the beginning, or once more; fruitless: how often each checkpoint has
    been tried for nothing (recovery.Past)."""

    def __init__(
        self,
        step: Step,
        warn: Callable[[str], None],
        *,
        afresh: str = "",
        again: str = "",
        fruitless: Mapping[int, int] | None = None,
    ) -> None:
        self._step = step
        self._warn = warn
        self._afresh = afresh
        self._again = again
        self._refused: dict[int, HpccrError] = {
            sequence: PeerLostError(f"{boots} attempts to restore it have come to nothing")
            for sequence, boots in (fruitless or {}).items()
            if sequence > 0 and boots >= MAX_BOOTS
        }

    def refuse(self, sequence: int, why: HpccrError) -> None:
        """Do not offer this one again in this run of the job: it did not verify or did not restore."""
        self._refused[sequence] = why

    async def exactly(self, sequence: int) -> Manifest:
        """That one, waiting for its flush. Raises NoCheckpointError, CorruptError."""
        checkpoint = self._step.checkpoint(sequence)
        if await self._settled(checkpoint) is not State.COMPLETE:
            raise NoCheckpointError(
                f"checkpoint {sequence} of {self._step.key} is not complete",
                hint=f"`hpccr status {self._step.key.job}` shows the checkpoints there are",
            )
        return await asyncio.to_thread(checkpoint.manifest)

    async def newest(self) -> Manifest | None:
        """The newest complete one of what the job has become (store.abandoned), waiting for one whose flush is still
        going on; None if there is none.

        Raises HpccrError if there were checkpoints, but nothing is left that can be restored: CorruptError if one of
        them is damaged.
        """
        left_out: list[tuple[int, HpccrError]] = []
        for checkpoint in await asyncio.to_thread(self._step.checkpoints):
            if checkpoint.sequence in self._refused:
                left_out.append((checkpoint.sequence, self._refused[checkpoint.sequence]))
                continue
            try:
                if left := await asyncio.to_thread(abandoned.found, checkpoint.path):
                    log.info("checkpoint %d is passed over: %s", checkpoint.sequence, left)
                    continue
                if await self._settled(checkpoint) is State.COMPLETE:
                    return await asyncio.to_thread(checkpoint.manifest)
                found = await asyncio.to_thread(checkpoint.state)
                problem = found.problem
                if not found.missing:
                    left_out.append((checkpoint.sequence, CorruptError(problem)))
            except (CorruptError, NoCheckpointError) as error:
                problem = error.message
                left_out.append((checkpoint.sequence, CorruptError(problem)))
            self._warn(f"checkpoint {checkpoint.sequence} is passed over: {problem}")
        if left_out:
            raise self._nothing_left(left_out)
        return None

    def _nothing_left(self, left_out: list[tuple[int, HpccrError]]) -> HpccrError:
        why = "; ".join(f"checkpoint {sequence}: {error.message}" for sequence, error in left_out)
        codes = [error.code for _, error in left_out]
        damaged = any(code in DAMAGED for code in codes)
        return error_for(
            ExitCode.CORRUPT if damaged else codes[0],
            f"no checkpoint of {self._step.key} can be restored: {why}",
            (self._afresh or f"`hpccr verify {self._step.key.job}` tells what is wrong with the newest")
            if damaged
            else f"once the cause is gone: {self._again}",
        )

    async def _settled(self, checkpoint: Checkpoint) -> State:
        """complete or incomplete: a flush that makes progress on whatever node is waited for."""
        while True:
            found = await asyncio.to_thread(checkpoint.state)
            if found.state is not State.FLUSHING:
                return found.state
            log.info("checkpoint %d is being written: %d of %d bytes", checkpoint.sequence, found.done, found.total)
            await asyncio.sleep(FLUSH_POLL)
