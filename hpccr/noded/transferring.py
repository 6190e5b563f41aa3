"""hpccrd's end of a transfer process (see noded.transfer)."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable

import msgspec

from hpccr.errors import HpccrError, error_for
from hpccr.noded.control import Identity
from hpccr.noded.spawned import ENVIRONMENT, Spawned, memory_file, read_line, read_pipe
from hpccr.noded.spool import Directory
from hpccr.noded.storeworker import KEEP_FREED, User
from hpccr.noded.transfer import Event, FetchJob, Finished, FlushJob, Moved, Refused

MAX_EVENT = 1 << 20
"""Bytes of an event line; the longest carries a CapsuleImage, which fitted into a control packet."""


def user(identity: Identity) -> User:
    return User(uid=identity.uid, gid=identity.gid, groups=identity.groups)


class Transfer:
    """One transfer process. It holds the locks of its directories too, so it may outlive hpccrd."""

    def __init__(
        self, label: str, job: FlushJob | FetchJob, directory: Directory, kept: Directory | None = None
    ) -> None:
        """kept: the capsule's kept image, for a fetch."""
        descriptors = [given.fd for given in (directory, kept) if given is not None]
        self._job = job
        # It has its job from the first moment: hpccrd may end in the next.
        text = memory_file(msgspec.msgpack.encode(job))
        try:
            self._spawned = Spawned(
                [sys.executable, "-I", "-m", "hpccr.noded.transfer", *map(str, descriptors)],
                label=label,
                descriptors=descriptors,
                given=text,
                talks=True,
                environment={**ENVIRONMENT, **KEEP_FREED},
            )
        finally:
            os.close(text)

    async def run(self, moved: Callable[[Moved], None]) -> Finished:
        """Until its end. Raises what the transfer was refused for. Cancelling kills a fetch; a flush goes on alone."""
        try:
            result = await self._listen(moved)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and isinstance(self._job, FlushJob):
                raise
            self._spawned.kill()
            await asyncio.shield(self._reap())
            raise
        await self._reap()
        if isinstance(result, Refused):
            raise error_for(result.code, result.message, result.hint)
        if not isinstance(result, Finished):
            raise HpccrError(f"the transfer process ended unexpectedly\n{self._spawned.last_words}".rstrip())
        return result

    async def _listen(self, moved: Callable[[Moved], None]) -> Event | None:
        result: Event | None = None
        reader = await read_pipe(self._spawned.output.fileno(), limit=MAX_EVENT)
        while line := await read_line(reader):
            event = msgspec.json.decode(line, type=Event)
            if isinstance(event, Moved):
                moved(event)
            else:
                result = event
        return result

    async def _reap(self) -> None:
        await self._spawned.wait()
        await self._spawned.close()
