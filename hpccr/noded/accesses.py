"""What restored tasks have open, compared with what their user may open.

CRIU opens files as root, by the paths in its images, and a user can change what a path leads to. So before any task
runs each file is opened once more, with the user's ids. And before a checkpoint is made: what a restore would not give
the tasks is refused then.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from hpccr.errors import CorruptError, UnsupportedError
from hpccr.noded.scan import DELETED, GONE, Named, Tree


@dataclass(frozen=True)
class Access:
    """A file some task has: path, how (os.O_ flags), and which file it must be."""

    path: str
    flags: int
    device: int
    inode: int
    holder: str
    leased: bool = False
    mode: int = stat.S_IFREG
    handle: int = -1
    """Where the name was removed while the file has others: the file itself, opened with O_PATH."""


def collect(whole: Tree) -> list[Access]:
    """Every file and directory that the tasks have open, mapped, as program or as working directory, but for files
    without any name. The handles are the caller's."""
    found: dict[tuple[str, int], Access] = {}
    nameless: dict[tuple[int, int, int], Access] = {}

    def note(one: Named) -> None:
        try:
            status = os.stat(one.link)
        except GONE:
            return
        regular = stat.S_ISREG(status.st_mode)
        if not regular and not stat.S_ISDIR(status.st_mode):
            return
        flags = one.flags & (os.O_ACCMODE | os.O_PATH)
        access = Access(one.name, flags, status.st_dev, status.st_ino, str(one.task), one.leased >= 0, status.st_mode)
        if not one.name.endswith(DELETED):
            found.setdefault((one.name, flags), access)
        elif regular and status.st_nlink and (key := (status.st_dev, status.st_ino, flags)) not in nameless:
            nameless[key] = replace(access, handle=os.open(one.link, os.O_PATH | os.O_CLOEXEC))

    for one in whole.named():
        if not one.flags & os.O_PATH:
            note(one)
    for task in whole.tasks:
        for what in ("exe", "cwd", "root"):
            link = f"/proc/{task.pid}/{what}"
            with suppress(*GONE):
                note(Named(task, link, os.readlink(link), os.O_PATH))
    return [*found.values(), *nameless.values()]


def check(wanted: Iterable[Access]) -> None:
    """Open each file by its path with the same access, as whoever calls this (a child with the user's ids).

    CRIU opened them as root. Raises CorruptError naming the first that this user cannot open or that is another file.
    """
    for access in wanted:
        try:
            status = _open_as(access)
        except OSError as error:
            raise CorruptError(
                f"process {access.holder} has {access.path} open, which the user cannot open: {error.strerror}",
                hint="the permissions of that file or of a directory above it have changed since the checkpoint",
            ) from None
        if (status.st_dev, status.st_ino) != (access.device, access.inode):
            raise CorruptError(
                f"process {access.holder} has another file open than the one now at {access.path}",
                hint="something changed the job's files during the restore",
            )


def refuse_unopenable(wanted: Iterable[Access]) -> None:
    """As whoever calls this (a child with the user's ids), while the tasks run. Raises UnsupportedError naming a file
    that a task has but its user may not open, so that no restore would give it back."""
    for access in wanted:
        try:
            _open_as(access)
        except PermissionError as error:
            raise UnsupportedError(
                f"process {access.holder} has {access.path} open, which the user cannot open again: {error.strerror}",
                hint="give the user the right to read it (a program that can only be executed cannot be checkpointed), "
                "or to write it where the job writes",
            ) from None
        except OSError:
            continue  # a matter of the moment, or the dump's


def refuse_unreachable(wanted: Iterable[Access]) -> None:
    """As root: CRIU goes to all files by their names. Raises UnsupportedError naming one that only the user reaches."""
    for access in wanted:
        try:
            os.stat(access.path)
        except PermissionError as error:
            raise UnsupportedError(
                f"process {access.holder} has {access.path} open, and root on this node cannot get there: "
                f"{error.strerror}",
                hint="its file system keeps root out (NFS: root_squash; FUSE: no allow_root): let others pass through "
                "the directories above it (chmod o+x), or have it exported with no_root_squash",
            ) from None
        except OSError:
            continue


_MODES = {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK, os.O_RDWR: os.R_OK | os.W_OK}


def _open_as(access: Access) -> os.stat_result:
    """The file that an open() like the task's gives, with no more than a look where opening would break a lease. What
    is the user's own is open to the user whatever its mode: a program may write to a file that it made read-only."""
    path = access.path if access.handle < 0 else f"/proc/self/fd/{access.handle}"
    if access.leased:
        if not os.access(path, _MODES[access.flags & os.O_ACCMODE]):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return os.stat(path)
    try:
        fd = os.open(path, access.flags | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        if (status := os.stat(path)).st_uid != os.geteuid():
            raise
        return status
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)
