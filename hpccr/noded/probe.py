"""What this node can do: the checks behind `hpccr doctor`. Each says what was found and, if it is bad, the remedy."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable

from hpccr.config import Config
from hpccr.errors import HpccrError
from hpccr.noded import netlink, network, seal
from hpccr.noded.spool import Spool
from hpccr.wire.messages import Check

FRESH = 5.0
"""Seconds for which the last findings are given again: probing costs processes, and every user may ask."""
CRIU_TIMEOUT = 120.0
MIN_CRIU = (4, 2)
"""4.1.1 fails on every TCP socket on kernels from 6.16 on; older ones lack what the restore needs."""

_VERSION = re.compile(r"^Version: (\d+)\.(\d+)(?:\.(\d+))?", re.MULTILINE)


class Prober:
    """Runs the checks in threads, at most one round at a time."""

    def __init__(self, config: Config, key_path: str, spool: Spool) -> None:
        self._config, self._key_path, self._spool = config, key_path, spool
        self._lock = asyncio.Lock()
        self._known: tuple[float, tuple[Check, ...]] | None = None

    async def checks(self) -> tuple[Check, ...]:
        async with self._lock:
            if self._known is None or time.monotonic() - self._known[0] > FRESH:
                found = await asyncio.to_thread(self._run)
                self._known = (time.monotonic(), found)
            return self._known[1]

    def _run(self) -> tuple[Check, ...]:
        criu = self._config.node.criu
        checks = [check_criu_version(criu), check_criu(criu), check_pycriu(), check_namespaces()]
        checks += in_scratch_network(lambda: [check_vxlan(self._config.network.port), check_nft()])
        checks += [
            check_tar(),
            check_ptrace(_read("/proc/sys/kernel/yama/ptrace_scope")),
            check_ports(_read("/proc/sys/net/ipv4/ip_unprivileged_port_start")),
            check_key(self._key_path),
            check_spool(self._spool, self._config.node.spool_reserve),
        ]
        return tuple(checks)


def _read(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


def run_criu(program: str, *arguments: str) -> tuple[int, str]:
    """Exit status and whole output of CRIU; 127 if it is not there, 124 if it did not end."""
    argv = [program, "--no-default-config", *arguments]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd="/",
            timeout=CRIU_TIMEOUT,
            check=False,
        )
    except OSError as error:
        return 127, f"{program}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return 124, f"{' '.join(argv)} did not end within {CRIU_TIMEOUT:.0f} s"
    return done.returncode, done.stdout


def criu_version(program: str) -> int:
    """major * 10000 + minor * 100 + sublevel; 0 if CRIU does not tell. Blocks."""
    status, output = run_criu(program, "--version")
    match = _VERSION.search(output)
    if status or match is None:
        return 0
    major, minor, sublevel = (int(part or 0) for part in match.groups())
    return major * 10000 + minor * 100 + sublevel


def check_criu_version(program: str) -> Check:
    status, output = run_criu(program, "--version")
    match = _VERSION.search(output)
    wanted = f"install CRIU {'.'.join(map(str, MIN_CRIU))} or newer, or name it in node.criu"
    if status or match is None:
        return Check("criu", False, output.strip()[-500:] or f"{program} ended with {status}", wanted)
    version = tuple(int(part or 0) for part in match.groups())
    text = ".".join(map(str, version))
    if version < MIN_CRIU:
        return Check("criu", False, f"{shutil.which(program) or program} is version {text}", wanted)
    return Check("criu", True, f"{shutil.which(program) or program} {text}")


def check_criu(program: str) -> Check:
    """Also fills CRIU's cache of kernel features (/run/criu.kdat), which its probe needs an open network for."""
    status, output = run_criu(program, "check")
    if status == 0:
        return Check("criu check", True, "the kernel has what CRIU needs")
    said = [line for line in output.splitlines() if "Error" in line] or output.splitlines()
    return Check(
        "criu check",
        False,
        "; ".join(said[-3:]) or f"ended with {status}",
        f"run `{program} check` as root on the node: the kernel lacks a feature, or CRIU a permission",
    )


def check_pycriu() -> Check:
    hint = "install the package python3-pycriu where hpccr's Python finds it (a venv with --system-site-packages)"
    try:
        import pycriu
        from pycriu import images  # noqa: F401 - that it can be imported is the check
    except Exception as error:
        return Check("pycriu", False, f"{type(error).__name__}: {error}", hint)
    return Check("pycriu", True, os.path.dirname(str(pycriu.__file__)))


def check_namespaces() -> Check:
    missing = [
        kind for kind in ("pid", "net", "ipc", "mnt", "uts", "time") if not os.path.exists(f"/proc/self/ns/{kind}")
    ]
    if missing:
        return Check("namespaces", False, f"the kernel lacks {', '.join(missing)}", "use a kernel that has them (5.6+)")
    return Check("namespaces", True, "pid net ipc mnt uts time")


def in_scratch_network(checks: Callable[[], list[Check]]) -> list[Check]:
    """Run checks on a thread in a network namespace of its own, which ends with it and takes all they made along."""
    found: list[Check] = []

    def run() -> None:
        try:
            os.unshare(os.CLONE_NEWNET)
            found.extend(checks())
        except OSError as error:
            found.append(Check("network", False, f"cannot make a network namespace: {error}", "run hpccrd as root"))

    thread = threading.Thread(target=run, name="probe")
    thread.start()
    thread.join()
    return found


def check_vxlan(port: int) -> Check:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with netlink.connect() as socket:
            socket.link("add", ifname="probe", kind="vxlan", vxlan_id=1, vxlan_port=port, vxlan_localbypass=0)
            (link,) = socket.get_links(ifname="probe")
            bypass = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA").get_attr("IFLA_VXLAN_LOCALBYPASS")
    except NetlinkError as error:
        name = errno.errorcode.get(error.code, str(error.code))
        return Check("vxlan", False, f"cannot make a VXLAN device: {name}", "modprobe vxlan (CONFIG_VXLAN)")
    if bypass != 0:
        return Check("vxlan", True, f"UDP port {port}; two capsules of a step on this node need Linux 6.5")
    return Check("vxlan", True, f"UDP port {port}")


def check_nft() -> Check:
    rule = "chain c { type nat hook postrouting priority 100; ct state established accept; masquerade; }"
    try:
        network.nft("-f", "-", text=f"table ip probe {{\n{rule}\n}}\n")
    except HpccrError as error:
        return Check("nft", False, error.message, error.hint or "modprobe nf_tables nft_masq nft_ct")
    return Check("nft", True, shutil.which("nft") or "nft")


def check_tar() -> Check:
    path = shutil.which("tar")
    if path is None:
        return Check("tar", False, "there is no tar", "install GNU tar: private directories are saved with it")
    return Check("tar", True, path)


def check_ptrace(scope: str | None) -> Check:
    """scope: content of /proc/sys/kernel/yama/ptrace_scope, None without Yama."""
    if scope in (None, "0", "1", "2"):
        return Check("ptrace", True, f"ptrace_scope {scope or 'absent'}")
    return Check(
        "ptrace", False, f"kernel.yama.ptrace_scope is {scope}: nobody may trace", "set it to 2 or less and reboot"
    )


def check_ports(first: str | None) -> Check:
    """first: content of ip_unprivileged_port_start. Capsule networks trust that users cannot send from below 1024."""
    if first is None or int(first) >= 1024:
        return Check("privileged ports", True, "users cannot send from ports below 1024")
    return Check(
        "privileged ports",
        False,
        f"net.ipv4.ip_unprivileged_port_start is {first}: users could forge packets of capsule networks",
        "sysctl net.ipv4.ip_unprivileged_port_start=1024 on every node",
    )


def check_key(path: str) -> Check:
    """The digest shown is of the key under a label of its own: it tells two keys apart and nothing else."""
    try:
        return Check("site key", True, f"{path}, fingerprint {seal.load(path, owner=os.geteuid()).fingerprint}")
    except HpccrError as error:
        return Check("site key", False, error.message, error.hint)


def check_spool(spool: Spool, reserve: int) -> Check:
    try:
        room = spool.room()
    except OSError as error:
        return Check("spool", False, f"{spool.root}: {error.strerror}", "make the directory node.spool, root's, 0700")
    if room == 0:
        hint = "free space there, or set node.spool to a larger local disk"
        return Check("spool", False, f"{spool.root} has nothing left beside the reserve of {reserve >> 20} MiB", hint)
    return Check("spool", True, f"{spool.root}, {room >> 20} MiB for images")


def host_name() -> str:
    return socket.gethostname().partition(".")[0]


def cpu_flags(cpuinfo: str) -> tuple[str, ...]:
    """Features of the first CPU in the text of /proc/cpuinfo ("flags" on x86, "Features" on ARM)."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(value.split()))
    return ()
