"""What a SIGTERM leads to: the job's final checkpoint, or its end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from hpccr.coordinator.checkpoints import Checkpoints, requeued
from hpccr.coordinator.plan import BOOT
from hpccr.coordinator.service import Boot
from hpccr.coordinator.site import Site
from hpccr.errors import HpccrError, UnsupportedError

log = logging.getLogger(__name__)

ASK_AGAIN = 3.0
"""Seconds until Slurm is asked once more why it ends the job."""
RETRY = 5.0
"""Seconds until the next attempt to checkpoint a job in its GraceTime."""


class Departure:
    """Of one step. boot: the one that is under way, if one is; warn: tells the user; left: called when nothing of the
    job runs any more and it is back in the queue; stop: called when there is nothing to wait for."""

    def __init__(
        self,
        *,
        site: Site,
        checkpoints: Checkpoints,
        boot: Callable[[], Boot | None],
        event: Callable[..., None],
        warn: Callable[[str], None],
        left: Callable[[], None],
        stop: Callable[[], None],
    ) -> None:
        self._site = site
        self._checkpoints = checkpoints
        self._boot = boot
        self._event = event
        self._warn = warn
        self._left = left
        self._stop = stop
        self._busy = False
        self._own = asyncio.Event()
        self.finished = False
        """Its command has ended: whatever comes now comes too late to mean anything."""
        self.why = ""
        """What Slurm ends the job's processes for, once they have been told to end: they are not at their end."""

    async def signalled(self, *, own: bool) -> None:
        """SIGTERM came, to this process (own) or to an agent on another node."""
        if own:
            self._own.set()
        if self._busy:
            return  # what is under way is what this signal would ask for
        self._busy = True
        try:
            # So is a requeue that somebody has asked for, unless it fails.
            await self._checkpoints.staying.wait()
            await self._depart(own=own)
        finally:
            self._busy = False
            self._own.clear()

    async def _depart(self, *, own: bool) -> None:
        why = await self._why()
        await self._checkpoints.staying.wait()  # somebody may have asked for a requeue meanwhile
        if self.finished:
            return
        self._event("terminate", why=why)
        leaving = why in ("requeue", "preempted")
        if not leaving and not self._own.is_set():
            return  # this process gets its own signal if the job is to end
        boot = self._boot()
        if boot is None or boot.state.phase in BOOT:
            await self._depart_booting(leaving=leaving)
        elif leaving:
            await self._leave(boot, why)
        else:
            self._end(boot, why)

    async def _why(self) -> str:
        """Asks Slurm until it answers. A checkpoint that nobody needed costs less than one that was needed and is
        missing, but what is only a guess kills nobody."""
        guessed = False
        while True:
            try:
                return await asyncio.to_thread(self._site.why_signalled)
            except HpccrError as error:
                log.warning("Slurm does not say why the job is ended: %s", error.message)
            boot = self._boot()
            if boot is not None and boot.running.is_set() and not guessed:
                guessed = True
                try:
                    await self._checkpoints.make(boot, "signal", wait=False)
                except HpccrError as error:
                    self._warn(f"no checkpoint on SIGTERM: {error.message}")
            else:
                await asyncio.sleep(ASK_AGAIN)

    async def _depart_booting(self, *, leaving: bool) -> None:
        """What the job starts from is still there."""
        if not leaving:
            self._stop()
            return
        try:
            await requeued(self._site.ensure_requeued, self._warn)
        except UnsupportedError as error:
            self._warn(error.message)  # it is given time, and boots on
            return
        self._left()

    async def _leave(self, boot: Boot, why: str) -> None:
        """The final checkpoint. In a GraceTime it is tried again until that is over; then the job is told to end as
        it would have been without hpccr."""
        while True:
            await self._checkpoints.staying.wait()
            try:
                await self._checkpoints.final(boot, why)
                return
            except HpccrError as error:
                if boot.outcome.done():
                    return
                self._warn(f"no final checkpoint before the {why}: {error.message}")
            if self._own.is_set():
                self._end(boot, why)
                return
            try:
                async with asyncio.timeout(RETRY):
                    await self._own.wait()
            except TimeoutError:
                continue

    def _end(self, boot: Boot, why: str) -> None:
        if why != "unknown":
            # What is saved from now on would be a job in the middle of its end, the signal with it.
            self._checkpoints.ending = True
            boot.cancel("the job has been told to end")
        if why not in ("cancelled", "unknown"):
            self.why = why
            boot.returns = True
        boot.signal(signal.SIGTERM)
