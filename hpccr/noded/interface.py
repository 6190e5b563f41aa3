"""The capsule's end of its network: addresses, peers and routes, inside the capsule's network namespace.

The devices were made in the node's namespace and moved in.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import Any

from hpccr.errors import HpccrError
from hpccr.noded.addresses import GATEWAY_MAC
from hpccr.noded.control import Network
from hpccr.noded.hold import Nft
from hpccr.noded.netlink import NUD_PERMANENT, SCOPE_GLOBAL

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1  # netdevice(7)

_PATIENCE = {"tcp_retries2": "200", "tcp_rto_max_ms": "10000"}
"""Of TCP in /proc/sys/net/ipv4, for what is under way when the job is held. By the kernel's defaults, 15 repetitions
with up to two minutes in between, a connection is given up after 15 minutes, half of what a dump may take, and is
quiet for up to two minutes after a long hold. The second is new in Linux 6.15."""


def begin() -> None:
    """A new network namespace, before any other socket is made in it: lo is up, and TCP has patience. By capsule init,
    which does without pyroute2: what init has in its memory every fork of it pays for, also while the job stands
    still."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as anything:
        fcntl.ioctl(anything, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
    for name, value in _PATIENCE.items():
        try:
            with open(f"/proc/sys/net/ipv4/{name}", "w") as file:
                file.write(value)
        except OSError:
            pass  # jobs run without it too, and stand still for less long


def configure(route: Any, network: Network) -> None:
    """Make the capsule reachable for its peers and, with an uplink, the outside reachable from it.

    By hpccrd; route: a netlink socket in the capsule's network namespace. Raises HpccrError naming the step that the
    kernel refused.
    """
    _overlay(route, network)
    if network.uplink:
        _uplink(route, network)


def translate(network: Network) -> None:
    """The constant source address means nothing to the node: give it this capsule's own on the way out. By a helper of
    capsule init's."""
    Nft().run(
        "table ip hpccr_uplink {\n"
        " chain out {\n"
        "  type nat hook postrouting priority srcnat;\n"
        f'  oifname "{network.uplink}" snat to {network.uplink_address}\n'
        " }\n"
        "}\n"
    )


def _overlay(route: Any, network: Network) -> None:
    device = network.device
    index = _index(route, device)
    _do(f"set up {device}", lambda: route.link("set", index=index, address=network.mac, mtu=network.mtu, state="up"))
    _do(
        f"give {device} the address {network.address}/{network.prefix}",
        lambda: route.addr("add", index=index, address=network.address, prefixlen=network.prefix),
    )
    for peer in network.peers:
        if peer.capsule == network.own:
            continue
        # Nothing is learned or asked for: who is where is known, and a held capsule could not answer.
        _do(
            f"add capsule {peer.capsule} at {peer.address} as a neighbour",
            lambda peer=peer: route.neigh(
                "replace", ifindex=index, dst=peer.address, lladdr=peer.mac, state=NUD_PERMANENT
            ),
        )
        _do(
            f"forward to capsule {peer.capsule} by {peer.underlay} vni {peer.vni}",
            lambda peer=peer: route.fdb("append", ifindex=index, lladdr=peer.mac, dst=peer.underlay, vni=peer.vni),
        )


def _uplink(route: Any, network: Network) -> None:
    index = _index(route, network.uplink)
    loopback = _index(route, "lo")
    _do(
        f"give {network.uplink} the address {network.uplink_address}/{network.uplink_prefix}",
        lambda: route.addr("add", index=index, address=network.uplink_address, prefixlen=network.uplink_prefix),
    )
    _do(f"bring up {network.uplink}", lambda: route.link("set", index=index, state="up"))
    _do(
        f"add the node as a neighbour at {network.uplink_gateway}",
        lambda: route.neigh(
            "replace", ifindex=index, dst=network.uplink_gateway, lladdr=GATEWAY_MAC, state=NUD_PERMANENT
        ),
    )
    # The address that outgoing sockets are bound to: the same in every capsule, so they can be restored anywhere.
    _do(
        f"add the address {network.outside_source}",
        lambda: route.addr("add", index=loopback, address=network.outside_source, prefixlen=32, scope=SCOPE_GLOBAL),
    )
    _do(
        f"route to the outside by {network.uplink_gateway}",
        lambda: route.route(
            "add", dst="default", gateway=network.uplink_gateway, oif=index, prefsrc=network.outside_source
        ),
    )


def _index(route: Any, name: str) -> int:
    found = route.link_lookup(ifname=name)
    if not found:
        raise HpccrError(f"there is no network device {name} in the capsule")
    return int(found[0])


def _do(doing: str, act: Any) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        act()
    except NetlinkError as error:
        raise HpccrError(f"capsule network: cannot {doing}: {error}") from None
