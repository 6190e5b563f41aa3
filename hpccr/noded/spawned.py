"""Processes that hpccrd starts and that must not depend on its event loop: capsule init, transfers."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO

log = logging.getLogger(__name__)

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
TAIL = 20
"""Lines of a process's stderr that errors quote."""
MAX_LINE = 4096


class Spawned:
    """A child process; its stderr goes to the log line by line. It is not ended with the loop or this object."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        label: str,
        descriptors: Sequence[int] = (),
        given: int | None = None,
        talks: bool = False,
        environment: Mapping[str, str] = ENVIRONMENT,
    ) -> None:
        """given: a descriptor for its stdin, which the caller may close at once; talks: its stdout is a pipe, `output`.
        Else they are /dev/null."""
        self._label = label
        self._tail: deque[str] = deque(maxlen=TAIL)
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL if given is None else given,
            stdout=subprocess.PIPE if talks else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=tuple(descriptors),
            env=environment,
            cwd="/",
            umask=0o077,
            # A signal from hpccrd's terminal is for hpccrd; a transfer outlives it.
            start_new_session=True,
        )
        self._pidfd = os.pidfd_open(self.process.pid)
        self._ended = watch(self._pidfd)
        self._ended.add_done_callback(lambda _: self.process.poll())
        self._reader = asyncio.create_task(self._log())

    @property
    def output(self) -> IO[bytes]:
        """Its stdout; only if it `talks`."""
        if self.process.stdout is None:
            raise ValueError("the process has no pipe at its stdout")
        return self.process.stdout

    async def wait(self) -> int:
        """Its exit status as subprocess gives it."""
        await asyncio.shield(self._ended)
        return self.process.wait()

    def kill(self) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it ended by itself

    @property
    def last_words(self) -> str:
        """The last lines of its stderr, or ""."""
        return "\n".join(self._tail)

    async def close(self) -> None:
        """After wait(): read what it still said and let go of it."""
        try:
            # A grandchild may hold the pipe open: what it says is not ours to wait for.
            await asyncio.wait_for(self._reader, 1)
        except TimeoutError:
            pass
        if self.process.stdout is not None:
            self.process.stdout.close()
        os.close(self._pidfd)

    async def _log(self) -> None:
        stream = self.process.stderr
        if stream is None:
            return
        reader = await read_pipe(stream.fileno(), limit=MAX_LINE)
        stream.close()
        while line := await read_line(reader):
            text = line.decode(errors="replace").rstrip()
            self._tail.append(text)
            log.info("%s: %s", self._label, text)


def memory_file(content: bytes) -> int:
    """A sealed memfd with that content, at its beginning: nobody who gets it can change it. The caller closes it."""
    fd = os.memfd_create("hpccr", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def watch(pidfd: int) -> asyncio.Future[None]:
    """A future that is done when the process of a pidfd has ended. The descriptor must stay open until then."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def ended() -> None:
        loop.remove_reader(pidfd)
        if not future.done():
            future.set_result(None)

    loop.add_reader(pidfd, ended)
    future.add_done_callback(lambda done: loop.remove_reader(pidfd) if done.cancelled() else None)
    return future


async def read_pipe(fd: int, *, limit: int) -> asyncio.StreamReader:
    """A reader over a duplicate of a pipe's descriptor, closed at its end."""
    reader = asyncio.StreamReader(limit=limit)
    duplicate = os.fdopen(os.dup(fd), "rb", buffering=0)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), duplicate)
    return reader


async def read_line(reader: asyncio.StreamReader) -> bytes:
    """The next line or, of a longer one, a piece; b"" at the end."""
    try:
        return await reader.readuntil()
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await reader.read(error.consumed or MAX_LINE)
