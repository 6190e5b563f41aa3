"""Saving the job's files: contents and attributes of what a restore has to put back. Runs with the user's ids.

Called in helper processes (child.Helper) of capsule init. Everything goes into two files that they get open: the list
(model.SavedFiles) and the contents. copy_ahead() runs beside the tasks, save() while every task of the job is stopped.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from hpccr.errors import HpccrError, UnsupportedError
from hpccr.model import Extent, Link, ReadFile, SavedFile, SavedFiles
from hpccr.noded import ahead
from hpccr.noded.ahead import write_list
from hpccr.noded.contents import PAGE, SMALL_HOLE, Container

TEMPORARY = ".hpccr-rollback"
"""How the names end that a rollback uses for a moment (rollback.py)."""

CRIU_LINK = re.compile(r"link_remap\.\d+")
"""How CRIU calls the links that it makes beside removed names (criu/files-reg.c)."""

_SQLITE = b"SQLite format 3\0"
_SQLITE_COMPANIONS = ("-journal", "-wal", "-shm")
"""What SQLite keeps beside a database. One that is left from later would be taken for the trace of a crash."""
_ATTRIBUTES = ("user.", "system.posix_acl_access", "system.posix_acl_default")
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR})


@dataclass(frozen=True)
class Wanted:
    """A file that some task can write to, as the task has it. append: every writer uses O_APPEND.

    leased: a task has a lease on it, so that it must not be opened; fd: that task's descriptor, for reading without
    moving its position, or -1 if it cannot be read.
    """

    path: str
    device: int
    inode: int
    append: bool
    leased: bool = False
    fd: int = -1


@dataclass(frozen=True)
class Nameless:
    """A file that some task has by a name that was removed, while the file has others. path: the removed name;
    elsewhere: another capsule saves it."""

    path: str
    device: int
    inode: int
    holder: str
    elsewhere: bool = False


@dataclass(frozen=True)
class Request:
    """What to save. files: open ones; trees, excluded: see model.FileRules; elsewhere: paths that others save;
    remaps: the names that CRIU has given the nameless files for a while; remote: devices (st_dev) of other machines;
    read: what the tasks only read."""

    files: Sequence[Wanted]
    trees: Sequence[str]
    excluded: Sequence[str]
    limit: int
    elsewhere: Sequence[str] = ()
    nameless: Sequence[Nameless] = ()
    remaps: Sequence[str] = ()
    remote: frozenset[int] = frozenset()
    read: Sequence[ReadFile] = ()


def measure(request: Request) -> int:
    """Bytes that save() may write, by the sizes as they are now. Raises what save() would, but for what may be a
    matter of the moment: the tasks run."""
    total = 0
    counted: set[str | tuple[int, int]] = set()

    def room(path: str, status: os.stat_result) -> int:
        # The content of hard links is saved once.
        key = (status.st_dev, status.st_ino) if status.st_nlink > 1 else path
        if key in counted:
            return 0
        counted.add(key)
        return _room(status)

    for nameless in request.nameless:
        _remove_stale_links(nameless, request.remaps)
        path = other_names(nameless)[0]
        status = os.stat(path, follow_symlinks=False)
        _check_size(path, status, request.limit)
        _check_readable(path)
        total += room(path, status)
    for file in request.files:
        try:
            now = os.stat(file.path, follow_symlinks=False)
        except OSError:
            continue
        if (now.st_dev, now.st_ino) != (file.device, file.inode):
            continue
        if file.leased:
            total += _room(now)
            continue
        fd, status = _open_wanted(file)
        if fd >= 0:
            try:
                if _only_cut(file, status, request):
                    _sync(fd, file.path)  # the most of it, so that little is left when everything stands still
                else:
                    total += room(file.path, status)
            finally:
                os.close(fd)
    seen = {file.path for file in request.files}
    for path, status in _trees(request):
        if stat.S_ISREG(status.st_mode) and path not in seen:
            _check_size(path, status, request.limit)
            _check_readable(path)
            total += room(path, status)
    return total


def copy_ahead(request: Request, list_fd: int, data_fd: int, *, first: bool) -> int:
    """While the tasks run: copy what is in the trees and rests; how many files. first: this is the capsule that saves
    what is on other machines, where all capsules have it. Raises as save() does."""
    open_now = {(file.device, file.inode) for file in request.files}

    def wanted(status: os.stat_result) -> bool:
        return (
            stat.S_ISREG(status.st_mode)
            and status.st_size <= request.limit
            and (first or status.st_dev not in request.remote)
            and (status.st_dev, status.st_ino) not in open_now
        )

    paths = (path for path, status in _trees(request) if wanted(status))
    return ahead.copy(paths, request.remote, list_fd, data_fd)


def save(request: Request, list_fd: int, data_fd: int) -> int:
    """Save everything; how many names and links there are. list_fd, data_fd: as copy_ahead() left them, or empty.
    Raises UnsupportedError naming what cannot be saved, OSError."""
    return _Saving(request, list_fd, data_fd).run()


def _remove_stale_links(file: Nameless, wanted: Sequence[str]) -> None:
    """CRIU could not link the file again where a link of its own is left from a dump in which the node died."""
    directory = os.path.dirname(file.path)
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if CRIU_LINK.fullmatch(entry.name) and entry.path not in wanted:
                status = os.stat(entry.path, follow_symlinks=False)
                if (status.st_dev, status.st_ino) == (file.device, file.inode):
                    os.unlink(entry.path)


def other_names(file: Nameless) -> list[str]:
    """What the file is called now in the directory of its removed name, by the order of names. Raises
    UnsupportedError if no restore could find it again: it has to be the user's, in a directory of the user's."""
    directory = os.path.dirname(file.path)
    found = []
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if CRIU_LINK.fullmatch(entry.name):
                continue
            with suppress(OSError):
                status = os.stat(entry.path, follow_symlinks=False)
                if (status.st_dev, status.st_ino, status.st_uid) == (file.device, file.inode, os.geteuid()):
                    found.append(entry.path)
    if not found or not os.access(directory, os.W_OK | os.X_OK):
        raise UnsupportedError(
            f"process {file.holder} has {file.path} open, a name that was removed, and the file lives on under "
            "a name that is not known",
            hint="keep both names in one directory of the user's, or the program's scratch files in /tmp (TMPDIR)",
        )
    return sorted(found)


def refresh(paths: Sequence[str], *, write_out: bool) -> None:
    """Open each file, which makes a network file system look at it anew. write_out: first bring what this node has
    written to the server, where the other nodes see it."""
    for path in paths:
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if write_out:
                    os.fsync(fd)
            finally:
                os.close(fd)


def _open_wanted(file: Wanted) -> tuple[int, os.stat_result]:
    """The file that the tasks have, open for reading; -1 where the user cannot read it and it need only be cut."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM) and file.append:
            return -1, os.stat(file.path, follow_symlinks=False)
        raise UnsupportedError(
            f"the job has {file.path} open for writing and it cannot be saved: {error.strerror}",
            hint=f"let the user read it: chmod u+r {file.path}" if error.errno == errno.EACCES else "",
        ) from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) != (file.device, file.inode):
        os.close(fd)
        raise UnsupportedError(
            f"the job has another file open for writing than the one that is now at {file.path}",
            hint="something is mounted over it, or another process has just replaced it: try again",
        )
    return fd, status


def _only_cut(file: Wanted, status: os.stat_result, request: Request) -> bool:
    """Whether the content is left where it is. What is appended only stays as it was, as far as anybody can tell; but
    the job's output, which others append to as well, is cut back first to where theirs ended."""
    if file.append and status.st_size > request.limit and file.path not in request.excluded:
        return True
    _check_size(file.path, status, request.limit)
    return False


def _sync(fd: int, path: str) -> None:
    """A checkpoint that has only the size of a file counts on its content, also after a loss of power."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise HpccrError(f"{path} cannot be brought to its disk: {error.strerror}") from None


def _check_size(path: str, status: os.stat_result, limit: int) -> None:
    if status.st_blocks * 512 > limit and status.st_size > limit:
        raise UnsupportedError(
            f"{path} has {status.st_size} bytes, and files up to {limit} bytes are saved with a checkpoint",
            hint="raise files.snapshot_limit (HPCCR_FILES_SNAPSHOT_LIMIT), or let the program append (O_APPEND) or "
            "write into more than one file",
        )


def _check_readable(path: str) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        # Of the file itself: the name may be removed, or another file's, at any moment.
        readable = os.access(f"/proc/self/fd/{fd}", os.R_OK)
    finally:
        os.close(fd)
    if not readable:
        raise UnsupportedError(
            f"{path} cannot be saved: the user cannot read it", hint="take it out of the directories of --files"
        )


def _room(status: os.stat_result) -> int:
    # Each page of data may have a small hole after it.
    return min(status.st_size, status.st_blocks * 512 * (1 + SMALL_HOLE // PAGE)) + PAGE


class _Saving:
    def __init__(self, request: Request, list_fd: int, data_fd: int) -> None:
        self._request = request
        self._list = list_fd
        self._container = Container(data_fd)
        self._ahead = ahead.Ahead(list_fd, self._container)
        self._found: dict[str, SavedFile] = {}
        self._inodes: dict[tuple[int, int], str] = {}
        """The first name of each file that has several."""

    def run(self) -> int:
        request = self._request
        for file in request.files:
            self._save_wanted(file)
        for nameless in request.nameless:
            for path in other_names(nameless):
                if nameless.elsewhere:
                    self._inodes.setdefault((nameless.device, nameless.inode), path)
                elif path not in self._found:
                    self._save_wanted(Wanted(path, nameless.device, nameless.inode, append=False))
        links = tuple(self._link(remap) for remap in request.remaps)
        for path, status in _trees(request):
            if path not in self._found:
                self._save_entry(path, status)
        self._ahead.discard()
        saved = SavedFiles(
            files=tuple(self._found.values()),
            trees=tuple(os.fsencode(tree) for tree in request.trees),
            excluded=tuple(os.fsencode(path) for path in request.excluded),
            elsewhere=tuple(os.fsencode(path) for path in request.elsewhere),
            links=links,
            read=tuple(request.read),
        )
        write_list(self._list, msgspec.msgpack.encode(saved))
        return len(saved.files) + len(saved.links)

    def _link(self, remap: str) -> Link:
        status = os.stat(remap, follow_symlinks=False)
        other = self._inodes.get((status.st_dev, status.st_ino))
        if other is None:
            raise HpccrError(f"CRIU has linked {remap}, a file that the job was not seen to have open")
        return Link(os.fsencode(remap), os.fsencode(other))

    def _save_wanted(self, file: Wanted) -> None:
        if file.leased:
            status = os.stat(file.path, follow_symlinks=False)
            whole = None
            if file.fd >= 0:
                whole = self._container.add(file.fd, status.st_size, file.path, holes=False)
            self._found[file.path] = _entry(file.path, status, extents=whole)
            return
        fd, status = _open_wanted(file)
        if fd < 0:
            self._found[file.path] = _entry(file.path, status, extents=None)
            return
        try:
            if _only_cut(file, status, self._request):
                _sync(fd, file.path)
                self._found[file.path] = _entry(file.path, status, extents=None, fd=fd)
                self._remember(file.path, status)
                return
            self._save_content(file.path, fd, status)
            if os.pread(fd, len(_SQLITE), 0) == _SQLITE:
                # It writes no more to a database whose name leads to another inode (SQLITE_READONLY_DBMOVED).
                self._found[file.path] = msgspec.structs.replace(self._found[file.path], keep=True)
                for suffix in _SQLITE_COMPANIONS:
                    self._save_companion(file.path + suffix)
        finally:
            os.close(fd)

    def _save_companion(self, path: str) -> None:
        if path in self._found:
            return
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            self._found[path] = SavedFile(os.fsencode(path), 0)
            return
        if stat.S_ISREG(status.st_mode):
            self._save_entry(path, status)

    def _save_content(
        self, path: str, fd: int, status: os.stat_result, extents: tuple[Extent, ...] | None = None
    ) -> None:
        same = self._inodes.get((status.st_dev, status.st_ino))
        if same is not None:
            self._found[path] = _entry(path, status, fd=fd, same=os.fsencode(same))
            return
        if extents is None:
            extents = self._container.add(fd, status.st_size, path)
        self._found[path] = _entry(path, status, extents=extents, fd=fd)
        self._remember(path, status)

    def _remember(self, path: str, status: os.stat_result) -> None:
        if status.st_nlink > 1:
            self._inodes.setdefault((status.st_dev, status.st_ino), path)

    def _save_entry(self, path: str, status: os.stat_result) -> None:
        """A name in a tree. Devices and sockets are left out: the first a user cannot make, the second are CRIU's."""
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            _check_size(path, status, self._request.limit)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise UnsupportedError(
                    f"{path} cannot be saved: {error.strerror}", hint="take it out of the directories of --files"
                ) from None
            try:
                # Opened first: on a network file system that makes what is known of the file new.
                now = os.fstat(fd)
                self._save_content(path, fd, now, self._ahead.take(path, now))
            finally:
                os.close(fd)
        elif kind == stat.S_IFLNK:
            self._found[path] = _entry(path, status, target=os.fsencode(os.readlink(path)))
        elif kind in (stat.S_IFDIR, stat.S_IFIFO):
            self._found[path] = _entry(path, status)


def _entry(
    path: str,
    status: os.stat_result,
    *,
    extents: tuple[Extent, ...] | None = (),
    fd: int = -1,
    target: bytes = b"",
    same: bytes = b"",
) -> SavedFile:
    kind = stat.S_IFMT(status.st_mode)
    return SavedFile(
        path=os.fsencode(path),
        mode=status.st_mode,
        size=status.st_size if kind == stat.S_IFREG else 0,
        uid=status.st_uid,
        gid=status.st_gid,
        mtime=status.st_mtime_ns,
        extents=extents,
        target=target,
        same=same,
        xattrs=attributes(fd if fd >= 0 else path) if kind in (stat.S_IFREG, stat.S_IFDIR) else {},
    )


def attributes(where: int | str) -> dict[str, bytes]:
    """The extended attributes of a file or directory that are saved with it."""
    found = {}
    try:
        for name in os.listxattr(where):
            if name.startswith(_ATTRIBUTES):
                found[name] = os.getxattr(where, name)
    except OSError:
        return {}  # a file system without them
    return found


def _trees(request: Request) -> Iterator[tuple[str, os.stat_result]]:
    """Everything in the trees, directories before what is in them; nothing excluded, no other file systems."""
    excluded = {*request.excluded, *request.remaps}

    def fail(error: OSError) -> None:
        if error.errno not in _NOT_THERE:
            raise UnsupportedError(
                f"{error.filename} cannot be saved: {error.strerror}", hint="take it out of the directories of --files"
            ) from None

    def left_out(path: str) -> bool:
        return path in excluded or path.endswith(TEMPORARY)

    for tree in request.trees:
        yield from walk(tree, left_out, fail)


def walk(
    top: str, excluded: Callable[[str], bool], fail: Callable[[OSError], None]
) -> Iterator[tuple[str, os.stat_result]]:
    """Every name in `top`, it included, with its status; what is excluded, or mounted there, is passed over."""
    try:
        status = os.stat(top, follow_symlinks=False)
    except OSError as error:
        fail(error)
        return
    yield top, status
    if not stat.S_ISDIR(status.st_mode):
        return
    waiting = [top]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            fail(error)
            continue
        for name in names:
            path = os.path.join(directory, name)
            if excluded(path):
                continue
            try:
                found = os.stat(path, follow_symlinks=False)
            except OSError as error:
                fail(error)
                continue
            if found.st_dev != status.st_dev:
                continue
            yield path, found
            if stat.S_ISDIR(found.st_mode):
                waiting.append(path)
