"""The checkpoints of a step, whoever asks for them, and what comes after each: durability, clean-up, a requeue."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

from hpccr.coordinator import plan
from hpccr.coordinator.report import progress
from hpccr.coordinator.schedule import Costs
from hpccr.coordinator.service import Boot, Snapshot
from hpccr.coordinator.site import Site
from hpccr.errors import HpccrError, LockedError, SupersededError, UnsupportedError
from hpccr.store.gc import collect
from hpccr.store.layout import Step
from hpccr.wire import messages as m

log = logging.getLogger(__name__)

FRESH = 300.0
"""Seconds of work that may be at stake when a job is killed before its last checkpoint is in the store."""
PAUSES = (1.0, 3.0, 10.0)
"""Seconds before each further attempt to have Slurm requeue the job; the last one again and again."""

Post = Callable[[m.Message], None]


def nobody(message: m.Message) -> None:
    """For checkpoints whose progress nobody waits for."""


def safe(now: float, *, began: float, durable: float | None) -> bool:
    """Whether little work would be lost with the final checkpoint: what its job has done since it began to run, or
    since a checkpoint of it became durable."""
    return now - max(began, durable or began) < FRESH


class Checkpoints:
    """Makes checkpoints of whatever Boot it is given. left: called once when the job is requeued and its tasks are
    dead; warn: tells the user."""

    def __init__(
        self, *, step: Step, site: Site, keep: int, left: Callable[[], None], warn: Callable[[str], None]
    ) -> None:
        self._step = step
        self._site = site
        self._keep = keep
        self._left = left
        self._warn = warn
        self._tasks: set[asyncio.Task[Any]] = set()
        self.costs = Costs()
        self.suspended = False
        """The job is stopped by `scontrol suspend`."""
        self.suspensions = 0
        """How often it has been: what a clock says of the time since is no measure."""
        self._safe_at: float | None = None
        """When the newest durable checkpoint of this run of the job was made, by the monotonic clock."""
        self.ending = False
        """The job has been told to end, and is not saved any more."""
        self._requeueing = False
        self.staying = asyncio.Event()
        """Not set while a final checkpoint is being made, or when it has been: the job's tasks will not run on here."""
        self.staying.set()

    def check(self) -> None:
        """Raises LockedError while no checkpoint may begin."""
        if self.suspended:
            raise LockedError("the job is suspended", hint="it can be checkpointed when it has been resumed")
        if self.ending:
            raise LockedError("the job has been told to end")

    async def answer(self, boot: Boot, request: m.CheckpointRequest, post: Post) -> m.CheckpointReply:
        """What a client asked for. Raises HpccrError."""
        reason = request.reason or "command"
        if request.requeue:
            return await self.leave(boot, reason, post, quiesce=request.quiesce)
        return await self._made(boot, kill=False, wait=request.wait, reason=reason, post=post, quiesce=request.quiesce)

    async def leave(
        self,
        boot: Boot,
        reason: str,
        post: Post = nobody,
        *,
        quiesce: str = "",
        hurry: bool = False,
        by: float = math.inf,
    ) -> m.CheckpointReply:
        """The last checkpoint of this run of the job, then a requeue. Raises HpccrError; the job then goes on.

        The job is killed for it, and gone if it does not come into the store: so when that would be much, there is one
        before it that the job runs on after. hurry: there is no time for that, nor for ranks that are late at a safe
        point. by: when it must be requeued at the latest, durable or not: flushes go on without the job, and its next
        run waits for them.
        """
        if self._requeueing and not hurry:
            raise LockedError("the job is being requeued already")
        self._requeueing = True
        try:
            await asyncio.to_thread(self._site.check_requeue)
            now = time.monotonic()
            if not hurry and not safe(now, began=boot.began or now, durable=self._safe_at):
                # The job runs on, for long perhaps, and a time limit or Slurm's own requeue does not wait for this.
                await self._made(boot, kill=False, wait=True, reason=reason, post=post, quiesce=quiesce)
            return await self._last(boot, reason, post, quiesce=quiesce, hurry=hurry, by=by)
        finally:
            self._requeueing = False

    async def final(self, boot: Boot, reason: str) -> None:
        """The last checkpoint of a job that Slurm is requeueing. Raises HpccrError; the job then goes on."""
        await self._last(boot, reason, nobody, quiesce="", hurry=True, by=math.inf)

    async def _last(
        self, boot: Boot, reason: str, post: Post, *, quiesce: str, hurry: bool, by: float
    ) -> m.CheckpointReply:
        if not self.staying.is_set():
            raise LockedError("the job is being requeued already")
        self.staying.clear()
        try:
            reply = await self._made(
                boot, kill=True, wait=True, reason=reason, post=post, quiesce=quiesce, hurry=hurry, by=by
            )
        except BaseException:
            self.staying.set()
            raise
        post(m.Leaving(reply))
        await self._put_back(boot)
        return reply

    async def _put_back(self, boot: Boot) -> None:
        """Have a job requeued whose tasks are dead. If Slurm will not, the checkpoint is restored in place. Raises
        HpccrError then."""
        try:
            await requeued(self._site.ensure_requeued, self._warn)
        except UnsupportedError as error:
            self.staying.set()
            if not boot.outcome.done():
                boot.outcome.set_result(plan.StepLost(m.Failed(error.code, error.message, error.hint)))
            raise
        self._left()

    async def make(self, boot: Boot, reason: str, *, wait: bool) -> Snapshot:
        """A checkpoint that the job runs on after; not yet durable. wait: for the one before to be durable, else
        LockedError. Raises HpccrError."""
        return await self._checkpoint(boot, kill=False, reason=reason, wait=wait)

    async def _made(
        self,
        boot: Boot,
        *,
        kill: bool,
        wait: bool,
        reason: str,
        post: Post,
        quiesce: str = "",
        hurry: bool = False,
        by: float = math.inf,
    ) -> m.CheckpointReply:
        """Make a checkpoint and, if asked, see it into the store until then, telling `post` of the progress."""
        work = self._checkpoint(boot, kill=kill, reason=reason, quiesce=quiesce, hurry=hurry)
        snapshot = await _watched(work, boot, post)
        if wait:
            durable = asyncio.wait_for(
                boot.flushes.durable(snapshot.manifest.sequence), None if by == math.inf else max(0.0, by - time.time())
            )
            try:
                await _watched(durable, boot, post)
            except TimeoutError:
                wait = False
                self._warn(f"checkpoint {snapshot.manifest.sequence} is still being written; there is no time to wait")
        return m.CheckpointReply(
            snapshot.manifest.sequence,
            snapshot.manifest.freeze_seconds,
            snapshot.total_seconds,
            snapshot.bytes,
            wait,
        )

    async def _checkpoint(
        self,
        boot: Boot,
        *,
        kill: bool,
        reason: str,
        wait: bool = True,
        quiesce: str = "",
        hurry: bool = False,
    ) -> Snapshot:
        self.check()
        asked, suspensions = time.monotonic(), self.suspensions
        snapshot = await boot.checkpoint(kill=kill, reason=reason, wait=wait, quiesce=quiesce, hurry=hurry)
        self.costs = self.costs.with_freeze(snapshot.manifest.freeze_seconds)
        task = asyncio.create_task(self._after(boot, snapshot, asked, suspensions, kill=kill))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return snapshot

    async def _after(self, boot: Boot, snapshot: Snapshot, asked: float, suspensions: int, *, kill: bool) -> None:
        """When the checkpoint is durable: drop the oldest. If it never will be and the tasks are dead: start again.

        asked, suspensions: when it was asked for, and how often the job had been suspended by then."""
        try:
            await boot.flushes.durable(snapshot.manifest.sequence)
        except HpccrError as error:
            if kill and not boot.outcome.done():
                failure = m.Failed(error.code, f"the final checkpoint was lost: {error.message}", error.hint)
                boot.outcome.set_result(plan.StepLost(failure))
            await self._collect()  # what failed ones have left may be what the store has no room for
            return
        self._safe_at = asked
        if suspensions == self.suspensions:
            self.costs = self.costs.with_whole(time.monotonic() - asked)
        try:
            await asyncio.to_thread(self._site.show, _shown(snapshot))
        except HpccrError as error:
            log.warning("cannot show the checkpoint in the job's comment: %s", error.message)
        await self._collect()

    async def _collect(self) -> None:
        """Remove what is not needed any more."""
        try:
            await asyncio.to_thread(collect, self._step, keep=self._keep)
        except (OSError, HpccrError) as error:
            self._warn(f"cannot remove old checkpoints: {error}")


async def requeued(ask: Callable[[], None], warn: Callable[[str], None]) -> None:
    """Returns when the job is on its way back into the queue: asks Slurm until it answers, or has killed this process.

    ask: Site.ensure_requeued or move. Raises UnsupportedError if Slurm may not requeue it, SupersededError if it has.
    """
    for pause in itertools.chain(PAUSES, itertools.repeat(PAUSES[-1])):
        try:
            await asyncio.to_thread(ask)
            return
        except (UnsupportedError, SupersededError):
            raise
        except HpccrError as error:
            if pause == PAUSES[0]:
                warn(f"the job is not requeued yet: {error.message}")
        await asyncio.sleep(pause)


async def _watched[T](work: Coroutine[Any, Any, T], boot: Boot, post: Post) -> T:
    """The result of `work`; every half second until then its progress goes to `post`."""
    task = asyncio.ensure_future(work)
    # If nobody waits for it any more, nobody has to hear how it failed.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    while not (await asyncio.wait((task,), timeout=0.5))[0]:
        post(progress(boot))
    return task.result()


def _shown(snapshot: Snapshot) -> str:
    manifest = snapshot.manifest
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(manifest.created))
    return f"checkpoint {manifest.sequence} of {when}, {snapshot.bytes / (1 << 20):.0f} MiB"
