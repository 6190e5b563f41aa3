"""What tasks watch by inotify(7): CRIU dumps a watch on a file whose last name was removed and cannot restore it, and
gives the dump up where a file system tells of no handle by which its files are found.

The kernel tells of a watched file its number and a handle (fs/notify/fdinfo.c), by which it can be looked at without a
name (open_by_handle_at(2)).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hpccr.noded import jobfiles, scan, syscalls

_MINOR_BITS = 20
"""Of a device number as the kernel prints it (linux/kdev_t.h)."""

_OCTAL = re.compile(rb"\\([0-7]{3})")
"""How spaces and the like are written in mountinfo."""


@dataclass(frozen=True)
class Watch:
    """A watched file. device: as st_dev; type and handle: of struct file_handle, 0 and nothing where there is none."""

    device: int
    inode: int
    type: int
    handle: bytes


def parse(fdinfo: Iterable[str]) -> Iterator[Watch]:
    """The watches in a /proc file fdinfo/FD."""
    for line in fdinfo:
        if line.startswith("inotify "):
            facts = dict(word.split(":", 1) for word in line.split()[1:] if ":" in word)
            device = int(facts["sdev"], 16)
            yield Watch(
                os.makedev(device >> _MINOR_BITS, device & ((1 << _MINOR_BITS) - 1)),
                int(facts["ino"], 16),
                int(facts.get("fhandle-type", "0"), 16),
                bytes.fromhex(facts.get("f_handle", "")),
            )


def lost(fdinfo: Iterable[str]) -> str:
    """Why one of the watched files would not be found again; "" if all would. Files of other machines are not looked
    at: their file systems keep one that is open under a name of their own, and may not answer."""
    watches = [*parse(fdinfo)]
    if not watches:
        return ""
    mounts = scan.lines("/proc/self/mountinfo")
    elsewhere = jobfiles.network_devices("\n".join(mounts))
    places: dict[int, list[bytes]] = {}
    for line in mounts:
        words = line.split()
        major, _, minor = words[2].partition(":")
        place = _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), os.fsencode(words[4]))
        places.setdefault(os.makedev(int(major), int(minor)), []).append(place)
    for watch in watches:
        if watch.device not in elsewhere:
            names = [_names(watch, place) for place in places.get(watch.device, ())]
            if all(count is None for count in names):
                return "a file on a file system that cannot find files again, such as overlayfs,"
            if 0 in names:
                return "a file without a name any more"
    return ""


def _names(watch: Watch, place: bytes) -> int | None:
    """How many the watched file has; None where it is not found by this mount point."""
    try:
        mount = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None  # another mount lies over it, or it is a single file's
    try:
        fd = syscalls.open_by_handle_at(mount, watch.type, watch.handle, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    finally:
        os.close(mount)
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    return status.st_nlink if status.st_ino == watch.inode else None
