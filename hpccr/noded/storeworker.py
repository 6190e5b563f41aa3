"""Root's end of the store worker (hpccr.store.worker, whose docstring has the protocol): the child that does all I/O on
the store, with the user's ids and no privileges. It is taken for hostile here."""

from __future__ import annotations

import fcntl
import math
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Annotated

import msgspec

from hpccr.errors import HpccrError, error_for

WORKER = 3
"""Descriptor of the socket in the worker."""
MAX_FRAME = 4 << 20
STALL = 600.0
"""Seconds without any progress of the worker after which a transfer is given up (a file system that hangs)."""
SLOWEST = 1 << 20
"""Bytes a second that a transfer must reach in the end: whoever only seems to work does not do so for ever."""
KILLED = 5.0
"""Seconds for a worker that was killed to end; one that waits for a file system may take for ever."""
MAX_TEXT = 16 << 10
BUFFER = 4 << 20
"""Bytes of the socket to the worker, each way."""
MAX_STDERR = 64 << 10
KEEP_FREED = {
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_ARENA_MAX": "4",
}
"""For glibc (mallopt(3)): pieces of a mebibyte come and go all the time, and giving their memory back to the kernel
each time costs more than copying them."""
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", **KEEP_FREED}

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_HEADER = struct.Struct("!I")


class User(msgspec.Struct, frozen=True):
    """The ids of the worker."""

    uid: int
    gid: int
    groups: tuple[int, ...]


class Data(msgspec.Struct, frozen=True, tag_field="t", tag="data"):
    data: memoryview
    """Of the frame itself, so that it is not copied."""


class End(msgspec.Struct, frozen=True, tag_field="t", tag="end"):
    pass


class Ok(msgspec.Struct, frozen=True, tag_field="t", tag="ok"):
    pass


class Taken(msgspec.Struct, frozen=True, tag_field="t", tag="moved"):
    """How many bytes and files of a flush the worker has taken over."""

    done: int
    files: int


class FragmentText(msgspec.Struct, frozen=True, tag_field="t", tag="fragment"):
    fragment: bytes


class WorkerError(msgspec.Struct, frozen=True, tag_field="t", tag="error"):
    message: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
    hint: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
    code: int


FromWorker = Ok | Taken | FragmentText | Data | End | WorkerError


class Link:
    """Frames to and from the worker over one socket. Every wait has the deadline `stall`."""

    def __init__(self, sock: socket.socket, stall: float) -> None:
        sock.settimeout(stall)
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._stall = stall
        self.ends = math.inf
        """Until when (time.monotonic()) all must be over; see allow()."""
        self._decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
        self._encoder = msgspec.msgpack.Encoder()

    def allow(self, count: int) -> None:
        """From now on there is time for that many bytes, however slow."""
        self.ends = time.monotonic() + 2 * self._stall + count / SLOWEST

    def send(self, *, descriptor: int | None = None, **message: object) -> None:
        """Raises what the worker complained of, or HpccrError if it is gone or stalls. Whoever uses ready() and
        receive() in between learns of a complaint sooner."""
        body = self._encoder.encode(message)
        frame = _HEADER.pack(len(body)) + body
        try:
            if descriptor is not None:
                sent = socket.send_fds(self._socket, [frame], [descriptor])
                frame = frame[sent:]
            self._socket.sendall(frame)
        except TimeoutError:
            raise self._stalled() from None
        except OSError as error:
            self._complaint()
            raise self._lost(str(error)) from None

    def ready(self) -> bool:
        """Whether the worker has said something."""
        return bool(self._poll.poll(0))

    def receive(self) -> Ok | Taken | FragmentText | Data | End:
        """The next message. Raises as send()."""
        try:
            if time.monotonic() > self.ends:
                raise TimeoutError
            (length,) = _HEADER.unpack(self._exactly(_HEADER.size))
            if length > MAX_FRAME:
                raise self._lost(f"it sent a frame of {length} bytes")
            message = self._decoder.decode(self._exactly(length))
        except TimeoutError:
            raise self._stalled() from None
        except OSError as error:
            raise self._lost(str(error)) from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._lost(f"it sent what is no message: {error}") from None
        if isinstance(message, WorkerError):
            raise error_for(message.code, message.message, message.hint)
        return message

    def expect_ok(self) -> None:
        message = self.receive()
        if not isinstance(message, Ok):
            raise self._lost(f"it sent {type(message).__name__} where ok was due")

    def _exactly(self, count: int) -> bytearray:
        # One deadline for the whole frame, looked at after each wait: a byte now and then is no progress.
        deadline = time.monotonic() + self._stall
        data = bytearray(count)
        view = memoryview(data)
        while view:
            received = self._socket.recv_into(view)
            if not received:
                raise self._lost("it closed the connection")
            view = view[received:]
            if view and time.monotonic() > deadline:
                raise TimeoutError
        return data

    def _complaint(self) -> None:
        """Raise what the worker has said already, behind what it has taken over."""
        while isinstance(message := self.receive(), Taken):
            pass
        raise self._lost(f"it sent {type(message).__name__} unasked")

    def _stalled(self) -> HpccrError:
        return HpccrError(
            f"the store made no progress for {self._stall:.0f} s"
            if time.monotonic() <= self.ends
            else f"the store took less than {SLOWEST >> 20} MiB a second",
            hint="is its file system mounted and answering on this node?",
        )

    def _lost(self, reason: str) -> HpccrError:
        """The error to raise when nothing more can come from here."""
        return HpccrError(f"the store worker failed: {reason}")

    def shut(self) -> None:
        """Wake whoever waits here, in any thread; nothing more comes."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end is gone

    def close(self) -> None:
        self._socket.close()


class Lane(Link):
    """A further socket to a worker, for another thread."""

    def __init__(self, sock: socket.socket, stall: float, lost: Callable[[str], HpccrError]) -> None:
        super().__init__(sock, stall)
        self._worker_lost = lost

    def _lost(self, reason: str) -> HpccrError:
        return self._worker_lost(reason)


class Worker(Link):
    """The child with the user's ids, and frames to and from it."""

    def __init__(self, mode: str, user: User, *, stall: float = STALL) -> None:
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # Either end may have got the worker's number, which is about to be used.
        ours, theirs = (socket.socket(fileno=fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)) for end in pair)
        for end in pair:
            end.close()
        for end in (ours, theirs):
            _widen(end)
        super().__init__(ours, stall)
        self._stderr = bytearray()
        # The socket is put at its number here: in the child it could overwrite a descriptor of subprocess's own.
        os.dup2(theirs.fileno(), WORKER)
        theirs.close()
        try:
            self._process = subprocess.Popen(
                # It takes the ids itself: so it is not dumpable, and nobody of the user's can trace it.
                [sys.executable, "-I", "-m", "hpccr.store.worker", mode, *map(str, (user.uid, user.gid, *user.groups))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[WORKER],
                cwd="/",
                env=ENVIRONMENT,
                umask=0o077,
            )
        except OSError as error:
            ours.close()
            raise HpccrError(f"cannot start the store worker: {error}") from None
        finally:
            os.close(WORKER)
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    def lane(self) -> Link:
        """Another socket to the worker of a fetch, to be served at the same time. The caller's to close."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            for end in (ours, theirs):
                _widen(end)
            try:
                self.send(t="lane", descriptor=theirs.fileno())
            except BaseException:
                ours.close()
                raise
        lane = Lane(ours, self._stall, self._lost)
        lane.ends = self.ends
        return lane

    def _lost(self, reason: str) -> HpccrError:
        # Whatever it does now, it is not listened to any more.
        self._kill()
        self._reader.join(1)
        said = bytes(self._stderr[-1000:]).decode(errors="replace").strip()
        return HpccrError(f"the store worker failed: {reason}" + (f"\n{said}" if said else ""))

    def _read_stderr(self) -> None:
        stream = self._process.stderr
        if stream is None:
            return
        while chunk := os.read(stream.fileno(), 4096):
            if len(self._stderr) < MAX_STDERR:
                self._stderr += chunk

    def close(self) -> None:
        """End it: told by the end of the socket it cleans up after itself, else it is killed."""
        self._socket.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self) -> None:
        """It does nothing any more, whether or not it can end now: a file system that hangs may hold it."""
        self._process.kill()
        try:
            self._process.wait(KILLED)
        except subprocess.TimeoutExpired:
            pass


def _widen(sock: socket.socket) -> None:
    """Room for a few frames of data, so that neither end waits for the other at each."""
    for forced, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, BUFFER)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, BUFFER)
