"""Netlink on the node and inside capsules, by pyroute2."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hpccr.errors import HpccrError, UnsupportedError

MAX_MTU = 65535
"""Of an IPv4 packet; loopback announces one byte more."""

NUD_PERMANENT = 0x80
SCOPE_GLOBAL, SCOPE_LINK = 0, 253


@dataclass(frozen=True)
class Underlay:
    """Where VXLAN packets of this node come from."""

    address: str
    mtu: int


def connect() -> Any:
    """A netlink socket in this thread's network namespace; a context manager."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.ifinfmsg.plugins.vxlan import vxlan

    if not any(name == "IFLA_VXLAN_LOCALBYPASS" for name, _ in vxlan.nla_map):
        # if_link.h goes on after IFLA_VXLAN_DF, where pyroute2 0.9 ends.
        extended = type("vxlan", (vxlan,), {"nla_map": (*vxlan.nla_map[:30], *_VXLAN_AFTER_DF)})
        ifinfmsg.ifinfo.register_link_kind(module={"vxlan": extended})
    return IPRoute()


_VXLAN_AFTER_DF = (("IFLA_VXLAN_VNIFILTER", "uint8"), ("IFLA_VXLAN_LOCALBYPASS", "uint8"))


@contextmanager
def inside(namespace: int) -> Iterator[Any]:
    """A netlink socket in another network namespace; this thread itself is back home before it is used."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.setns(namespace, os.CLONE_NEWNET)
        try:
            socket = connect()
        finally:
            os.setns(home, os.CLONE_NEWNET)
    finally:
        os.close(home)
    with socket:
        yield socket


def delete(socket: Any, device: str) -> None:
    """Remove a device if it is there."""
    from pyroute2.netlink.exceptions import NetlinkError

    for index in socket.link_lookup(ifname=device):
        try:
            socket.link("del", index=index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise HpccrError(f"cannot remove the device {device}: {error}") from None


def delete_beyond(socket: Any, device: str, other: str) -> None:
    """Remove `other` from the namespace that the peer of the veth `device` is in, if both are there.

    Also one that no process and no mount leads to any more: connections that have lost their processes keep a
    namespace, and a VXLAN device in it its socket on the node, until the kernel gives up sending what they had to send
    (minutes).
    """
    from pyroute2.netlink.exceptions import NetlinkError

    for link in socket.get_links(ifname=device):
        beyond = link.get_attr("IFLA_LINK_NETNSID")
        if beyond is None or beyond < 0:
            continue
        try:
            socket.link("del", ifname=other, if_netnsid=beyond)
        except NetlinkError as error:
            # Gone in the meantime: the device, the namespace.
            if error.code not in (errno.ENODEV, errno.EINVAL):
                raise HpccrError(f"cannot remove the device {other} beyond {device}: {error}") from None


def find_underlay(socket: Any, wanted: str) -> Underlay:
    """This node's end of the underlay: `wanted` is an interface, an address or "" (see NetworkConfig.underlay)."""
    links = {link["index"]: link for link in socket.get_links()}
    found = [
        (address["index"], address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS"), address["scope"])
        for address in socket.get_addr(family=2)  # AF_INET
    ]

    def underlay(index: int, address: str) -> Underlay:
        return Underlay(address, links[index].get_attr("IFLA_MTU"))

    if wanted:
        for index, address, _ in found:
            if wanted in (address, links[index].get_attr("IFLA_IFNAME")):
                return underlay(index, address)
        raise UnsupportedError(
            f"network.underlay is {wanted!r}, but the node has neither such an interface with an IPv4 address nor such "
            "an address",
            hint="`ip address` lists them",
        )
    for route in socket.get_default_routes(family=2):
        source, output = route.get_attr("RTA_PREFSRC"), route.get_attr("RTA_OIF")
        for index, address, _ in found:
            if index == output and source in (None, address):
                return underlay(index, address)
    for scope in (0, 254):  # RT_SCOPE_UNIVERSE, then RT_SCOPE_HOST: a machine with loopback only
        for index, address, has in found:
            if has == scope and not links[index].get_attr("IFLA_IFNAME").startswith("hpu"):
                return underlay(index, address)
    return Underlay("127.0.0.1", MAX_MTU)
