"""Frames and handshake: what is sent arrives, and nothing else gets in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccr.errors import HpccrError
from hpccr.wire import messages as m
from hpccr.wire.frames import HEADER, Channel, FrameError, encode
from hpccr.wire.handshake import MAGIC, HandshakeError, authenticate, new_secret

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connected(serve: Callable[[Stream], Awaitable[None]], use: Callable[[Stream], Awaitable[None]]) -> None:
    """Run both ends of one TCP connection on loopback; errors of either are raised."""
    results: asyncio.Queue[BaseException | None] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve((reader, writer))
            results.put_nowait(None)
        except Exception as error:
            results.put_nowait(error)
        finally:
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            await use((reader, writer))
        finally:
            writer.close()
        error = await asyncio.wait_for(results.get(), 20)
    if error is not None:
        raise error


def both_with(secret_of_server: str, secret_of_client: str) -> None:
    async def serve(stream: Stream) -> None:
        await authenticate(*stream, secret_of_server, server=True)

    async def use(stream: Stream) -> None:
        await authenticate(*stream, secret_of_client, server=False)

    asyncio.run(connected(serve, use))


def test_the_same_secret_lets_both_in() -> None:
    secret = new_secret()
    both_with(secret, secret)


def test_another_secret_lets_nobody_in() -> None:
    with pytest.raises(HandshakeError):
        both_with(new_secret(), new_secret())


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.0\r\n\r\n", b"", MAGIC + b"\0" * 32, MAGIC + b"\0" * 64])
def test_strangers_are_refused(garbage: bytes) -> None:
    async def serve(stream: Stream) -> None:
        await authenticate(*stream, new_secret(), server=True)

    async def use(stream: Stream) -> None:
        stream[1].write(garbage)
        stream[1].write_eof()
        await stream[0].read()

    with pytest.raises(HandshakeError):
        asyncio.run(connected(serve, use))


def test_a_server_that_mirrors_our_proof_is_not_believed() -> None:
    async def serve(stream: Stream) -> None:
        hello = await stream[0].readexactly(len(MAGIC) + 32)
        stream[1].write(hello)
        stream[1].write(await stream[0].readexactly(32))
        await stream[0].read()

    async def use(stream: Stream) -> None:
        await authenticate(*stream, new_secret(), server=False)

    with pytest.raises(HandshakeError):
        asyncio.run(connected(serve, use))


def test_messages_arrive_whole_and_in_order() -> None:
    sent = [m.Output(1, b"x" * n) for n in (0, 1, 100_000)] + [m.Released(0.5), m.Ping(), m.Failed(13, "no", "hint")]

    async def serve(stream: Stream) -> None:
        channel: Channel[m.AgentMessage] = Channel(*stream, m.AgentMessage)
        for message in sent:
            assert await channel.receive() == message
        assert await channel.receive() is None

    async def use(stream: Stream) -> None:
        channel: Channel[m.AgentMessage] = Channel(*stream, m.AgentMessage)
        for message in sent:
            await channel.send(message)
        await channel.close()

    asyncio.run(connected(serve, use))


def receive_bytes(data: bytes, limit: int = 1000) -> object:
    async def feed() -> object:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        channel: Channel[m.NodeRequest] = Channel(reader, None, m.NodeRequest, limit=limit)  # type: ignore[arg-type]
        return await channel.receive()

    return asyncio.run(feed())


@given(st.binary(max_size=200))
def test_garbage_is_an_error_never_a_crash(data: bytes) -> None:
    try:
        receive_bytes(data)
    except HpccrError:
        pass


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 10])
def test_half_a_frame_is_an_error(cut: int) -> None:
    frame = encode(m.Flush("/somewhere/on/shared/storage"))
    with pytest.raises(FrameError, match="inside a frame"):
        receive_bytes(frame[:cut])


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameError, match="exceeds"):
        receive_bytes(HEADER.pack(1 << 31))
    with pytest.raises(FrameError, match="exceeds"):
        encode(m.Output(1, b"x" * 2000), limit=1000)


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(FrameError):
        receive_bytes(encode(m.Created(m.Endpoint(0, "", 1, ""), "n", ())))


def test_values_out_of_range_are_refused() -> None:
    for bad in (m.Prepare(0, "0" * 32), m.Prepare(1, "../../etc"), m.Flush(1)):  # type: ignore[arg-type]
        with pytest.raises(FrameError):
            receive_bytes(encode(bad))


def test_text_that_is_none_makes_no_frame() -> None:
    """What bypasses errors.encodable() is an error that names the message, and no end of the connection unsaid."""
    with pytest.raises(FrameError, match="Abort cannot be encoded"):
        encode(m.Abort("caf\udce9"))
