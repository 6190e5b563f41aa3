"""Frames with descriptors over a socket pair: whole, cut, late, oversized, and garbage."""

import array
import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpccr.noded.channel import MAX_DESCRIPTORS, MAX_FRAME, MAX_QUEUED, FrameChannel
from hpccr.wire import messages as m
from hpccr.wire.frames import HEADER, FrameError, encode

Body = Callable[[FrameChannel, socket.socket], Coroutine[Any, Any, None]]


def with_channel(body: Body) -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            channel = FrameChannel(ours, m.NodeRequest)
            try:
                async with asyncio.timeout(20):
                    await body(channel, theirs)
            finally:
                channel.stray.close()
                channel.close()

    asyncio.run(run())


def pipes(count: int) -> list[int]:
    made: list[int] = []
    while len(made) < count:
        made.extend(os.pipe())
    for fd in made[count:]:
        os.close(fd)
    return made[:count]


def send_with(peer: socket.socket, data: bytes, count: int) -> None:
    fds = pipes(count)
    peer.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    for fd in fds:
        os.close(fd)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_belong_to_their_frame() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        # Sent in one go, and read in one go if the reader were greedy.
        peer.sendall(encode(m.Signal(1)))
        send_with(peer, encode(m.Signal(2)), 3)
        peer.sendall(encode(m.Signal(3)))
        send_with(peer, encode(m.Signal(4)), 1)
        counts = []
        for number in range(1, 5):
            received = await channel.receive()
            assert received is not None
            message, descriptors = received
            assert message == m.Signal(number)
            assert descriptors.are_pipes()
            counts.append(len(descriptors))
            descriptors.close()
            descriptors.close()
        assert counts == [0, 3, 0, 1]
        peer.shutdown(socket.SHUT_WR)
        assert await channel.receive() is None

    before = open_descriptors()
    with_channel(body)
    assert open_descriptors() == before


def test_received_descriptors_are_not_inherited() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        send_with(peer, encode(m.Freeze()), 1)
        received = await channel.receive()
        assert received is not None
        assert not os.get_inheritable(received[1].numbers[0])
        received[1].close()

    with_channel(body)


def test_what_is_no_anonymous_pipe_is_known_without_asking_its_file_system() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        with open("/dev/null", "rb") as null:
            socket.send_fds(peer, [encode(m.Freeze())], [null.fileno()])
        received = await channel.receive()
        assert received is not None
        assert not received[1].are_pipes()
        received[1].close()

    with_channel(body)


def test_too_many_descriptors_end_the_connection_and_leak_nothing() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        send_with(peer, encode(m.Freeze()), MAX_DESCRIPTORS + 5)
        with pytest.raises(FrameError, match="descriptors"):
            await channel.receive()

    before = open_descriptors()
    with_channel(body)
    assert open_descriptors() == before


def test_descriptors_dribbled_into_one_frame_are_counted_together() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        frame = encode(m.Freeze())
        for k in range(len(frame)):
            send_with(peer, frame[k : k + 1], 1)
        with pytest.raises(FrameError, match="descriptors"):
            await channel.receive()

    before = open_descriptors()
    with_channel(body)
    assert open_descriptors() == before


def test_an_announced_length_costs_nothing() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        peer.sendall(HEADER.pack(MAX_FRAME + 1))
        with pytest.raises(FrameError, match="limit"):
            await channel.receive()

    with_channel(body)


@pytest.mark.parametrize("cut", [1, 3, 4, 7])
def test_half_a_frame(cut: int) -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        peer.sendall(encode(m.Abort(reason="x" * 100))[:cut])
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(FrameError, match="inside a frame"):
            await channel.receive()

    with_channel(body)


def test_a_frame_that_does_not_come_to_its_end() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        send_with(peer, encode(m.Abort(reason="x"))[:5], 2)
        with pytest.raises(FrameError, match="not complete"):
            await channel.receive(deadline=0.05)
        assert len(channel.stray) == 2

    before = open_descriptors()
    with_channel(body)
    assert open_descriptors() == before


def test_silence_between_frames_has_no_deadline() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        receiving = asyncio.create_task(channel.receive(deadline=0.01))
        done, _ = await asyncio.wait({receiving}, timeout=0.1)
        assert not done
        peer.sendall(encode(m.Freeze()))
        received = await receiving
        assert received is not None
        assert received[0] == m.Freeze()

    with_channel(body)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_garbage_is_a_frame_error_or_a_message(garbage: bytes) -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        peer.sendall(garbage)
        peer.shutdown(socket.SHUT_WR)
        try:
            while await channel.receive() is not None:
                pass
        except FrameError:
            pass

    with_channel(body)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_a_garbage_body_is_a_frame_error(garbage: bytes) -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        peer.sendall(HEADER.pack(len(garbage)) + garbage)
        with pytest.raises(FrameError, match="not a message"):
            await channel.receive()

    with_channel(body)


def test_deep_nesting_is_a_frame_error() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        garbage = b"\x91" * 100_000
        sending = asyncio.create_task(asyncio.to_thread(peer.sendall, HEADER.pack(len(garbage)) + garbage))
        with pytest.raises(FrameError, match="not a message"):
            await channel.receive()
        await sending

    with_channel(body)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=20), st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_any_cutting_of_the_stream_gives_the_same_messages(numbers: list[int], cuts: list[int]) -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        stream = b"".join(encode(m.Signal(number)) for number in numbers)

        async def send() -> None:
            position = 0
            while position < len(stream):
                size = cuts[position % len(cuts)]
                peer.sendall(stream[position : position + size])
                position += size
                await asyncio.sleep(0)
            peer.shutdown(socket.SHUT_WR)

        sending = asyncio.create_task(send())
        got = []
        while (received := await channel.receive()) is not None:
            got.append(received[0].signum)
        await sending
        assert got == numbers

    with_channel(body)


def test_replies_arrive_in_order_and_whole() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        messages = [m.Failed(code=1, message=str(k) * 1000) for k in range(200)]

        def read() -> bytes:
            data = b""
            while len(data) < sum(len(encode(message)) for message in messages):
                data += peer.recv(65536)
            return data

        reading = asyncio.create_task(asyncio.to_thread(read))
        for message in messages:
            assert channel.post(message)
        await channel.drain(10)
        assert await reading == b"".join(encode(message) for message in messages)
        assert channel.unread == 0

    with_channel(body)


def test_a_peer_that_does_not_read_is_cut_off() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        receiving = asyncio.create_task(channel.receive())
        posted = 0
        while channel.post(m.Failed(code=1, message="x" * 10_000)):
            posted += 10_000
            assert posted < 4 * MAX_QUEUED
        assert channel.unread == 0
        # The reader notices too, so the lease ends.
        assert await receiving is None

    with_channel(body)


def test_draining_has_a_deadline() -> None:
    async def body(channel: FrameChannel, peer: socket.socket) -> None:
        while channel.unread == 0:
            channel.post(m.Failed(code=1, message="x" * 10_000))
        await channel.drain(0.05)
        assert not channel.post(m.Aborted())

    with_channel(body)
