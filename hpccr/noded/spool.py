"""hpccrd's directories: one per capsule in the runtime directory, one per checkpoint in the spool.

Every directory in use is locked (flock on the directory itself), by hpccrd or by the transfer it was handed to. What
is not locked has no owner any more: that is how leftovers are known, also when several hpccrds share a node.

But for images that are kept (noded.kept): durable ones, which stay for a restore on this node. They have names of their
own, are locked only while they are read (shared) or removed, and are anybody's to remove: when they are old, when room
is needed, when a newer one of the same capsule is there, and when their step has ended.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from hpccr.errors import UsageError

log = logging.getLogger(__name__)

RUNTIME = "capsules"
"""The runtime area's place in node.run."""
KEPT = "kept-"
"""Names of kept images begin with this."""
KEPT_PART = 2
"""Without a limit of its own the spool's kept images take at most one part in so many of the file system."""


class Directory:
    """A directory of ours, mode 0700, locked by the descriptor `fd`."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def open(self) -> int:
        """Another descriptor, which does not hold the lock: for giving away."""
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)

    def bytes(self) -> int:
        """Sum of the sizes of its files (it has no subdirectories)."""
        with os.scandir(self.fd) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)

    def remove(self) -> None:
        """Remove it with all that is in it, and unlock. Safe to repeat. Blocks."""
        if self.fd >= 0:
            self._empty()
            shutil.rmtree(self.path, ignore_errors=True)
            if os.path.lexists(self.path):
                log.warning("%s could not be removed; that is tried again every minute", self.path)
            self.release()

    def _empty(self) -> None:
        """Space comes back also where somebody has kept a descriptor, as a store worker can."""
        try:
            names = os.listdir(self.fd)
        except OSError:
            return
        for name in names:
            try:
                status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
                # A restore has links to the files of a kept image, which stay.
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                    os.close(os.open(name, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd))
            except OSError:
                continue  # rmtree() says no more either

    def release(self) -> None:
        """Unlock, unless the descriptor was inherited by a transfer, which then goes on holding the lock."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Area:
    """A directory (0700, root's) that holds such directories and nothing else."""

    def __init__(self, root: str) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make it if it is not there. Raises UsageError if others than root could get at what is in it."""
        try:
            os.makedirs(self.root, mode=0o700, exist_ok=True)
            status = os.lstat(self.root)
        except OSError as error:
            raise UsageError(
                f"cannot make {self.root}: {error.strerror}", hint="set node.run and node.spool to local directories"
            ) from None
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise UsageError(
                f"{self.root} must be a directory of root with mode 0700", hint=f"chown root {self.root}; chmod 0700 it"
            )

    def create(self, name: str) -> Directory:
        """A fresh locked directory. Raises OSError (also if there is one of that name)."""
        path = os.path.join(self.root, name)
        while True:
            os.mkdir(path, 0o700)
            directory = _lock(path, wait=True)
            if directory is not None:
                return directory
            # Somebody's sweep took it between mkdir and flock.

    def leftovers(self) -> list[Directory]:
        """Directories whose owner is gone, now locked by us."""
        found = []
        for name in self._owned():
            directory = _lock(os.path.join(self.root, name), wait=False)
            if directory is not None:
                found.append(directory)
        return found

    def _owned(self) -> list[str]:
        return sorted(os.listdir(self.root))


class Limits(msgspec.Struct, frozen=True):
    """How much a spool may hold.

    root: its directory. reserve: bytes that stay free in its file system. size: bytes that images may take; 0: as
    many as the file system has, kept ones a part of it (KEPT_PART).
    """

    root: str
    reserve: int = 0
    size: int = 0


class KeptImage(NamedTuple):
    """since: when it became durable, seconds since the epoch."""

    name: str
    since: float
    bytes: int


class Spool(Area):
    """Where images are on their way between a capsule and the store, and where the newest durable ones stay."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits.root)
        self.limits = limits

    def _owned(self) -> list[str]:
        # Kept images have no owner; whoever is about to remove one must not find it locked by a mere look.
        return [name for name in super()._owned() if not name.startswith(KEPT)]

    def room(self, *, evicting: bool = True) -> int:
        """Bytes that may be written here; evicting: if kept images go that nobody reads. Never negative."""
        status = os.statvfs(self.root)
        room = status.f_bavail * status.f_frsize - self.limits.reserve
        if self.limits.size:
            room = min(room, self.limits.size - self._used())
        if evicting:
            room += sum(image.bytes for image in self.kept() if not self._is_read(image.name))
        return max(0, room)

    def is_short(self) -> bool:
        """Whether less is free than must stay so."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize < self.limits.reserve

    def make_room(self, count: int) -> None:
        """Remove kept images, the oldest first, until `count` bytes can be written or none is left. Blocks."""
        for image in self.kept():
            if self.room(evicting=False) >= count:
                return
            self._remove(image.name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For one fetch at a time, of all processes. Blocks."""
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def limit_kept(self) -> int:
        """Bytes that kept images may take."""
        status = os.statvfs(self.root)
        return self.limits.size or status.f_blocks * status.f_frsize // KEPT_PART

    def evict(self) -> None:
        """Remove kept images, the oldest first, until they are within their limit. Blocks."""
        images = self.kept()
        excess = max(sum(image.bytes for image in images) - self.limit_kept(), 0)
        for image in images:
            if excess <= 0:
                return
            excess -= image.bytes if self._remove(image.name) else 0

    def expire(self, seconds: float, *, now: float | None = None) -> list[str]:
        """Remove images kept for longer than that; their names. Blocks."""
        now = time.time() if now is None else now
        return [image.name for image in self.kept() if now - image.since > seconds and self._remove(image.name)]

    def drop(self, prefix: str, *, before: str = "") -> None:
        """Remove the kept images whose names begin so, and if `before` is given come before it. Those that are being
        read stay. Blocks."""
        for image in self.kept():
            if image.name.startswith(prefix) and (not before or image.name < before):
                self._remove(image.name)

    def kept(self) -> list[KeptImage]:
        """The oldest first."""
        found = []
        for name in os.listdir(self.root):
            if name.startswith(KEPT):
                try:
                    since = os.stat(os.path.join(self.root, name), follow_symlinks=False).st_mtime
                except FileNotFoundError:
                    continue
                found.append(KeptImage(name, since, _bytes(os.path.join(self.root, name), set())))
        return sorted(found, key=lambda image: image.since)

    def take(self, name: str) -> Directory | None:
        """A kept image, for reading: nobody removes it until it is let go. None if it is not there. Blocks."""
        return _lock(os.path.join(self.root, name), wait=True, shared=True)

    def _remove(self, name: str) -> bool:
        directory = _lock(os.path.join(self.root, name), wait=False)
        if directory is not None:
            directory.remove()
        return directory is not None

    def _is_read(self, name: str) -> bool:
        """Whether a kept image cannot be removed now. What another is just removing can: its room is about to come."""
        path = os.path.join(self.root, name)
        for shared in (False, True):
            directory = _lock(path, wait=False, shared=shared)
            if directory is not None:
                directory.release()
                return shared
        return False

    def _used(self) -> int:
        seen: set[int] = set()
        return sum(_bytes(os.path.join(self.root, name), seen) for name in os.listdir(self.root))


def _bytes(path: str, seen: set[int]) -> int:
    """Sizes of a directory's files, but of those seen; 0 for what has just gone."""
    size = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if status.st_ino not in seen:
                    seen.add(status.st_ino)
                    size += status.st_size
    except (FileNotFoundError, NotADirectoryError):
        pass
    return size


def _lock(path: str, *, wait: bool, shared: bool = False) -> Directory | None:
    """The directory locked; None if it is locked already (not `wait`) or is no directory any more."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            return Directory(path, fd)
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None
