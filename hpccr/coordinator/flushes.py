"""The flushes of released checkpoints: their start, their progress, whether they came to a durable checkpoint."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
from collections.abc import Callable, Iterator

from hpccr.config import StoreConfig
from hpccr.errors import HpccrError
from hpccr.model import Manifest
from hpccr.store.gc import collect
from hpccr.store.layout import Step
from hpccr.wire import messages as m

log = logging.getLogger(__name__)

FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
"""What the message of a flush that found no room says."""


def pauses() -> Iterator[float]:
    """Seconds before each further attempt to flush what is left of a job: storage comes back, people make room."""
    return itertools.chain((2.0, 5.0, 15.0), itertools.repeat(30.0))


class Flushes:
    """post(capsule, message): send a request; done(capsule, message): what a capsule would have answered, after a
    flush that succeeded without our having heard of it."""

    def __init__(
        self,
        *,
        step: Step,
        config: StoreConfig,
        post: Callable[[int, m.Message], None],
        done: Callable[[int, m.Message], None],
    ) -> None:
        self._step = step
        self._config = config
        self._post = post
        self._done = done
        self.progress: dict[int, tuple[int, int]] = {}
        """Of the newest checkpoint, by capsule: bytes done and in all."""
        self._manifests: dict[int, Manifest] = {}
        self._durable: dict[int, asyncio.Future[None]] = {}
        self._pauses: dict[tuple[int, int], Iterator[float]] = {}

    def expect(self, sequence: int) -> None:
        """A checkpoint with that number has been begun."""
        self._durable[sequence] = asyncio.get_running_loop().create_future()

    def begin(self, manifest: Manifest, sizes: list[int]) -> None:
        """Flush every capsule. sizes: of their images, in capsule order."""
        self._manifests[manifest.sequence] = manifest
        self.progress = {capsule: (0, size) for capsule, size in enumerate(sizes)}
        for capsule in range(manifest.capsules):
            self._flush(manifest.sequence, capsule)

    def _flush(self, sequence: int, capsule: int) -> None:
        directory = str(self._step.checkpoint(sequence).capsule_path(capsule))
        self._post(capsule, m.Flush(directory, self._config.level, self._config.share))

    async def again(self, sequence: int, capsule: int, failure: m.Failed) -> None:
        """After a while, flush what a killed job has left there once more."""
        key = sequence, capsule
        pause = next(self._pauses.setdefault(key, pauses()))
        log.warning("trying again in %g s to flush checkpoint %d of hpccr-%d", pause, sequence, capsule)
        if any(text in failure.message for text in FULL):
            await self._make_room()
        await asyncio.sleep(pause)
        try:
            fragment = await asyncio.to_thread(self._step.checkpoint(sequence).fragment, capsule)
        except (OSError, HpccrError):
            fragment = None
        if fragment is not None and fragment.checkpoint == self._manifests[sequence].checkpoint:
            self._done(capsule, m.Flushed(sequence, fragment.bytes, 0.0))
        else:
            self._flush(sequence, capsule)

    async def _make_room(self) -> None:
        """One complete checkpoint is enough until this one is another."""
        try:
            await asyncio.to_thread(collect, self._step, keep=1)
        except (OSError, HpccrError) as error:
            log.warning("cannot remove old checkpoints: %s", error)

    def pending(self, sequence: int) -> asyncio.Future[None] | None:
        """What is done when that checkpoint is durable, or never will be; None if that is settled."""
        future = self._durable.get(sequence)
        return None if future is None or future.done() else future

    def settle(self, sequence: int, error: HpccrError | None) -> None:
        """It is durable, or will not be."""
        future = self.pending(sequence)
        if future is None:
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
            future.exception()  # seen: whoever waits gets it, and nobody may be waiting

    def give_up(self, error: HpccrError) -> None:
        """Nobody will hear of any flush any more."""
        for sequence in self._durable:
            self.settle(sequence, error)

    async def durable(self, sequence: int) -> None:
        """Wait until a released checkpoint is in the store whole. Raises the error that kept it from that."""
        await asyncio.shield(self._durable[sequence])
