"""Who asks: the process at the other end of a unix socket, as the kernel and /proc tell it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import select
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hpccr.errors import HpccrError, PeerLostError, UnsupportedError
from hpccr.noded import cgroups, scan
from hpccr.noded.control import Identity
from hpccr.noded.criu import CACHE

# Constants of asm-generic/socket.h and linux/nsfs.h that Python's modules do not have.
SO_PEERGROUPS = 59
SO_PEERPIDFD = 77
NS_GET_USERNS = 0xB701

_UCRED = struct.Struct("3i")
_LIMIT = re.compile(r"^(?P<name>Max [a-z -]+?)\s{2,}(?P<soft>\S+)\s+(?P<hard>\S+)")

# Rows of /proc/PID/limits (fs/proc/base.c) by their RLIMIT number.
_RESOURCES = {
    "Max cpu time": resource.RLIMIT_CPU,
    "Max file size": resource.RLIMIT_FSIZE,
    "Max data size": resource.RLIMIT_DATA,
    "Max stack size": resource.RLIMIT_STACK,
    "Max core file size": resource.RLIMIT_CORE,
    "Max resident set": resource.RLIMIT_RSS,
    "Max processes": resource.RLIMIT_NPROC,
    "Max open files": resource.RLIMIT_NOFILE,
    "Max locked memory": resource.RLIMIT_MEMLOCK,
    "Max address space": resource.RLIMIT_AS,
    "Max file locks": 10,  # RLIMIT_LOCKS, which the kernel no longer enforces
    "Max pending signals": resource.RLIMIT_SIGPENDING,
    "Max msgqueue size": resource.RLIMIT_MSGQUEUE,
    "Max nice priority": resource.RLIMIT_NICE,
    "Max realtime priority": resource.RLIMIT_RTPRIO,
    "Max realtime timeout": resource.RLIMIT_RTTIME,
}


@dataclass(frozen=True)
class Credentials:
    """What the kernel recorded when the peer connected: nothing the peer can change afterwards."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] | None
    """Supplementary groups; None if they are more than Python's getsockopt() can take (256)."""


@dataclass
class Requester:
    """A checked requester. The descriptors are the owner's to close(): mount namespace, cgroup.procs files."""

    identity: Identity
    mount_namespace: int
    cgroups: list[int]

    @property
    def descriptors(self) -> list[int]:
        """In the order of control.Build."""
        return [self.mount_namespace, *self.cgroups]

    def close(self) -> None:
        for fd in self.descriptors:
            os.close(fd)


def credentials(sock: socket.socket) -> Credentials:
    """Of the process that connected (unix(7)). Raises OSError."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        return Credentials(pid, uid, gid, None)
    return Credentials(pid, uid, gid, struct.unpack(f"{len(groups) // 4}I", groups))


def examine(sock: socket.socket, who: Credentials, criu: str = "criu") -> Requester:
    """Everything of the requesting process that a capsule inherits. criu: which program that is (node.criu).

    Raises UnsupportedError (foreign namespaces or mounts, mixed ids), PeerLostError (it is gone).
    """
    gone = PeerLostError("the requesting process has ended")
    try:
        process = pidfd(sock, who.pid)
    except ProcessLookupError:
        raise gone from None
    opened: list[int] = []
    try:
        status = _status(who.pid)
        _check_ids(who, status)
        identity = Identity(
            uid=who.uid,
            gid=who.gid,
            groups=who.groups if who.groups is not None else tuple(map(int, status["Groups"].split())),
            umask=int(status["Umask"], 8),
            rlimits=parse_limits(_read(who.pid, "limits")),
            cpus=tuple(sorted(os.sched_getaffinity(who.pid))),
            nice=os.getpriority(os.PRIO_PROCESS, who.pid),
        )
        opened.append(_mount_namespace(who.pid, criu))
        opened += cgroups.open_procs(who.pid)
        # What was read is the peer's if the peer still lives now: its pid cannot have gone to another process.
        if has_ended(process):
            raise gone
    except BaseException as error:
        for fd in opened:
            os.close(fd)
        if isinstance(error, FileNotFoundError | ProcessLookupError):
            raise gone from None
        if isinstance(error, OSError):
            raise HpccrError(f"cannot examine the requesting process {who.pid}: {error}") from None
        raise
    finally:
        os.close(process)
    return Requester(identity, opened[0], opened[1:])


def has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def pidfd(sock: socket.socket, pid: int) -> int:
    """Of the process that connected. Raises ProcessLookupError, UnsupportedError."""
    try:
        (number,) = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4))
    except ProcessLookupError:
        raise
    except OSError:
        # Kernels before 6.5: the pid could already be another's, but then it must have the same ids to pass.
        if pid <= 0:
            raise UnsupportedError(
                "the requesting process is not in a pid namespace that hpccrd can see",
                hint="start hpccr outside of containers, or run hpccrd where the jobs run",
            ) from None
        return os.pidfd_open(pid)
    return int(number)


def _read(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/{name}") as file:
        return file.read()


def _status(pid: int) -> dict[str, str]:
    lines = (line.partition(":") for line in _read(pid, "status").splitlines())
    return {name: value.strip() for name, _, value in lines}


def _check_ids(who: Credentials, status: dict[str, str]) -> None:
    for name, wanted in (("Uid", who.uid), ("Gid", who.gid)):
        ids = {int(text) for text in status[name].split()}
        if ids != {wanted}:
            raise UnsupportedError(
                f"the requesting process has mixed or changed ids ({name} {status[name]}, connected as {wanted})",
                hint="run hpccr as the job's user, not from a set-id program",
            )


def parse_limits(text: str) -> tuple[tuple[int, int, int], ...]:
    """(resource, soft, hard) of each row of a /proc/PID/limits; -1 is infinity."""
    found = []
    for line in text.splitlines():
        match = _LIMIT.match(line)
        if match and match["name"] in _RESOURCES:
            found.append((_RESOURCES[match["name"]], _limit(match["soft"]), _limit(match["hard"])))
    return tuple(found)


def _limit(text: str) -> int:
    return -1 if text == "unlimited" else int(text)


def _check_mounts(pid: int, criu: str, hint: str) -> None:
    # A container runtime that is set-id root makes such a namespace with whatever its user wants to see in it.
    if not os.path.samestat(os.stat(f"/proc/{pid}/root"), os.stat("/")):
        raise UnsupportedError("the requesting process has another root directory than hpccrd", hint=hint)
    other = foreign_mounts(_read(pid, "mountinfo"), _read(os.getpid(), "mountinfo"), trusted_places(criu))
    if other:
        raise UnsupportedError(
            f"the requesting process sees another {other[0]} than hpccrd, which trusts what is there", hint=hint
        )


def trusted_places(criu: str) -> tuple[str, ...]:
    """Where root starts programs, loads libraries and opens files in a requester's mount namespace."""
    system = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/dev/null", CACHE)
    own = [sys.prefix, sys.base_prefix, *([os.path.dirname(criu)] if "/" in criu else [])]
    return (*system, *own, *map(os.path.realpath, own))


def foreign_mounts(theirs: str, own: str, places: Iterable[str]) -> list[str]:
    """Mount points at, above or below `places` at which one mount namespace has what the other has not. Both as
    /proc/PID/mountinfo."""
    known = set(_mounts(own))
    return [
        point
        for mount in _mounts(theirs)
        if mount not in known
        for point in [mount[0]]
        if any(scan.below(point, [place]) or scan.below(place, [point]) for place in places)
    ]


def _mounts(text: str) -> Iterator[tuple[str, str, str]]:
    """Mount point, device and directory of it."""
    for line in text.splitlines():
        _, _, device, root, point, _ = line.split(" ", 5)
        yield point, device, root


def _mount_namespace(pid: int, criu: str) -> int:
    """The process's mount namespace, if root may trust what is mounted in it."""
    hint = "hpccr cannot run inside a container or `unshare --user`: start it from the job itself"
    own = os.stat("/proc/self/ns/user")
    if not os.path.samestat(os.stat(f"/proc/{pid}/ns/user"), own):
        raise UnsupportedError("the requesting process is in another user namespace than hpccrd", hint=hint)
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        owner = fcntl.ioctl(namespace, NS_GET_USERNS)
        try:
            trusted = os.path.samestat(os.fstat(owner), own)
        finally:
            os.close(owner)
        if not trusted:
            raise UnsupportedError(
                "the mounts of the requesting process were made in another user namespace", hint=hint
            )
        if not os.path.samestat(os.fstat(namespace), os.stat("/proc/self/ns/mnt")):
            _check_mounts(pid, criu, hint)
    except BaseException:
        os.close(namespace)
        raise
    return namespace
