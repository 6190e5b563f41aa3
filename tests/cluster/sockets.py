"""The TCP connections of the capsules' processes, looked at from outside: how long each bears silence."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from nodes import Cluster

_SYS_PIDFD_GETFD = 438
_TCP_USER_TIMEOUT = 18
_TCP_RTO_MAX_MS = 44
_TCP_ESTABLISHED = 1
_NEVER = float("inf")


@dataclass(frozen=True)
class Deadline:
    """A connection of a process; after how many seconds without an answer the kernel ends it, and how many there may be
    between two repetitions of what is not acknowledged (0.0: Linux before 6.15 does not say)."""

    command: str
    peer: str
    seconds: float
    pause: float


def deadlines(cluster: Cluster, node: str) -> list[Deadline]:
    """Of all established connections in capsules on a node. As root of this machine."""
    outside = _network(cluster.pid_one(node))
    found = []
    for pid in cluster.pids(node, "."):
        if _network(pid) not in ("", outside):
            found += list(_of_process(pid))
    return found


def _network(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def _of_process(pid: int) -> Iterator[Deadline]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read().replace(b"\0", b" ").decode(errors="replace")[:80]
        numbers = [int(name) for name in os.listdir(f"/proc/{pid}/fd") if _is_socket(pid, name)]
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        for number in numbers:
            fd = ctypes.CDLL(None).syscall(_SYS_PIDFD_GETFD, handle, number, 0)
            if fd < 0:
                continue
            with socket.socket(fileno=fd) as sock:
                if sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM and _established(sock):
                    yield Deadline(command, "{}:{}".format(*sock.getpeername()), _seconds(sock), _pause(sock))
    finally:
        os.close(handle)


def _is_socket(pid: int, name: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    except OSError:
        return False


def _established(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_ESTABLISHED


def _seconds(sock: socket.socket) -> float:
    """tcp(7): by keepalives, and with TCP_USER_TIMEOUT by what is sent and not acknowledged."""

    def option(number: int) -> int:
        return struct.unpack("i", sock.getsockopt(socket.IPPROTO_TCP, number, 4))[0]

    longest = option(_TCP_USER_TIMEOUT) / 1000 or _NEVER
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        probes = option(socket.TCP_KEEPCNT) * option(socket.TCP_KEEPINTVL)
        longest = min(longest, option(socket.TCP_KEEPIDLE) + probes)
    return longest


def _pause(sock: socket.socket) -> float:
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS) / 1000
    except OSError:
        return 0.0
