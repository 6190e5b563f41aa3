"""Copies of files made before everything stands still, so that it does so for less time.

Such a copy counts only if the file has not been touched since, which its ctime tells: every change of content or
attributes sets it, and nobody can set it back. Two things could hide a change. Times have a grain, so a file that was
changed just before it is copied is not copied ahead. And a page that is mapped and already dirty is written to without
a trace, so each file is written out first: the next write is then seen again. In memory nothing is ever written out, so
files there are not copied ahead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import msgspec

from hpccr.errors import HpccrError
from hpccr.model import Extent
from hpccr.noded import syscalls
from hpccr.noded.contents import Container

SETTLED = 2.0
"""Seconds without a change after which a file is copied ahead: far more than the grain of times."""
SETTLED_REMOTE = 60.0
"""The same where another machine's clock tells the times."""

_IN_MEMORY = frozenset({0x01021994, 0x858458F6, 0x958458F6, 0x794C7630})
"""tmpfs, ramfs, hugetlbfs and overlayfs, which may lie on one of them (linux/magic.h)."""

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Copied(msgspec.Struct, frozen=True, array_like=True):
    """A file as it was when it was copied. facts: see _facts."""

    path: bytes
    facts: tuple[int, ...]
    extents: tuple[Extent, ...]


def copy(paths: Iterable[str], remote: frozenset[int], list_fd: int, data_fd: int) -> int:
    """Copy regular files that rest; how many. remote: devices (st_dev) of other machines. Raises OSError when there is
    no more room for them; what cannot be read, or changes meanwhile, is left out."""
    container = Container(data_fd)
    copied = []
    links: set[tuple[int, int]] = set()
    for path in paths:
        try:
            fd = os.open(path, _FLAGS)
        except OSError:
            continue
        try:
            status = os.fstat(fd)
            if not _rests(status, remote) or syscalls.file_system(fd) in _IN_MEMORY:
                continue
            try:
                syscalls.write_pages(fd)
            except OSError:
                continue
            # From here on a change is seen.
            status = os.fstat(fd)
            if not _rests(status, remote) or (status.st_dev, status.st_ino) in links:
                continue
            if status.st_nlink > 1:
                links.add((status.st_dev, status.st_ino))
            try:
                extents = container.add(fd, status.st_size, path)
            except HpccrError:
                continue  # it became shorter
        finally:
            os.close(fd)
        copied.append(Copied(os.fsencode(path), _facts(status), extents))
    write_list(list_fd, msgspec.msgpack.encode(copied))
    return len(copied)


class Ahead:
    """What was copied ahead, while every task of the job stands still."""

    def __init__(self, list_fd: int, container: Container) -> None:
        """list_fd: as copy() left it, or empty."""
        data = os.pread(list_fd, os.fstat(list_fd).st_size, 0)
        found = msgspec.msgpack.decode(data, type=tuple[Copied, ...]) if data else ()
        self._container = container
        self._copies = {os.fsdecode(copy.path): copy for copy in found}

    def take(self, path: str, status: os.stat_result) -> tuple[Extent, ...] | None:
        """The content of a file; None if there is no copy of it as it is now."""
        copy = self._copies.pop(path, None)
        if copy is None:
            return None
        if copy.facts != _facts(status):
            self._container.discard(copy.extents)
            return None
        return copy.extents

    def discard(self) -> None:
        """Give back the room of what nobody has taken."""
        for copy in self._copies.values():
            self._container.discard(copy.extents)


def write_list(fd: int, data: bytes) -> None:
    """Make this the whole content of a file."""
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _rests(status: os.stat_result, remote: frozenset[int]) -> bool:
    wanted = SETTLED_REMOTE if status.st_dev in remote else SETTLED
    return max(status.st_ctime, status.st_mtime) < time.time() - wanted


def _facts(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
