"""Names and addresses inside a capsule network. Pure: the same on every node and for every incarnation of a step."""

from __future__ import annotations

import ipaddress
import uuid

from blake3 import blake3

from hpccr.errors import UnsupportedError, UsageError
from hpccr.model import StepKey

FIRST_HOST = 10
"""Capsule k has the address subnet base + FIRST_HOST + k; what is below is for the strategies' own use."""

OUTSIDE_SOURCE = "169.254.95.1"
"""Source address of every connection from a capsule to the outside: constant, so that its sockets can be restored on
any node, whichever uplink the capsule gets there."""

GATEWAY_MAC, UPLINK_MAC = "02:68:70:01:00:01", "02:68:70:01:00:02"
"""Of the node's and the capsule's end of every uplink. Nobody asks for them, so the node's end needs no address: MPI
libraries, also those of jobs that have nothing to do with us, take an interface with one for a way to other nodes."""


def subnet(text: str) -> ipaddress.IPv4Network:
    """The capsules' subnet of a configuration. Raises UsageError."""
    try:
        return ipaddress.IPv4Network(text)
    except ValueError as error:
        raise UsageError(f"network.subnet: {error}", hint="write an IPv4 network such as 10.90.0.0/16") from None


def address(network: ipaddress.IPv4Network, capsule: int) -> str:
    """Address of a capsule. Raises UnsupportedError if the subnet ends before it."""
    if not fits(network, capsule + 1):
        raise UnsupportedError(
            f"capsule {capsule} has no address in {network}", hint="ask the administrator for a larger network.subnet"
        )
    return str(network.network_address + FIRST_HOST + capsule)


def fits(network: ipaddress.IPv4Network, capsules: int) -> bool:
    """Whether that many capsules have addresses; the last address of the subnet is broadcast."""
    return FIRST_HOST + capsules <= network.num_addresses - 1


def mac(capsule: int) -> str:
    """Locally administered MAC address of a capsule: 02, "hp", 0, and its number."""
    return f"02:68:70:00:{capsule >> 8:02x}:{capsule & 0xFF:02x}"


def hostname(capsule: int) -> str:
    return f"hpccr-{capsule}"


def hosts(network: ipaddress.IPv4Network, capsules: int, node: str = "") -> str:
    """Text of /etc/hosts inside every capsule of a step: the capsules' names first, then the node's own /etc/hosts
    (`node`), by which the job finds servers outside."""
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    lines += [f"{address(network, k)}\t{hostname(k)}" for k in range(capsules)]
    lines += node.splitlines()
    return "\n".join(lines) + "\n"


def boot_id(key: StepKey, uid: int, capsule: int) -> str:
    """Content of /proc/sys/kernel/random/boot_id inside: differs between capsules, so that MPI libraries see them as
    different hosts, and is the same after a restore, when a program may look again."""
    digest = blake3(f"hpccr boot_id 1 {key} {uid} {capsule}".encode()).digest(16)
    return f"{uuid.UUID(bytes=digest, version=4)}\n"


def first_free_uplink(pool: str, taken: set[str]) -> ipaddress.IPv4Network:
    """The first /30 of the pool that holds none of the addresses `taken` (texts without prefix).

    Raises UsageError (pool) or UnsupportedError (none left).
    """
    try:
        network = ipaddress.IPv4Network(pool)
    except ValueError as error:
        raise UsageError(f"network.uplink_pool: {error}") from None
    if network.prefixlen > 30:
        raise UsageError(f"network.uplink_pool: {pool} has no room for one uplink, which takes a /30")
    used = {int(ipaddress.IPv4Address(text)) >> 2 for text in taken}
    for candidate in network.subnets(new_prefix=30):
        if int(candidate.network_address) >> 2 not in used:
            return candidate
    raise UnsupportedError(
        f"all uplink networks of {pool} are in use on this node",
        hint="ask the administrator for a larger network.uplink_pool",
    )
