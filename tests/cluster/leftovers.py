"""What is on a node: taken before and after a test, it must be the same. snapshot() runs on the node as root.

Network namespaces that nothing but a lost descriptor keeps are found through every process's descriptors; a VXLAN
device in one of them would keep the UDP port of the node's own namespace open, which is looked at as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path


def processes() -> list[str]:
    """Command lines, but not of this process, its parents and its children."""
    mine = set()
    pid = os.getpid()
    while pid:
        mine.add(pid)
        pid = _parent(pid)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or (int(entry.name) in mine and entry.name != "1"):
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if not line:
                line = f"[{(entry / 'comm').read_text().strip()}]"  # a zombie
            owner = entry.stat().st_uid
        except (FileNotFoundError, ProcessLookupError):
            continue
        found.append(f"uid {owner}: {line}")
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


def mounts() -> list[str]:
    found = []
    for line in Path("/proc/1/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        found.append(" ".join([*before.split()[3:5], *after.split()[:2]]))
    return found


def network_namespaces() -> list[str]:
    """Inodes, of processes and of open descriptors. The node's own is called so: it has another after a reboot."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            found.add(os.readlink(entry / "ns/net"))
            for fd in os.listdir(entry / "fd"):
                target = os.readlink(entry / "fd" / fd)
                if target.startswith("net:["):
                    found.add(target)
        except (FileNotFoundError, ProcessLookupError):
            continue
    own = os.readlink("/proc/1/ns/net")
    return sorted("own" if name == own else name for name in found)


def links() -> list[str]:
    found = json.loads(_output("ip", "-json", "-details", "link"))
    return [f"{link['ifname']} {link.get('linkinfo', {}).get('info_kind', '')}" for link in found]


def udp_ports() -> list[str]:
    """Local ports below the range of short-lived ones: VXLAN's among them."""
    lines = Path("/proc/net/udp").read_text().splitlines()[1:]
    ports = {int(line.split()[1].rpartition(":")[2], 16) for line in lines}
    return [str(port) for port in sorted(ports) if port < 32768]


def tables() -> list[str]:
    return re.findall(r"^table .*$", _output("nft", "list", "tables"), re.MULTILINE)


def control_groups() -> list[str]:
    return [directory for directory, _, _ in os.walk("/sys/fs/cgroup")]


def files() -> list[str]:
    """All there is in hpccr's directories, and what a job or capsule would have put where all processes can.

    But for images kept in the spool: those stay on purpose (test_store has a test of when they go).
    """
    found = []
    for top in ("/run/hpccr", "/var/spool/hpccr", "/dev/shm", "/tmp"):
        for directory, names, leaves in os.walk(top):
            names[:] = [name for name in names if not name.startswith("kept-")]
            found += [os.path.join(directory, name) for name in (*names, *leaves)]
    found += [str(path) for path in Path("/run").glob("hpccr-*")]
    return found


def system_v() -> list[str]:
    """Keys and identifiers of the node's own System V objects."""
    found = []
    for kind in ("shm", "sem", "msg"):
        lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]
        found += [f"{kind} {line.split()[1]}" for line in lines]
    return found


def forwarding() -> list[str]:
    return [Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()]


def _output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def snapshot() -> dict[str, list[str]]:
    """Everything by kind."""
    return {
        "process": processes(),
        "mount": mounts(),
        "network namespace": network_namespaces(),
        "link": links(),
        "UDP port": udp_ports(),
        "nft table": tables(),
        "control group": control_groups(),
        "file": files(),
        "System V object": system_v(),
        "ip_forward": forwarding(),
    }


def added(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    """What is there after and was not before, and what is gone, in words."""
    found = []
    for kind, then in before.items():
        was, now = Counter(then), Counter(after[kind])
        found += [f"{kind} left: {what}" for what in sorted((now - was).elements())]
        # A daemon that died, a mount of the node that was taken down with a capsule's.
        found += [f"{kind} gone: {what}" for what in sorted((was - now).elements())]
    return found
