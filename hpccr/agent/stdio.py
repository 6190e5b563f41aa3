"""The job's stdio as seen from outside its capsule: the far ends of its pipes.

Bytes are pumped, not interpreted. Flow control in both directions is by credit, so that neither a slow reader of the
job's output nor a job that does not read its input holds up anything else.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import termios
from collections import deque
from collections.abc import Callable

from hpccr.wire import messages as m

CHUNK = 64 << 10
WINDOW = 1 << 20
"""Bytes of output that may be on their way to the coordinator; beyond, the job waits as it would on any pipe."""


class JobPipes:
    """Pipes for one start or restore of a capsule's job. `job_ends` go to hpccrd and are then closed here.

    `post` gets Output and InputTaken messages, in order.
    """

    def __init__(self, *, stdin: bool, merged: bool, post: Callable[[m.Message], None]) -> None:
        self._post = post
        self._loop = asyncio.get_running_loop()
        self.job_ends: list[int] = []
        self._stdin = -1
        self._unread = -1
        """A read end of the job's stdin, once its write end is closed: to see how much the job has left in it."""
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._received = 0
        self._stdin_ended = False
        self._writing = False
        self._readers: dict[int, int] = {}
        self._in_flight = 0
        self._paused = False
        if stdin:
            job_end, self._stdin = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self._stdin, False)
            self.job_ends.append(job_end)
        for stream in (1,) if merged else (1, 2):
            own, job_end = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(own, False)
            self.job_ends.append(job_end)
            self._readers[own] = stream

    def started(self) -> None:
        """hpccrd has the job's ends: close them here, so that the job's end of file is seen, and begin to pump."""
        for fd in self.job_ends:
            os.close(fd)
        self.job_ends.clear()
        for fd in self._readers:
            self._loop.add_reader(fd, self._readable, fd)

    def _readable(self, fd: int) -> None:
        if not self._read(fd):
            return
        if self._in_flight >= WINDOW and not self._paused:
            self._paused = True
            for other in self._readers:
                self._loop.remove_reader(other)

    def _read(self, fd: int) -> bool:
        """Pass one chunk on; False when there was none (for now, or for ever)."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._close_reader(fd)
            return False
        self._in_flight += len(data)
        self._post(m.Output(self._readers[fd], data))
        return True

    def _close_reader(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        os.close(fd)
        del self._readers[fd]

    def close_output(self, stream: int) -> None:
        """Nobody reads the job's stdout (1) or stderr (2) any more: let the job see that. Idempotent."""
        for fd in [fd for fd, number in self._readers.items() if number == stream]:
            self._close_reader(fd)

    def output_taken(self, count: int) -> None:
        """The coordinator has written `count` bytes: make room."""
        self._in_flight -= count
        if self._paused and self._in_flight < WINDOW // 2:
            self._paused = False
            for fd in self._readers:
                self._loop.add_reader(fd, self._readable, fd)

    def drain(self) -> None:
        """Pass on everything that is in the pipes now, whatever the window: at most the pipes' capacity."""
        for fd in list(self._readers):
            while self._read(fd):
                pass

    def feed(self, data: bytes) -> None:
        """Bytes for the job's stdin; b"" ends it."""
        if data:
            self._queue.append(data)
            self._queued += len(data)
            self._received += len(data)
        else:
            self._stdin_ended = True
        self._write()

    def _write(self) -> None:
        while self._queue and self._stdin >= 0:
            chunk = self._queue[0]
            try:
                written = os.write(self._stdin, chunk)
            except BlockingIOError:
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(self._stdin, self._write)
                return
            except BrokenPipeError:
                self._close_stdin()
                break
            self._took(written)
            if written < len(chunk):
                self._queue[0] = chunk[written:]
            else:
                self._queue.popleft()
        if self._stdin < 0 and self._queue:
            # The job has closed its stdin: what is still sent is read by nobody, as with any pipe.
            self._took(self._queued)
            self._queue.clear()
        if self._stdin_ended and not self._queue:
            self._end_stdin()
        elif self._writing and self._stdin >= 0:
            self._writing = False
            self._loop.remove_writer(self._stdin)

    def _took(self, count: int) -> None:
        self._queued -= count
        self._post(m.InputTaken(count))

    def stdin_consumed(self) -> int:
        """Bytes fed so far that the job has read: neither queued here nor left in the pipe."""
        left = array.array("i", [0])
        pipe = self._stdin if self._stdin >= 0 else self._unread
        if pipe >= 0:
            fcntl.ioctl(pipe, termios.FIONREAD, left)
        return self._received - self._queued - left[0]

    def _end_stdin(self) -> None:
        """All input is in the pipe: let the job see its end after it."""
        if self._stdin >= 0:
            self._unread = os.open(f"/proc/self/fd/{self._stdin}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._stdin >= 0:
            self._loop.remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = -1

    def close(self) -> None:
        """Close everything; idempotent."""
        for fd in self.job_ends:
            os.close(fd)
        self.job_ends.clear()
        for fd in list(self._readers):
            self._close_reader(fd)
        self._close_stdin()
        if self._unread >= 0:
            os.close(self._unread)
            self._unread = -1
