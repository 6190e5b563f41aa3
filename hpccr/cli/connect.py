"""The client's side of the coordinator's port: one request, its progress and its reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hpccr.cli.jobs import job_of
from hpccr.errors import HpccrError, LockedError, PeerLostError, error_for
from hpccr.model import EndpointRecord
from hpccr.store.layout import Step
from hpccr.wire import messages as m
from hpccr.wire.frames import Channel, FrameError
from hpccr.wire.handshake import HandshakeError, authenticate

CONNECT_TIMEOUT = 5.0
SILENCE = 120.0
"""Seconds without progress or a reply after which the coordinator counts as lost (it reports progress twice a second;
the longest pause is a call of Slurm's commands)."""


class NotRunningError(HpccrError):
    """The step has no coordinator that could be asked."""


class LeftError(PeerLostError):
    """The coordinator ended after a checkpoint, when it asked Slurm to requeue the job. reply: what it had to say."""

    def __init__(self, error: PeerLostError, reply: m.CheckpointReply) -> None:
        super().__init__(error.message, hint=error.hint)
        self.reply = reply


def ask[R: (m.CheckpointReply, m.StatusReply)](
    step: Step,
    request: m.CheckpointRequest | m.StatusRequest,
    reply: type[R],
    *,
    timeout: float | None = None,
    progress: Callable[[m.Progress], None] = lambda message: None,
) -> R:
    """Send one request to the coordinator of a running step and wait for the reply, `timeout` seconds at most.

    Raises NotRunningError, PeerLostError (nobody answers, or no more; LeftError), or the error that the coordinator
    reports.
    """
    endpoint = step.endpoint()
    if endpoint is None:
        raise _not_running(step)
    return asyncio.run(_ask(step, endpoint, request, reply, timeout, progress))


def _not_running(step: Step) -> NotRunningError:
    record = step.record()
    if record is not None and record.exit_code is not None:
        return NotRunningError(f"step {step.key} has finished with exit code {record.exit_code}")
    what, hint = "is not running", "`hpccr status` shows its last checkpoint; a requeued job goes on from it by itself"
    if (info := job_of(step)) is not None:
        states = "+".join(sorted(info.states))
        what += f": its job is {states}" + (f" ({info.reason})" if info.reason not in ("", "None") else "")
    if step.key.cluster == "local":
        hint = f"`hpccr restore {step.key.job_directory}` goes on from its newest checkpoint"
    return NotRunningError(f"step {step.key} {what}", hint=hint)


async def _ask[R: (m.CheckpointReply, m.StatusReply)](
    step: Step,
    endpoint: EndpointRecord,
    request: m.CheckpointRequest | m.StatusRequest,
    reply: type[R],
    timeout: float | None,
    progress: Callable[[m.Progress], None],
) -> R:
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await _connect(step, endpoint)
            channel: Channel[m.ClientReply] = Channel(reader, writer, m.ClientReply)
            try:
                await _authenticate(reader, writer, endpoint)
                await channel.send(request)
                return await _reply(channel, reply, endpoint, progress)
            finally:
                writer.close()
    except TimeoutError:
        raise HpccrError(
            f"no answer within {timeout:.0f} s",
            hint="what was asked for goes on; `hpccr status` shows how far it is",
        ) from None
    except PeerLostError as error:
        raise _suspended(step) or error from None
    except OSError as error:
        raise _broken(endpoint, error) from None


def _suspended(step: Step) -> HpccrError | None:
    """Why a coordinator does not answer that is stopped with its job."""
    info = job_of(step)
    if info is None or "SUSPENDED" not in info.states:
        return None
    return LockedError(
        f"job {step.key.job} is suspended", hint="it can be checkpointed when it has been resumed; nothing is lost"
    )


async def _connect(step: Step, endpoint: EndpointRecord) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    tried = []
    for host in endpoint.hosts:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                return await asyncio.open_connection(host, endpoint.port)
        except TimeoutError:
            tried.append(f"{host}: no answer within {CONNECT_TIMEOUT:.0f} s")
        except OSError as error:
            tried.append(f"{host}: {error.strerror or error}")
    raise PeerLostError(
        f"cannot reach the coordinator of {step.key} (pid {endpoint.pid} on {endpoint.host}, port {endpoint.port}): "
        + "; ".join(tried),
        hint="if its node or process is gone, requeue the job (it goes on from its newest complete checkpoint); "
        "otherwise run this on a node that can reach the compute nodes",
    )


async def _authenticate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, endpoint: EndpointRecord) -> None:
    try:
        await authenticate(reader, writer, endpoint.secret, server=False)
    except HandshakeError as error:
        raise PeerLostError(
            f"what answers on {endpoint.host}, port {endpoint.port}, is not the step's coordinator: {error.message}",
            hint="the coordinator is gone and another program has its port; requeue the job",
        ) from None


async def _reply[R: (m.CheckpointReply, m.StatusReply)](
    channel: Channel[m.ClientReply],
    reply: type[R],
    endpoint: EndpointRecord,
    progress: Callable[[m.Progress], None],
) -> R:
    left: m.CheckpointReply | None = None
    while True:
        try:
            message = await _next(channel, endpoint)
        except PeerLostError as error:
            raise (error if left is None else LeftError(error, left)) from None
        match message:
            case m.Progress():
                progress(message)
            case m.Leaving():
                left = message.reply
            case m.Failed():
                where = f"{message.node}: " if message.node else ""
                raise error_for(message.code, where + message.message, message.hint)
            case _ if isinstance(message, reply):
                return message
            case _:
                raise HpccrError(f"the coordinator answered with {type(message).__name__}")


async def _next(channel: Channel[m.ClientReply], endpoint: EndpointRecord) -> m.ClientReply:
    """The next message. Raises PeerLostError."""
    try:
        message = await asyncio.wait_for(channel.receive(), SILENCE)
    except TimeoutError:
        raise PeerLostError(
            f"the coordinator on {endpoint.host} has been silent for {SILENCE:.0f} s", hint="is its node alive?"
        ) from None
    except FrameError as error:
        raise PeerLostError(f"the coordinator on {endpoint.host}: {error.message}", hint=error.hint) from None
    except OSError as error:
        raise _broken(endpoint, error) from None
    if message is None:
        raise PeerLostError(
            f"the coordinator on {endpoint.host} ended before it answered",
            hint="`hpccr status` shows the last checkpoint and why the step ended",
        )
    return message


def _broken(endpoint: EndpointRecord, error: OSError) -> PeerLostError:
    return PeerLostError(
        f"the connection to the coordinator on {endpoint.host} broke: {error.strerror or error}",
        hint="`hpccr status` shows what is left",
    )
