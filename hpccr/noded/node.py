"""What all leases of one hpccrd share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from hpccr.config import Config
from hpccr.noded.network import Plumber
from hpccr.noded.seal import SiteKey
from hpccr.noded.spool import Area, Directory, Spool

log = logging.getLogger(__name__)

MAX_FLUSHES = 8
"""Flushes of one user at a time; others of his wait. They run outside of his jobs' limits."""
MAX_HOSTS = 64 << 10
"""Bytes of the node's /etc/hosts that a capsule's has."""


@dataclass
class Node:
    """One per hpccrd."""

    config: Config
    key: SiteKey
    name: str
    cpu_flags: tuple[str, ...]
    plumber: Plumber
    spool: Spool
    runtime: Area
    criu_ready: asyncio.Event
    """Set when CRIU's own feature cache is there: with a hold on lo and no cache its probe would hang."""
    flushes: set[asyncio.Task[None]] = field(default_factory=set)
    waiting: set[asyncio.Future[None]] = field(default_factory=set)
    """One of each flush whose process has not been started yet."""
    endings: set[asyncio.Task[None]] = field(default_factory=set)
    """Capsules being undone: a stop waits for them, whatever became of their connections."""
    vnis: set[int] = field(default_factory=set)
    claims: dict[str, int] = field(default_factory=dict)
    """Bytes of the spool that dumps under way may still take, by lease name."""
    _turns: dict[int, asyncio.Semaphore] = field(default_factory=dict)

    @property
    def keeps(self) -> bool:
        """Whether durable images stay in the spool."""
        return self.config.node.spool_keep > 0

    def claimed(self, name: str) -> int:
        """Bytes of the spool that are promised to other leases than `name`."""
        return sum(size for other, size in self.claims.items() if other != name)

    def room(self, name: str) -> int:
        """Bytes of the spool that lease `name` may write, if kept images go."""
        return max(0, self.spool.room() - self.claimed(name))

    @contextlib.asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[Callable[[], None]]:
        """For a user's flush while its processes run; it calls what it is given once they have been started."""
        waiting = asyncio.get_running_loop().create_future()

        def begun() -> None:
            self.waiting.discard(waiting)
            if not waiting.done():
                waiting.set_result(None)

        self.waiting.add(waiting)
        try:
            async with self._turns.setdefault(uid, asyncio.Semaphore(MAX_FLUSHES)):
                yield begun
        finally:
            begun()

    async def begin_all(self) -> None:
        """Let all flushes begin at once; returns when they have. What has not begun when hpccrd ends is lost."""
        for turn in self._turns.values():
            for _ in self.waiting:
                turn.release()
        if self.waiting:
            await asyncio.wait(self.waiting)

    async def claim(self, name: str, size: int) -> None:
        """Let kept images go, the oldest first, as far as lease `name` may need their room for its dump."""
        self.claims[name] = size
        await asyncio.to_thread(self.spool.make_room, sum(self.claims.values()))

    def choose_vni(self) -> int:
        while (vni := secrets.randbelow((1 << 24) - 1) + 1) in self.vnis:
            pass
        return vni


async def to_its_end[T](work: Coroutine[Any, Any, T]) -> T:
    """Await what must not be left half done: if the caller is cancelled, that takes effect when `work` has ended.

    Requests are cancelled at any moment, when their capsule ends. What waits for a thread may then have lost what the
    thread brings, and a thread that has not begun never does.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def remove(directory: Directory) -> None:
    """Remove it, whoever is cancelled meanwhile."""
    await to_its_end(asyncio.to_thread(directory.remove))


def node_hosts() -> str:
    """The node's /etc/hosts, as far as it fits into a packet to init beside the capsules' names."""
    try:
        with open("/etc/hosts", errors="replace") as file:
            text = file.read(MAX_HOSTS + 1)
    except OSError:
        return ""
    if len(text) > MAX_HOSTS:
        log.warning("/etc/hosts is longer than %d bytes: names in it are not known inside capsules", MAX_HOSTS)
        return ""
    return text
