"""Which checkpoint a boot may start from."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hpccr.errors import CorruptError, NoCheckpointError
from hpccr.model import Manifest
from hpccr.store.layout import Checkpoint, State, Step

log = logging.getLogger(__name__)

FLUSH_POLL = 0.5
"""Seconds between looks at a flush that another node is still doing."""


MAX_BOOTS = 3
"""Boots from one checkpoint, over all requeues of the job, that may come to nothing; then it is passed over."""


def fruitless(happened: Iterable[Mapping[str, Any]]) -> Counter[int]:
    """How often each checkpoint (0: the start) has been booted from since it last came to a running job, by the events
    of the step. Boots that Slurm ended (a requeue, a preemption) do not count."""
    found: Counter[int] = Counter()
    current = -1
    for event in happened:
        match event["event"]:
            case "boot":
                current = int(event.get("sequence", 0))
                found[current] += 1
            case "restored":
                found[current] = 0
            case "checkpoint":
                found.pop(int(event.get("sequence", 0)), None)  # another one of that number was removed
            case "terminate" if event.get("why") != "unknown":
                found[current] = max(0, found[current] - 1)
                current = -1  # Slurm may signal more than once
    return found


class Candidates:
    """The complete checkpoints of a step but for those that were refused. warn: tells the user of one passed over;
    afresh: how the job is started from the beginning; happened: the step's events so far."""

    def __init__(
        self,
        step: Step,
        warn: Callable[[str], None],
        *,
        afresh: str = "",
        happened: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._step = step
        self._warn = warn
        self._afresh = afresh
        self._refused = {
            sequence: f"{boots} attempts to restore it have come to nothing"
            for sequence, boots in fruitless(happened).items()
            if sequence > 0 and boots >= MAX_BOOTS
        }

    def refuse(self, sequence: int, why: str) -> None:
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
        """The newest complete one, waiting for one whose flush is still going on; None if there is none.

        Raises CorruptError if there were checkpoints, but nothing is left that can be restored.
        """
        damaged = []
        for checkpoint in await asyncio.to_thread(self._step.checkpoints):
            if checkpoint.sequence in self._refused:
                damaged.append(f"checkpoint {checkpoint.sequence}: {self._refused[checkpoint.sequence]}")
                continue
            try:
                if await self._settled(checkpoint) is State.COMPLETE:
                    return await asyncio.to_thread(checkpoint.manifest)
                found = await asyncio.to_thread(checkpoint.state)
                problem = found.problem
                if not found.missing:
                    damaged.append(f"checkpoint {checkpoint.sequence}: {problem}")
            except (CorruptError, NoCheckpointError) as error:
                problem = error.message
                damaged.append(f"checkpoint {checkpoint.sequence}: {problem}")
            self._warn(f"checkpoint {checkpoint.sequence} is passed over: {problem}")
        if damaged:
            raise CorruptError(
                f"no checkpoint of {self._step.key} can be restored: {'; '.join(damaged)}",
                hint=self._afresh or f"`hpccr verify {self._step.key.job} SEQ` tells what is wrong with one",
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
