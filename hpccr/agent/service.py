"""The agent: joins the coordinator and the local hpccrd for one capsule, and carries the job's stdio.

It decides nothing. Requests go down with descriptors added, answers come back; Frozen and Exited are held until the
job's output that was written before them has been passed on. When either side ends, the agent ends both: the capsule
does not outlive its coordinator.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from hpccr.agent.lease import Lease
from hpccr.agent.stdio import JobPipes
from hpccr.errors import HpccrError, PeerLostError
from hpccr.model import EndpointRecord
from hpccr.wire import messages as m
from hpccr.wire.frames import Channel
from hpccr.wire.handshake import authenticate

HEARTBEAT = 5.0
"""Seconds between pings, both ways."""


def node_name(environ: dict[str, str] | os._Environ[str] = os.environ) -> str:
    """This node as Slurm calls it, else its host name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


async def connect(endpoint: EndpointRecord) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An authenticated connection to the coordinator, tried by each of its names and addresses.

    Raises PeerLostError naming what was tried, HandshakeError.
    """
    failures = []
    for host in endpoint.hosts:
        try:
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_connection(host, endpoint.port)
        except (OSError, TimeoutError) as error:
            failures.append(f"{host}: {error or 'no answer in 10 s'}")
            continue
        enable_keepalive(writer)
        try:
            await authenticate(reader, writer, endpoint.secret, server=False)
        except HpccrError:
            writer.close()
            raise
        return reader, writer
    raise PeerLostError(f"cannot reach the coordinator on port {endpoint.port} ({'; '.join(failures)})")


def enable_keepalive(writer: asyncio.StreamWriter) -> None:
    """Let the kernel notice a dead peer also where nobody sends (a blocked reader), and send small frames at once."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Agent:
    """One capsule's agent. run() ends when the coordinator or hpccrd does."""

    def __init__(
        self, channel: Channel[m.CoordinatorMessage], *, socket_path: str, silence: float, node: str, rank: int
    ) -> None:
        """silence: seconds without a word until the coordinator counts as lost."""
        self._channel = channel
        self._socket_path = socket_path
        self._silence = silence
        self._node = node
        self._rank = rank
        self._pipes: JobPipes | None = None

    async def run(self) -> None:
        """Serve until either side ends. Raises HpccrError when hpccrd cannot be reached or ended the lease."""
        lease: Lease | None = None
        try:
            await self._channel.send(m.Join(self._node, self._rank, os.getpid()))
            lease = await Lease.open(self._socket_path)
            await self._serve(lease)
        except HpccrError as error:
            # The coordinator tells the user, in the words of the node that failed.
            self._channel.post(m.Failed(error.code, error.message, error.hint, self._node))
            raise
        finally:
            if self._pipes:
                self._pipes.close()
            if lease is not None:
                await lease.close()
            await self._channel.close()

    async def _serve(self, lease: Lease) -> None:
        jobs: list[Coroutine[Any, Any, None]] = [
            self._from_coordinator(lease),
            self._from_node(lease),
            heartbeat(self._channel.send),
        ]
        tasks = [asyncio.create_task(job) for job in jobs]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, HpccrError):
                raise result
            if isinstance(result, Exception) and not isinstance(result, OSError):
                raise result

    async def _from_coordinator(self, lease: Lease) -> None:
        while True:
            try:
                message = await receive(self._channel, self._silence)
            except TimeoutError:
                raise PeerLostError(f"the coordinator has been silent for {self._silence:.0f} s") from None
            match message:
                case None:
                    return
                case m.Ping() | m.Assign():
                    pass
                case m.Call():
                    self._channel.post(m.Here())
                case m.Input(data):
                    if self._pipes:
                        self._pipes.feed(data)
                case m.OutputTaken(count):
                    if self._pipes:
                        self._pipes.output_taken(count)
                case m.CloseOutput(stream):
                    if self._pipes:
                        self._pipes.close_output(stream)
                case m.Start() | m.Restore():
                    await self._begin(lease, message)
                case _:
                    await lease.send(message)

    async def _begin(self, lease: Lease, message: m.Start | m.Restore) -> None:
        if self._pipes:
            self._pipes.close()
        self._pipes = JobPipes(stdin=message.stdin == "pipe", merged=message.merged, post=self._channel.post)
        await lease.send(message, self._pipes.job_ends)
        self._pipes.started()

    async def _from_node(self, lease: Lease) -> None:
        while (message := await lease.receive()) is not None:
            match message:
                case m.Frozen():
                    await self._frozen()
                case m.Exited():
                    if self._pipes:
                        self._pipes.drain()
                    await self._channel.send(message)
                case m.Destroyed():
                    await self._channel.send(message)
                    return
                case _:
                    await self._channel.send(message)
        raise PeerLostError(f"hpccrd on {self._node} has ended the lease", hint=f"see hpccrd's log on {self._node}")

    async def _frozen(self) -> None:
        consumed = 0
        if self._pipes:
            self._pipes.drain()
            consumed = self._pipes.stdin_consumed()
        await self._channel.send(m.Frozen(consumed))


async def receive[M](channel: Channel[M], silence: float) -> M | None:
    """The next message of a peer that pings, None at its end. Raises TimeoutError when it is silent for that long.

    Counted in turns of this process and not by the clock: after `scontrol suspend` both sides wake up some time
    apart, and neither has been silent.
    """
    receiving = asyncio.ensure_future(channel.receive())
    try:
        for _ in range(round(silence / HEARTBEAT)):
            if (await asyncio.wait((receiving,), timeout=HEARTBEAT))[0]:
                return receiving.result()
    finally:
        receiving.cancel()
    raise TimeoutError


async def heartbeat(send: Callable[[m.Message], Coroutine[Any, Any, None]]) -> None:
    """Say Ping every HEARTBEAT seconds until cancelled or the connection breaks (OSError)."""
    while True:
        await send(m.Ping())
        await asyncio.sleep(HEARTBEAT)
