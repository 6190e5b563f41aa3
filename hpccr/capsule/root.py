"""The launch root: the first process of a capsule's job, inside the dump, the user's, without any capability.

It adopts and reaps every orphan of the job, runs the user's command (capsule 0) and starts commands for hpccr-rsh.
What it starts is in the launch root's own session, each command a process group of its own: a session whose leader has
died cannot be restored with its members' parents as they were, and this leader lives as long as the job.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import sys
import time

from hpccr.capsule import link
from hpccr.capsule.spawn import Request, end_like, exit_code, fork, host_environment

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import NoReturn

    from hpccr.capsule.step.ledger import Ledger, Step
else:
    import _signal as signal

MAX_STRANGERS = 32
"""Connections that have not authenticated; one more, and the oldest of them is closed."""
BACKLOG = 1024
HANGUP_GRACE = 5.0
"""Seconds between SIGHUP and SIGKILL for a command whose hpccr-rsh is gone."""
ACCEPT_PAUSE = 1.0
"""Seconds until the next try when there was no descriptor or memory for a connection."""
SUBREAPER_DONE = "--subreaper-set"

NOT_PASSED = {
    signal.SIGCHLD,
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGTRAP,
    signal.SIGSYS,
    signal.SIGTTIN,
    signal.SIGTTOU,
}
"""Signals that mean the launch root itself."""

TO_GROUP = {signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT}
"""Signals a terminal would send to the whole foreground group; the others go to the command alone, as from Slurm."""


class Session:
    """One connection of hpccr-rsh, from the first byte to the end of the command it asked for."""

    def __init__(self, root: LaunchRoot, sock: _socket.socket) -> None:
        self._root = root
        self._loop = root.loop
        self._sock = sock
        self._fd = sock.fileno()
        self._wire = link.Wire(sock)
        self._nonce = os.urandom(link.NONCE)
        self._greeted = False
        self.authenticated = False
        self.deadline: float | None = time.monotonic() + link.HANDSHAKE_TIMEOUT
        """When the root has to call expire()."""
        self.pid = 0
        """Of the command; 0 before it runs and after it was reaped."""
        self._group = 0
        self._status: int | None = None
        self._stdin: link.Sink | None = None
        self._outputs: dict[int, link.Source] = {}
        self._connected = True
        self._finishing = False
        """The last frame is posted; what still comes from the peer is of no interest."""
        self._shut = False
        self._step: Step | None = None
        """What it has reserved for an srun."""
        self._wire.outgoing += link.MAGIC + self._nonce
        self.settle()

    # The connection

    def ready(self, events: int) -> None:
        try:
            if events & ~select.POLLOUT and not self._wire.fill():
                self.disconnect()
                return
            self._advance()
        except (OSError, link.ProtocolError):
            self.disconnect()

    def settle(self) -> None:
        """Send what there is, wait for what is missing; after every change."""
        if not self._connected:
            return
        try:
            self._wire.flush()
        except OSError:
            self.disconnect()
            return
        if self._wire.outgoing:
            self._loop.watch(self._fd, select.POLLIN | select.POLLOUT, self.ready)
        else:
            if self._finishing and not self._shut:
                # Not closed: with input of the peer still unread, that would take back what it has not received yet.
                self._shut = True
                self._shut_down()
            self._loop.watch(self._fd, select.POLLIN, self.ready)

    def _shut_down(self) -> None:
        try:
            self._sock.shutdown(_socket.SHUT_WR)
        except OSError:
            pass  # it is gone already, which the next read will tell

    def _advance(self) -> None:
        if not self.authenticated:
            self._authenticate()
        if self._finishing:
            self._wire.incoming.clear()
        while self.authenticated and not self._finishing and (frame := self._wire.frame()) is not None:
            self._handle(*frame)

    def _authenticate(self) -> None:
        if self._finishing:
            return
        hello = self._wire.take(len(link.MAGIC) + link.NONCE + link.DIGEST)
        if hello is None:
            return
        peer = hello[len(link.MAGIC) : -link.DIGEST]
        expected = link.proof(self._root.secret, b"client", peer, self._nonce)
        if hello.startswith(link.MAGIC) and link.same(hello[-link.DIGEST :], expected):
            self.authenticated = True
            self._wire.outgoing += link.proof(self._root.secret, b"server", self._nonce, peer)
        else:
            self._finishing = True
            self._wire.outgoing += link.REFUSED

    def _handle(self, kind: int, stream: int, payload: bytes) -> None:
        if kind == link.REQUEST and not self._group:
            self._start(Request(payload))
        elif kind == link.RESERVE and not self._group and not self._step:
            self._reserve(payload)
        elif kind == link.DATA and self._stdin is not None:
            self._stdin.feed(payload)
        elif kind == link.EOF and self._stdin is not None:
            self._stdin.end()
        elif kind == link.CREDIT and stream in self._outputs:
            self._outputs[stream].grant(int.from_bytes(payload, "big"))
        elif kind == link.CLOSED and stream in self._outputs:
            self._outputs[stream].close()
            self._finish_if_ended()
        elif kind == link.SIGNAL and self._group:
            self._signal(int.from_bytes(payload, "big"))
        else:
            raise link.ProtocolError(f"frame {kind} of stream {stream} out of place")

    def disconnect(self) -> None:
        """The connection is over: whatever still runs is hung up, as by sshd."""
        if not self._connected:
            return
        self._connected = False
        self._loop.forget(self._fd)
        self._sock.close()
        if self._stdin is not None:
            self._stdin.close()
        for output in self._outputs.values():
            output.close()
        if self._step is not None:
            self._root.ledger().leave(self._step)
        self.deadline = None
        if self.pid:
            self._signal(signal.SIGHUP)
            self._signal(signal.SIGCONT)
            self.deadline = time.monotonic() + HANGUP_GRACE
        else:
            self._root.drop(self)

    def expire(self) -> None:
        """The deadline has passed: a stranger is sent away, a command that was hung up is killed."""
        if self._connected:
            self.disconnect()
        else:
            self._signal(signal.SIGKILL)
            self.deadline = None
            if not self.pid:
                self._root.drop(self)

    # A place for a step

    def _reserve(self, payload: bytes) -> None:
        from hpccr.capsule.step.layout import Demand
        from hpccr.capsule.step.ledger import IMPOSSIBLE, Step

        self.deadline = None
        try:
            demand = Demand.decode(payload)
        except ValueError:
            raise link.ProtocolError("a demand of the wrong form") from None
        if not self._root.ledger().possible(demand):
            self._wire.post(link.ERROR, 0, IMPOSSIBLE)
            self._finishing = True
            return
        self._step = Step(demand, self._answer)
        self._root.ledger().enter(self._step)

    def _answer(self, placed: bytes | None) -> None:
        if placed is None:
            self._wire.post(link.WAIT)
        else:
            self._wire.post(link.PLACE, 0, placed)
            self._root.placed = True
        # Not settle(): it may find the connection gone, and the ledger is in the middle of serving.

    # The command

    def _start(self, request: Request) -> None:
        self.deadline = None
        pipes: list[int] = []
        try:
            for _ in range(3):
                pipes += os.pipe()
            child = (pipes[0], pipes[3], pipes[5])

            def prepare() -> None:
                for number, fd in enumerate(child):
                    os.dup2(fd, number)
                request.apply()

            environ = host_environment(request.environ, self._root.index)
            # The same object, so that what apply() finds out about the directory is in it.
            request.environ = environ
            self.pid = self._group = fork("hpccr-rsh", [b"/bin/sh", b"-c", request.command], environ, prepare)
        except OSError as error:
            for fd in pipes:
                os.close(fd)
            self._wire.post(link.ERROR, 0, f"cannot start a process: {error.strerror}".encode())
            self._finishing = True
            return
        for fd in child:
            os.close(fd)
        for fd in (pipes[1], pipes[2], pipes[4]):
            os.set_blocking(fd, False)
        self._stdin = link.Sink(self._loop, self._wire, link.STDIN, pipes[1], link.CHUNK)
        self._outputs = {
            link.STDOUT: link.Source(self._loop, self._wire, link.STDOUT, pipes[2]),
            link.STDERR: link.Source(self._loop, self._wire, link.STDERR, pipes[4]),
        }
        self._wire.post(link.STARTED)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._group, number)
        except OSError:
            pass  # nothing of it is left, or the number is none

    def reaped(self, status: int) -> None:
        """The command itself has ended; processes it left behind may still hold its output open."""
        self.pid = 0
        self._status = status
        if self._connected:
            self._finish_if_ended()
            return
        try:
            os.killpg(self._group, 0)
        except OSError:
            self._root.drop(self)  # else expire() sees to the rest of the group

    def _finish_if_ended(self) -> None:
        if self._status is None or self._finishing or any(output.open for output in self._outputs.values()):
            return
        if self._stdin is not None:
            self._stdin.close()
        self._wire.post_number(link.EXIT, 0, exit_code(self._status))
        self._finishing = True

    def check(self) -> None:
        """After each turn of the loop: an output may have ended, streams may have left frames to send."""
        self._finish_if_ended()
        self.settle()


class LaunchRoot:
    """Owner of everything: event loop, listening socket, sessions, the user's command."""

    def __init__(self, index: int, secret: bytes, listener: _socket.socket | None) -> None:
        self.index = index
        self.secret = secret
        self.loop = link.Loop()
        self.placed = False
        """A session has been given its place, and may have to send that."""
        self._listener = listener
        self._sessions: list[Session] = []
        self._signals = link.SignalPipe(
            {n for n in signal.valid_signals() - NOT_PASSED if signal.getsignal(n) is not signal.SIG_IGN}
            | {signal.SIGCHLD, signal.SIGTERM}
        )
        self.loop.watch(self._signals.fd, select.POLLIN, self._on_signals)
        self._command = 0
        self._code: int | None = None
        self._listen_at: float | None = None
        self._ledger: Ledger | None = None
        self._listen()

    def run(self, argv: list[bytes]) -> int:
        """Serve until the command `argv` has ended, or SIGTERM if there is none; the exit code, -n for signal n."""
        restore = _raise_limit()
        if argv:
            self._command = fork("hpccr", argv, link.original_environment(), restore)
        while self._code is None:
            self.loop.turn(self._timeout())
            now = time.monotonic()
            if self._listen_at is not None and self._listen_at <= now:
                self._listen()
            self.placed = True
            while self.placed:
                # A session that ends in here may give another one its place, which that has to be told.
                self.placed = False
                for session in list(self._sessions):
                    if session.deadline is not None and session.deadline <= now:
                        session.expire()
                    session.check()
        return self._code

    def _timeout(self) -> float | None:
        times = [session.deadline for session in self._sessions] + [self._listen_at]
        deadlines = [moment for moment in times if moment is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _on_signals(self, _events: int) -> None:
        for number in set(self._signals.numbers()):
            if number == signal.SIGCHLD:
                self._reap()
            elif self._command:
                try:
                    (os.killpg if number in TO_GROUP else os.kill)(self._command, number)
                except OSError:
                    pass  # it has just ended
            elif number == signal.SIGTERM:
                self._code = 128 + number

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._command:
                self._command = 0
                self._code = os.waitstatus_to_exitcode(status)
            for session in list(self._sessions):
                if session.pid == pid:
                    session.reaped(status)

    def _listen(self) -> None:
        self._listen_at = None
        if self._listener is not None:
            self.loop.watch(self._listener.fileno(), select.POLLIN, self._accept)

    def _accept(self, _events: int) -> None:
        assert self._listener is not None  # noqa: S101 - for the type checker: only watched if there is one
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # The connection stays in the queue until there is room: drop() or time may have made it.
                self.loop.forget(self._listener.fileno())
                self._listen_at = time.monotonic() + ACCEPT_PAUSE
            return
        strangers = [session for session in self._sessions if not session.authenticated]
        if len(strangers) >= MAX_STRANGERS:
            strangers[0].disconnect()
        self._sessions.append(Session(self, _socket.socket(fileno=fd)))

    def ledger(self) -> Ledger:
        """The job's CPUs and who has them; only capsule 0's is asked."""
        if self._ledger is None:
            from hpccr.capsule.step.ledger import Ledger, job_cpus

            self._ledger = Ledger(job_cpus(link.original_environment()))
        return self._ledger

    def drop(self, session: Session) -> None:
        """A session is over, connection and command."""
        if session in self._sessions:
            self._sessions.remove(session)
        self._listen()


def _raise_limit() -> Callable[[], None]:
    """Allow this process as many open files as it may have: four for each command. Gives what takes that back."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def become_subreaper() -> None:
    """PR_SET_CHILD_SUBREAPER for this process; it survives execve. Raises OSError."""
    import ctypes

    PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a child subreaper")


def listen(address: str, port: int) -> _socket.socket:
    """A socket on address and port. Raises OSError."""
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def main(argv: list[str]) -> NoReturn:
    """`--index K --address ADDR --port PORT [--] [CMD...]`; without an address nothing listens."""
    link.fill_standard_descriptors()
    if SUBREAPER_DONE not in argv[:1]:
        # A second program image, because ctypes would stay in this one's memory for good.
        become_subreaper()
        again = [sys.executable, "-I", "-S", sys.argv[0], SUBREAPER_DONE, *argv]
        os.execve(sys.executable, again, link.original_environment())  # noqa: S606
    rest = argv[1:]
    options = {"--index": "0", "--address": "", "--port": str(link.DEFAULT_PORT)}
    while len(rest) >= 2 and rest[0] in options:
        options[rest[0]] = rest[1]
        rest = rest[2:]
    if rest[:1] == ["--"]:
        rest = rest[1:]
    address, port, secret = options["--address"], options["--port"], os.environ.get(link.SECRET_VARIABLE, "")
    code = 125
    try:
        if address and not secret:
            raise ValueError(f"{link.SECRET_VARIABLE} is not set")
        listener = listen(address, int(port)) if address else None
        root = LaunchRoot(int(options["--index"]), secret.encode(), listener)
        code = root.run([os.fsencode(word) for word in rest])
    except (OSError, ValueError) as error:
        link.warn(f"hpccr: launch root {options['--index']} at {address}:{port}: {error}")
    end_like(code)
