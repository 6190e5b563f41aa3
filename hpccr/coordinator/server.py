"""The coordinator's TCP port: agents join here, clients (`hpccr checkpoint|status`) ask here.

Whoever connects must know the step's secret before a single frame is read.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from hpccr.agent.service import enable_keepalive, heartbeat, receive
from hpccr.errors import HpccrError
from hpccr.wire import messages as m
from hpccr.wire.frames import Channel
from hpccr.wire.handshake import authenticate

log = logging.getLogger(__name__)

MAX_STRANGERS = 64
"""Connections that may be in the handshake at once."""
FIRST_WORD = 30.0
"""Seconds from the handshake to the first message."""

Incoming = m.AgentMessage | m.ClientMessage


@dataclass(eq=False)
class Member:
    """A joined agent and the capsule it carries."""

    join: m.Join
    channel: Channel[Incoming]
    capsule: int = -1
    lost: bool = False
    here: asyncio.Event = field(default_factory=asyncio.Event)
    """It has answered a Call."""
    destroyed: asyncio.Event = field(default_factory=asyncio.Event)

    def post(self, message: m.Message) -> None:
        self.channel.post(message)


class Server:
    """Accepts, authenticates and sorts connections; the coordinator's callbacks do the rest.

    silence: seconds without a word until an agent counts as lost.
    on_join may refuse a member by returning False. on_message gets every message of a joined agent, on_lost its end.
    on_client answers one client request with the replies to send after it.
    """

    def __init__(
        self,
        *,
        secret: str,
        silence: float,
        on_join: Callable[[Member], bool],
        on_message: Callable[[Member, m.Message], None],
        on_lost: Callable[[Member, str], None],
        on_client: Callable[[m.ClientMessage, Callable[[m.Message], None]], Awaitable[m.Message]],
    ) -> None:
        self._secret = secret
        self._silence = silence
        self._on_join = on_join
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_client = on_client
        self._strangers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: set[asyncio.Future[m.Message]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen on a free port of all addresses; the port."""
        self._server = await asyncio.start_server(self._accept, family=socket.AF_INET, port=0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Stop listening and end all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio runs this callback in a task
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (HpccrError, OSError, TimeoutError) as error:
            log.info("connection from %s ended: %s", writer.get_extra_info("peername"), error)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._strangers >= MAX_STRANGERS:
            return
        self._strangers += 1
        try:
            enable_keepalive(writer)
            await authenticate(reader, writer, self._secret, server=True)
        finally:
            self._strangers -= 1
        channel: Channel[Incoming] = Channel(reader, writer, Incoming)
        async with asyncio.timeout(FIRST_WORD):
            first = await channel.receive()
        match first:
            case m.Join():
                await self._serve_agent(Member(first, channel))
            case m.CheckpointRequest() | m.StatusRequest():
                await self._serve_client(first, channel)
            case None:
                pass
            case _:
                raise HpccrError(f"a connection began with {type(first).__name__}")

    async def _serve_agent(self, member: Member) -> None:
        if not self._on_join(member):
            return
        pings = asyncio.create_task(heartbeat(member.channel.send))
        reason = "its agent has ended"
        try:
            while True:
                message = await receive(member.channel, self._silence)
                if message is None:
                    break
                if not isinstance(message, m.Ping):
                    self._on_message(member, message)
        except TimeoutError:
            reason = f"its agent has been silent for {self._silence:.0f} s"
        except (HpccrError, OSError) as error:
            reason = f"the connection to its agent broke: {error}"
        finally:
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)
            member.lost = True
            member.destroyed.set()
            self._on_lost(member, reason)

    def _answered(self, answer: asyncio.Future[m.Message]) -> None:
        # The client may be gone, and nobody else asks how it went.
        self._answers.discard(answer)
        if not answer.cancelled() and (error := answer.exception()) is not None:
            log.info("a client's request failed: %s", error, exc_info=None if isinstance(error, HpccrError) else error)

    async def _serve_client(self, request: m.ClientMessage, channel: Channel[Incoming]) -> None:
        # A client that goes away ends nothing: half a requeue would be a job that neither runs nor waits.
        answer = asyncio.ensure_future(self._on_client(request, channel.post))
        self._answers.add(answer)
        answer.add_done_callback(self._answered)
        gone = asyncio.create_task(channel.reader.read(1))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                await channel.send(answer.result())
        except HpccrError as error:
            await channel.send(m.Failed(error.code, error.message, error.hint))
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            await channel.close()
