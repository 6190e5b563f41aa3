"""The agent's side of a lease: one connection to the local hpccrd, with descriptors beside the frames."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Sequence

from hpccr.errors import PeerLostError, UnsupportedError
from hpccr.wire import messages as m
from hpccr.wire.frames import Channel, encode

PATIENCE = 10.0
"""Seconds for hpccrd to be there: it may be starting again at this moment."""
RETRY = 0.1
MAX_REQUEST = 4 << 20
"""Longest frame hpccrd takes from a user."""


def _connected(path: str, *, last: bool) -> socket.socket | None:
    """A socket connected to hpccrd's; None if it cannot be had now, or an error if last. Raises as Lease.open()."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    try:
        # Never in progress, for a unix socket: asyncio would take EAGAIN (the queue is full) for that, and for success.
        sock.connect(path)
        return sock
    except OSError as error:
        sock.close()
        if error.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN):
            raise PeerLostError(f"cannot connect to hpccrd at {path}: {error.strerror}") from None
        if not last:
            return None
        raise UnsupportedError(
            f"no hpccrd answers on {socket.gethostname()} ({path}: {error.strerror})",
            hint="the administrator starts it with `systemctl start hpccrd`; `hpccr doctor` checks every node",
        ) from None


class Lease:
    """One capsule at the local hpccrd: while this connection is open the capsule lives."""

    def __init__(self, sock: socket.socket, channel: Channel[m.NodeReply]) -> None:
        self._sock = sock
        self._channel = channel
        self._lock = asyncio.Lock()

    @classmethod
    async def open(cls, path: str, *, patience: float = PATIENCE) -> Lease:
        """Connect to hpccrd's socket, waiting `patience` seconds for it to be there.

        Raises UnsupportedError (no hpccrd) or PeerLostError.
        """
        deadline = time.monotonic() + patience
        while (sock := _connected(path, last=time.monotonic() >= deadline)) is None:
            await asyncio.sleep(RETRY)
        # The transport reads; a duplicate sends, because asyncio's transports cannot send descriptors.
        reader, writer = await asyncio.open_unix_connection(sock=sock.dup())
        return cls(sock, Channel(reader, writer, m.NodeReply))

    async def send(self, message: m.Message, descriptors: Sequence[int] = ()) -> None:
        """Send one request; the descriptors stay open here. Raises OSError when hpccrd is gone."""
        frame = encode(message, limit=MAX_REQUEST)
        loop = asyncio.get_running_loop()
        async with self._lock:
            sent = 0
            if descriptors:
                sent = await self._send_descriptors(frame, descriptors)
            await loop.sock_sendall(self._sock, frame[sent:])

    async def _send_descriptors(self, frame: bytes, descriptors: Sequence[int]) -> int:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return socket.send_fds(self._sock, [frame], list(descriptors))
            except BlockingIOError:
                writable = loop.create_future()
                loop.add_writer(self._sock, writable.set_result, None)
                try:
                    await writable
                finally:
                    loop.remove_writer(self._sock)

    async def receive(self) -> m.NodeReply | None:
        """The next reply or event; None when hpccrd has ended the lease."""
        try:
            return await self._channel.receive()
        except ConnectionError:
            return None

    async def close(self) -> None:
        """End the lease: hpccrd kills the capsule and removes what belongs to it."""
        self._sock.close()
        await self._channel.close()
