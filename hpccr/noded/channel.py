"""Frames with descriptors over a unix stream socket: hpccrd's end of a connection from a user.

A frame is as in wire.frames. The sender attaches descriptors (SCM_RIGHTS) to the first byte of the frame they belong
to; here every read asks for exactly what is still missing of the frame, so a descriptor can never be taken for
another frame's.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections import deque
from typing import Any

import msgspec

from hpccr.wire.frames import HEADER, FrameError, decode_body, encode

MAX_FRAME = 4 << 20
"""Bytes of a frame from a user."""
MAX_DESCRIPTORS = 3
"""stdin, stdout, stderr."""
MAX_QUEUED = 1 << 20
"""Bytes of replies a peer may leave unread; then the connection counts as broken."""
CHUNK = 64 << 10

_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)


class Descriptors:
    """Descriptors that came with a frame. Owned here; close() is safe to repeat."""

    def __init__(self, numbers: list[int]) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(self._numbers)

    def are_pipes(self) -> bool:
        """Whether all are anonymous pipes. Asks the kernel only: a stat could ask a user's own FUSE server."""
        return all(os.readlink(f"/proc/self/fd/{number}").startswith("pipe:[") for number in self._numbers)

    def close(self) -> None:
        """May block for as long as a user's FUSE server likes, unless are_pipes()."""
        while self._numbers:
            os.close(self._numbers.pop())


class FrameChannel:
    """Messages of type `receive` from one connected non-blocking unix stream socket, which this object owns."""

    def __init__(self, sock: socket.socket, receive: Any, *, limit: int = MAX_FRAME) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(receive)
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._out: deque[memoryview] = deque()
        self._queued = 0
        self._writing = False
        self._drained = asyncio.Event()
        self._drained.set()
        self._broken = False
        self.stray = Descriptors([])
        """What came with a frame that was never completed, or was too many: the owner of the channel closes it."""

    async def receive(self, *, deadline: float | None = None) -> tuple[Any, Descriptors] | None:
        """The next message and its descriptors; None at a clean end.

        deadline: seconds the peer has for a frame once its first byte has come. Raises FrameError (bad or late frame)
        or OSError (connection broken); the descriptors of such a frame are in `stray`.
        """
        numbers: list[int] = []
        try:
            first = await self._read(1, numbers)
            if not first:
                return None
            async with asyncio.timeout(deadline):
                header = first + await self._exactly(HEADER.size - 1, numbers)
                (length,) = HEADER.unpack(header)
                if length > self._limit:
                    raise FrameError(f"a frame of {length} bytes exceeds the limit of {self._limit}")
                body = await self._exactly(length, numbers)
            message = decode_body(self._decoder, body)
        except TimeoutError:
            self.stray = Descriptors(numbers)
            raise FrameError(f"a frame was not complete after {deadline:.0f} s") from None
        except BaseException:
            self.stray = Descriptors(numbers)
            raise
        return message, Descriptors(numbers)

    async def _exactly(self, count: int, numbers: list[int]) -> bytes:
        # Grows with what has come, not with what was announced: an announcement costs the peer nothing.
        data = bytearray()
        while len(data) < count:
            chunk = await self._read(min(CHUNK, count - len(data)), numbers)
            if not chunk:
                raise FrameError("the connection ended inside a frame")
            data += chunk
        return bytes(data)

    async def _read(self, count: int, numbers: list[int]) -> bytes:
        while True:
            try:
                data, ancillary, flags, _ = self.socket.recvmsg(count, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
                break
            except BlockingIOError:
                await self._wait_readable()
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                numbers.extend(received)
        if flags & socket.MSG_CTRUNC or len(numbers) > MAX_DESCRIPTORS:
            raise FrameError(f"more than {MAX_DESCRIPTORS} descriptors came with a frame")
        return data

    async def _wait_readable(self) -> None:
        ready = self._loop.create_future()
        self._loop.add_reader(self.socket, _resolve, ready)
        try:
            await ready
        finally:
            self._loop.remove_reader(self.socket)

    def post(self, message: msgspec.Struct) -> bool:
        """Queue a message; order is kept. False if the peer is gone or has left MAX_QUEUED bytes unread."""
        if self._broken:
            return False
        frame = encode(message, limit=self._limit)
        if self._queued + len(frame) > MAX_QUEUED:
            self._break()
            return False
        self._out.append(memoryview(frame))
        self._queued += len(frame)
        self._drained.clear()
        self._write()
        return not self._broken

    @property
    def unread(self) -> int:
        """Bytes of replies that the peer has not taken yet and the socket has no room for."""
        return self._queued

    async def drain(self, deadline: float) -> None:
        """Wait until the peer has taken all, at most `deadline` seconds."""
        try:
            async with asyncio.timeout(deadline):
                await self._drained.wait()
        except TimeoutError:
            self._break()

    def _write(self) -> None:
        try:
            while self._out:
                sent = self.socket.send(self._out[0], socket.MSG_NOSIGNAL)
                self._queued -= sent
                rest = self._out[0][sent:]
                if rest:
                    self._out[0] = rest
                else:
                    self._out.popleft()
        except BlockingIOError:
            if not self._writing:
                self._loop.add_writer(self.socket, self._write)
                self._writing = True
            return
        except OSError:
            self._break()
            return
        self._stop_writing()
        self._drained.set()

    def _stop_writing(self) -> None:
        if self._writing:
            self._loop.remove_writer(self.socket)
            self._writing = False

    def _break(self) -> None:
        self._broken = True
        self._stop_writing()
        self._out.clear()
        self._queued = 0
        self._drained.set()
        try:
            # Wakes the reader too: the owner sees the end of the connection and closes.
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it was closed by the peer before us

    def close(self) -> None:
        self._stop_writing()
        self._broken = True
        self._drained.set()
        self.socket.close()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
