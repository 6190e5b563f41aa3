"""A capsule's network on the node: what is to be made, as data that can be described, executed and undone in reverse.

Everything here is synchronous and belongs into one thread (see Plumber): netlink, nft and setns() on that thread.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from hpccr.config import NetworkConfig
from hpccr.errors import HpccrError, UnsupportedError, UsageError
from hpccr.noded import addresses, interface, netlink
from hpccr.noded.control import Network
from hpccr.noded.netlink import Underlay

DEVICE = "hpc0"
"""The capsule network's device inside a capsule."""
UPLINK = "hpcu0"
"""The uplink's device inside a capsule."""
OVERHEAD = 50
"""Bytes VXLAN adds to a frame over IPv4: outer IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14."""
FORWARDING = "/proc/sys/net/ipv4/ip_forward"

_TABLE = re.compile(r"^table ip hpccr_([0-9a-f]{8})$", re.MULTILINE)
_LINK = re.compile(r"^hpu([0-9a-f]{8})$")


def node_device(name: str) -> str:
    """The node's end of the uplink of the capsule called `name` (8 hex digits)."""
    return f"hpu{name}"


def table(name: str) -> str:
    """The node's nft table of that capsule."""
    return f"hpccr_{name}"


class VniTaken(HpccrError):
    """Another VXLAN device on this node has that VNI."""


class Context(Protocol):
    """What operations work on: a netlink socket on the node, and the capsule's namespace."""

    node: Any
    namespace: int

    def inside(self) -> Any:
        """Context manager giving a netlink socket inside the capsule's network namespace."""


class Operation(Protocol):
    """One step of a plan. describe() is a shell command that would do the same; undo() succeeds if nothing is left."""

    def describe(self) -> str: ...

    def execute(self, context: Context) -> None: ...

    def undo(self, context: Context) -> None: ...


@dataclass(frozen=True)
class AddVxlan:
    """A VXLAN device inside the capsule whose packets leave by the node.

    Made in the capsule at once rather than moved there: the request comes from the node's namespace, so the kernel ties
    the device's sockets to the node. Source ports are privileged ones, which no user can send from (see Vxlan).
    nolocalbypass: by the kernel's short cut between two devices of one node a packet keeps the route of its sender and
    is dropped when the receiver is in another namespace, as capsules are. Kernels before 6.5 ignore it.
    """

    device: str
    vni: int
    local: str
    port: int
    mac: str
    mtu: int

    def describe(self) -> str:
        return (
            f"ip link add {self.device} netns CAPSULE address {self.mac} mtu {self.mtu} type vxlan id {self.vni} "
            f"local {self.local} dstport {self.port} srcport 512 1023 nolearning "
            "nolocalbypass"
        )

    def execute(self, context: Context) -> None:
        try:
            context.node.link(
                "add",
                ifname=self.device,
                net_ns_fd=context.namespace,
                address=self.mac,
                mtu=self.mtu,
                kind="vxlan",
                vxlan_id=self.vni,
                vxlan_local=self.local,
                vxlan_port=self.port,
                vxlan_port_range={"low": 512, "high": 1023},
                vxlan_learning=0,
                vxlan_localbypass=0,
            )
        except Exception as error:
            if getattr(error, "code", None) == errno.EEXIST:
                raise VniTaken(f"VXLAN {self.vni} is in use on this node") from None
            raise _failed(self, error) from error

    def undo(self, context: Context) -> None:
        with context.inside() as socket:
            netlink.delete(socket, self.device)


@dataclass(frozen=True)
class AddUplink:
    """A veth pair between the node and the capsule, and the node's way to the capsule's address on it.

    The node's end has no address of its own (see addresses.GATEWAY_MAC).
    """

    node_device: str
    device: str
    address: str
    mtu: int

    def describe(self) -> str:
        return (
            f"ip link add {self.node_device} mtu {self.mtu} address {addresses.GATEWAY_MAC} type veth "
            f"peer {self.device} mtu {self.mtu} address {addresses.UPLINK_MAC} netns CAPSULE"
            f" && ip link set {self.node_device} up"
            f" && ip route add {self.address} dev {self.node_device}"
            f" && ip neighbour add {self.address} dev {self.node_device} lladdr {addresses.UPLINK_MAC} nud permanent"
        )

    def execute(self, context: Context) -> None:
        try:
            context.node.link(
                "add",
                ifname=self.node_device,
                mtu=self.mtu,
                address=addresses.GATEWAY_MAC,
                kind="veth",
                peer={
                    "ifname": self.device,
                    "net_ns_fd": context.namespace,
                    "mtu": self.mtu,
                    "address": addresses.UPLINK_MAC,
                },
            )
            # No link-local IPv6 address and no router discovery from a capsule.
            _write_if_there(f"/proc/sys/net/ipv6/conf/{self.node_device}/disable_ipv6", "1")
            (index,) = context.node.link_lookup(ifname=self.node_device)
            context.node.link("set", index=index, state="up")
            context.node.route("add", dst=f"{self.address}/32", oif=index, scope=netlink.SCOPE_LINK)
            context.node.neigh(
                "add", ifindex=index, dst=self.address, lladdr=addresses.UPLINK_MAC, state=netlink.NUD_PERMANENT
            )
        except Exception as error:
            raise _failed(self, error) from error

    def undo(self, context: Context) -> None:
        netlink.delete(context.node, self.node_device)


@dataclass(frozen=True)
class NftTable:
    """All rules of one capsule on the node, in one table that is removed as a whole."""

    name: str
    rules: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join([f"table ip {self.name} {{", *(f"  {rule}" for rule in self.rules), "}", ""])

    def describe(self) -> str:
        return f"nft -f - <<'EOF'\n{self.text}EOF"

    def execute(self, context: Context) -> None:
        nft("-f", "-", text=self.text)

    def undo(self, context: Context) -> None:
        delete_table(self.name)


@dataclass(frozen=True)
class Plan:
    """A capsule's network: the operations in order, and what init must know of the result."""

    operations: tuple[Operation, ...]
    vni: int
    underlay: Underlay
    mtu: int
    uplink: ipaddress.IPv4Network | None

    def describe(self) -> list[str]:
        return [operation.describe() for operation in self.operations]


class Strategy(Protocol):
    """How capsules of a step reach each other and the world."""

    def plan(self, *, name: str, capsule: int, vni: int, underlay: Underlay, taken: set[str]) -> Plan:
        """What to make for one capsule.

        name: unique on the node, 8 hex digits; taken: addresses that the node has or has routes to. Pure. Raises
        HpccrError if the configuration has no room for it.
        """


class Vxlan:
    """One VXLAN device per capsule, with a VNI of its own, over UDP on the node's network."""

    def __init__(self, config: NetworkConfig) -> None:
        self._config = config
        addresses.subnet(config.subnet)

    def plan(self, *, name: str, capsule: int, vni: int, underlay: Underlay, taken: set[str]) -> Plan:
        config = self._config
        mtu = min(underlay.mtu, netlink.MAX_MTU) - OVERHEAD
        operations: list[Operation] = [
            AddVxlan(DEVICE, vni, underlay.address, config.port, addresses.mac(capsule), mtu),
        ]
        rules = [
            # A user's program cannot send from a privileged port, so it cannot forge packets of a capsule network.
            "chain input { type filter hook input priority -10; policy accept;"
            f" udp dport {config.port} udp sport >= 1024 drop; }}",
        ]
        uplink = None
        if config.uplink:
            uplink = addresses.first_free_uplink(config.uplink_pool, taken)
            device = node_device(name)
            operations.append(AddUplink(device, UPLINK, str(uplink[2]), min(underlay.mtu, netlink.MAX_MTU)))
            guard = f'oifname "{device}" ct state != {{ established, related }} drop;'
            rules += [
                f"chain forward {{ type filter hook forward priority -10; policy accept; {guard} }}",
                f"chain output {{ type filter hook output priority -10; policy accept; {guard} }}",
                "chain postrouting { type nat hook postrouting priority 100; policy accept;"
                f' ip saddr {uplink} oifname != "{device}" masquerade; }}',
            ]
        # After its device and gone before it: a table without a device is a leftover, whoever's it was.
        operations.append(NftTable(table(name), tuple(rules)))
        return Plan(tuple(operations), vni, underlay, mtu, uplink)


def strategy(config: NetworkConfig) -> Strategy:
    """The strategy a configuration names. Raises UsageError."""
    strategies: dict[str, Callable[[NetworkConfig], Strategy]] = {"vxlan": Vxlan}
    if config.strategy not in strategies:
        raise UsageError(f"unknown network.strategy {config.strategy!r}", hint=f"known are: {', '.join(strategies)}")
    return strategies[config.strategy](config)


# --- executing --------------------------------------------------------------------------------------------


@dataclass
class Node:
    """The Context of a running hpccrd, on the thread that made it."""

    node: Any
    namespace: int

    @contextmanager
    def inside(self) -> Iterator[Any]:
        with netlink.inside(self.namespace) as socket:
            yield socket


def _failed(operation: Operation, error: Exception) -> HpccrError:
    return HpccrError(
        f"cannot make the capsule's network: {error}",
        hint=f"the same by hand: {operation.describe()}; `hpccr doctor` tells what the node lacks",
    )


def nft(*arguments: str, text: str = "") -> str:
    """Run nft; gives its output. Raises UnsupportedError (not there) or HpccrError with its complaint and the rules."""
    try:
        done = subprocess.run(["nft", *arguments], input=text, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        raise UnsupportedError("there is no nft on this node", hint="install the package nftables") from None
    except subprocess.TimeoutExpired:
        raise HpccrError(f"nft {' '.join(arguments)} did not end within 30 s") from None
    if done.returncode:
        raise HpccrError(f"nft {' '.join(arguments)} failed ({done.returncode}): {done.stderr.strip()} {text}".strip())
    return done.stdout


def tables() -> set[str]:
    """Names of the capsules that have a table on this node."""
    return set(_TABLE.findall(nft("list", "tables", "ip")))


def delete_table(name: str) -> None:
    """Remove a table if it is there."""
    # add makes it exist, so that delete cannot fail for its absence: nft's own `destroy` needs kernel 6.3.
    nft("-f", "-", text=f"add table ip {name}\ndelete table ip {name}\n")


def _write_if_there(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except FileNotFoundError:
        pass  # no IPv6 on this node: nothing to switch off


class Plumber:
    """Executes and undoes plans, on a thread of its own so that the event loop never waits for the kernel."""

    def __init__(self, config: NetworkConfig, run: str) -> None:
        self._config = config
        self._strategy = strategy(config)
        self._record = os.path.join(run, "ip_forward")
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._thread: threading.Thread | None = None

    @property
    def executor(self) -> ThreadPoolExecutor:
        """Where the methods below must be called."""
        return self._executor

    def make(self, *, name: str, capsule: int, namespace: int, choose: Callable[[], int]) -> Plan:
        """Make a capsule's network. choose() gives a VNI to try. Raises HpccrError with nothing left behind."""
        with netlink.connect() as socket:
            context = Node(socket, namespace)
            underlay = netlink.find_underlay(socket, self._config.underlay)
            taken = {address.get_attr("IFA_LOCAL") for address in socket.get_addr(family=2)}
            taken |= {route.get_attr("RTA_DST") for route in socket.get_routes(family=2)}
            taken.discard(None)
            for _ in range(16):
                plan = self._strategy.plan(name=name, capsule=capsule, vni=choose(), underlay=underlay, taken=taken)
                try:
                    self._execute(plan, context)
                    return plan
                except VniTaken:
                    continue
        raise HpccrError("found no free VXLAN identifier on this node in 16 tries")

    def configure(self, wanted: Network, namespace: int) -> None:
        """Set up what make() has put into the capsule. Raises HpccrError naming the step that failed."""
        with netlink.inside(namespace) as socket:
            interface.configure(socket, wanted)

    def _execute(self, plan: Plan, context: Context) -> None:
        done: list[Operation] = []
        try:
            for operation in plan.operations:
                done.append(operation)
                operation.execute(context)
            if plan.uplink is not None:
                self._forward()
        except VniTaken:
            raise  # the first operation, and it has made nothing
        except BaseException:
            self._undo(done, context)
            raise

    def unmake(self, plan: Plan, namespace: int) -> None:
        """Undo what make() did; goes on after an error and raises the first."""
        with netlink.connect() as socket:
            self._undo(plan.operations, Node(socket, namespace))
            self._stop_forwarding(socket)

    def _undo(self, operations: Sequence[Operation], context: Context) -> None:
        first: Exception | None = None
        for operation in reversed(operations):
            try:
                operation.undo(context)
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    def sweep(self, dead: set[str]) -> list[str]:
        """Remove devices of the capsules `dead`, and every table without a device. Gives what was removed."""
        removed = []
        orphans = tables()
        with netlink.connect() as socket:
            for name in dead:
                if socket.link_lookup(ifname=node_device(name)):
                    netlink.delete_beyond(socket, node_device(name), DEVICE)
                    netlink.delete(socket, node_device(name))
                    removed.append(node_device(name))
            # Listed after the tables: the device of a table that another hpccrd is making now is already there.
            alive = _uplinks(socket)
            for name in orphans - alive if self._config.uplink else orphans & dead:
                delete_table(table(name))
                removed.append(table(name))
            self._stop_forwarding(socket)
        return removed

    def _forward(self) -> None:
        """Let the node route for capsules; remembers on disk that it did not before."""
        with open(FORWARDING) as file:
            if file.read().strip() != "0":
                return
        with open(self._record, "w") as file:
            file.write("0\n")
        with open(FORWARDING, "w") as file:
            file.write("1\n")

    def _stop_forwarding(self, socket: Any) -> None:
        if not os.path.exists(self._record) or _uplinks(socket):
            return
        with open(FORWARDING, "w") as file:
            file.write("0\n")
        os.unlink(self._record)


def _uplinks(socket: Any) -> set[str]:
    """Names of the capsules that have an uplink on this node."""
    names = (link.get_attr("IFLA_IFNAME") for link in socket.get_links())
    return {match[1] for match in map(_LINK.match, names) if match}
