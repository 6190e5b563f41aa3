"""Frames: a 4-byte big-endian length and that many bytes of msgpack. Over asyncio streams and over bytes."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import msgspec

from hpccr.errors import HpccrError

MAX_FRAME = 8 << 20
"""Upper bound of a frame between the user's own processes (environments and output chunks fit many times over)."""

HEADER = struct.Struct("!I")


class FrameError(HpccrError):
    """The peer does not speak our protocol: a frame is too long, cut off, or not a message."""


_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct, *, limit: int = MAX_FRAME) -> bytes:
    """One frame. Raises FrameError if it were longer than `limit` bytes or has a str that is no text."""
    try:
        body = _encoder.encode(message)
    except UnicodeEncodeError as error:
        raise FrameError(f"{type(message).__name__} cannot be encoded: {error}") from None
    if len(body) > limit:
        raise FrameError(f"a {type(message).__name__} message of {len(body)} bytes exceeds the limit of {limit}")
    return HEADER.pack(len(body)) + body


def decode_body[T](decoder: msgspec.msgpack.Decoder[T], body: bytes | bytearray | memoryview) -> T:
    """The message in a frame's body. Raises FrameError if it is none."""
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # msgspec lets the latter through
        raise FrameError(f"not a message of this protocol: {error}") from None
    except RecursionError:
        raise FrameError("not a message of this protocol: nested too deeply") from None


class Channel[T]:
    """Messages of type `receive` (a class or union) over a pair of asyncio streams; send() accepts any message."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        receive: Any,
        *,
        limit: int = MAX_FRAME,
    ) -> None:
        self.reader = reader
        self.writer = writer
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receive)
        self._limit = limit

    async def receive(self) -> T | None:
        """The next message; None at a clean end. Raises FrameError, or OSError if the connection broke."""
        try:
            header = await self.reader.readexactly(HEADER.size)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise FrameError("the connection ended inside a frame") from None
            return None
        (length,) = HEADER.unpack(header)
        if length > self._limit:
            raise FrameError(f"a frame of {length} bytes exceeds the limit of {self._limit}")
        try:
            body = await self.reader.readexactly(length)
        except asyncio.IncompleteReadError:
            raise FrameError("the connection ended inside a frame") from None
        return decode_body(self._decoder, body)

    def post(self, message: msgspec.Struct) -> None:
        """Queue a message; order is kept. Does not wait and does not raise when the peer is gone."""
        if not self.writer.is_closing():
            self.writer.write(encode(message, limit=self._limit))

    async def send(self, message: msgspec.Struct) -> None:
        """Queue a message and wait until the transport has room. Raises OSError if the connection broke."""
        self.post(message)
        await self.writer.drain()

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass  # the peer closed first: closed is what we wanted
