"""Connections of the job to the world outside its capsules: found, refused before a dump, ended after a restore."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hpccr.errors import HpccrError, UnsupportedError
from hpccr.noded import sockdiag
from hpccr.noded.scan import Tree

_TABLES = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6, "udp": socket.AF_INET, "udp6": socket.AF_INET6}

_TCP_TIME_WAIT = 6

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Connection:
    """A connected socket as /proc/net shows it; the addresses are in network byte order, 4 or 16 bytes."""

    table: str
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    state: int
    inode: int

    @property
    def peer(self) -> Address:
        address = ipaddress.ip_address(self.remote)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            return address.ipv4_mapped
        return address

    def __str__(self) -> str:
        return f"{self.table[:3].upper()} to {self.peer} port {self.remote_port}"


def connections(inside: Iterable[str]) -> Iterator[Connection]:
    """Sockets of this network namespace with a peer that is in none of the networks `inside` ("10.90.0.10/16")."""
    networks = [ipaddress.ip_network(network, strict=False) for network in inside]
    for table in _TABLES:
        with open(f"/proc/self/net/{table}") as file:
            lines = file.read().splitlines()[1:]
        for line in lines:
            words = line.split()
            local, remote = _endpoint(words[1]), _endpoint(words[2])
            found = Connection(table, *local, *remote, int(words[3], 16), int(words[9]))
            if found.remote_port and not any(found.peer in network for network in networks):
                yield found


def _endpoint(text: str) -> tuple[bytes, int]:
    """An address and port as /proc/net prints it: 32-bit words of network order, read as numbers of the host's."""
    address, port = text.split(":")
    words = (int(address[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(address), 8))
    return b"".join(words), int(port, 16)


def refuse(tree: Tree, inside: Iterable[str]) -> None:
    """Raises UnsupportedError naming the first task that is connected to the outside."""
    remote = {connection.inode: connection for connection in connections(inside) if connection.inode}
    if not remote:
        return
    for task in tree.tasks:
        for _, link in tree.links(task):
            if link.startswith("socket:[") and (found := remote.get(int(link[8:-1]))) is not None:
                raise UnsupportedError(
                    f"process {task} has a connection to outside the job: {found}",
                    hint='close it before the checkpoint, or set checkpoint.outside = "allow": after a restart '
                    "the program then finds it aborted",
                )


def end(inside: Iterable[str]) -> int:
    """Abort all TCP connections to the outside (their owners see ECONNABORTED); how many there were.

    For a restored job: the peer went on without it, and where addresses and ports are the same again it would take
    bytes of the past for new ones. To be called under the hold, or the peer would hear of it.
    """
    ended = 0
    for found in connections(inside):
        if found.table.startswith("tcp") and found.state != _TCP_TIME_WAIT:
            local, remote = (found.local, found.local_port), (found.remote, found.remote_port)
            try:
                ended += sockdiag.destroy_tcp(_TABLES[found.table], local, remote)
            except OSError as error:
                raise HpccrError(
                    f"cannot end the job's connection {found}: {error.strerror}",
                    hint="the kernel needs CONFIG_INET_DIAG_DESTROY and the tcp_diag module",
                ) from None
    return ended
