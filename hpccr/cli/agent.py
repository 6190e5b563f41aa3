"""`hpccr agent`: one per node, started by `hpccr run` through a helper step of Slurm. Not for people."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Any

from hpccr.agent.service import Agent, connect, node_name
from hpccr.config import Config
from hpccr.errors import ExitCode, HpccrError, PeerLostError, UsageError
from hpccr.model import EndpointRecord
from hpccr.store.publish import read_if_there
from hpccr.wire import messages as m
from hpccr.wire.frames import Channel

log = logging.getLogger(__name__)

ENDPOINT_TIMEOUT = 30.0
"""Seconds for endpoint.json to appear on this node: shared file systems cache that a file is absent."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("agent", help="carry one node's part of a job (started by `hpccr run`)")
    parser.add_argument("--endpoint", required=True, type=Path, help="endpoint.json of the step")
    parser.add_argument(
        "--count", action="append", default=[], metavar="NODE=N", help="capsules that a node carries (default 1)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """Serve until the coordinator or hpccrd ends; 14 when it was not the coordinator who said so."""
    # A requeue sends SIGTERM to every process that Slurm started; the agent is needed for the final checkpoint and
    # ends with its coordinator, or by SIGKILL. What a user sends to all of the job's steps is meant for the job.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    node = node_name()
    return asyncio.run(_serve(args.endpoint, _count(args.count, node), node, config))


def _count(counts: list[str], node: str) -> int:
    for item in counts:
        name, _, number = item.rpartition("=")
        if not number.isdecimal():
            raise UsageError(f"--count {item}: not NODE=N")
        if name == node:
            return int(number)
    return 1


async def _endpoint(path: Path) -> EndpointRecord:
    deadline = asyncio.get_running_loop().time() + ENDPOINT_TIMEOUT
    while (found := read_if_there(path, EndpointRecord)) is None:
        if asyncio.get_running_loop().time() > deadline:
            raise PeerLostError(f"{path} is not there on {node_name()}", hint="is the store on shared storage?")
        os.listdir(path.parent)  # makes NFS look again
        await asyncio.sleep(0.2)
    return found


async def _serve(path: Path, count: int, node: str, config: Config) -> int:
    channels: list[Channel[m.CoordinatorMessage]] = []

    def signalled() -> None:
        for channel in channels[:1]:
            channel.post(m.Signalled(signal.SIGTERM))

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signalled)
    endpoint = await _endpoint(path)
    results = await asyncio.gather(
        *(_one(endpoint, config, node, rank, channels) for rank in range(count)), return_exceptions=True
    )
    for result in results:
        if isinstance(result, HpccrError):
            log.error("%s", result.message)
        elif isinstance(result, BaseException):
            raise result
    return ExitCode.PEER_LOST if any(isinstance(result, HpccrError) for result in results) else ExitCode.OK


async def _one(
    endpoint: EndpointRecord,
    config: Config,
    node: str,
    rank: int,
    channels: list[Channel[m.CoordinatorMessage]],
) -> None:
    reader, writer = await connect(endpoint)
    channel: Channel[m.CoordinatorMessage] = Channel(reader, writer, m.CoordinatorMessage)
    channels.append(channel)
    silence = config.checkpoint.silence_timeout
    await Agent(channel, socket_path=config.node.socket, silence=silence, node=node, rank=rank).run()
