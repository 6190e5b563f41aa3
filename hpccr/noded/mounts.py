"""What a capsule's mount namespace gets: a plan of operations, made as data, then executed.

Everything lives in the capsule's own mount namespace and vanishes with it, so nothing here has an undo.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpccr.errors import HpccrError
from hpccr.noded import syscalls
from hpccr.noded.control import Build

SCRATCH = "/proc"
"""Where the files to be bind-mounted lie: a small tmpfs that the fresh /proc then covers, so nobody else sees it."""

SHM = "/dev/shm"  # noqa: S108 - each capsule has its own

PSEUDO_TERMINALS = "newinstance,ptmxmode=0666,mode=0620,gid=5"
"""Group 5 is tty wherever Linux programs run (getpt(3) relied on it)."""

_HARDENED = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC


class Operation(Protocol):
    """One step of a plan. describe() says what it does in one line, execute() does it or raises OSError."""

    def describe(self) -> str: ...

    def execute(self) -> None: ...


@dataclass(frozen=True)
class MakePrivate:
    """Nothing mounted from here on is seen outside, and nothing from outside appears."""

    def describe(self) -> str:
        return "make all mounts private"

    def execute(self) -> None:
        syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)


@dataclass(frozen=True)
class Mount:
    fstype: str
    target: str
    flags: int = 0
    data: str = ""

    def describe(self) -> str:
        return f"mount a fresh {self.fstype} on {self.target}" + (f" ({self.data})" if self.data else "")

    def execute(self) -> None:
        syscalls.mount(
            "hpccr" if self.fstype == "tmpfs" else self.fstype, self.target, self.fstype, self.flags, self.data
        )


@dataclass(frozen=True)
class WriteFile:
    path: str
    text: str

    def describe(self) -> str:
        return f"write {self.path} ({len(self.text)} characters)"

    def execute(self) -> None:
        with open(self.path, "w") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(self.text)


@dataclass(frozen=True)
class BindFile:
    source: str
    target: str

    def describe(self) -> str:
        return f"bind {self.source} on {self.target}"

    def execute(self) -> None:
        syscalls.mount(self.source, self.target, flags=syscalls.MS_BIND | syscalls.MS_REC)


@dataclass(frozen=True)
class Covering:
    """Mount `covers`, then bind what was at `source` before (now hidden below) on `target`."""

    source: str
    covers: Mount
    target: str

    def describe(self) -> str:
        return f"{self.covers.describe()}, then bind the earlier {self.source} on {self.target}"

    def execute(self) -> None:
        fd = os.open(self.source, os.O_PATH | os.O_CLOEXEC)
        try:
            self.covers.execute()
            # A descriptor still names the hidden mount; /proc is always a fresh one of ours by now.
            syscalls.mount(f"/proc/self/fd/{fd}", self.target, flags=syscalls.MS_BIND | syscalls.MS_REC)
        finally:
            os.close(fd)


def plan(build: Build) -> tuple[Operation, ...]:
    """All operations for a capsule, in order. To be executed in its mount, pid and net namespaces."""
    boot_id = f"{SCRATCH}/boot_id"
    hosts = f"{SCRATCH}/hosts"
    return (
        MakePrivate(),
        Mount("tmpfs", SCRATCH, _HARDENED, "mode=0700,size=1m"),
        WriteFile(boot_id, build.boot_id.strip() + "\n"),
        WriteFile(hosts, build.hosts),
        BindFile(hosts, "/etc/hosts"),
        # UCX takes equal boot ids for one host and would try shared memory between capsules.
        Covering(boot_id, Mount("proc", "/proc", _HARDENED), "/proc/sys/kernel/random/boot_id"),
        # sysfs shows the network namespace it was mounted from; UCX looks for devices in /sys/class/net.
        *_sysfs(),
        # A pseudo-terminal (prted opens one per rank) is restored under its old number: on the node's it may be taken.
        Mount("devpts", "/dev/pts", syscalls.MS_NOSUID | syscalls.MS_NOEXEC, PSEUDO_TERMINALS),
        *(Mount("tmpfs", path, syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=1777") for path in places(build.private)),
    )


def places(private: Iterable[str]) -> tuple[str, ...]:
    """All private directories of a capsule in a fixed order, outer ones before those below them."""
    return tuple(sorted({SHM, *(os.path.normpath(path) for path in private)}))


def _sysfs() -> Sequence[Operation]:
    sysfs = Mount("sysfs", "/sys", _HARDENED)
    return (Covering("/sys/fs/cgroup", sysfs, "/sys/fs/cgroup"),)


def execute(operations: Iterable[Operation]) -> None:
    """Execute in order. Raises HpccrError naming the operation that failed."""
    for operation in operations:
        try:
            operation.execute()
        except OSError as error:
            raise HpccrError(f"cannot {operation.describe()}: {error}", hint=_hint(operation)) from None


def links(follow: bool) -> None:
    """Whether symbolic links are followed in this mount namespace. Raises HpccrError.

    Off while CRIU, as root, goes the paths of a checkpoint: the user may have put a link anywhere into them. In /proc
    and /dev, where users cannot, they are always followed.
    """
    attribute = syscalls.MOUNT_ATTR_NOSYMFOLLOW
    try:
        if follow:
            syscalls.mount_setattr("/", clear=attribute, recursive=True)
        else:
            syscalls.mount_setattr("/", set=attribute, recursive=True)
            for path in ("/proc", "/dev"):
                syscalls.mount_setattr(path, clear=attribute)
    except OSError as error:
        raise HpccrError(
            f"cannot tell the kernel whether to follow symbolic links: {error}", hint="Linux 5.14 or newer is needed"
        ) from None


def _hint(operation: Operation) -> str:
    if isinstance(operation, Mount) and operation.fstype == "tmpfs":
        return f"every directory in capsule.private must exist on the node: create {operation.target} or take it out"
    return ""
