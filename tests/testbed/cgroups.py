"""Control groups: every process of a cluster is in /hpccr-testbed/INSTANCE/NODE, so leftovers can be found.

Each node gets a group of its own in every hierarchy in which this process is at the root. Where somebody else manages
it already (a supervisor's memory group, a login session) it is left there; the freezer is always ours, Slurm needs it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from paths import TestbedError, common

TOP = "hpccr-testbed"


@dataclass(frozen=True)
class Hierarchy:
    """A mounted cgroup hierarchy of this machine, as `mountpoint` shows it."""

    controllers: str  # as in /proc/PID/cgroup: "cpu,cpuacct", "name=systemd", "" for v2
    mountpoint: Path
    ours: bool

    @property
    def v2(self) -> bool:
        return not self.controllers


@functools.cache
def hierarchies() -> tuple[Hierarchy, ...]:
    """All mounted hierarchies; raises TestbedError when there is no v1 freezer.

    Kept from the first call on: a node being made has left the pid namespace that /proc belongs to.
    """
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[frozenset(controllers.split(","))] = (controllers, path)
    found: dict[str, Hierarchy] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        root, mountpoint = before.split()[3:5]
        fstype, _, options = after.split()[:3]
        if root != "/" or fstype not in ("cgroup", "cgroup2"):
            continue
        for names, (controllers, path) in own.items():
            if names == {""} if fstype == "cgroup2" else controllers and names <= set(options.split(",")):
                ours = path == "/" or "freezer" in names
                found.setdefault(controllers, Hierarchy(controllers, Path(mountpoint), ours))
    if not any("freezer" in h.controllers.split(",") for h in found.values()):
        raise TestbedError(
            "this machine has no cgroup v1 freezer, so Slurm's proctrack/cgroup cannot work inside a namespace",
            "use a machine with cgroup v1 mounted (kernel command line: systemd.unified_cgroup_hierarchy=0)",
        )
    return tuple(found.values())


def create(instance: str, node: str) -> None:
    """Make the node's groups."""
    with common():
        for hierarchy in hierarchies():
            if hierarchy.ours:
                _make(hierarchy, (TOP, instance, node))


def _make(hierarchy: Hierarchy, parts: Iterable[str]) -> None:
    group = hierarchy.mountpoint
    for part in parts:
        parent, group = group, group / part
        group.mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):
            # A v1 cpuset starts empty and then takes no process.
            if not hierarchy.v2 and (group / name).exists():
                (group / name).write_text((parent / name).read_text())


def join(instance: str, node: str) -> None:
    """Move this process into the node's groups; raises TestbedError when the node has none."""
    joined = False
    for hierarchy in hierarchies():
        procs = hierarchy.mountpoint / TOP / instance / node / "cgroup.procs"
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(procs, os.O_WRONLY | os.O_CLOEXEC)
            os.write(fd, b"0")
            os.close(fd)
            joined = True
    if not joined:
        raise TestbedError(f"{node} is off: it has no control group", "see `testbed status`")


def _trees(instance: str, node: str = "") -> list[Path]:
    return [tree for h in hierarchies() if (tree := h.mountpoint / TOP / instance / node).is_dir()]


def pids(instance: str, node: str = "") -> set[int]:
    """Processes of a node, or of the whole instance."""
    found: set[int] = set()
    for tree in _trees(instance, node):
        for directory, _, _ in os.walk(tree):
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in Path(directory, "cgroup.procs").read_text().split())
    return found - {0}


def kill(instance: str, node: str = "", within: float = 30.0) -> None:
    """SIGKILL every process of a node, or of the whole instance, and return when none is left."""
    deadline = time.monotonic() + within
    while left := pids(instance, node):
        _thaw(instance, node)
        for pid in left:
            _kill_member(pid, f"/{TOP}/{instance}/{node}" if node else f"/{TOP}/{instance}/")
        if time.monotonic() > deadline:
            raise TestbedError(
                f"processes {sorted(left)} of {instance} {node} outlived SIGKILL for {within:.0f} s",
                "look at /proc/PID/stack: they hang in the kernel",
            )
        time.sleep(0.005)


def _kill_member(pid: int, prefix: str) -> None:
    """SIGKILL `pid` if it (and not a later process of that number) is in a group below `prefix`."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        fd = os.pidfd_open(pid)
        try:
            groups = Path(f"/proc/{pid}/cgroup").read_text()
            if any((line.split(":", 2)[2] + "/").startswith(prefix) for line in groups.splitlines()):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


def _thaw(instance: str, node: str) -> None:
    # A frozen v1 group does not act on SIGKILL.
    for tree in _trees(instance, node):
        for directory, _, files in os.walk(tree):
            if "freezer.state" in files:
                with contextlib.suppress(OSError):
                    Path(directory, "freezer.state").write_text("THAWED")


def destroy(instance: str, node: str = "", within: float = 30.0) -> None:
    """Kill every process of a node, or of the whole instance, and remove its groups."""
    deadline = time.monotonic() + within
    while trees := _trees(instance, node):
        kill(instance, node, within)
        for tree in trees:
            for directory in _bottom_up(tree):
                with contextlib.suppress(OSError):
                    directory.rmdir()
        if time.monotonic() > deadline:
            raise TestbedError(
                f"cannot remove control groups {', '.join(map(str, trees))}", "is a process left in one?"
            )
        time.sleep(0.002)
    with common():
        for hierarchy in hierarchies():
            with contextlib.suppress(OSError):  # other instances may be there
                (hierarchy.mountpoint / TOP).rmdir()


def _bottom_up(tree: Path) -> Iterator[Path]:
    for directory, _, _ in os.walk(tree, topdown=False):
        yield Path(directory)


def instances() -> set[str]:
    """Names of all instances that have groups."""
    return {
        entry.name
        for h in hierarchies()
        if (h.mountpoint / TOP).is_dir()
        for entry in (h.mountpoint / TOP).iterdir()
        if entry.is_dir()
    }
