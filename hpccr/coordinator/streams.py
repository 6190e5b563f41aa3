"""The job's stdin, stdout and stderr on the coordinator's side, and how far each has got.

The real streams may block for as long as they like (a pager, a full pipe, NFS), so each is served by a thread of its
own; the event loop never waits for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import re
import select
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpccr.errors import HpccrError
from hpccr.model import Stream

CHUNK = 64 << 10
MAX_FOREIGN = 1000
"""Pieces of others' output between the job's own that are remembered."""
MAX_MOVED = 64 << 20
"""Bytes of output behind a notice of Slurm's that are moved up when it is taken out."""
NOTICE = re.compile(rb"slurmstepd[^\n]*: error: \*\*\* (?:JOB|STEP) [^\n]* CANCELLED AT [^\n]* \*\*\*\n")
"""What Slurm writes into the output of a job that it requeues: no undisturbed run has it."""
WINDOW = 256 << 10
"""Bytes of input that may be on their way to the job."""


def is_regular(fd: int) -> bool:
    """Whether a regular file is behind the descriptor, so that its size says how far it has got."""
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


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
    return "null" if _is_null(fd) else "pipe"


def _is_null(fd: int) -> bool:
    found, null = os.fstat(fd), os.stat(os.devnull)
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == null.st_rdev


@dataclass(frozen=True)
class _Mark:
    """Passes through a sink's queue: everything before it has been written when it is reached."""

    reached: Callable[[Stream], None]


class Sink:
    """One output stream of the job, written by a thread in the order of put() calls."""

    def __init__(self, fd: int, *, taken: Callable[[int], None], journal: Path | None) -> None:
        """taken: called in the event loop with the count of bytes that have been written (or dropped).

        journal: where to keep a copy of what is written, for a regular file that a requeued script truncates (it was
        opened without O_APPEND, as `> file` does); used by cut_back(). None: no copy.
        """
        self._fd = fd
        self._taken = taken
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[bytes | _Mark | None] = queue.SimpleQueue()
        self._regular = is_regular(fd)
        self._told = False
        """Whether the user knows that nothing can be taken back here."""
        self._journal = -1
        self._base = 0
        self._end = os.fstat(fd).st_size if self._regular else 0
        """Where the job's own output ends in the file, as far as it is written."""
        self._foreign: list[tuple[int, int]] = []
        self.error: OSError | None = None
        """Why nothing more is written (reader gone, disk full); what comes after is dropped."""
        if self._regular and journal is not None and not _appends(fd):
            self._open_journal(journal)
        self._thread = threading.Thread(target=self._write_all, name=f"stdout-{fd}", daemon=True)
        self._thread.start()

    def _open_journal(self, path: Path) -> None:
        base = path.with_name(path.name + ".base")
        self._journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._base = int(base.read_text())
        except (FileNotFoundError, ValueError):
            self._base = os.lseek(self._fd, 0, os.SEEK_CUR)
            base.write_text(str(self._base))

    def put(self, data: bytes) -> None:
        self._queue.put(data)

    async def mark(self) -> Stream:
        """How far the stream has got once everything put before this call is written."""
        future: asyncio.Future[Stream] = self._loop.create_future()

        def settle(stream: Stream) -> None:
            if not future.done():
                future.set_result(stream)

        def reached(stream: Stream) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                self._loop.call_soon_threadsafe(settle, stream)

        self._queue.put(_Mark(reached))
        return await future

    async def close(self) -> None:
        """Wait until everything is written."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def cut_back(self, position: Stream) -> str:
        """Make the file as it was at `position`: what came later is cut off, what a truncation took is put back.

        Call before anything is put. Returns a warning for the log, or "". Raises OSError.
        """
        target = position.position
        if not self._regular and not _is_null(self._fd) and not self._told:
            self._told = True
            return (
                "the job's output goes to a pipe or a terminal: what it wrote after the checkpoint cannot be taken "
                "back, and comes again"
            )
        if target is None or not self._regular:
            return ""
        size = os.fstat(self._fd).st_size
        warning = ""
        if size > target:
            os.ftruncate(self._fd, target)
        elif size < target:
            warning = self._refill(size, target)
        self._foreign = list(position.foreign)
        self._take_out_notices()
        self._end = os.fstat(self._fd).st_size
        if not _appends(self._fd):
            os.lseek(self._fd, min(target, self._end), os.SEEK_SET)
        if self._journal >= 0:
            os.ftruncate(self._journal, max(0, target - self._base))
        return warning

    def _take_out_notices(self) -> None:
        """What Slurm wrote about the requeue while the job still ran stands between its lines: close the gaps."""
        size = os.fstat(self._fd).st_size
        notices = []
        for offset, length in self._foreign:
            if offset + length <= size and size - offset <= MAX_MOVED:
                found = NOTICE.finditer(_read_at(self._fd, offset, length))
                notices += [(offset + match.start(), match.end() - match.start()) for match in found]
        if not notices:
            return
        first = notices[0][0]
        tail = bytearray(_read_at(self._fd, first, size - first))
        for offset, length in reversed(notices):
            del tail[offset - first : offset - first + length]
        os.ftruncate(self._fd, first)
        self._end = first
        if not _appends(self._fd):
            os.lseek(self._fd, first, os.SEEK_SET)
        self._write_out(tail)
        # What is left of the others' output has moved; it is the job's prelude now as far as we care.
        self._foreign = []

    def _refill(self, size: int, target: int) -> str:
        have = os.fstat(self._journal).st_size if self._journal >= 0 else 0
        if self._journal < 0 or size < self._base or self._base + have < target:
            return (
                f"the job's output file has {size} bytes but had {target} at the checkpoint: lines are lost "
                "(use `#SBATCH --open-mode=append`)"
            )
        offset = size
        while offset < target:
            chunk = os.pread(self._journal, min(CHUNK, target - offset), offset - self._base)
            offset += os.pwrite(self._fd, chunk, offset)
        return ""

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, _Mark):
                known = self._regular and self.error is None
                item.reached(Stream(self._end, tuple(self._foreign)) if known else Stream(None))
                continue
            if self.error is None:
                try:
                    self._write(item)
                except OSError as error:
                    self.error = error
            # The loop is gone when the process ends while a reader still blocks us.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._taken, len(item))

    def _write(self, data: bytes) -> None:
        if self._journal >= 0:
            os.write(self._journal, data)
        self._write_out(data)

    def _write_out(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            try:
                written = os.write(self._fd, view)
            except BlockingIOError:
                select.select([], [self._fd], [])
                continue
            view = view[written:]
            if self._regular:
                self._note(written)

    def _note(self, written: int) -> None:
        """Where the write landed tells whether somebody else has written into the file since ours before it."""
        end = os.lseek(self._fd, 0, os.SEEK_CUR)
        between = end - written - self._end
        if between > 0 and len(self._foreign) < MAX_FOREIGN:
            self._foreign.append((self._end, between))
        self._end = end


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
        self._stopped = False
        self._thread = threading.Thread(target=self._read_all, name="stdin", daemon=True)

    def start(self) -> None:
        """Begin to read; further calls do nothing."""
        if not self._started:
            self._started = True
            self._thread.start()

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
        if data:
            self._in_flight += len(data)
            self._chunks.append(len(data))
            self.sent += len(data)
        self._feed(data)


def _read_at(fd: int, offset: int, length: int) -> bytes:
    """From a file that may be open for writing only. Raises OSError."""
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        file.seek(offset)
        return file.read(length)


def _appends(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)


@dataclass(frozen=True)
class Positions:
    """How far all three streams had got at a freeze."""

    stdin: Stream
    stdout: Stream
    stderr: Stream


class Streams:
    """All three streams of one `hpccr run`, across the restores of its step."""

    def __init__(self, *, journal: Path, taken: Callable[[int], None], feed: Callable[[bytes], None]) -> None:
        self.stdin = stdin_kind(0)
        self.merged = same_file(1, 2)
        self._feed = feed
        self._sinks = {1: Sink(1, taken=taken, journal=journal.with_name(journal.name + ".stdout"))}
        self._sinks[2] = (
            self._sinks[1] if self.merged else Sink(2, taken=taken, journal=journal.with_name(journal.name + ".stderr"))
        )
        self._source: Source | None = None
        self._skipped = 0
        self._start = os.lseek(0, 0, os.SEEK_CUR) if is_regular(0) else 0

    def begin(self, positions: Positions | None) -> list[str]:
        """Before a start (None) or a restore: put the files back to `positions`. Returns warnings for the log.

        Raises HpccrError if input that was consumed cannot be skipped again.
        """
        warnings = []
        consumed = 0
        if positions is not None:
            consumed = positions.stdin.position or 0
            for number, position in ((1, positions.stdout), (2, positions.stderr)):
                if number == 2 and self.merged:
                    continue
                try:
                    warnings.append(self._sinks[number].cut_back(position))
                except OSError as error:
                    warnings.append(f"cannot cut the job's output back to the checkpoint: {error.strerror}")
        self._skipped = consumed
        if self.stdin == "pipe":
            self._open_source(consumed)
        return [warning for warning in warnings if warning]

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

    def output(self, stream: int, data: bytes) -> None:
        self._sinks[stream].put(data)

    def input_taken(self, count: int) -> None:
        if self._source is not None:
            self._source.taken(count)

    async def positions(self, stdin_consumed: int) -> Positions:
        """Where the streams are, all output so far included. stdin_consumed: see wire.messages.Frozen."""
        consumed = self._skipped + stdin_consumed
        stdout, stderr = await asyncio.gather(self._sinks[1].mark(), self._sinks[2].mark())
        return Positions(Stream(consumed), stdout, stderr)

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the regular files behind stdout and stderr are, as far as they have a name."""
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2) if is_regular(fd)]
        return tuple(dict.fromkeys(link for link in links if link.startswith("/")))

    @property
    def broken(self) -> OSError | None:
        """Why the job's stdout is not written any more."""
        return self._sinks[1].error

    async def close(self) -> None:
        """Wait until all output is written."""
        if self._source is not None:
            self._source.stop()
        for sink in {id(sink): sink for sink in self._sinks.values()}.values():
            await sink.close()
