"""A capsule as its agent sees it: for checks of a running hpccrd from inside a node of the testbed."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

from hpccr.agent.lease import Lease
from hpccr.errors import ExitCode
from hpccr.model import StepKey
from hpccr.wire import messages as m
from hpccr.wire.frames import Channel, encode

SOCKET = os.environ.get("HPCCRD_SOCKET", "/run/hpccr/hpccrd.sock")
RELAY_PORT = 7999
M = TypeVar("M", bound=m.Message)
DEADLINE = 60.0
SHORT = 20.0
"""Seconds for a job to say something: it runs already."""


class Line(Protocol):
    """Something that speaks for a capsule: a Lease here, or a relay on another node."""

    async def send(self, message: m.Message, descriptors: Any = ()) -> None: ...

    async def receive(self) -> Any: ...

    async def close(self) -> None: ...


class Capsule:
    """A lease, its pipes and what came out of them."""

    def __init__(self, lease: Line) -> None:
        self.lease = lease
        self.output = b""
        self.stdin = -1
        self._replies: asyncio.Queue[m.Message | None] = asyncio.Queue()
        self._reading = asyncio.create_task(self._read())
        self._pumps: list[asyncio.Task[None]] = []
        self._arrived = asyncio.Condition()

    async def _read(self) -> None:
        while (message := await self.lease.receive()) is not None:
            if isinstance(message, m.Output):
                await self._add(message.data)
            else:
                await self._replies.put(message)
        await self._replies.put(None)

    async def ask(self, message: m.Message, *, stdin: bool = False) -> Any:
        """Send and give the next reply that is no Flushing."""
        if isinstance(message, m.Start | m.Restore):
            await self._send_with_pipes(message)
        else:
            await self.lease.send(message)
        return await self.next()

    async def send_together(self, *messages: m.Message) -> None:
        """In one write: hpccrd has all of them before it can have done the first."""
        assert isinstance(self.lease, Lease)
        await asyncio.get_running_loop().sock_sendall(self.lease._sock, b"".join(map(encode, messages)))

    async def next(self, *, deadline: float | None = DEADLINE) -> Any:
        async with asyncio.timeout(deadline):
            while isinstance(message := await self._replies.get(), m.Flushing):
                pass
        return message

    async def expect(self, message: m.Message, reply: type[M]) -> M:
        answer = await self.ask(message)
        assert isinstance(answer, reply), f"{type(message).__name__} -> {answer}"
        return answer

    async def expect_event(self, event: type[M]) -> M:
        message = await self.next()
        assert isinstance(message, event), message
        return message

    async def refused(self, message: m.Message, code: ExitCode, pattern: str) -> m.Failed:
        """Send what must fail, with that exit code and a message that tells this."""
        answer = await self.expect(message, m.Failed)
        assert answer.code == code, answer
        assert re.search(pattern, answer.message), answer
        return answer

    async def _send_with_pipes(self, message: m.Start | m.Restore) -> None:
        if isinstance(self.lease, Remote):
            await self.lease.send(message)
            return
        job_ends = []
        if message.stdin == "pipe":
            end, self.stdin = os.pipe()
            job_ends.append(end)
        for _ in range(1 if message.merged else 2):
            own, end = os.pipe()
            job_ends.append(end)
            self._pumps.append(asyncio.create_task(self._pump(own)))
        await self.lease.send(message, job_ends)
        for end in job_ends:
            os.close(end)

    async def _pump(self, fd: int) -> None:
        reader = asyncio.StreamReader()
        pipe = os.fdopen(fd, "rb", buffering=0)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        while data := await reader.read(65536):
            await self._add(data)

    async def _add(self, data: bytes) -> None:
        async with self._arrived:
            self.output += data
            self._arrived.notify_all()

    async def until(self, pattern: str) -> re.Match[str]:
        """Wait for output."""
        try:
            async with asyncio.timeout(SHORT), self._arrived:
                while not (match := re.search(pattern, self.output.decode())):
                    await self._arrived.wait()
                return match
        except TimeoutError:
            raise AssertionError(f"no {pattern!r} in what the job said: {self.output.decode()!r}") from None

    async def more_than(self, length: int) -> None:
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.output) > length)

    async def all_output(self) -> str:
        await asyncio.gather(*self._pumps)
        return self.output.decode()

    async def close(self) -> None:
        self._reading.cancel()
        for pump in self._pumps:
            pump.cancel()
        await self.lease.close()


class Remote:
    """A Line to a relay on another node."""

    def __init__(self, channel: Channel[m.AgentMessage]) -> None:
        self._channel = channel

    async def send(self, message: m.Message, descriptors: Any = ()) -> None:
        await self._channel.send(message)

    async def receive(self) -> Any:
        return await self._channel.receive()

    async def close(self) -> None:
        await self._channel.close()


@asynccontextmanager
async def remote(node: str) -> AsyncIterator[Capsule]:
    """A capsule on another node, where `relay` runs."""
    reader, writer = await asyncio.open_connection(node, RELAY_PORT)
    made = Capsule(Remote(Channel(reader, writer, m.AgentMessage)))
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def capsule() -> AsyncIterator[Capsule]:
    made = Capsule(await Lease.open(SOCKET))
    try:
        yield made
    finally:
        await made.close()


def step_key() -> StepKey:
    return StepKey(cluster="testbed", job=str(os.getpid()), step=secrets.token_hex(4))


def create(key: StepKey, index: int = 0, count: int = 1) -> m.Create:
    return m.Create(
        protocol=m.PROTOCOL, key=key, capsule=index, capsules=count, incarnation=0, secret=secrets.token_hex(32)
    )


def start(*argv: str, stdin: str = "null", merged: bool = True, cwd: str = "/", **env: str) -> m.Start:
    whole = {os.fsencode(k): os.fsencode(v) for k, v in {"PATH": os.environ["PATH"], **env}.items()}
    command = tuple(map(os.fsencode, argv))
    return m.Start(argv=command, env=whole, cwd=os.fsencode(cwd), stdin=stdin, merged=merged)


async def join(*capsules: Capsule) -> None:
    """Bring the capsules of one step up to Connected."""
    key = step_key()
    created = [await made.expect(create(key, k, len(capsules)), m.Created) for k, made in enumerate(capsules)]
    peers = tuple(one.endpoint for one in created)
    for made in capsules:
        await made.expect(m.Connect(peers=peers), m.Connected)


async def connected(made: Capsule, key: StepKey | None = None) -> Capsule:
    """Bring a single capsule up to Connected."""
    created = await made.expect(create(key or step_key()), m.Created)
    await made.expect(m.Connect(peers=(created.endpoint,)), m.Connected)
    return made


WAIT = ("sh", "-c", "echo up; while read line; do echo got $line; done; exit 9")
"""A job that echoes its stdin and ends with it."""


async def running(made: Capsule, key: StepKey | None = None, *, job: tuple[str, ...] = WAIT) -> Capsule:
    """Bring a single capsule up to a running job."""
    await connected(made, key)
    await made.expect(start(*job, stdin="pipe"), m.Started)
    await made.until("up\n")
    return made


async def echoes(made: Capsule) -> None:
    """The job runs: it answers."""
    word = secrets.token_hex(4)
    os.write(made.stdin, f"{word}\n".encode())
    await made.until(f"got {word}\n")


PHASES: tuple[tuple[m.Message, type[m.Message]], ...] = (
    (m.Freeze(), m.Frozen),
    (m.Dump(), m.Dumped),
    (m.Release(kill=False), m.Released),
)


async def checkpointed(made: Capsule, *, sequence: int = 1, kill: bool = False) -> str:
    """Prepare to Release; gives the checkpoint's identifier."""
    identifier = secrets.token_hex(16)
    await made.expect(m.Prepare(sequence=sequence, checkpoint=identifier), m.Prepared)
    await made.expect(m.Freeze(), m.Frozen)
    await made.expect(m.Dump(), m.Dumped)
    await made.expect(m.Release(kill=kill), m.Released)
    return identifier


def fetch(directory: str, identifier: str, *, sequence: int = 1) -> m.Fetch:
    return m.Fetch(directory=directory, sequence=sequence, checkpoint=identifier)


async def restored(made: Capsule, directory: str, identifier: str) -> m.Restored:
    """Fetch to Restore."""
    await made.expect(fetch(directory, identifier), m.Fetched)
    await made.expect(m.RollBack(), m.RolledBack)
    return await made.expect(m.Restore(stdin="pipe", merged=True), m.Restored)


CASES: dict[str, Callable[..., Awaitable[None]]] = {}


def case(function: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Make an async function a case of hpccrd_checks.py, named as the function."""
    CASES[function.__name__.replace("_", "-")] = function
    return function
