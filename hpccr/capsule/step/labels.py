"""Lines of several tasks in one stream: whole, and with a label if that is wanted."""

from __future__ import annotations

import os
import select

from hpccr.capsule import link
from hpccr.capsule.spawn import exit_code, fork

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    import signal
    from typing import NoReturn
else:
    import _signal as signal

LONGEST = 32 << 10
"""Bytes of a line; a longer one is passed on in pieces, so that nothing is kept without bound."""
PASSED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Lines:
    """What one task prints on one stream."""

    def __init__(self, label: bytes, *, unbuffered: bool = False) -> None:
        """label: put in front of each line. unbuffered: parts of lines are passed on at once."""
        self._label, self._unbuffered = label, unbuffered
        self._kept = b""
        self._inside = False
        """Part of the present line has been passed on already."""

    def feed(self, data: bytes) -> bytes:
        """What can be passed on after `data` has come."""
        whole, newline, self._kept = (self._kept + data).rpartition(b"\n")
        ready = whole + newline
        if self._kept and (self._unbuffered or len(self._kept) > LONGEST):
            ready, self._kept = ready + self._kept, b""
        return self._labelled(ready)

    def end(self) -> bytes:
        """What is left at the end; with labels a line's end is added if it is missing."""
        ready, self._kept = self._kept, b""
        result = self._labelled(ready)
        if self._label and self._inside:
            self._inside = False
            result += b"\n"
        return result

    def _labelled(self, ready: bytes) -> bytes:
        if not ready or not self._label:
            return ready
        ends = ready.endswith(b"\n")
        body = ready[:-1] if ends else ready
        result = (b"" if self._inside else self._label) + body.replace(b"\n", b"\n" + self._label)
        self._inside = not ends
        return result + (b"\n" if ends else b"")


class Labeller:
    """A program with its outputs (descriptors `streams`) labelled, on those of this process."""

    def __init__(self, streams: list[int], label: bytes, argv: list[bytes]) -> None:
        self._loop = link.Loop()
        self._lines: dict[int, tuple[int, Lines]] = {}
        self._signals = link.SignalPipe(set(PASSED))
        self._loop.watch(self._signals.fd, select.POLLIN, self._on_signals)
        pipes = {number: os.pipe() for number in streams}

        def prepare() -> None:
            for number, (_, write) in pipes.items():
                os.dup2(write, number)

        # The group stays mpirun's: it is what mpirun signals.
        self._pid = fork("srun", argv, link.original_environment(), prepare, group=False)
        for number, (read, write) in pipes.items():
            os.close(write)
            self._lines[read] = (number, Lines(label))
            self._watch(read)

    def _watch(self, fd: int) -> None:
        self._loop.watch(fd, select.POLLIN, lambda _: self._ready(fd))

    def run(self) -> int:
        """The program's exit code, when everything that it has printed is passed on."""
        while self._lines:
            self._loop.turn(None)
        return exit_code(os.waitpid(self._pid, 0)[1])

    def _ready(self, fd: int) -> None:
        number, lines = self._lines[fd]
        data = os.read(fd, link.CHUNK)
        ready = lines.feed(data) if data else lines.end()
        while ready:
            ready = ready[os.write(number, ready) :]
        if not data:
            self._loop.forget(fd)
            os.close(fd)
            del self._lines[fd]

    def _on_signals(self, _events: int) -> None:
        self._signals.numbers()  # sent to the program as well: it is in the same group


def main(argv: list[str]) -> NoReturn:
    """`STREAMS LABEL COMMAND...`; STREAMS: the digits of the descriptors."""
    streams, label, *command = map(os.fsencode, argv)
    code = 126
    try:
        code = Labeller([int(digit) for digit in streams.decode()], label, command).run()
    except OSError as error:
        link.warn(f"srun: {error.strerror}")
    os._exit(code)
