"""What tasks watch by inotify(7), and what of it a restore would not find again.

The kernel tells of a watched file its number and a handle (fs/notify/fdinfo.c), by which CRIU looks for its name, or
for the copy of it that it makes where a task has it open (criu/fsnotify.c). Where a file system gives no handles, or
tmpfs no name, it gives up the dump; where nobody has a file without a name, the restore.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from hpccr.noded import cgroups, jobfiles, scan, syscalls

_MINOR_BITS = 20
"""Of a device number as the kernel prints it (linux/kdev_t.h)."""

_IN_MEMORY = ("tmpfs", "devtmpfs")


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


def lost(fdinfo: Iterable[str], held: Callable[[], set[tuple[int, int]]]) -> str:
    """Why one of the watched files would not be found again; "" if all would. Files of other machines are not looked
    at: their file systems keep one that is open under a name of their own, and may not answer.

    held: st_dev and st_ino of the files without a name that tasks have open.
    """
    watches = [*parse(fdinfo)]
    if not watches:
        return ""
    lines = scan.lines("/proc/self/mountinfo")
    elsewhere = jobfiles.network_devices("\n".join(lines))
    mounts = [*map(_mount, lines)]
    for watch in watches:
        if watch.device in elsewhere:
            continue
        found = None
        for mount in mounts:
            if mount.device == watch.device and (found := _look(watch, mount.place)) is not None:
                break
        if found is None:
            return "a file on a file system that cannot find files again, such as overlayfs,"
        if not found.st_nlink and (mount.type in _IN_MEMORY or (found.st_dev, found.st_ino) not in held()):
            return "a file without a name any more"
    return ""


@dataclass(frozen=True)
class _Mount:
    device: int
    place: bytes
    type: str


def _mount(line: str) -> _Mount:
    before, _, after = line.partition(" - ")
    words = before.split()
    major, _, minor = words[2].partition(":")
    place = os.fsencode(cgroups.unescape(words[4]))
    return _Mount(os.makedev(int(major), int(minor)), place, after.split()[0])


def _look(watch: Watch, place: bytes) -> os.stat_result | None:
    """The watched file; None where it is not found by this mount point."""
    try:
        # Whoever can rename what lies above a mount point must not lead root elsewhere.
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        mount = syscalls.openat2(place, flags, resolve=syscalls.RESOLVE_NO_SYMLINKS)
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
    return status if status.st_ino == watch.inode else None
