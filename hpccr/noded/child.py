"""Short-lived helper processes of capsule init: a function called in a fork, perhaps with the user's ids.

init itself must stay single-threaded, hold no descriptor for longer than it must, and never touch as root what the
user controls; so whatever needs another identity, a library that makes threads or sockets, or a path of the user's,
runs in one of these.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import msgspec

from hpccr.errors import ExitCode, HpccrError, encodable, error_for
from hpccr.noded import syscalls
from hpccr.noded.control import Identity
from hpccr.noded.reaper import Reaper

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where root's tools are looked for inside a capsule."""

ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C.UTF-8"}
"""The whole environment of root's tools: nothing of the daemon's, nothing of the user's."""


DATA = 4 << 30
"""Bytes of memory for a helper: not the job's memory, and how many files there are to save, say, is up to the user."""

type Function[R] = Callable[[], R]
"""What a helper does; R is msgpack-able."""


class Failure(msgspec.Struct, frozen=True):
    """How an HpccrError crosses the pipe from a helper."""

    code: int
    message: str
    hint: str


def become(identity: Identity) -> None:
    """Take the user's ids and give up every capability for good. In a forked child only."""
    syscalls.drop_bounding_set()
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    syscalls.clear_capabilities()
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def reset_signals() -> None:
    """All signals as a login leaves them: neither what Python does to them at its start nor what whoever started
    hpccrd had ignored (a shell does that to what it puts into the background) is the program's."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) is not signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def call(function: Callable[[], Any], *, identity: Identity | None = None, keep: Iterable[int] = ()) -> Any:
    """What function() gives (msgpack-able) when called in a child that has only 0-2 and `keep` open.

    identity: whose ids the child takes first; None: root's. Raises the HpccrError the function raised (any other
    exception becomes one). Waits for the child, so the function must not block for long.
    """
    pid, reading = _start(function, identity, keep)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    return _result(data, f"wait status {status:#x}")


class Helper:
    """call() for what may take long: capsule init goes on meanwhile, and can end it."""

    def __init__(
        self, reaper: Reaper, function: Callable[[], Any], *, identity: Identity | None, keep: Iterable[int]
    ) -> None:
        """Starts at once. `keep` may be closed here afterwards."""
        self.pid, reading = _start(function, identity, keep)
        self._exited = reaper.watch(self.pid)
        self._pipe = os.fdopen(reading, "rb")

    async def result(self) -> Any:
        """As call() gives and raises it."""
        code = await asyncio.shield(self._exited)
        with self._pipe:
            # It has ended, and what it says fits into a pipe.
            return _result(self._pipe.read(), f"exit code {code}")

    async def cancel(self) -> None:
        """Kill it, unless it has ended; returns when it has."""
        if not self._exited.done():
            os.kill(self.pid, signal.SIGKILL)
            # Whoever is cancelled here may come again, or another does.
            await asyncio.shield(self._exited)
        self._pipe.close()


async def work(
    reaper: Reaper, function: Callable[[], Any], *, identity: Identity | None, keep: Iterable[int] = ()
) -> Any:
    """A Helper's result. identity: as for call(). When this is cancelled the helper is ended."""
    helper = Helper(reaper, function, identity=identity, keep=keep)
    try:
        return await helper.result()
    finally:
        await helper.cancel()


def _start(function: Callable[[], Any], identity: Identity | None, keep: Iterable[int]) -> tuple[int, int]:
    """The helper's pid and the pipe from which its result comes."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(function, identity, writing, keep)
    os.close(writing)
    return pid, reading


def _result(data: bytes, status: str) -> Any:
    if not data:
        raise HpccrError(f"a helper process of capsule init died: {status}")
    kind, value = msgspec.msgpack.decode(data)
    if kind == "failed":
        failure = msgspec.convert(value, Failure)
        raise error_for(failure.code, failure.message, failure.hint)
    return value


def _child(function: Callable[[], Any], identity: Identity | None, writing: int, keep: Iterable[int]) -> NoReturn:
    try:
        reset_signals()
        syscalls.close_all_but([writing, *keep])
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = DATA if hard == resource.RLIM_INFINITY else min(DATA, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        if identity is not None:
            become(identity)
        answer: tuple[str, Any] = ("done", function())
    except HpccrError as error:
        answer = ("failed", Failure(int(error.code), error.message, error.hint))
    except OSError as error:
        answer = ("failed", Failure(int(ExitCode.FAILED), encodable(str(error)), ""))
    except MemoryError:
        hint = "are there tens of millions of files in the directories of --files?"
        answer = ("failed", Failure(int(ExitCode.FAILED), f"a helper process needs more than {DATA >> 30} GiB", hint))
    except BaseException:
        answer = ("failed", Failure(int(ExitCode.FAILED), encodable(traceback.format_exc()), ""))
    try:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(msgspec.msgpack.encode(answer))
    finally:
        os._exit(0)


def execute(
    argv: list[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    before_exec: Callable[[], None] | None = None,
) -> int:
    """Start a tool of root's, with a clean environment, nothing open but 0-2 (None: /dev/null); its pid.

    before_exec is called first in the new process. A tool that cannot be executed exits 127.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        if before_exec is not None:
            before_exec()
        reset_signals()
        redirect(stdin, stdout, stderr)
        syscalls.close_range(3)
        os.execvpe(argv[0], argv, ENVIRONMENT)  # noqa: S606 - there is no shell to want
    finally:
        os._exit(127)


def redirect(stdin: int | None, stdout: int | None, stderr: int | None) -> None:
    """Make these descriptors 0, 1 and 2 of this process; None is /dev/null. In a forked child only."""
    # Out of the way first: one of them may itself be below 3.
    high = []
    for fd in (stdin, stdout, stderr):
        source = os.open("/dev/null", os.O_RDWR) if fd is None else fd
        high.append(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 3))
    for target, fd in enumerate(high):
        os.dup2(fd, target, inheritable=True)
