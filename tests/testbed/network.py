"""The cluster's network: a bridge in a namespace of its own (the "switch") and one cable from it to each node.

The machine's own network namespace is never touched and nothing leads out: traffic to the outside is answered with
"network unreachable" by the switch, which is every node's default gateway.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import cgroups
from paths import CTL, Instance, TestbedError
from syscalls import CLONE_NEWNET, setns, unshare

SWITCH = "switch"
_NET = "10.77.0"
_BITS = 24
_GATEWAY = f"{_NET}.254"
MAX_NODES = 200


def address(node: str) -> str:
    """The node's address, the same in every cluster."""
    return f"{_NET}.{_index(node)}"


def hosts(nodes: list[str]) -> str:
    """The content of /etc/hosts on every node."""
    lines = ["127.0.0.1 localhost", "::1 localhost", *(f"{address(node)} {node}" for node in nodes)]
    return "\n".join(lines) + "\n"


def _index(node: str) -> int:
    return 1 if node == CTL else 10 + int(node.removeprefix("node"))


def start_switch(instance: Instance) -> None:
    """Make the switch: a process that holds the namespace (found by its control group) with a bridge in it."""
    cgroups.create(instance.name, SWITCH)
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            os.setsid()
            cgroups.join(instance.name, SWITCH)
            unshare(CLONE_NEWNET)
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            # Its end of the pipe is closed by exec: then the namespace is there.
            os.execvp("sleep", ["sleep", "infinity"])
        finally:
            os._exit(1)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    _ip(
        _switch_pid(instance),
        "link set lo up",
        "link add br0 type bridge stp_state 0 forward_delay 0",
        f"addr add {_GATEWAY}/{_BITS} dev br0",
        "link set br0 up",
        "route add unreachable default",
    )
    _run(_switch_pid(instance), ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])


def _switch_pid(instance: Instance) -> int:
    found = cgroups.pids(instance.name, SWITCH)
    if len(found) != 1:
        raise TestbedError("the cluster's network is gone", "run `testbed up`")
    return found.pop()


def connect(instance: Instance, node: str, pid: int) -> None:
    """Lay the cable from the switch to the network namespace of process `pid` and configure the node's end."""
    port = f"p{_index(node)}"
    mac = f"02:68:70:00:00:{_index(node):02x}"
    switch = _switch_pid(instance)
    # A namespace is torn down some time after its last process: a node just powered off may still have its cable.
    _retry(
        switch,
        f"link add {port} type veth peer name eth0 address {mac} netns {pid}",
        f"link set {port} master br0 up",
        clear=f"link del {port}",
    )
    _ip(
        pid,
        "link set lo up",
        f"addr add {address(node)}/{_BITS} broadcast {_NET}.255 dev eth0",
        "link set eth0 up",
        f"route add default via {_GATEWAY}",
    )


def set_cable(instance: Instance, node: str, *, plugged: bool) -> None:
    """Cut the node off or join it again. The node sees no loss of carrier, as when a switch further away fails."""
    port = f"p{_index(node)}"
    _ip(_switch_pid(instance), f"link set {port} master br0" if plugged else f"link set {port} nomaster")


def unplugged(instance: Instance) -> set[int]:
    """Numbers of the ports that have been cut off."""
    shown = _run(_switch_pid(instance), ["ip", "-json", "link", "show"])
    ports = [link for link in json.loads(shown) if link["ifname"].startswith("p")]
    return {int(link["ifname"][1:]) for link in ports if "master" not in link}


def is_unplugged(node: str, ports: set[int]) -> bool:
    return _index(node) in ports


def _retry(pid: int, *commands: str, clear: str, within: float = 5.0) -> None:
    deadline = time.monotonic() + within
    while True:
        try:
            return _ip(pid, *commands)
        except TestbedError:
            if time.monotonic() > deadline:
                raise
        try:
            _ip(pid, clear)
        except TestbedError:
            time.sleep(0.02)


def _ip(pid: int, *commands: str) -> None:
    _run(pid, ["ip", "-batch", "-"], "\n".join(commands) + "\n")


def _run(pid: int, command: list[str], text: str = "") -> str:
    """Run a command of this machine in the network namespace of process `pid`; its output."""
    with Path(f"/proc/{pid}/ns/net").open("rb") as namespace:
        fd = namespace.fileno()
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, preexec_fn=lambda: setns(fd, CLONE_NEWNET), check=False
        )
    if done.returncode:
        raise TestbedError(f"{' '.join(command)} failed ({done.returncode}): {done.stderr.strip()}\n{text.strip()}")
    return done.stdout
