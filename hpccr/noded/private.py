"""Private directories of a capsule: saved as tar archives while all tasks are frozen, put back before any runs.

tar runs as root on directories the user owns, and follows no links in them. Everything else that goes by names below
them is done with the user's ids: processes of the user outside the capsule see these mounts through /proc/PID/root of
any task, stopped or not, and can put a link where a directory was.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress

import msgspec

from hpccr.errors import HpccrError, UnsupportedError
from hpccr.model import PrivateTree, SocketName
from hpccr.noded import child, launch, scan
from hpccr.noded.capsule import Capsule

MAX_SOCKETS = 512

_CHANGED = 1
"""tar's exit code where something changed while it was read (info tar, "Synopsis")."""


def check(home: Capsule, limit: int) -> None:
    """Raises UnsupportedError naming a private directory with more than `limit` bytes, or more sockets than can be
    saved."""
    for place in home.places:
        system = os.statvfs(place)
        used = (system.f_blocks - system.f_bfree) * system.f_frsize
        if used > limit:
            raise UnsupportedError(
                f"the private directory {place} holds {used} bytes, and up to {limit} are saved with a checkpoint",
                hint="let the program keep large scratch files on shared storage, or have capsule.private_limit raised",
            )
    _sockets(home)


class Saving:
    """Archives of the places that are not empty, being written by tar processes beside CRIU."""

    def __init__(self, home: Capsule, directory: int) -> None:
        self._capsule = home
        self._directory = directory
        self._running: dict[int, tuple[PrivateTree, asyncio.Future[int], int]] = {}
        self._changed: dict[str, str] = {}
        """Places in which something changed under tar, and what it said."""
        self.trees: tuple[PrivateTree, ...] = ()

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self._running)

    def start(self) -> None:
        """All tasks are stopped."""
        sockets = _sockets(self._capsule)
        self.trees = tuple(
            PrivateTree(path=place, file=f"private-{number}.tar", sockets=sockets[number])
            for number, place in enumerate(self._capsule.places)
            if any(True for _ in os.scandir(place))
        )
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
        self._running[pid] = (tree, self._capsule.reaper.watch(pid), words)

    async def finish(self, remaps: Sequence[str]) -> None:
        """Wait for all archives; call when CRIU has written everything. remaps: the names that it has given files for
        a while. Raises HpccrError naming the place."""
        await self._wait()
        # tar may have passed a directory before CRIU put such a name into it, or have been in it.
        again = [tree for tree in self.trees if any(scan.below(path, [tree.path]) for path in remaps)]
        for tree in again:
            self._changed.pop(tree.path, None)
            self._start(tree)
        await self._wait()
        for place, said in self._changed.items():
            raise HpccrError(
                f"cannot save the private directory {place}: tar: {said}",
                hint="does a process outside the job write there?",
            )

    async def _wait(self) -> None:
        while self._running:
            pid, (tree, exited, words) = next(iter(self._running.items()))
            code = await asyncio.shield(exited)
            del self._running[pid]
            said = _said(words)
            if code == _CHANGED:
                self._changed[tree.path] = said
            elif code:
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
            await asyncio.shield(exited)  # if this is cancelled, the next who comes waits for the same
            os.close(words)
        self._running.clear()


def _tar(
    *options: str, stdin: int | None = None, stdout: int | None = None, cgroups: Sequence[int] = ()
) -> tuple[int, int]:
    """Start tar, in these cgroups (launch.enter_cgroups); its pid and a descriptor of what it will have said on
    stderr."""
    words = os.memfd_create("tar", os.MFD_CLOEXEC)
    argv = ["tar", "--sparse", "--xattrs", "--numeric-owner", *options]
    enter = lambda: launch.enter_cgroups(cgroups)  # noqa: E731
    return child.execute(argv, stdin=stdin, stdout=stdout, stderr=words, before_exec=enter), words


def _said(words: int) -> str:
    """The last line tar wrote; closes the descriptor."""
    with os.fdopen(words, "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace").strip().rpartition("\n")[2]


def _sockets(home: Capsule) -> list[tuple[SocketName, ...]]:
    """Those in each of the places. Raises UnsupportedError for more than a message can carry."""
    found = child.call(lambda: [sockets_in(place) for place in home.places], identity=home.identity)
    sockets = msgspec.convert(found, list[tuple[SocketName, ...]])
    for place, names in zip(home.places, sockets, strict=True):
        if len(names) > MAX_SOCKETS:
            raise UnsupportedError(
                f"there are more than {MAX_SOCKETS} unix sockets in {place}",
                hint="let the program remove the sockets that it does not use any more",
            )
    return sockets


def sockets_in(place: str) -> list[SocketName]:
    """Unix sockets below a directory, MAX_SOCKETS and one at most; what goes meanwhile, as tasks run, is left out."""
    found: list[SocketName] = []
    for directory, _, names in os.walk(os.fsencode(place)):
        for name in names:
            with suppress(OSError):
                status = os.lstat(path := os.path.join(directory, name))
                if stat.S_ISSOCK(status.st_mode) and len(found) <= MAX_SOCKETS:
                    found.append(SocketName(path, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns))
    return found


def _make_sockets(names: Iterable[SocketName]) -> None:
    """Nobody listens at such a name, or CRIU makes it anew: one that the user may not make is no loss."""
    for name in names:
        with suppress(OSError):
            os.mknod(name.path, name.mode)
            os.chown(name.path, name.uid, name.gid)
            os.chmod(name.path, stat.S_IMODE(name.mode))
            os.utime(name.path, ns=(name.mtime, name.mtime))


Times = dict[bytes, int]


def _directory_times(places: Sequence[str]) -> Times:
    return {
        directory: os.lstat(directory).st_mtime_ns
        for place in places
        for directory, _, _ in os.walk(os.fsencode(place))
    }


def set_directory_times(home: Capsule, times: Times) -> None:
    """CRIU makes deleted files anew where they were, and sockets: the directories are as old as they were."""
    # The places themselves are root's, and no link can take their place.
    _set_times({os.fsencode(place): times[os.fsencode(place)] for place in home.places if os.fsencode(place) in times})
    child.call(lambda: _set_times(times), identity=home.identity)


def _set_times(times: Times) -> None:
    for directory, mtime in times.items():
        with suppress(FileNotFoundError, PermissionError):
            status = os.lstat(directory)
            if status.st_mtime_ns != mtime:
                os.utime(directory, ns=(status.st_atime_ns, mtime), follow_symlinks=False)


async def restore(home: Capsule, trees: Sequence[PrivateTree], directory: int) -> Times:
    """Extract every archive into its (fresh, empty) place. Gives the times to be set once CRIU has made its files
    there. Raises HpccrError naming the place."""
    for tree in trees:
        archive = os.open(tree.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            options = ("-x", "-f", "-", "-p", "--same-owner", "--delay-directory-restore", "-C", tree.path)
            # In the job's cgroups: memory of tmpfs is charged to whoever writes it first.
            pid, words = _tar(*options, stdin=archive, cgroups=home.cgroups)
        finally:
            os.close(archive)
        code = await home.reaper.watch(pid)
        said = _said(words)
        if code:
            raise HpccrError(
                f"cannot restore the private directory {tree.path}: tar exited {code}: {said}",
                hint="there may be too little memory for it on this node, or within the job's limit",
            )

    def look() -> Times:
        times = _directory_times([tree.path for tree in trees])
        for tree in trees:
            _make_sockets(tree.sockets)
        return times

    times: Times = child.call(look, identity=home.identity)
    return times
