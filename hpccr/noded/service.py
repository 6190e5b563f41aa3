"""hpccrd's unix socket: who may talk to it, how many, how fast; each connection is served by a lease or a probe."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import hpccr
from hpccr.errors import ExitCode, HpccrError, PeerLostError, UsageError
from hpccr.noded import admission, peer
from hpccr.noded.channel import Descriptors, FrameChannel
from hpccr.noded.lease import Lease
from hpccr.noded.node import Node
from hpccr.noded.passing import Passing
from hpccr.noded.probe import Prober
from hpccr.noded.said import printable
from hpccr.wire import messages as m
from hpccr.wire.frames import FrameError

log = logging.getLogger(__name__)

BACKLOG = 128
MAX_CONNECTIONS = 1024
MAX_CONNECTIONS_PER_USER = 128
MAX_LEASES_PER_USER = 64
MAX_IDLE_PER_USER = 64
"""Connections that have not made a request yet."""
FIRST_REQUEST = 1.5
"""A connection has that many times checkpoint.agent_timeout for its first request: an agent connects at once, and its
coordinator then waits for the agents of all nodes."""
FRAME = 30.0
"""Seconds a frame may take once it has begun, and replies may lie unread at the end."""
STOP = 25.0
"""Seconds for all leases to end at a stop; less than TimeoutStopSec= of the unit."""


class Service:
    """Accepts connections and serves each in a task of its own, until stop()."""

    def __init__(self, node: Node, prober: Prober) -> None:
        self._node = node
        self._prober = prober
        self._passing = Passing()
        self._connections: set[asyncio.Task[None]] = set()
        self._count: Counter[int] = Counter()
        self._idle: Counter[int] = Counter()
        self._leases: Counter[int] = Counter()

    async def serve(self, listener: socket.socket) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno not in (errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    raise
                log.error("cannot accept a connection: %s", error)
                # Out of descriptors: room comes only when some connection ends.
                if self._connections:
                    await asyncio.wait(self._connections, return_when=asyncio.FIRST_COMPLETED, timeout=1)
                continue
            task = asyncio.create_task(self._connection(sock))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def stop(self) -> None:
        """End all leases; returns when they are undone, or after STOP seconds: the next start sweeps."""
        for task in self._connections:
            task.cancel()
        try:
            async with asyncio.timeout(STOP):
                # Connections first: each begins to end its lease when it is cancelled.
                while waiting := self._connections | self._node.endings:
                    await asyncio.wait(waiting)
        except TimeoutError:
            log.warning("%d capsules did not end in time", len(self._node.endings))

    async def _connection(self, sock: socket.socket) -> None:
        channel = FrameChannel(sock, m.NodeRequest)
        try:
            try:
                who = peer.credentials(sock)
            except (OSError, struct.error):
                return  # it has gone already
            self._count[who.uid] += 1
            try:
                await self._admitted(channel, who)
            except (FrameError, UsageError) as error:
                # An error of the decoder quotes what it was given, megabytes of it perhaps.
                log.info("uid %d pid %d: %s", who.uid, who.pid, printable(error.message))
                channel.post(m.Failed(int(error.code), printable(error.message), error.hint, self._node.name))
                await channel.drain(1)
            finally:
                await _close_stray(channel.stray)
                _uncount(self._count, who.uid)
        except OSError as error:
            log.info("a connection broke: %s", error)
        except Exception:
            log.exception("a connection failed")
        finally:
            channel.close()

    async def _admitted(self, channel: FrameChannel, who: peer.Credentials) -> None:
        """Raises FrameError or UsageError for what ends the connection with a Failed."""
        if self._count.total() > MAX_CONNECTIONS or self._count[who.uid] > MAX_CONNECTIONS_PER_USER:
            raise UsageError(f"too many connections to hpccrd on {self._node.name}")
        if self._idle[who.uid] >= MAX_IDLE_PER_USER:
            raise UsageError(f"too many connections of uid {who.uid} that ask for nothing")
        self._idle[who.uid] += 1
        patience = FIRST_REQUEST * self._node.config.checkpoint.agent_timeout
        try:
            async with asyncio.timeout(patience):
                received = await channel.receive(deadline=FRAME)
        except TimeoutError:
            raise UsageError(f"no request came within {patience:.0f} s") from None
        finally:
            _uncount(self._idle, who.uid)
        if received is None:
            return
        request, descriptors = received
        if isinstance(request, m.Probe):
            channel.stray = descriptors
            await self._probe(channel, request, who)
        elif isinstance(request, m.Create):
            channel.stray = descriptors
            if self._leases[who.uid] >= MAX_LEASES_PER_USER:
                raise UsageError(f"uid {who.uid} has {MAX_LEASES_PER_USER} capsules on {self._node.name} already")
            self._leases[who.uid] += 1
            try:
                await Conversation(self._node, channel, who, self._failed).run(request)
            finally:
                _uncount(self._leases, who.uid)
        else:
            channel.stray = descriptors
            raise UsageError(f"{type(request).__name__} is not a first request: that is Create or Probe")

    async def _probe(self, channel: FrameChannel, request: m.Probe, who: peer.Credentials) -> None:
        try:
            kept_out = await self._kept_out(channel.socket, who, request.levels) if request.levels else -1
        except HpccrError as error:
            channel.post(self._failed(error))
        else:
            channel.post(
                m.Probed(
                    node=self._node.name,
                    version=hpccr.__version__,
                    checks=await self._prober.checks(),
                    leases=self._leases[who.uid],
                    kept_out=kept_out,
                )
            )
        await channel.drain(FRAME)

    async def _kept_out(self, sock: socket.socket, who: peer.Credentials, levels: int) -> int:
        try:
            process = peer.pidfd(sock, who.pid)
        except ProcessLookupError:
            raise PeerLostError("the requesting process has ended") from None
        try:
            found = await self._passing.kept_out(who.uid, who.pid, levels)
            if peer.has_ended(process):  # else it may have been another's directory
                raise PeerLostError("the requesting process has ended")
            return found
        finally:
            os.close(process)

    def _failed(self, error: HpccrError) -> m.Failed:
        return m.Failed(code=int(error.code), message=error.message, hint=error.hint, node=self._node.name)


class Conversation:
    """A lease and the connection that it lives with."""

    def __init__(
        self,
        node: Node,
        channel: FrameChannel,
        who: peer.Credentials,
        failed: Callable[[HpccrError], m.Failed],
    ) -> None:
        self._node = node
        self._channel = channel
        self._failed = failed
        self._lease = Lease(node, who, lambda: peer.examine(channel.socket, who, node.config.node.criu), self._emit)
        self._busy: asyncio.Task[None] | None = None
        self._aborting: asyncio.Task[None] | None = None

    def _emit(self, message: m.Message) -> int:
        self._channel.post(message)
        return self._channel.unread

    async def run(self, create: m.Create) -> None:
        """Until the peer goes, misbehaves (raises FrameError or UsageError) or says Destroy. Nothing is left then."""
        lost = asyncio.create_task(self._lease.lost.wait())
        try:
            self._begin(create, Descriptors([]))
            while True:
                receiving = asyncio.create_task(self._channel.receive(deadline=FRAME))
                try:
                    await asyncio.wait({receiving, lost}, return_when=asyncio.FIRST_COMPLETED)
                    if not receiving.done():
                        break
                    received = receiving.result()
                finally:
                    await _cancel(receiving)
                if received is None or not await self._take(*received):
                    break
            if lost.done() and self._busy is not None:
                await self._busy  # its answer says why
        finally:
            # A task of its own: a stop may cancel this one in the middle of it.
            ending = asyncio.create_task(self._end(lost))
            self._node.endings.add(ending)
            ending.add_done_callback(self._node.endings.discard)
            await asyncio.shield(ending)
        await self._channel.drain(FRAME)

    async def _end(self, lost: asyncio.Task[Any]) -> None:
        for task in (lost, self._aborting, self._busy):
            await _cancel(task)
        await self._lease.end()

    async def _take(self, request: m.Message, descriptors: Descriptors) -> bool:
        """One request. False ends the lease."""
        if descriptors.numbers and not isinstance(request, m.Start | m.Restore):
            self._channel.stray = descriptors
            raise UsageError(f"descriptors came with {type(request).__name__}, which takes none")
        if descriptors.numbers and not descriptors.are_pipes():
            self._channel.stray = descriptors
            raise UsageError("the job's stdio must be anonymous pipes")
        match request:
            case m.Destroy():
                await _cancel(self._aborting)
                await _cancel(self._busy)
                await self._lease.end()
                if request.over:
                    await self._lease.forget()
                self._channel.post(m.Destroyed())
                return False
            case m.Signal():
                if admission.check_signal(request.signum):
                    self._lease.signal(request.signum)
            case m.Abort():
                if self._aborting is None:
                    self._aborting = asyncio.create_task(self._abort(request))
            case _ if self._busy is not None:
                descriptors.close()
                self._channel.post(
                    self._failed(UsageError(f"{type(request).__name__} came while another request was under way"))
                )
            case _:
                self._begin(request, descriptors)
        return True

    def _begin(self, request: m.Message, descriptors: Descriptors) -> None:
        self._busy = asyncio.create_task(self._perform(request, descriptors))

    async def _perform(self, request: m.Message, descriptors: Descriptors) -> None:
        try:
            reply = await self._lease.perform(request, descriptors)
        except HpccrError as error:
            reply = self._failed(error)
        except Exception as error:
            log.exception("%s failed", type(request).__name__)
            reply = m.Failed(
                code=int(ExitCode.FAILED),
                message=f"hpccrd failed at {type(request).__name__}: {type(error).__name__}",
                hint="hpccrd's log on the node has the details",
                node=self._failed(HpccrError("")).node,
            )
            self._lease.lost.set()
        finally:
            descriptors.close()
            self._busy = None
        self._channel.post(reply)

    async def _abort(self, request: m.Abort) -> None:
        reply: m.Message = m.Aborted()
        try:
            await self._lease.abort(request.reason)
        except HpccrError as error:
            reply = self._failed(error)
        # The request under way answers first.
        if self._busy is not None:
            await asyncio.wait({self._busy})
        self._aborting = None
        self._channel.post(reply)


def _uncount(counter: Counter[int], uid: int) -> None:
    counter[uid] -= 1
    if not counter[uid]:
        del counter[uid]


async def _cancel(task: asyncio.Task[Any] | None) -> None:
    """End a task and wait for that; what it raised is of no interest any more."""
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()


async def _close_stray(descriptors: Descriptors) -> None:
    """Close descriptors nobody asked for. A user's FUSE server can hold a close up as long as it likes: then a thread
    waits for it, and the connection counts against the user's limit until it is done."""
    if not descriptors.numbers:
        return
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def close() -> None:
        descriptors.close()
        loop.call_soon_threadsafe(done.set)

    threading.Thread(target=close, name="close", daemon=True).start()
    await done.wait()
