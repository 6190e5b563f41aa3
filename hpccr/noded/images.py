"""The images of one capsule in the spool: released ones on their way to the store, and those it is restored from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from hpccr.errors import CorruptError, HpccrError, UsageError
from hpccr.model import FORMAT, CapsuleImage, Fragment
from hpccr.noded import kept, transferring
from hpccr.noded.admission import check_directory
from hpccr.noded.control import Identity
from hpccr.noded.node import Node, remove, to_its_end
from hpccr.noded.said import printable
from hpccr.noded.spool import Directory
from hpccr.noded.transfer import FetchJob, Finished, FlushJob, Moved
from hpccr.wire import messages as m

log = logging.getLogger(__name__)

MAX_UNREAD = 64 << 10
"""Bytes of unread replies from which on progress is not reported."""


@dataclass
class Dumping:
    """A checkpoint on its way: from Prepare until it is durable or given up."""

    sequence: int
    checkpoint: str
    directory: Directory
    created: float = 0.0
    image: CapsuleImage | None = None
    frozen_seconds: float = 0.0


class Images:
    """Owns the directories; what is left of them goes with end(), but for flushes under way."""

    def __init__(self, node: Node, name: str, emit: Callable[[m.Message], int]) -> None:
        """name: of the lease; emit: as the lease's."""
        self._node, self._name, self._emit = node, name, emit
        self._fetched: Directory | None = None
        self._copy: Directory | None = None
        self._released: Dumping | None = None
        self._newest: Dumping | None = None
        """That was released: only that one is worth to be flushed again."""
        self._flushes: set[asyncio.Task[None]] = set()
        self._ended = False
        self._over = False

    async def fetch(self, request: m.Fetch, create: m.Create, identity: Identity) -> tuple[Finished, Directory]:
        """Bring a fragment into a directory of the spool, of its own files where they were kept. Raises HpccrError."""
        node, limit = self._node, self._node.config.checkpoint.restore_timeout
        directory = check_directory(request.directory)
        wanted = kept.name(create.key, identity.uid, create.capsule, request.sequence)
        copy = await to_its_end(self._take(wanted))
        self._fetched = fetched = node.spool.create(f"{self._name}-restore")
        job = FetchJob(
            user=transferring.user(identity),
            key=node.key.secret,
            directory=directory,
            limits=node.spool.limits,
            claimed=node.claimed(self._name),
            step=create.key,
            checkpoint=request.checkpoint,
            sequence=request.sequence,
            capsule=create.capsule,
            capsules=create.capsules,
        )
        transfer = transferring.Transfer(f"fetch {self._name}", job, fetched, copy)
        loop = asyncio.get_running_loop()
        most = 0
        try:
            async with asyncio.timeout(limit) as patience:

                def moved(event: Moved) -> None:
                    nonlocal most
                    if event.done > most:
                        most = event.done
                        patience.reschedule(loop.time() + limit)

                finished = await transfer.run(moved)
        except TimeoutError:
            raise HpccrError(
                f"fetching the checkpoint made no progress for {limit:.0f} s",
                hint="is the store's file system slow? checkpoint.restore_timeout is the limit",
            ) from None
        if finished.image is None:
            raise CorruptError("the transfer brought no image")
        if copy is not None and not finished.local:
            self._copy = None
            copy.release()
            await asyncio.to_thread(node.spool.drop, copy.name)  # it is not what it should be
        return finished, fetched

    async def _take(self, name: str) -> Directory | None:
        self._copy = copy = await asyncio.to_thread(self._node.spool.take, name)
        return copy

    async def drop_fetched(self) -> None:
        """The restore is over, or failed."""
        fetched, self._fetched = self._fetched, None
        copy, self._copy = self._copy, None
        if copy is not None:
            copy.release()
        if fetched is not None:
            await remove(fetched)

    async def release(self, dumping: Dumping) -> None:
        """From now on it can be flushed, and is ours."""
        self._newest = dumping
        await self.supersede(dumping)

    async def supersede(self, by: Dumping | None = None) -> None:
        """A released checkpoint that was never flushed is not needed any more."""
        released, self._released = self._released, by
        if released is not None:
            await remove(released.directory)

    def flush(self, request: m.Flush, create: m.Create, identity: Identity, *, nice: int, last: bool) -> None:
        """Begin to copy what was released to the store. Raises HpccrError.

        One at a time, but for the last one of a job that has ended, which does not wait for the one before; another one
        fails at once, and may be tried again.
        """
        released, node = self._released, self._node
        if released is None or released.image is None:
            raise UsageError("there is no released checkpoint to flush")
        if len(self._flushes) > last:
            self._emit(m.FlushFailed(released.sequence, "the checkpoint before is still being copied to the store"))
            return
        job = FlushJob(
            user=transferring.user(identity),
            key=node.key.secret,
            directory=check_directory(request.directory),
            spool=released.directory.path,
            level=request.level,
            share=request.share,
            nice=nice,
            keep=node.spool.limits if node.keeps else None,
            fragment=Fragment(
                format=FORMAT,
                key=create.key,
                checkpoint=released.checkpoint,
                sequence=released.sequence,
                capsule=create.capsule,
                capsules=create.capsules,
                uid=identity.uid,
                gid=identity.gid,
                created=released.created,
                node=node.name,
                image=msgspec.structs.replace(released.image, frozen_seconds=released.frozen_seconds),
                files=(),
            ),
        )
        self._released = None
        # The node's task, not the lease's: it goes on when the lease ends.
        task = asyncio.create_task(self._flush(job, released))
        for flushes in (node.flushes, self._flushes):
            flushes.add(task)
            task.add_done_callback(flushes.discard)

    async def _flush(self, job: FlushJob, released: Dumping) -> None:
        sequence = released.sequence

        def moved(event: Moved) -> None:
            if self._emit(m.Flushing(sequence=sequence, done=event.done, total=event.total)) > MAX_UNREAD:
                log.debug("capsule %s: nobody reads how the flush goes", self._name)

        try:
            async with self._node.turn(job.user.uid) as begun:
                transfer = transferring.Transfer(f"flush {self._name}-{sequence}", job, released.directory)
                begun()
                finished = await transfer.run(moved)
        except Exception as error:
            log.warning("capsule %s: flush of checkpoint %d failed: %s", self._name, sequence, printable(str(error)))
            if released is self._newest and not self._ended:
                self._released = released  # it may be tried again
            else:
                await remove(released.directory)
            hint = error.hint if isinstance(error, HpccrError) else "hpccrd's log on the node has the details"
            self._emit(m.FlushFailed(sequence=sequence, message=str(error), hint=hint))
            return
        released.directory.release()
        if self._over:
            await self._drop_kept(job.fragment)
        self._emit(m.Flushed(sequence=sequence, bytes=finished.bytes, seconds=finished.seconds))

    async def _drop_kept(self, of: Fragment | m.Create, uid: int = 0) -> None:
        uid = of.uid if isinstance(of, Fragment) else uid
        await asyncio.to_thread(self._node.spool.drop, kept.label(of.key, uid, of.capsule))

    async def forget(self, create: m.Create, uid: int) -> None:
        """The step is over: nobody will restore what is kept of it here, nor what is still on its way."""
        self._over = True
        await self._drop_kept(create, uid)

    async def end(self) -> None:
        """The capsule is gone."""
        self._ended = True
        await self.drop_fetched()
        await self.supersede()
