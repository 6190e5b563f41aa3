"""Where the requester's control groups are in hpccrd's file system: v1, v2 and hybrid.

Decisions are pure functions over the texts of /proc/PID/cgroup and /proc/self/mountinfo (proc(5), cgroups(7)).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from hpccr.errors import UnsupportedError

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Membership:
    """One line of /proc/PID/cgroup: controllers is empty for v2; path is seen from the reader's cgroup namespace."""

    controllers: tuple[str, ...]
    path: str

    def __str__(self) -> str:
        return f"{','.join(self.controllers) or 'cgroup2'}:{self.path}"


@dataclass(frozen=True)
class Mount:
    """One cgroup mount: options are the v1 controllers it shows (empty for v2); root is the group at its top."""

    v2: bool
    options: frozenset[str]
    root: str
    point: str


def memberships(text: str) -> list[Membership]:
    """The lines of a /proc/PID/cgroup."""
    found = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        found.append(Membership(tuple(c for c in controllers.split(",") if c), path))
    return found


def mounts(mountinfo: str) -> list[Mount]:
    """The cgroup mounts in a /proc/PID/mountinfo, in its order."""
    found = []
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        separator = fields.index("-", 6)
        kind, super_options = fields[separator + 1], fields[separator + 3]
        if kind in ("cgroup", "cgroup2"):
            found.append(
                Mount(
                    v2=kind == "cgroup2",
                    options=frozenset(super_options.split(",")) if kind == "cgroup" else frozenset(),
                    root=unescape(fields[3]),
                    point=unescape(fields[4]),
                )
            )
    return found


def unescape(text: str) -> str:
    """A path of mountinfo, in which spaces and the like are written in octal."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def directory(membership: Membership, found: Iterable[Mount]) -> str | None:
    """Directory of the group; None if no mount of its hierarchy shows it.

    The mount's root and the path are both relative to the cgroup namespace of whoever read them; either may begin with
    "..", which is a name here and never resolved.
    """
    parts = _parts(membership.path)
    # The last mount on a mount point covers the earlier ones.
    for mount in reversed(list(found)):
        same = mount.v2 if not membership.controllers else mount.options.issuperset(membership.controllers)
        if not same:
            continue
        root = _parts(mount.root)
        rest = parts[len(root) :]
        if parts[: len(root)] == root and ".." not in rest:
            return os.path.join(mount.point, *rest)
    return None


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def directories(of: str, own: str, mountinfo: str) -> list[str]:
    """One directory per hierarchy for the /proc/PID/cgroup text `of`; `own` is hpccrd's.

    A hierarchy that is not mounted here is passed over if the process is in the same group as hpccrd, where a child of
    hpccrd is already. Raises UnsupportedError for any other that cannot be reached: a capsule must not escape it.
    """
    found = mounts(mountinfo)
    here = set(memberships(own))
    result = []
    for membership in memberships(of):
        place = directory(membership, found)
        if place is not None:
            result.append(place)
        elif membership not in here:
            raise UnsupportedError(
                f"the control group {membership} of the requesting process is not visible to hpccrd",
                hint="mount that hierarchy on the node, or run hpccrd outside of any cgroup namespace",
            )
    return result


def open_procs(pid: int) -> list[int]:
    """cgroup.procs (O_WRONLY) of each hierarchy the process is in, for moving another process there.

    Raises UnsupportedError, or OSError if the process or a group is gone. The caller closes them.
    """
    with open(f"/proc/{pid}/cgroup") as of, open("/proc/self/cgroup") as own, open("/proc/self/mountinfo") as info:
        places = directories(of.read(), own.read(), info.read())
    opened: list[int] = []
    try:
        for place in places:
            opened.append(os.open(os.path.join(place, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC))
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    return opened
