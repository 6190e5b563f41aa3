"""Starting the agents: in this process for this node's capsules, by a helper step of Slurm for the other nodes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from hpccr.agent.service import Agent, connect
from hpccr.errors import HpccrError
from hpccr.model import EndpointRecord
from hpccr.store.publish import FILE_MODE
from hpccr.wire import messages as m
from hpccr.wire.frames import Channel

log = logging.getLogger(__name__)

STEP_END_TIMEOUT = 20.0
"""Seconds the helper step has to end once its agents have."""
LOST_STEP_TIMEOUT = 3.0
"""The same when one of its nodes is gone: that part of it does not end."""


def place(capsules: int, nodes: Sequence[str]) -> tuple[str, ...]:
    """The node of each capsule: in order, capsule 0 on the first; round again where there are fewer nodes."""
    return tuple(nodes[k % len(nodes)] for k in range(capsules))


class Agents:
    """The agents of one Boot. `placement` is by place(); the first node is this one."""

    def __init__(
        self,
        *,
        placement: Sequence[str],
        endpoint: EndpointRecord,
        socket_path: str,
        silence: float,
        step_command: Callable[[Sequence[str], Sequence[str]], list[str]],
        agent_command: Callable[[dict[str, int]], list[str]],
        log_path: Path,
        environ: dict[str, str],
    ) -> None:
        """step_command(nodes, argv): the command that runs argv once on each node.

        agent_command(counts): argv of an agent process that carries counts[node] capsules on its node.
        """
        self._placement = placement
        self._endpoint = endpoint
        self._socket_path = socket_path
        self._silence = silence
        self._step_command = step_command
        self._agent_command = agent_command
        self._log_path = log_path
        self._environ = environ
        self._own: list[asyncio.Task[None]] = []
        self._step: asyncio.subprocess.Process | None = None
        self.step_ended: asyncio.Task[int] | None = None

    async def start(self) -> None:
        """Start them all; they join the coordinator by themselves. Raises HpccrError, OSError."""
        here = self._placement[0]
        counts = Counter(self._placement)
        for rank in range(counts.pop(here)):
            self._own.append(asyncio.create_task(self._run_own(here, rank)))
        if not counts:
            return
        command = self._step_command(list(counts), self._agent_command(dict(counts)))
        log.info("starting agents: %s", " ".join(command))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with os.fdopen(os.open(self._log_path, flags, FILE_MODE), "ab") as output:
            # Its own session: a signal to the batch script's process group is not meant for the agents.
            self._step = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environ,
                start_new_session=True,
            )
        self.step_ended = asyncio.create_task(self._step.wait())

    async def _run_own(self, node: str, rank: int) -> None:
        try:
            reader, writer = await connect(self._endpoint)
            channel: Channel[m.CoordinatorMessage] = Channel(reader, writer, m.CoordinatorMessage)
            agent = Agent(channel, socket_path=self._socket_path, silence=self._silence, node=node, rank=rank)
            await agent.run()
        except (HpccrError, OSError) as error:
            log.info("the agent of this node ended: %s", error)

    def log_tail(self) -> str:
        """The last lines the helper step wrote: why it failed."""
        try:
            lines = self._log_path.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return "; ".join(lines[-3:])

    async def stop(self, within: float) -> None:
        """After the members are destroyed: wait `within` seconds for the agents to end, and end those that do not."""
        if self._own:
            _, pending = await asyncio.wait(self._own, timeout=within)
            for task in pending:
                task.cancel()
            await asyncio.gather(*self._own, return_exceptions=True)
        if self._step is None or self.step_ended is None:
            return
        await asyncio.wait((self.step_ended,), timeout=within)
        if not self.step_ended.done():
            log.warning("the helper step did not end by itself")
            os.killpg(self._step.pid, signal.SIGKILL)
            await self.step_ended
