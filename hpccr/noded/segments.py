"""The length of TCP segments after a restore.

A connection that CRIU has made anew begins with the segments of one that knows nothing of its peer, 536 bytes, and the
kernel computes their length again only when it finds another MTU than then. So all devices have one that is smaller
by one byte until the hold ends.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterable

_SIOCGIFMTU = 0x8921
_SIOCSIFMTU = 0x8922
_IFREQ = struct.Struct("16si20x")


def shorten(devices: Iterable[str]) -> None:
    """Under the hold, before there is any socket. Raises OSError."""
    _change(devices, -1)


def lengthen(devices: Iterable[str]) -> None:
    """The job's sockets are there, and nothing that they have sent got through. Raises OSError."""
    _change(devices, 1)


def _change(devices: Iterable[str], by: int) -> None:
    """In this process's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for name in devices:
            _, mtu = _IFREQ.unpack(fcntl.ioctl(any_socket, _SIOCGIFMTU, _IFREQ.pack(name.encode(), 0)))
            fcntl.ioctl(any_socket, _SIOCSIFMTU, _IFREQ.pack(name.encode(), mtu + by))
