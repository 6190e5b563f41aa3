"""One output stream of the job, from the coordinator into whatever `hpccr run` has as its stdout or stderr.

Nothing of a job's output is dropped while it could still be written: a file that takes no more (a full disk, a quota,
storage that is away) is tried again until it does, and the job waits meanwhile as it would for a slow reader. A reader
that has gone is passed on to the job, which gets from its pipe what it would have got from that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
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
from typing import Any

from hpccr.errors import encodable
from hpccr.model import Stream

CHUNK = 64 << 10
MAX_FOREIGN = 1000
"""Pieces of others' output between the job's own that are remembered."""
MAX_MOVED = 64 << 20
"""Bytes of output behind a notice of Slurm's that are moved up when it is taken out."""
NOTICE = re.compile(rb"slurmstepd[^\n]*: error: \*\*\* (?:JOB|STEP) [^\n]* CANCELLED AT [^\n]* \*\*\*\n")
"""What Slurm writes into the output of a job that it requeues: no undisturbed run has it."""
RETRY = 1.0
"""Seconds until a file that could not be written is tried again; no event tells of room on a disk."""
FOR_GOOD = frozenset({errno.EBADF, errno.EFBIG})
"""Errors of a write to a file that no waiting cures: not open for writing, as large as its limit allows."""


def is_regular(fd: int) -> bool:
    """Whether a regular file is behind the descriptor, so that its size says how far it has got."""
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


def is_null(fd: int) -> bool:
    """Whether /dev/null is behind the descriptor. Raises OSError."""
    found, null = os.fstat(fd), os.stat(os.devnull)
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == null.st_rdev


@dataclass(frozen=True)
class _Mark:
    """Passes through a sink's queue: everything before it has been written when it is reached."""

    reached: Callable[[Stream], None]


@dataclass(frozen=True)
class _Cut:
    """Passes through a sink's queue: what the file is to be before anything after it is written.

    start: the job begins anew; else it goes on from the checkpoint at which the stream was at `position`.
    """

    position: Stream
    start: bool


class _Journal:
    """A copy of what was written into a file without O_APPEND (`> file`), which a requeued script truncates: the
    file's bytes from `base` on. All methods raise OSError."""

    def __init__(self, path: Path, here: int) -> None:
        """here: where the file's next byte goes, if nothing was kept before."""
        self._base_path = path.with_name(path.name + ".base")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self.base = self._known_base()
            if self.base < 0:
                self.restart(here)
        except OSError:
            self.close()
            raise

    def _known_base(self) -> int:
        try:
            return int(self._base_path.read_text())
        except (FileNotFoundError, ValueError):
            return -1

    @property
    def end(self) -> int:
        """Up to where in the file it reaches."""
        return self.base + os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """All of it, or it must not be written to again: what is there stays right."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def read(self, offset: int, count: int) -> bytes:
        """From `offset` of the file."""
        return os.pread(self._fd, count, offset - self.base)

    def cut(self, end: int) -> None:
        """The file was cut at `end`. What the journal lacks of it up to there cannot be put back any more."""
        if self.end < end:
            self.restart(end)
        else:
            os.ftruncate(self._fd, max(0, end - self.base))

    def restart(self, base: int) -> None:
        """Keep what comes from `base` on, and nothing of what was before."""
        self._base_path.unlink(missing_ok=True)  # should the next lines fail, there is none
        os.ftruncate(self._fd, 0)
        self._base_path.write_text(str(base))
        self.base = base

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class Sink:
    """One output stream of the job, served by a thread in the order of the calls."""

    def __init__(
        self,
        fd: int,
        *,
        taken: Callable[[int], None],
        warn: Callable[[str], None],
        broken: Callable[[], None],
        journal: Path | None,
    ) -> None:
        """All callbacks are called in the event loop. taken: with the count of bytes that were written (or dropped).
        warn: tells the user. broken: nobody will ever take anything; again for all that comes nevertheless.

        journal: where to keep a copy of what is written, for a regular file that a requeued script truncates. None: no
        copy.
        """
        self._fd = fd
        self._taken = taken
        self._warn = warn
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[bytes | _Mark | _Cut | None] = queue.SimpleQueue()
        self._regular = is_regular(fd)
        self._inode = os.fstat(fd).st_ino if self._regular else 0
        self._path = os.readlink(f"/proc/self/fd/{fd}") if self._regular else ""
        self._end = self._here() if self._regular else 0
        """Where the job's own output ends in the file, as far as it is written."""
        self._foreign: list[tuple[int, int]] = []
        self._cuts_asked = 0
        self._cuts_made = 0
        self._stir = threading.Event()
        """Something is to be done that does not wait for a file that takes nothing."""
        self._given_up = False
        self._syncing = threading.Lock()
        self.trouble = ""
        """Why the file takes nothing just now."""
        self.error: OSError | None = None
        """Why nothing more can be written; what comes after is dropped."""
        self._journal: _Journal | None = None
        if self._regular and journal is not None and not _appends(fd):
            try:
                self._journal = _Journal(journal, self._end)
            except OSError as error:
                self._no_journal(error)
        self._thread = threading.Thread(target=self._serve, name=f"stdout-{fd}", daemon=True)
        self._thread.start()

    @property
    def regular(self) -> bool:
        """Whether it goes to a regular file."""
        return self._regular

    @property
    def rewinds(self) -> bool:
        """Whether output can be taken back here, or nobody sees it anyway."""
        return self._regular or (self.error is None and is_null(self._fd))

    @property
    def position(self) -> Stream:
        """How far the stream has got; for others than its thread only before anything is put."""
        if not self._regular or self.error is not None:
            return Stream(None)
        return Stream(self._end, tuple(self._foreign), self._inode, encodable(self._path))

    def put(self, data: bytes) -> None:
        self._queue.put(data)

    async def mark(self) -> Stream:
        """How far the stream has got once everything put before this call is written."""
        future: asyncio.Future[Stream] = self._loop.create_future()

        def settle(stream: Stream) -> None:
            if not future.done():
                future.set_result(stream)

        self._queue.put(_Mark(lambda stream: self._tell(settle, stream)))
        return await future

    def sync(self) -> str:
        """Bring what has been written to the disk, from whatever thread; why it cannot be, "" if it is there.

        One at a time, so that storage that hangs does not hold up more than one thread."""
        if not self._regular:
            return ""
        if not self._syncing.acquire(blocking=False):
            return "the last time is not over"
        try:
            os.fdatasync(self._fd)
            if (journal := self._journal) is not None:
                journal.sync()
        except OSError as error:
            return error.strerror or str(error)
        finally:
            self._syncing.release()
        return ""

    def cut_back(self, position: Stream, *, start: bool = False) -> None:
        """Make the file as it was at `position`: what came later is cut off, what a truncation took is put back, and
        what was put before this call and has not been written is dropped.

        start: the job begins anew, and `position` is where it began the first time.
        """
        self._cuts_asked += 1
        self._queue.put(_Cut(position, start))
        self._stir.set()

    async def close(self) -> None:
        """Wait until everything is written; when cancelled, nothing more is."""
        self._queue.put(None)
        try:
            await asyncio.to_thread(self._thread.join)
        except asyncio.CancelledError:
            self._given_up = True
            self._stir.set()
            raise
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    # --- in the thread ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            match item:
                case _Mark(reached):
                    reached(self.position)
                case _Cut(position, start):
                    self._cuts_made += 1
                    self.trouble = ""
                    try:
                        self._cut(position, start=start)
                    except OSError as error:
                        self._tell(
                            self._warn, f"cannot cut the job's output back to the checkpoint: {error.strerror or error}"
                        )
                case _:
                    self._pass_on(item)

    def _pass_on(self, data: bytes) -> None:
        if self.error is None and not self._superseded():
            self._copy(lambda journal: journal.write(data))
            self._write(data)
        self._tell(self._taken, len(data))
        if self.error is not None:
            self._tell(self._broken)

    def _tell(self, callback: Callable[..., None], *what: Any) -> None:
        # The loop is gone when the process ends while a reader still blocks us: nobody waits any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *what)

    def _superseded(self) -> bool:
        """Whether what is being written would be cut off again."""
        return self._given_up or (self._regular and self._cuts_asked != self._cuts_made)

    def _copy(self, act: Callable[[_Journal], None]) -> None:
        """Do something to the journal, which may fail by itself."""
        if self._journal is not None:
            try:
                act(self._journal)
            except OSError as error:
                self._journal.close()
                self._journal = None
                self._no_journal(error)

    def _no_journal(self, error: OSError) -> None:
        self._tell(
            self._warn,
            f"no copy of the job's output can be kept in the store ({error.strerror or error}): where a requeued "
            "script empties its output file (`> file`), it cannot be put back; `>> file` needs no copy",
        )

    def _write(self, data: bytes | bytearray, *, whole: bool = False) -> None:
        """whole: also if it is to be cut off again, because it was there before."""
        view = memoryview(data)
        while view and not (self._given_up if whole else self._superseded()):
            try:
                written = os.write(self._fd, view)
            except BlockingIOError:
                select.select([], [self._fd], [])
                continue
            except OSError as error:
                if not self._regular or error.errno in FOR_GOOD:
                    self.error = error
                    self._tell(self._warn, f"the job's output cannot be written any more: {error.strerror or error}")
                    return
                self._wait(error)
                continue
            if self.trouble:
                self.trouble = ""
                self._tell(self._warn, "the job's output can be written again: nothing is missing")
            view = view[written:]
            if self._regular:
                self._note(written)

    def _wait(self, error: OSError) -> None:
        if not self.trouble:
            self.trouble = error.strerror or str(error)
            self._tell(
                self._warn,
                f"the job's output cannot be written to {self._path} ({self.trouble}): the job waits until it can be",
            )
        self._stir.wait(RETRY)
        self._stir.clear()

    def _note(self, written: int) -> None:
        """Where the write landed tells whether somebody else has written into the file since ours before it."""
        end = os.lseek(self._fd, 0, os.SEEK_CUR)
        between = end - written - self._end
        if between > 0 and len(self._foreign) < MAX_FOREIGN:
            self._foreign.append((self._end, between))
        self._end = end

    def _here(self) -> int:
        """Where in the file the next byte goes."""
        return os.fstat(self._fd).st_size if _appends(self._fd) else os.lseek(self._fd, 0, os.SEEK_CUR)

    def _cut(self, position: Stream, *, start: bool) -> None:
        target = position.position
        if not self._regular:
            return
        if target is None:
            self._go_on_here()
            return
        same = position.inode == self._inode or position.path == encodable(self._path)
        size = os.fstat(self._fd).st_size
        if start:
            # A file that the script opens anew (`> file`) is as it wants it.
            if same and _appends(self._fd) and size > target:
                os.ftruncate(self._fd, target)
            self._go_on_here()
            return
        if not same:
            self._tell(
                self._warn,
                f"the job's output goes on in {self._path}; what it wrote until the checkpoint is in {position.path}",
            )
            self._go_on_here()
            return
        if size > target:
            os.ftruncate(self._fd, target)
        elif size < target:
            self._refill(size, target)
        self._foreign = list(position.foreign)
        self._take_out_notices()
        self._end = os.fstat(self._fd).st_size
        if not _appends(self._fd):
            os.lseek(self._fd, self._end, os.SEEK_SET)
        self._copy(lambda journal: journal.cut(self._end))

    def _go_on_here(self) -> None:
        self._foreign = []
        self._end = self._here()
        self._copy(lambda journal: journal.restart(self._end))

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
        self._write(tail, whole=True)
        # What is left of the others' output has moved; it is the job's prelude now as far as we care.
        self._foreign = []

    def _refill(self, size: int, target: int) -> None:
        """Put back what the file had from `size` to `target`."""
        if self._journal is None or size < self._journal.base or self._journal.end < target:
            self._tell(
                self._warn,
                f"the job's output file has {size} bytes but had {target} at the checkpoint: lines are lost "
                "(use `#SBATCH --open-mode=append`)",
            )
            return
        offset = size
        while offset < target:
            chunk = self._journal.read(offset, min(CHUNK, target - offset))
            offset += os.pwrite(self._fd, chunk, offset)


def _read_at(fd: int, offset: int, length: int) -> bytes:
    """From a file that may be open for writing only. Raises OSError."""
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        file.seek(offset)
        return file.read(length)


def _appends(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)
