"""hpccrd's directories: one per capsule in the runtime directory, one per checkpoint in the spool.

Every directory in use is locked (flock on the directory itself), by hpccrd or by the transfer it was handed to. What
is not locked has no owner any more: that is how leftovers are known, also when several hpccrds share a node.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat

from hpccr.errors import UsageError

RUNTIME = "capsules"
"""The runtime area's place in node.run."""


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
            shutil.rmtree(self.path, ignore_errors=True)
            self.release()

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
        for name in sorted(os.listdir(self.root)):
            directory = _lock(os.path.join(self.root, name), wait=False)
            if directory is not None:
                found.append(directory)
        return found


class Spool(Area):
    """Where images are on their way between a capsule and the store."""

    def __init__(self, root: str, reserve: int) -> None:
        super().__init__(root)
        self._reserve = reserve

    def room(self) -> int:
        """Bytes that may be written here without touching the reserve; never negative."""
        status = os.statvfs(self.root)
        return max(0, status.f_bavail * status.f_frsize - self._reserve)


def _lock(path: str, *, wait: bool) -> Directory | None:
    """The directory locked; None if it is locked already (not `wait`) or is no directory any more."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            return Directory(path, fd)
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None
