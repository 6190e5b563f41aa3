"""The contents of the job's files on their way into a checkpoint: one after the other in one file, without holes.

Contents begin at places with the same remainder as in their file, so that the store finds the blocks of an earlier
checkpoint again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress

from hpccr.errors import HpccrError
from hpccr.model import Extent
from hpccr.noded import syscalls

CHUNK = 1 << 20
LARGE = 256 << 10
"""Bytes from which on a file's content begins at a multiple of this: a multiple of the store's blocks."""
PAGE = 4096
SMALL_HOLE = 64 << 10
"""Holes up to this are saved as zeros: many small extents cost more than they save."""


def data_ranges(fd: int, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """(begin, end) of what is not a hole in [start, end), small holes included."""
    begin = -1
    last = start
    while last < end:
        try:
            data = os.lseek(fd, last, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            data = last  # a file system that knows no holes
            hole = end
        else:
            if data >= end:
                break
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        if begin >= 0 and data - last > SMALL_HOLE:
            yield begin, last
            begin = -1
        if begin < 0:
            begin = data
        last = hole
    if begin >= 0:
        yield begin, last


class Container:
    """The file that contents are appended to."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = os.lseek(fd, 0, os.SEEK_END)

    def add(self, fd: int, size: int, name: str, *, holes: bool = True) -> tuple[Extent, ...]:
        """Copy the first `size` bytes of an open file. holes: look for them, which moves the file's position."""
        unit = LARGE if size >= LARGE else PAGE
        extents = []
        for begin, end in data_ranges(fd, size) if holes else [(0, size)] if size else []:
            place = self._end + (begin - self._end) % unit
            _copy(fd, begin, self._fd, place, end - begin, name)
            extents.append(Extent(begin, end - begin, place))
            self._end = place + end - begin
        return tuple(extents)

    def discard(self, extents: tuple[Extent, ...]) -> None:
        """Give back the room of contents that nobody wants any more."""
        for extent in extents:
            with suppress(OSError):  # a file system that cannot
                syscalls.punch_hole(self._fd, extent.place, extent.length)


def _copy(source: int, offset: int, target: int, place: int, count: int, name: str) -> None:
    # In the kernel where it can: without a copy at all where both are on one file system that shares blocks.
    inside = True
    while count:
        if inside:
            try:
                done = os.copy_file_range(source, target, min(count, 1 << 30), offset, place)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                    raise
                inside = False
                continue
        else:
            data = os.pread(source, min(count, CHUNK), offset)
            done = os.pwrite(target, data, place) if data else 0
        if not done:
            if inside:
                inside = False
                continue
            raise HpccrError(f"{name} became shorter while it was saved", hint="does anybody outside the job write it?")
        offset, place, count = offset + done, place + done, count - done
