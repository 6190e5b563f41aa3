"""The length of TCP segments after a restore.

A connection that CRIU has made anew begins with the segments of one that knows nothing of its peer, 536 bytes, and the
kernel computes their length again only when it finds another MTU than then. So all devices have one that is smaller
by some bytes while CRIU makes them.

With short segments a connection whose buffers are full both ways also stood still for ever, more often than not (seen
with Linux 6.18): what was received in them takes more memory than before, the peer takes back the window that it had
given, and passes over all that comes from beyond, with the news that there is room in the other direction.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterable

_LESS = 16
"""Bytes. By one, that of lo would be no other: of its 65536 the kernel's IP takes 65535."""
_SIOCGIFMTU = 0x8921
_SIOCSIFMTU = 0x8922
_IFREQ = struct.Struct("16si20x")


def shorten(devices: Iterable[str]) -> None:
    """Under the hold, before there is any socket. Raises OSError."""
    _change(devices, -_LESS)


def lengthen(devices: Iterable[str]) -> None:
    """All sockets are there, and have not begun to send. Raises OSError."""
    _change(devices, _LESS)


def _change(devices: Iterable[str], by: int) -> None:
    """In this process's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for name in devices:
            _, mtu = _IFREQ.unpack(fcntl.ioctl(any_socket, _SIOCGIFMTU, _IFREQ.pack(name.encode(), 0)))
            fcntl.ioctl(any_socket, _SIOCSIFMTU, _IFREQ.pack(name.encode(), mtu + by))
