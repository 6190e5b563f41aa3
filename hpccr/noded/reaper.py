"""Children of pid 1: everything in the capsule ends up here and is reaped; some of it is waited for."""

from __future__ import annotations

import asyncio
import os
import signal


class Reaper:
    """Reaps all children of this process, from the event loop.

    A pid must be watched in the same step of the loop that made or adopted it, before it can have been reaped.
    """

    def __init__(self) -> None:
        self._watched: dict[int, asyncio.Future[int]] = {}

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_signal_handler(signal.SIGCHLD, self.reap)

    def watch(self, pid: int) -> asyncio.Future[int]:
        """Becomes the exit code of child `pid`, -n if signal n ended it."""
        return self._watched.setdefault(pid, asyncio.get_running_loop().create_future())

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            future = self._watched.pop(pid, None)
            if future is not None and not future.cancelled():
                future.set_result(os.waitstatus_to_exitcode(status))
