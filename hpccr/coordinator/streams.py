"""The job's stdin, stdout and stderr on the coordinator's side, and how far each has got.

The real streams may block for as long as they like (a pager, a full pipe, NFS), so each is served by a thread of its
own; the event loop never waits for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpccr.coordinator.sink import CHUNK, Sink, is_null, is_regular
from hpccr.errors import HpccrError
from hpccr.model import Stream

LOOK = 0.5
"""Seconds between looks whether what waits to be written can be."""
SYNC = 30.0
"""Seconds that a checkpoint waits for the output to be on its disk: less than it has for its manifest."""
WINDOW = 256 << 10
"""Bytes of input that may be on their way to the job."""


def same_file(first: int, second: int) -> bool:
    """Whether two descriptors lead to the same file, pipe or terminal: then one pipe keeps the order of the writes."""
    try:
        a, b = os.fstat(first), os.fstat(second)
    except OSError:
        return False
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def stdin_kind(fd: int = 0) -> str:
    """ "pipe" if the job gets input through a pipe, "null" if there can be none."""
    try:
        os.fstat(fd)
    except OSError:
        return "null"
    return "null" if is_null(fd) else "pipe"


def outputs(process: int | str) -> tuple[str, ...]:
    """Paths of the regular files that are a process's stdout and stderr, as far as it lets us see."""
    found = []
    for fd in (1, 2):
        link = f"/proc/{process}/fd/{fd}"
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.stat(link).st_mode):
                found.append(os.readlink(link))
    return tuple(path for path in found if path.startswith("/"))


class Source:
    """The job's stdin: read by a thread, a window ahead of the job at most."""

    def __init__(self, fd: int, *, skip: int, feed: Callable[[bytes], None]) -> None:
        """skip: bytes the job consumed before the checkpoint it is restored from. feed: called in the event loop
        with each chunk, b"" at the end."""
        self._fd = fd
        self._skip = skip
        self._feed = feed
        self._loop = asyncio.get_running_loop()
        self._room = threading.Semaphore(WINDOW // CHUNK)
        self._in_flight = 0
        self._chunks: list[int] = []
        self.sent = skip
        """Bytes of the stream that have been sent to the job, the skipped ones included."""
        self._started = False
        self._open = False
        self._held: list[bytes] = []
        """What came while there was no job to take it."""
        self._ended = False
        self._stopped = False
        self._thread = threading.Thread(target=self._read_all, name="stdin", daemon=True)

    def start(self) -> None:
        """There is a job that takes input: begin to read, or go on."""
        if not self._started:
            self._started = True
            self._thread.start()
        self._open = True
        held, self._held = self._held, []
        for data in held:
            self._pass_on(data)
        if self._ended:
            self._feed(b"")

    def pause(self) -> None:
        """The job is gone: hold back what comes, for the one that is restored."""
        self._open = False

    def taken(self, count: int) -> None:
        """The agent has written `count` bytes into the job's pipe."""
        self._in_flight -= count
        while self._chunks and self._in_flight <= sum(self._chunks[1:]):
            self._chunks.pop(0)
            self._room.release()

    def stop(self) -> None:
        """Feed nothing more. A blocked read is left to the end of the process."""
        self._stopped = True
        self._room.release()

    def _read_all(self) -> None:
        try:
            self._discard()
            while not self._stopped:
                self._room.acquire()
                data = self._read(CHUNK)
                if self._stopped:
                    return
                self._loop.call_soon_threadsafe(self._fed, data)
                if not data:
                    return
        except RuntimeError:
            return  # the event loop has ended
        except OSError:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._fed, b"")

    def _discard(self) -> None:
        left = self._skip
        if left and is_regular(self._fd):
            os.lseek(self._fd, left, os.SEEK_CUR)
            return
        while left and (data := self._read(min(CHUNK, left))):
            left -= len(data)

    def _read(self, count: int) -> bytes:
        while True:
            try:
                return os.read(self._fd, count)
            except BlockingIOError:
                select.select([self._fd], [], [])

    def _fed(self, data: bytes) -> None:
        if self._stopped:
            return
        if not data:
            self._ended = True
            if self._open:
                self._feed(b"")
        elif self._open:
            self._pass_on(data)
        else:
            self._held.append(data)

    def _pass_on(self, data: bytes) -> None:
        self._in_flight += len(data)
        self._chunks.append(len(data))
        self.sent += len(data)
        self._feed(data)


@dataclass(frozen=True)
class Positions:
    """How far all three streams had got at a freeze."""

    stdin: Stream
    stdout: Stream
    stderr: Stream


class Streams:
    """All three streams of one `hpccr run`, across the restores of its step."""

    def __init__(
        self,
        *,
        journal: Path,
        began: tuple[Stream | None, Stream | None] | None,
        taken: Callable[[int], None],
        feed: Callable[[bytes], None],
        warn: Callable[[str], None],
        broken: Callable[[int], None],
    ) -> None:
        """began: where the step's output began in stdout's and stderr's files, None at its first start. warn: tells
        the user. broken: told the number (1, 2) of an output stream that nobody reads any more."""
        self.stdin = stdin_kind(0)
        self.merged = same_file(1, 2)
        self._feed = feed
        self._warn = warn
        self._told = False

        def sink(number: int, name: str) -> Sink:
            copy = journal.with_name(f"{journal.name}.{name}")
            return Sink(number, taken=taken, warn=warn, broken=lambda: broken(number), journal=copy)

        self._sinks = {1: sink(1, "stdout")}
        self._sinks[2] = self._sinks[1] if self.merged else sink(2, "stderr")
        self.began = began or (self._sinks[1].position, self._sinks[2].position)
        self._source: Source | None = None
        self._skipped = 0
        self._start = os.lseek(0, 0, os.SEEK_CUR) if is_regular(0) else 0
        self._parents = outputs(os.getppid())

    def begin(self, positions: Positions | None) -> None:
        """Before a start (None) or a restore: the input comes from there on. Raises HpccrError if input that was
        consumed cannot be skipped again."""
        self._skipped = (positions.stdin.position or 0) if positions else 0
        if self.stdin == "pipe":
            self._open_source(self._skipped)

    async def cut_back(self, positions: Positions | None) -> None:
        """Before the job that was started (None) or restored writes anything: put the output files back to where they
        were then. At the latest possible moment, as long as another checkpoint may be restored instead. Returns when
        that is done."""
        targets = (positions.stdout, positions.stderr) if positions else self.began
        for number, target in zip((1, 2), targets, strict=True):
            if number == 1 or not self.merged:
                self._sinks[number].cut_back(target or Stream(None), start=positions is None)
        if positions and not self._told and not all(sink.rewinds for sink in self._sinks.values()):
            self._told = True
            self._warn(
                "the job's output goes to a pipe or a terminal: what it wrote after the checkpoint cannot be taken "
                "back, and comes again"
            )
        await self.written()

    def _open_source(self, consumed: int) -> None:
        if self._source is None:
            self._source = Source(0, skip=consumed, feed=self._feed)
        elif is_regular(0):
            self._source.stop()
            os.lseek(0, self._start, os.SEEK_SET)
            self._source = Source(0, skip=consumed, feed=self._feed)
        elif self._source.sent > consumed:
            raise HpccrError(
                "the job's stdin is a pipe from which it has read since the checkpoint: it cannot be read again",
                hint="give the input as a file (`< file`), which can be rewound",
            )

    def running(self) -> None:
        """The job takes input now."""
        if self._source is not None:
            self._source.start()

    def pause(self) -> None:
        """No job is there to take it."""
        if self._source is not None:
            self._source.pause()

    def output(self, stream: int, data: bytes) -> None:
        self._sinks[stream].put(data)

    def input_taken(self, count: int) -> None:
        if self._source is not None:
            self._source.taken(count)

    async def written(self, limit: float = math.inf) -> str:
        """Returns when all output so far is in the regular files that it goes to; or why it cannot be written now, or
        not within `limit` seconds."""
        marks = [asyncio.ensure_future(sink.mark()) for sink in set(self._sinks.values()) if sink.regular]
        began = time.monotonic()
        while marks:
            _, waiting = await asyncio.wait(marks, timeout=LOOK)
            if not waiting or self.trouble:
                break
            if time.monotonic() - began > limit:
                return f"it takes more than {limit:.0f} s"
        return self.trouble

    async def positions(self, stdin_consumed: int) -> Positions:
        """Where the streams are, all output so far included, which a loss of power does not take any more then.
        stdin_consumed: see wire.messages.Frozen."""
        consumed = self._skipped + stdin_consumed
        stdout, stderr = await asyncio.gather(self._sinks[1].mark(), self._sinks[2].mark())
        await self._sync()
        return Positions(Stream(consumed), stdout, stderr)

    async def _sync(self) -> None:
        """Not worth a checkpoint if it fails or takes too long, or one would be lost for a loss that may never come."""
        syncing = [asyncio.ensure_future(asyncio.to_thread(sink.sync)) for sink in set(self._sinks.values())]
        done, late = await asyncio.wait(syncing, timeout=SYNC)
        for why in {task.result() for task in done} | ({f"it takes more than {SYNC:.0f} s"} if late else set()):
            if why:
                self._warn(
                    f"the job's output cannot be brought to its disk ({why}): should this node lose power, lines from "
                    "before the checkpoint may be missing"
                )

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the regular files behind stdout and stderr are, as far as they have a name; and those of the batch
        script, which may have given the job others (`hpccr run ... > file`) and goes on writing to its own."""
        return tuple(dict.fromkeys((*outputs("self"), *self._parents)))

    @property
    def trouble(self) -> str:
        """Why the job's output waits to be written; a checkpoint would wait for it with the job's tasks gone on."""
        return self._sinks[1].trouble or self._sinks[2].trouble

    async def close(self) -> None:
        """Wait until all output is written."""
        if self._source is not None:
            self._source.stop()
        for sink in {id(sink): sink for sink in self._sinks.values()}.values():
            await sink.close()
