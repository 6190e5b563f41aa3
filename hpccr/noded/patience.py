"""A checkpoint that nobody goes on with: it holds room of the spool that others want, and perhaps tasks still."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from hpccr.config import CheckpointConfig
from hpccr.noded.lifecycle import State

SHORT = 90.0
"""Seconds for what takes no time: more than the coordinator gives all nodes for it, so that a stall of this machine is
nobody's failure."""
STOPPED = 5.0
"""Seconds after which a timer that comes too late says that this process was stopped, and has not read yet what came
meanwhile."""


def limit(state: State, config: CheckpointConfig) -> float | None:
    """Seconds until the next request is due in that state: the other nodes' phase, the barrier after it, and the
    silence that one of them may keep. None if none is due."""
    phases = {
        State.PREPARED: config.prepare_timeout + config.dump_timeout,
        State.FROZEN: 2 * config.freeze_timeout,
        State.DUMPED: config.dump_timeout,
    }
    phase = phases.get(state)
    return None if phase is None else phase + config.silence_timeout + SHORT


class Patience:
    """With one capsule. begin() after each request, end() before the next."""

    def __init__(self, config: CheckpointConfig, give_up: Callable[[str], Coroutine[None, None, None]]) -> None:
        """give_up(reason): called once when no request came in time."""
        self._config, self._give_up = config, give_up
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self, state: State) -> None:
        seconds = limit(state, self._config)
        if seconds is not None:
            self._arm(seconds)

    def _arm(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        self._timer = loop.call_at(due, self._over, seconds, due)

    def end(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _over(self, seconds: float, due: float) -> None:
        if asyncio.get_running_loop().time() - due > STOPPED:
            self._arm(seconds)
            return
        self._task = asyncio.create_task(self._give_up(f"the next request did not come within {seconds:.0f} s"))
