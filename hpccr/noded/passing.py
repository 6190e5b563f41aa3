"""Whether root on this node gets to where a user is, as CRIU must: it goes to all files by their names.

Nothing is opened and no path of the user's is followed: /proc/PID/cwd leads to the directory that the asker is in, and
from there it goes only up. The answer is a number. A user's file system may take as long as it likes for it, so it is
found by a process of its own, one per user at a time.
"""

from __future__ import annotations

import asyncio
import os
import sys

from hpccr.errors import HpccrError
from hpccr.noded.spawned import Spawned

DEADLINE = 10.0


class Passing:
    """Starts those processes."""

    def __init__(self) -> None:
        self._turns: dict[int, asyncio.Lock] = {}

    async def kept_out(self, uid: int, pid: int, levels: int) -> int:
        """As m.Probed has it, for process `pid` of that user. Raises HpccrError when there is no answer in time."""
        turn = self._turns.setdefault(uid, asyncio.Lock())
        what = f"is still being asked whether root may pass a directory of uid {uid}"

        def ended(look: asyncio.Task[int]) -> None:
            turn.release()
            if not look.cancelled():
                look.exception()  # seen: nobody may be waiting any more

        try:
            async with asyncio.timeout(DEADLINE):
                await turn.acquire()
                what = f"did not tell root within {DEADLINE:.0f} s whether it may pass"
                look = asyncio.create_task(_look(pid, levels))
                look.add_done_callback(ended)
                return await asyncio.shield(look)
        except TimeoutError:
            raise HpccrError(f"a file system {what}", hint="is that storage well on this node?") from None


async def _look(pid: int, levels: int) -> int:
    spawned = Spawned(
        [sys.executable, "-I", "-m", "hpccr.noded.passing", str(pid), str(levels)], label="passing", talks=True
    )
    try:
        async with asyncio.timeout(DEADLINE):
            await spawned.wait()
    except TimeoutError:
        spawned.kill()  # which has to wait for a file system that was asked already
        await spawned.wait()
    said = spawned.output.read()
    await spawned.close()
    if not said:
        raise HpccrError("the process that looks whether root may pass ended without an answer")
    return int(said)


def kept_out(start: str, levels: int) -> int:
    """How many directories above `start` the first is that this process may not pass; -1 if there is none among the
    first `levels`, `start` being one of them."""
    for level in range(levels):
        if not os.access(start + "/.." * level, os.X_OK):
            return level
    return -1


def main() -> None:
    pid, levels = map(int, sys.argv[1:])
    print(kept_out(f"/proc/{pid}/cwd", levels))


if __name__ == "__main__":
    main()
