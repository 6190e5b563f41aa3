"""sock_diag(7) over netlink, for this process's network namespace: peers of unix sockets, ending TCP connections.

Message layouts: linux/sock_diag.h, linux/unix_diag.h, linux/inet_diag.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_SOCK_DESTROY = 21
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_SHOW_PEER = 4
_ATTRIBUTE_PEER = 2
_HEADER = struct.Struct("IHHII")
_ANY_COOKIE = b"\xff" * 8
_ALL_STATES = 0xFFFFFFFF


def unix_peers() -> dict[int, int]:
    """Inode of every unix socket -> inode of its peer, 0 for none. A peer may be in another network namespace."""
    request = struct.pack("BBHIII8s", socket.AF_UNIX, 0, 0, _ALL_STATES, 0, _SHOW_PEER, _ANY_COOKIE)
    found = {}
    with _open() as netlink:
        _send(netlink, _SOCK_DIAG_BY_FAMILY, _REQUEST | _DUMP, request)
        for message in _messages(netlink):
            (inode,) = struct.unpack_from("I", message, 4)
            found[inode] = next((value for kind, value in _numbers(message, 16) if kind == _ATTRIBUTE_PEER), 0)
    return found


def destroy_tcp(family: int, local: tuple[bytes, int], remote: tuple[bytes, int]) -> bool:
    """Abort a connection as if it had timed out: its owner sees ECONNABORTED. False if there is no such socket.

    Addresses in network byte order. Raises OSError, EOPNOTSUPP where the kernel cannot.
    """
    request = struct.pack("BBBxI", family, socket.IPPROTO_TCP, 0, _ALL_STATES)
    request += struct.pack("!HH16s16s", local[1], remote[1], local[0], remote[0])
    request += struct.pack("I", 0) + _ANY_COOKIE
    with _open() as netlink:
        _send(netlink, _SOCK_DESTROY, _REQUEST | _ACK, request)
        try:
            for _ in _messages(netlink):
                pass
        except FileNotFoundError:
            return False
    return True


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)


def _send(netlink: socket.socket, kind: int, flags: int, body: bytes) -> None:
    netlink.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body)


def _messages(netlink: socket.socket) -> Iterator[bytes]:
    """Bodies of the answer's messages up to its end. Raises OSError for what the kernel refused."""
    while True:
        data = netlink.recv(1 << 18)
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
            body = data[offset + _HEADER.size : offset + length]
            if kind == _DONE:
                return
            if kind == _ERROR:
                (code,) = struct.unpack_from("i", body)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return
            yield body
            offset += (length + 3) & ~3


def _numbers(message: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """The 4-byte attributes that follow the fixed part of a message."""
    while offset + 4 <= len(message):
        length, kind = struct.unpack_from("HH", message, offset)
        if length == 8:
            yield kind, struct.unpack_from("I", message, offset + 4)[0]
        offset += max(4, (length + 3) & ~3)
