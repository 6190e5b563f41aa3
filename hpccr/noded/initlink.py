"""hpccrd's end of the conversation with a capsule's init (see noded.control)."""

from __future__ import annotations

import array
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence

import msgspec

from hpccr.errors import HpccrError, PeerLostError, UnsupportedError, error_for
from hpccr.noded import control
from hpccr.noded.spawned import Spawned, watch
from hpccr.wire.messages import Abort, Aborted, Exited, Failed, Message, Signal, Wanted

log = logging.getLogger(__name__)

END_TIMEOUT = 10.0
"""Seconds init has to end by itself once its socket is closed."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[control.InitReply] = msgspec.msgpack.Decoder(control.InitReply)


class Init:
    """A capsule's init process, from its start until nothing of it is left."""

    def __init__(
        self, name: str, *, exited: Callable[[int], None], wanted: Callable[[], None], ended: Callable[[], None]
    ) -> None:
        """Start it. exited(code): the launch root ended; wanted(): the job asks for a checkpoint; ended(): init itself
        ended without being asked to."""
        self._exited, self._wanted, self._end = exited, wanted, ended
        self._loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = Spawned(
                [sys.executable, "-I", "-m", "hpccr.noded.init", "--fd", str(theirs.fileno())],
                label=f"capsule {name}",
                descriptors=[theirs.fileno()],
            )
        ours.setblocking(False)
        self._socket = ours
        self._pidfd = -1
        self._pending: asyncio.Future[control.InitReply] | None = None
        self._aborting: asyncio.Future[control.InitReply] | None = None
        self._closed = False
        self._loop.add_reader(ours, self._readable)

    def adopt(self, pid: int) -> None:
        """Pin the process that Built named. Raises PeerLostError if it is gone."""
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise self._lost() from None

    async def request[R: Message](
        self, message: Message, reply: type[R], *, timeout: float, descriptors: Sequence[int] = ()
    ) -> R:
        """Send a request (before the first suspension) and wait for its reply.

        Raises what init answered, PeerLostError if it ended or after `timeout` seconds.
        """
        if self._pending is not None:
            raise HpccrError(f"{type(message).__name__} while the capsule is busy")
        self._pending = self._loop.create_future()
        try:
            self._send(message, descriptors)
            async with asyncio.timeout(timeout):
                answer = await self._pending
        except TimeoutError:
            raise PeerLostError(f"the capsule did not answer {type(message).__name__} within {timeout:.0f} s") from None
        finally:
            self._pending = None
        return _expect(answer, reply)

    async def abort(self, reason: str, *, timeout: float) -> None:
        """Give a checkpoint up; a request under way then fails. Raises as request()."""
        if self._aborting is None:
            self._aborting = self._loop.create_future()
            self._aborting.add_done_callback(lambda future: future.cancelled() or future.exception())
            self._send(Abort(reason), ())
        try:
            async with asyncio.timeout(timeout):
                answer = await asyncio.shield(self._aborting)
        except TimeoutError:
            raise HpccrError(f"the capsule did not answer Abort within {timeout:.0f} s") from None
        _expect(answer, Aborted)

    def signal(self, signum: int) -> None:
        self._send(Signal(signum), ())

    def _send(self, message: Message, descriptors: Sequence[int]) -> None:
        packet = _encoder.encode(message)
        if len(packet) > control.MAX_PACKET:
            raise UnsupportedError(
                f"{type(message).__name__} takes {len(packet)} bytes, more than the {control.MAX_PACKET} that fit",
                hint="is the command line very long, or has the step a great many nodes? Put the command into a script",
            )
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self._socket.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise PeerLostError(f"cannot reach the capsule's init: {error.strerror}") from None

    def _readable(self) -> None:
        try:
            packet = self._socket.recv(control.MAX_PACKET)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._lose()
            return
        try:
            message = _decoder.decode(packet)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.error("capsule init sent what is no message: %s", error)
            self._lose()
            return
        match message:
            case Exited():
                self._exited(message.code)
            case Wanted():
                self._wanted()
            case Aborted():
                self._resolve(self._aborting, message)
                self._aborting = None
            case _:
                self._resolve(self._pending, message)

    @staticmethod
    def _resolve(future: asyncio.Future[control.InitReply] | None, message: control.InitReply) -> None:
        if future is not None and not future.done():
            future.set_result(message)
        else:
            log.warning("capsule init sent %s late or unasked", type(message).__name__)

    def _lose(self) -> None:
        self._loop.remove_reader(self._socket)
        self._fail(self._lost())
        self._end()

    def _fail(self, error: PeerLostError) -> None:
        for future in (self._pending, self._aborting):
            if future is not None and not future.done():
                future.set_exception(error)

    def _lost(self) -> PeerLostError:
        return PeerLostError(
            f"the capsule's init ended unexpectedly: {self._process.last_words}".rstrip(": "),
            hint="hpccrd's log on the node has all it said",
        )

    async def close(self) -> None:
        """End init and with it every process of the capsule; returns when they are gone."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._fail(PeerLostError("the capsule is being ended"))  # nobody reads answers any more
        ends = [self._process.wait()]
        if self._pidfd >= 0:
            ends.append(self._wait_pidfd())
        waiting = asyncio.gather(*ends)
        try:
            await asyncio.wait_for(asyncio.shield(waiting), END_TIMEOUT)
        except TimeoutError:
            log.warning("capsule init did not end within %.0f s: killing it", END_TIMEOUT)
            self._process.kill()
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await waiting
        await self._process.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)

    async def _wait_pidfd(self) -> int:
        await watch(self._pidfd)
        return 0


def _expect[R: Message](answer: control.InitReply, reply: type[R]) -> R:
    if isinstance(answer, Failed):
        raise error_for(answer.code, answer.message, answer.hint)
    if not isinstance(answer, reply):
        raise HpccrError(f"the capsule's init answered {type(answer).__name__} instead of {reply.__name__}")
    return answer
