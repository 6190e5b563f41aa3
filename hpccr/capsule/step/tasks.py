"""The tasks of a step without MPI: each started by its capsule's launch root, all streams passing here.

One connection for each task, as hpccr-rsh has it for its command. What tasks print is passed on in whole lines.
"""

from __future__ import annotations

import os
import select
import time

from hpccr.capsule import link
from hpccr.capsule.step.labels import Lines
from hpccr.capsule.step.layout import runs
from hpccr.capsule.step.options import KILL_WAIT

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    import _socket
    import signal
    from collections.abc import Callable, Sequence
else:
    import _signal as signal

PASSED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
PIECE = 4096
"""PIPE_BUF: what a stream that other processes may share takes without blocking once poll says so."""


class Output:
    """A descriptor that several tasks print on. Credit goes back to a task when what it printed is written."""

    def __init__(self, loop: link.Loop, fd: int) -> None:
        self._loop, self._fd = loop, fd
        self._queue: list[tuple[bytes, Callable[[], None]]] = []
        self.broken = False

    def put(self, data: bytes, written: Callable[[], None]) -> None:
        """Write `data`, then call `written`."""
        if self.broken or not data:
            written()
            return
        self._queue.append((data, written))
        self._loop.watch(self._fd, select.POLLOUT, self._ready)

    @property
    def empty(self) -> bool:
        return not self._queue

    def _ready(self, events: int) -> None:
        data, written = self._queue[0]
        try:
            count = os.write(self._fd, data[:PIECE]) if events & select.POLLOUT else -1
        except BlockingIOError:
            return
        except OSError:
            count = -1
        if count < 0:
            # Nobody reads any more: what comes is dropped, as by srun.
            self.broken = True
            rest, self._queue = self._queue, []
            self._loop.forget(self._fd)
            for _, done in rest:
                done()
            return
        if count < len(data):
            self._queue[0] = (data[count:], written)
            return
        del self._queue[0]
        if not self._queue:
            self._loop.forget(self._fd)
        written()


class Input:
    """srun's standard input, or a file, for one task or for all of them, at the pace of the slowest."""

    def __init__(self, loop: link.Loop, fd: int, tasks: Sequence[Task]) -> None:
        self._loop, self._fd = loop, fd
        self._credit = {task: link.WINDOW for task in tasks if task.code is None}
        self._arm()

    def grant(self, task: Task, count: int) -> None:
        if task in self._credit:
            self._credit[task] += count
            self._arm()

    def drop(self, task: Task) -> None:
        """It reads no more, or has ended."""
        if self._credit.pop(task, None) is not None:
            self._arm()

    def _arm(self) -> None:
        if not self._credit:
            self._loop.forget(self._fd)
        elif min(self._credit.values()) > 0:
            self._loop.watch(self._fd, select.POLLIN, self._ready)
        else:
            self._loop.forget(self._fd)

    def _ready(self, _events: int) -> None:
        try:
            data = os.read(self._fd, min(link.CHUNK, *self._credit.values()))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        for task in list(self._credit):
            task.wire.post(link.DATA if data else link.EOF, link.STDIN, data)
            task.settle()
            if task in self._credit:
                self._credit[task] -= len(data)
        if not data:
            self._credit.clear()
        self._arm()


class Task:
    """One task, from its request to its exit code."""

    def __init__(self, run: Run, rank: int, name: str, sock: _socket.socket, request: bytes, streams: Streams) -> None:
        """name: of its node."""
        self._run, self.rank, self.name = run, rank, name
        self._loop, self._outputs, self._lines = run.loop, streams.outputs, streams.lines
        self.wire = link.Wire(sock)
        self.input: Input | None = None
        self.code: int | None = None
        self.failed = False
        self._connected = True
        self.wire.post(link.REQUEST, 0, request)
        self.settle()

    def settle(self) -> None:
        """Send what there is; after every post()."""
        if not self._connected:
            return
        try:
            self.wire.flush()
        except OSError:
            self._lost("its connection broke")
            return
        events = select.POLLIN | (select.POLLOUT if self.wire.outgoing else 0)
        self._loop.watch(self.wire.sock.fileno(), events, self._ready)

    def _ready(self, events: int) -> None:
        try:
            if events & ~select.POLLOUT and not self.wire.fill():
                self._lost("the connection ended before the task did")
                return
            while self._connected and (frame := self.wire.frame()) is not None:
                self._handle(*frame)
        except (OSError, link.ProtocolError) as error:
            self._lost(str(error))
            return
        self.settle()

    def _handle(self, kind: int, stream: int, payload: bytes) -> None:
        if kind == link.DATA and stream in self._outputs:
            size = len(payload)
            self._outputs[stream].put(self._lines[stream].feed(payload), lambda: self._grant(stream, size))
        elif kind == link.EOF and stream in self._outputs:
            self._outputs[stream].put(self._lines[stream].end(), lambda: None)
        elif kind == link.CREDIT and self.input is not None:
            self.input.grant(self, int.from_bytes(payload, "big"))
        elif kind == link.CLOSED and self.input is not None:
            self.input.drop(self)
        elif kind == link.ERROR:
            self._lost(payload.decode("utf-8", "replace"))
        elif kind == link.EXIT:
            self._end(int.from_bytes(payload, "big"))
        elif kind not in (link.STARTED, link.CREDIT, link.CLOSED):
            raise link.ProtocolError(f"frame {kind} of stream {stream} out of place")

    def _grant(self, stream: int, count: int) -> None:
        if self._connected:
            self.wire.post_number(link.CREDIT, stream, count)
            self.settle()

    def _lost(self, why: str) -> None:
        link.warn(f"srun: error: {self.name}: task {self.rank}: {why}")
        self.failed = True
        self._end(1)

    def _end(self, code: int) -> None:
        if not self._connected:
            return
        self._connected = False
        self._loop.forget(self.wire.sock.fileno())
        self.wire.sock.close()
        self.code = code
        for stream, lines in self._lines.items():
            self._outputs[stream].put(lines.end(), lambda: None)
        if self.input is not None:
            self.input.drop(self)
        self._run.ended(self)


class Streams:
    """Where one task's outputs go: the descriptor's Output by stream, and its lines on the way there."""

    def __init__(self, outputs: dict[int, Output], label: bytes, *, unbuffered: bool) -> None:
        self.outputs = outputs
        self.lines = {stream: Lines(label, unbuffered=unbuffered) for stream in outputs}


class Run:
    """The running step. kill_on_bad_exit, wait (seconds after the first end; 0: for ever), limit (seconds; None: none)
    as of srun; started: when the limit began, by time.monotonic()."""

    def __init__(self, *, kill_on_bad_exit: bool, wait: int, limit: float | None) -> None:
        self.loop = link.Loop()
        self._kill, self._wait = kill_on_bad_exit, wait
        self._signals = link.SignalPipe({n for n in PASSED if signal.getsignal(n) is not signal.SIG_IGN})
        self.loop.watch(self._signals.fd, select.POLLIN, self._on_signals)
        self.tasks: list[Task] = []
        self._news: list[Task] = []
        self._outputs: dict[int, Output] = {}
        self._limit = None if limit is None else time.monotonic() + limit
        self._wait_until: float | None = None
        self._kill_at: float | None = None
        self._ending = False

    def output(self, fd: int) -> Output:
        """The one Output of a descriptor."""
        return self._outputs.setdefault(fd, Output(self.loop, fd))

    def add(self, rank: int, name: str, sock: _socket.socket, request: bytes, streams: Streams) -> Task:
        task = Task(self, rank, name, sock, request, streams)
        self.tasks.append(task)
        return task

    def finish(self) -> int:
        """Wait for all; the highest exit code of any task (128 + n for signal n)."""
        while any(task.code is None for task in self.tasks) or not all(o.empty for o in self._outputs.values()):
            self.loop.turn(self._timeout())
            self._tell()
            self._look_at_clock()
        self._tell()
        return max((task.code or 0 for task in self.tasks), default=0)

    def ended(self, task: Task) -> None:
        self._news.append(task)

    def _timeout(self) -> float | None:
        times = [moment for moment in (self._limit, self._wait_until, self._kill_at) if moment is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _tell(self) -> None:
        """srun's words for tasks that have failed, those of a node with the same end in one line."""
        news, self._news = self._news, []
        if news and self._wait and self._wait_until is None:
            self._wait_until = time.monotonic() + self._wait
        groups: dict[tuple[str, int], list[int]] = {}
        for task in news:
            if task.code and not task.failed:
                groups.setdefault((task.name, task.code), []).append(task.rank)
        for (name, code), ranks in groups.items():
            link.warn(f"srun: error: {name}: {task_ids(ranks)}: {ending(code)}")
        if self._kill and any(task.code for task in news) and not self._ending:
            self._terminate()

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        if self._limit is not None and self._limit <= now:
            self._limit = None
            link.warn("srun: error: the step is cancelled due to its time limit")
            self._terminate()
        if self._wait_until is not None and self._wait_until <= now:
            self._wait_until, self._wait = None, 0
            link.warn("srun: error: the first task has ended, and the time to wait for the others is over")
            self._terminate()
        if self._kill_at is not None and self._kill_at <= now:
            self._kill_at = None
            self._signal(signal.SIGKILL)

    def _terminate(self) -> None:
        if not any(task.code is None for task in self.tasks):
            return
        self._ending = True
        link.warn(f"srun: Job step aborted: Waiting up to {KILL_WAIT + 2:.0f} seconds for job step to finish.")
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        self._kill_at = time.monotonic() + KILL_WAIT

    def _signal(self, number: int) -> None:
        for task in self.tasks:
            if task.code is None:
                task.wire.post_number(link.SIGNAL, 0, number)
                task.settle()

    def _on_signals(self, _events: int) -> None:
        for number in set(self._signals.numbers()):
            self._signal(number)


def task_ids(ranks: list[int]) -> str:
    """As in "task 3" and "tasks 0-2,5"."""
    return f"task{'s' if len(ranks) > 1 else ''} {','.join(runs(sorted(ranks)))}"


def ending(code: int) -> str:
    """How a task has ended, as srun says it."""
    if 128 < code <= 128 + 64:
        text = signal.strsignal(code - 128)
        if text:
            return text
    return f"Exited with exit code {code}"
