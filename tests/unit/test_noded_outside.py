"""Connections of this process, seen as a capsule's init sees them."""

from __future__ import annotations

import os
import socket

import pytest

from hpccr.errors import UnsupportedError
from hpccr.noded import outside, scan, sockdiag


def own_tree() -> scan.Tree:
    own = scan.read_task(os.getpid())
    assert own is not None
    return scan.Tree(own.pid, [own])


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_connection_is_outside_unless_a_network_has_its_peer(family: int, address: str, kind: int) -> None:
    with socket.socket(family, kind) as server, socket.socket(family, kind) as client:
        server.bind((address, 0))
        if kind == socket.SOCK_STREAM:
            server.listen()
        client.connect(server.getsockname()[:2])
        port = server.getsockname()[1]
        with pytest.raises(UnsupportedError, match=rf"(TCP|UDP) to {address} port {port}"):
            outside.refuse(own_tree(), ["10.90.0.10/16"])
        outside.refuse(own_tree(), ["127.0.0.1/8", "::1/128"])


def test_mapped_addresses_are_the_v4_ones_they_stand_for() -> None:
    address, port = outside._endpoint("0000000000000000FFFF00000100007F:1F90")
    connection = outside.Connection("tcp6", address, port, address, port, 1, 1)
    assert str(connection) == "TCP to 127.0.0.1 port 8080"


def test_unix_peers_are_found() -> None:
    one, other = socket.socketpair()
    with one, other, socket.socket(socket.AF_UNIX) as alone:
        peers = sockdiag.unix_peers()
        inode = {each: os.fstat(each.fileno()).st_ino for each in (one, other, alone)}
        assert peers[inode[one]] == inode[other] and peers[inode[other]] == inode[one]
        assert peers.get(inode[alone], 0) == 0
