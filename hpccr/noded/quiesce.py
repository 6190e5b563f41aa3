"""The page by which the ranks of a capsule are asked to stand still at a safe point; see docs/internals/quiesce.md.

The page is the user's file: made by the first rank that calls a safe point, in the capsule's own /dev/shm, so that it
is saved and restored with it. Init opens it with the user's ids and only ever reads and writes it by pread and pwrite
(a file that the user has cut short is then a short read and not a signal). Nothing in it is believed: the worst that a
wrong page does is that the user's own checkpoint is made transparently.
"""

from __future__ import annotations

import asyncio
import enum
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable

from hpccr.errors import HpccrError, LockedError
from hpccr.noded import child
from hpccr.noded.control import Identity
from hpccr.wire.messages import Quiesce, Quiesced, RankAt

PATH = "/dev/shm/hpccr-quiesce"  # noqa: S108 - each capsule has its own /dev/shm
MAGIC = 0x3230514343504848
"""The first eight bytes: "HHPCCQ02"; changes with the layout, which mpi/page.h and hpccr/mpi/page.py have too."""
MAX_ENTRIES = 1024
"""Ranks (times communicators of different groups) in one capsule."""
LOOK_AGAIN = 0.005
"""Seconds between two looks at the page while ranks are waited for: they have nothing to wake init with."""

_CLAIMED, _ASKED, _ENDED, _OUTCOMES, _TARGETED, _GO, _RESTARTS, _PATIENCE = 8, 64, 72, 80, 96, 104, 112, 120
_ENTRIES, _ENTRY = 4096, 128
_TARGET, _COUNT = 96, 64
_U64 = struct.Struct("<Q")
_RANK = struct.Struct("<QIIIIII32x8Q")
_ACTIVE = 1
_UNCOUNTED = 0xFFFFFFFFFFFFFFFF

WISHES = "\0hpccr-request"
"""Abstract unix datagram socket of the capsule's network namespace: any datagram asks for a checkpoint."""
WISH_PAUSE = 1.0
"""Seconds after a wish in which more of them are the same one."""

MAX_HEARD = 1000
"""Wishes taken from the queue at once: whoever sends without a pause must not keep init from everything else."""


class Outcome(enum.IntEnum):
    """How a quiesce ended, as the ranks are told."""

    RESUMED = 1
    RESTARTED = 2
    ABANDONED = 3


class Ranks:
    """The ranks of this capsule, as far as they take part. One stage after the other, then end()."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._fd = -1
        self._strangers: frozenset[int] = frozenset()
        """Processes that have the number of a rank that is gone."""

    async def stage(self, request: Quiesce) -> Quiesced:
        """Do what `request` says and wait for the ranks, request.timeout_ms at most."""
        if request.stage == "ask":
            return Quiesced(self._ask())
        if self._fd < 0:
            return Quiesced(())
        asked = self._get(_ASKED)
        if request.stage == "arrive":
            targets = dict(request.targets)
            for place, rank in self._entries(asked):
                # Written before _TARGETED says that it is valid.
                self._put(_ENTRIES + place * _ENTRY + _TARGET, targets.get(rank.group, 0))
            self._put(_TARGETED, asked)
            chosen = set(targets)
        else:
            # Half of the time for traffic that shows no progress, the rest for the hooks.
            self._put(_PATIENCE, request.timeout_ms // 2)
            self._put(_GO, asked)
            chosen = set(dict(request.targets))
        deadline = time.monotonic() + request.timeout_ms / 1000
        while True:
            if not os.fstat(self._fd).st_nlink:
                # It would not be in the checkpoint, and nobody could tell the restored ranks to go on.
                raise LockedError(f"the ranks' page {PATH} was removed", hint="what removes files of /dev/shm?")
            ranks = tuple(rank for _, rank in self._entries(asked) if rank.group in chosen)
            done = all(rank.arrived if request.stage == "arrive" else rank.finished for rank in ranks)
            if done or time.monotonic() >= deadline or any(rank.gone for rank in ranks):
                return Quiesced(ranks)
            await asyncio.sleep(LOOK_AGAIN)

    def end(self, outcome: Outcome) -> None:
        """Tell the ranks that it is over, if they have been asked: also those restored, who were asked elsewhere.

        That they were restored all are told, asked or not.
        """
        try:
            if self._fd < 0 and not self._open():
                return
            if outcome is Outcome.RESTARTED:
                self._put(_RESTARTS, self._get(_RESTARTS) + 1)
            asked = self._get(_ASKED)
            if asked != self._get(_ENDED):
                self._put(_OUTCOMES + 8 * (asked % 2), outcome)
                self._put(_ENDED, asked)
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _ask(self) -> tuple[RankAt, ...]:
        self.end(Outcome.ABANDONED)  # of one whose end was never told
        if not self._open():
            return ()
        asked = self._get(_ASKED) + 1
        self._put(_ASKED, asked & 0x7FFFFFFFFFFFFFFF)
        self._strangers = frozenset()
        pids = {rank.pid for _, rank in self._entries(asked) if not rank.gone}
        self._strangers = frozenset(pid for pid in pids if not _maps_page(pid))
        # A rank writes its count and then looks whether it is asked; here it is the other way round, so that whoever
        # has not seen the question has its newest count in the page.
        return tuple(rank for _, rank in self._entries(asked))

    def _open(self) -> bool:
        if not os.path.lexists(PATH):
            return False
        ours, theirs = socket.socketpair()
        with ours, theirs:

            def give() -> None:
                fd = os.open(PATH, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                socket.send_fds(theirs, [b"p"], [fd])

            try:
                child.call(give, identity=self._identity, keep=(theirs.fileno(),))
                theirs.close()
                _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            except HpccrError as error:
                # Something else of that name, by the user; or no helper could be started, and ranks may stand there.
                print(f"hpccr: the ranks' page {PATH} cannot be opened: {error}", file=sys.stderr)
                return False
        if not fds:
            return False
        found = os.fstat(fds[0])
        if not stat.S_ISREG(found.st_mode) or found.st_dev != os.stat(os.path.dirname(PATH)).st_dev:
            os.close(fds[0])
            return False
        os.set_inheritable(fds[0], False)
        self._fd = fds[0]
        if (magic := self._get(0)) != MAGIC:
            if magic:
                print(f"hpccr: {PATH} is of another version of hpccr's MPI library: no rank is asked", file=sys.stderr)
            os.close(self._fd)
            self._fd = -1
            return False
        return True

    def _get(self, place: int) -> int:
        data = os.pread(self._fd, 8, place)
        return int(_U64.unpack(data)[0]) if len(data) == 8 else 0

    def _put(self, place: int, value: int) -> None:
        os.pwrite(self._fd, _U64.pack(value), place)

    def _entries(self, asked: int) -> list[tuple[int, RankAt]]:
        claimed = min(self._get(_CLAIMED), MAX_ENTRIES)
        data = os.pread(self._fd, claimed * _ENTRY, _ENTRIES)
        # Counts once more: one that says that it waits does so at its newest count, which it has written before.
        again = os.pread(self._fd, claimed * _ENTRY, _ENTRIES)
        found = []
        for place in range(min(len(data), len(again)) // _ENTRY):
            group, pid, size, number, _, state, _, _, waiting, arrived, finished, _, pending, left, gap = (
                _RANK.unpack_from(data, place * _ENTRY)
            )
            if not state or not pid:
                continue
            (count,) = _U64.unpack_from(again, place * _ENTRY + _COUNT)
            found.append(
                (
                    place,
                    RankAt(
                        group=group,
                        size=size,
                        rank=number,
                        pid=pid,
                        count=count,
                        waiting=waiting == asked,
                        arrived=arrived == asked,
                        finished=finished == asked,
                        pending=pending if finished == asked and pending != _UNCOUNTED else 0,
                        uncounted=finished == asked and pending == _UNCOUNTED,
                        gone=state != _ACTIVE or pid in self._strangers or not os.path.exists(f"/proc/{pid}"),
                        left=left,
                        gap=gap,
                    ),
                )
            )
        return found


def _maps_page(pid: int) -> bool:
    """Whether that process is one of those that share the page; False if there is none."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:
            return any(PATH.encode() in line for line in maps)
    except OSError:
        return False  # it has ended


class Wishes:
    """Hears the ranks that ask for a checkpoint."""

    def __init__(self, wanted: Callable[[], None]) -> None:
        """wanted(): called once for any number of wishes within WISH_PAUSE seconds."""
        self._wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.bind(WISHES)
        self._loop.add_reader(self._socket, self._heard)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _heard(self) -> None:
        # What comes in the meantime stays in the queue, and what does not fit is the same wish anyway.
        self._loop.remove_reader(self._socket)
        self._wanted()
        self._loop.call_later(WISH_PAUSE, self._listen)

    def _listen(self) -> None:
        try:
            for _ in range(MAX_HEARD):
                self._socket.recv(1)
        except BlockingIOError:
            self._loop.add_reader(self._socket, self._heard)
        else:
            self._loop.call_later(WISH_PAUSE, self._listen)  # whoever floods it waits
