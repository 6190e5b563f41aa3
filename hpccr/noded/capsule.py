"""What capsule init knows about its capsule: shared by launching, checkpointing and restoring."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType

from hpccr.errors import HpccrError
from hpccr.model import Stdio
from hpccr.noded.control import Identity, Network
from hpccr.noded.criu import Criu
from hpccr.noded.hold import Hold
from hpccr.noded.reaper import Reaper

_LAST_PID = "/proc/sys/kernel/ns_last_pid"


@dataclass
class Capsule:
    """A capsule from the inside. root is 0 until there is a launch root."""

    identity: Identity
    cgroups: tuple[int, ...]
    """cgroup.procs of the job, open for writing."""
    places: tuple[str, ...]
    criu_program: str
    rpc: ModuleType
    images: ModuleType
    reaper: Reaper
    hold: Hold
    network: Network | None = None
    root: int = 0
    stdio: Stdio = field(default_factory=lambda: Stdio(0, 0, 0))

    @property
    def devices(self) -> tuple[str, ...]:
        """The network devices that carry what the job sends."""
        own = () if self.network is None else (self.network.device, self.network.uplink)
        return ("lo", *filter(None, own))

    @property
    def inside(self) -> tuple[str, ...]:
        """The networks whose addresses are the job's own, as address/prefix."""
        own = () if self.network is None else (f"{self.network.address}/{self.network.prefix}",)
        return ("127.0.0.0/8", "::1/128", *own)

    def criu(self, directory: int) -> Criu:
        return Criu(self.rpc, self.reaper, program=self.criu_program, identity=self.identity, directory=directory)


def set_last_pid(pid: int) -> None:
    """The next process in this pid namespace gets pid + 1, or the next one that is free."""
    with open(_LAST_PID, "w") as file:
        file.write(str(pid))


@dataclass(frozen=True)
class Streams:
    """The job's stdio as it came beside Launch or InitRestore. stdin is None for /dev/null."""

    stdin: int | None
    stdout: int
    stderr: int

    @classmethod
    def take(cls, fds: list[int], *, stdin: str, merged: bool) -> Streams:
        """Raises HpccrError if the descriptors are not those that stdin and merged announce."""
        wanted = (stdin == "pipe") + 1 + (not merged)
        if len(fds) != wanted:
            raise HpccrError(f"expected {wanted} descriptors for stdio ({stdin=}, {merged=}), got {len(fds)}")
        rest = list(fds)
        first = rest.pop(0) if stdin == "pipe" else None
        stdout = rest.pop(0)
        return cls(first, stdout, rest.pop(0) if rest else stdout)

    def inodes(self) -> Stdio:
        """Raises HpccrError if one is no pipe: nothing else can be given to a restored job."""

        def inode(fd: int) -> int:
            status = os.fstat(fd)
            if not stat.S_ISFIFO(status.st_mode):
                raise HpccrError("the job's stdio must be pipes")
            return status.st_ino

        return Stdio(0 if self.stdin is None else inode(self.stdin), inode(self.stdout), inode(self.stderr))


def kill(pids: Iterable[int]) -> list[int]:
    """SIGKILL these processes; pidfds of those that were there, for wait_ended().

    When this returns none of them executes another instruction, traced and stopped ones included. But a traced one
    with several threads counts as ended only when its tracer has let go of it.
    """
    pidfds = []
    for pid in pids:
        try:
            pidfds.append(os.pidfd_open(pid))
            signal.pidfd_send_signal(pidfds[-1], signal.SIGKILL)
        except ProcessLookupError:
            continue
    return pidfds


async def wait_ended(pidfds: Iterable[int]) -> None:
    """Wait until these processes have ended, and close the pidfds."""
    for fd in pidfds:
        try:
            await _ended(fd)
        finally:
            os.close(fd)


async def _ended(pidfd: int) -> None:
    """A pidfd becomes readable when its process ends."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
