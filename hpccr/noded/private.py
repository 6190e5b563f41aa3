"""Private directories of a capsule: saved as tar archives while all tasks are frozen, put back before any runs.

tar runs as root on directories the user owns. That is safe only here: when saving, every task that could swap something
below them is stopped and nobody outside sees these mounts; when restoring, they are fresh and no task exists yet.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import Sequence

from hpccr.errors import HpccrError, UnsupportedError
from hpccr.model import PrivateTree, SocketName
from hpccr.noded import child
from hpccr.noded.reaper import Reaper

_REMAP_PREFIX = "link_remap."
"""Names CRIU gives deleted files that still have other links, beside where they were (criu/files-reg.c)."""


MAX_SOCKETS = 512


def check_sizes(places: Sequence[str], limit: int) -> None:
    """Raises UnsupportedError naming a place that holds more than `limit` bytes."""
    for place in places:
        system = os.statvfs(place)
        used = (system.f_blocks - system.f_bfree) * system.f_frsize
        if used > limit:
            raise UnsupportedError(
                f"the private directory {place} holds {used} bytes, and up to {limit} are saved with a checkpoint",
                hint="let the program keep large scratch files on shared storage, or have capsule.private_limit raised",
            )


class Saving:
    """Archives of the places that are not empty, being written by tar processes beside CRIU."""

    def __init__(self, reaper: Reaper, places: Sequence[str], directory: int) -> None:
        self._reaper = reaper
        self._directory = directory
        self._running: dict[int, tuple[PrivateTree, asyncio.Future[int], int]] = {}
        self.trees = tuple(
            PrivateTree(path=place, file=f"private-{number}.tar", sockets=_sockets(place))
            for number, place in enumerate(places)
            if any(True for _ in os.scandir(place))
        )

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self._running)

    def start(self) -> None:
        for tree in self.trees:
            self._start(tree)

    def _start(self, tree: PrivateTree) -> None:
        archive = os.open(
            tree.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self._directory
        )
        try:
            pid, words = _tar("-c", "-f", "-", "-C", tree.path, ".", stdout=archive)
        finally:
            os.close(archive)
        self._running[pid] = (tree, self._reaper.watch(pid), words)

    async def finish(self) -> None:
        """Wait for all archives; call when CRIU has written everything. Raises HpccrError naming the place."""
        await self._wait()
        # tar may have passed a directory before CRIU put such a name into it.
        for tree in self.trees:
            if _has_remaps(tree.path):
                self._start(tree)
        await self._wait()

    async def _wait(self) -> None:
        while self._running:
            pid, (tree, exited, words) = next(iter(self._running.items()))
            code = await asyncio.shield(exited)
            del self._running[pid]
            said = _said(words)
            if code:
                await self.cancel()
                raise HpccrError(
                    f"cannot save the private directory {tree.path}: tar exited {code}: {said}",
                    hint="the spool may be full (node.spool), or tar is missing on this node",
                )

    async def cancel(self) -> None:
        """Kill what still runs; nothing is left running when this returns."""
        for pid, (_, exited, words) in self._running.items():
            if not exited.done():  # one that has ended is reaped already, and its pid free for others
                os.kill(pid, signal.SIGKILL)
            await exited
            os.close(words)
        self._running.clear()


def _tar(*options: str, stdin: int | None = None, stdout: int | None = None) -> tuple[int, int]:
    """Start tar; its pid and a descriptor of what it will have said on stderr."""
    words = os.memfd_create("tar", os.MFD_CLOEXEC)
    argv = ["tar", "--sparse", "--xattrs", "--numeric-owner", *options]
    return child.execute(argv, stdin=stdin, stdout=stdout, stderr=words), words


def _said(words: int) -> str:
    """The last line tar wrote; closes the descriptor."""
    with os.fdopen(words, "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace").strip().rpartition("\n")[2]


def _has_remaps(place: str) -> bool:
    return any(name.startswith(_REMAP_PREFIX) for _, _, files in os.walk(place) for name in files)


def _sockets(place: str) -> tuple[SocketName, ...]:
    """Raises UnsupportedError for more than a message can carry."""
    found = []
    for directory, _, names in os.walk(os.fsencode(place)):
        for name in names:
            status = os.lstat(path := os.path.join(directory, name))
            if stat.S_ISSOCK(status.st_mode):
                found.append(SocketName(path, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns))
    if len(found) > MAX_SOCKETS:
        raise UnsupportedError(
            f"there are {len(found)} unix sockets in {place}, more than {MAX_SOCKETS}",
            hint="let the program remove the sockets that it does not use any more",
        )
    return tuple(found)


def _make_socket(name: SocketName) -> None:
    os.mknod(name.path, name.mode)
    os.chown(name.path, name.uid, name.gid)
    os.chmod(name.path, stat.S_IMODE(name.mode))
    os.utime(name.path, ns=(name.mtime, name.mtime))


Times = dict[bytes, int]


def directory_times(trees: Sequence[PrivateTree]) -> Times:
    """Modification times of all directories in the places, nanoseconds."""
    return {
        directory: os.lstat(directory).st_mtime_ns
        for tree in trees
        for directory, _, _ in os.walk(os.fsencode(tree.path))
    }


def set_directory_times(times: Times) -> None:
    """CRIU makes deleted files anew where they were, and sockets: the directories are as old as they were."""
    for directory, mtime in times.items():
        status = os.lstat(directory)
        if status.st_mtime_ns != mtime:
            os.utime(directory, ns=(status.st_atime_ns, mtime), follow_symlinks=False)


async def restore(reaper: Reaper, trees: Sequence[PrivateTree], directory: int) -> Times:
    """Extract every archive into its (fresh, empty) place. Gives the times to be set once CRIU has made its files
    there. Raises HpccrError naming the place."""
    times: Times = {}
    for tree in trees:
        archive = os.open(tree.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            options = ("-x", "-f", "-", "-p", "--same-owner", "--delay-directory-restore", "-C", tree.path)
            pid, words = _tar(*options, stdin=archive)
        finally:
            os.close(archive)
        code = await reaper.watch(pid)
        said = _said(words)
        if code:
            raise HpccrError(
                f"cannot restore the private directory {tree.path}: tar exited {code}: {said}",
                hint="there may be too little memory for it on this node",
            )
        times |= directory_times([tree])
        for name in tree.sockets:
            _make_socket(name)
    return times
