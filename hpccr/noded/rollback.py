"""Putting the job's files back as they were at a checkpoint. Runs with the user's ids, before any task is restored.

Two stages. First everything that differs is written beside its place under a temporary name, and nothing else is
touched: if that fails the files are as they were found. Then names are exchanged. A crash in between leaves each file
in its old or in its new state, and the next rollback finishes the work. Only what cannot be replaced is written in
place: a file with several names, of another owner, in a directory where the user cannot make files, or one that
programs know by its inode (SQLite), or that this run has open already (its output). There, too, the next rollback
finishes the work.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec

from hpccr.errors import CorruptError, HpccrError
from hpccr.model import ReadFile, SavedFile, SavedFiles
from hpccr.noded.contents import CHUNK, data_ranges
from hpccr.noded.scan import below
from hpccr.noded.snapshot import TEMPORARY, attributes, walk

_MAX_NAME = 255
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def roll_back(list_fd: int, data_fd: int, capsule: int, excluded: Iterable[str] = ()) -> int:
    """Put everything back; how many names were not as they were. Two capsules may put the same file back at the same
    time. excluded: what this run and its script write, which may be elsewhere than at the checkpoint. Raises HpccrError
    naming the file."""
    return _Rollback(_read(list_fd), data_fd, capsule, frozenset(excluded)).run()


def link(list_fd: int) -> None:
    """When all capsules' files are back: see that what the job only reads is there, and make the names by which CRIU
    finds files whose own names had been removed, which it removes again. Not earlier: to be replaced since would give
    such a file's tasks another file. Raises HpccrError naming the file."""
    saved = _read(list_fd)
    _check_read(saved.read)
    for wanted in saved.links:
        path, other = os.fsdecode(wanted.path), os.fsdecode(wanted.other)
        try:
            # A restore that failed may have left it.
            with suppress(FileNotFoundError):
                os.unlink(path)
            os.link(other, path, follow_symlinks=False)
        except OSError as error:
            raise _failure(path, error) from None


def _check_read(files: Iterable[ReadFile]) -> None:
    """The same file may have become another one, as it might have under the running job. A program that goes on in
    the middle of another file, though, reads what nobody has written."""
    for file in files:
        path = os.fsdecode(file.path)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise HpccrError(
                f"the job was reading {path} at the checkpoint, and it is not there any more",
                hint="put the file back as it was then",
            ) from None
        except OSError:
            continue  # it is checked again when its tasks have it, by name
        if status.st_ino != file.inode and status.st_size != file.size:
            raise HpccrError(
                f"the job was reading {path} at the checkpoint, and there is another file now: it had {file.size} "
                f"bytes and has {status.st_size}",
                hint="put the file back as it was then; what a waiting job reads should not be replaced",
            )


def unlink(list_fd: int) -> None:
    """Remove those names, where CRIU has not: a restore was given up."""
    for wanted in _read(list_fd).links:
        with suppress(OSError):
            if os.path.samestat(os.lstat(wanted.path), os.lstat(wanted.other)):
                os.unlink(wanted.path)


def _read(list_fd: int) -> SavedFiles:
    data = os.pread(list_fd, os.fstat(list_fd).st_size, 0)
    try:
        return msgspec.msgpack.decode(data, type=SavedFiles)
    except msgspec.MsgspecError as error:
        raise CorruptError(f"the list of the job's files cannot be read: {error}") from None


class _Rollback:
    def __init__(self, saved: SavedFiles, data_fd: int, capsule: int, now: frozenset[str]) -> None:
        """now: what is excluded now; saved.excluded: what was at the checkpoint."""
        self._saved = saved
        self._now = now
        self._excluded = {os.fsdecode(path) for path in saved.excluded} | now
        trees = [os.fsdecode(tree) for tree in saved.trees]
        self._spared = [path for path in now - {os.fsdecode(path) for path in saved.excluded} if below(path, trees)]
        """Of the trees then, and not any more: what is there stays. In a tree of the checkpoint's `excluded` only those
        files are saved that a task had open."""
        self._holding = {parent for path in now for parent in _parents(path)}
        self._data = data_fd
        self._suffix = f".{capsule}{TEMPORARY}"
        self._temporary: list[str] = []
        self._then: list[Callable[[], None]] = []
        """The second stage, in order."""
        self._replaced: list[str] = []
        """Where files have gone that stood in the place of a directory."""
        self._undo: list[Callable[[], None]] = []
        """Takes back what had to be done to names in the first stage, the last first."""
        self._directories: set[str] = set()
        """Where names change: synced at the end."""
        self._changed = 0
        self._shared = _inodes_of_several(saved)
        """Files that have become one since: each of them gets one of its own again."""

    def run(self) -> int:
        files = [file for file in self._saved.files if not below(os.fsdecode(file.path), self._spared)]
        directories = [file for file in files if stat.S_ISDIR(file.mode)]
        try:
            for file in directories:
                self._make_directory(file)
            for file in files:
                with _named(file):
                    self._plan(file)
        except BaseException:
            _unlink(self._temporary)
            for undo in reversed(self._undo):
                with suppress(OSError):
                    undo()
            raise
        try:
            for action in self._then:
                action()
            self._remove_later_names()
            for file in reversed(directories):
                self._set_attributes(file)
        except OSError as error:
            raise _failure(error.filename, error) from None
        finally:
            _unlink([*self._temporary, *self._replaced])
        for path in self._directories:
            with suppress(OSError):
                _sync(path)
        return self._changed

    def _make_directory(self, file: SavedFile) -> None:
        path = os.fsdecode(file.path)
        with _named(file):
            status = _status(path)
            if status is not None and not stat.S_ISDIR(status.st_mode):
                temporary = self._beside(path)
                self._temporary.remove(temporary)
                self._replaced.append(temporary)
                os.rename(path, temporary)
                self._undo.append(lambda: os.rename(temporary, path))
                status = None
            if status is None:
                os.makedirs(path, 0o700, exist_ok=True)
                self._undo.append(lambda: os.rmdir(path))
                self._changed += 1
            elif status.st_uid == os.geteuid() and status.st_mode & 0o700 != 0o700:
                mode = stat.S_IMODE(status.st_mode)
                os.chmod(path, 0o700)  # its own mode comes back at the end
                self._undo.append(lambda: os.chmod(path, mode))

    def _plan(self, file: SavedFile) -> None:
        path = os.fsdecode(file.path)
        kind = stat.S_IFMT(file.mode)
        if kind == stat.S_IFDIR:
            return
        status = _status(path)
        if status is not None and stat.S_ISDIR(status.st_mode) and path in self._holding:
            raise HpccrError(
                f"cannot put {path} back as it was at the checkpoint: this run's output or store is in it",
                hint="let them be somewhere else",
            )
        if kind == 0:
            if status is not None:
                self._do(path, lambda: _remove(path))
        elif kind == stat.S_IFREG and file.same:
            self._plan_link(path, os.fsdecode(file.same))
        elif kind == stat.S_IFREG:
            self._plan_file(file, path, status)
        elif kind == stat.S_IFLNK:
            if status is None or not stat.S_ISLNK(status.st_mode) or os.readlink(file.path) != file.target:
                temporary = self._beside(path)
                os.symlink(file.target, temporary)
                self._do(path, lambda: _exchange(temporary, path))
        elif kind == stat.S_IFIFO and (status is None or stat.S_IFMT(status.st_mode) != kind):
            temporary = self._beside(path)
            os.mkfifo(temporary, stat.S_IMODE(file.mode))
            self._do(path, lambda: _exchange(temporary, path))

    def _do(self, path: str, action: Callable[[], None]) -> None:
        self._changed += 1
        self._directories.add(os.path.dirname(path))
        self._then.append(action)

    def _plan_link(self, path: str, other: str) -> None:
        def link() -> None:
            status, target = _status(path), _status(other)
            if status is not None and target is not None and os.path.samestat(status, target):
                return
            temporary = self._beside(path)
            os.link(other, temporary)
            _exchange(temporary, path)

        self._then.append(link)

    def _plan_file(self, file: SavedFile, path: str, status: os.stat_result | None) -> None:
        if file.extents is None:
            self._plan_cut(file, path, status)
            return
        there = status is not None and stat.S_ISREG(status.st_mode)
        shared = status is not None and (status.st_dev, status.st_ino) in self._shared
        if status is not None and there and not shared and status.st_size >= file.size:
            fd = _open_to_compare(path)
            if fd >= 0:
                try:
                    equal = self._equal(fd, file)
                finally:
                    os.close(fd)
                if equal:
                    if status.st_size > file.size:
                        _check_writable(path, status)
                        self._do(path, lambda: _cut(path, file.size))
                    self._then.append(lambda: self._set_attributes(file))
                    return
        in_place = status is not None and there and not shared and not self._replaceable(status, file)
        temporary = "" if in_place else self._write_beside(file, path)
        if temporary:
            self._do(path, lambda: _exchange(temporary, path))
        elif status is not None and there and not shared:
            _check_writable(path, status)
            self._do(path, lambda: self._write_in_place(file, path))
        else:
            raise HpccrError(
                f"cannot make {path} again: the user may not make files in its directory",
                hint="restore the directory's permissions as they were at the checkpoint",
            )

    def _plan_cut(self, file: SavedFile, path: str, status: os.stat_result | None) -> None:
        """Content that was not saved: what was appended since is cut off, bytes that are missing cannot be made up."""
        if status is None or not stat.S_ISREG(status.st_mode):
            raise HpccrError(
                f"the job had {path} open for appending and it is not there; its content was not saved",
                hint="it was larger than files.snapshot_limit, or the user could not read it",
            )
        if status.st_size < file.size:
            raise HpccrError(
                f"{path} has {status.st_size} bytes and had {file.size} at the checkpoint; its content was not saved",
                hint="put the file back as it was; it was larger than files.snapshot_limit, or not to be read",
            )
        if status.st_size > file.size:
            _check_writable(path, status)
            self._do(path, lambda: _cut(path, file.size))
        self._then.append(lambda: self._set_attributes(file))

    def _replaceable(self, status: os.stat_result, file: SavedFile) -> bool:
        # An output file is listed if the job itself had it open; hpccr, or the script, goes on writing to it.
        keep = file.keep or os.fsdecode(file.path) in self._now
        return not keep and status.st_nlink == 1 and status.st_uid == os.geteuid() == file.uid

    def _beside(self, path: str) -> str:
        """A temporary name in the same directory, free to use; the same after a crash, so that nothing piles up."""
        directory, name = os.path.split(path)
        number = 0
        while True:
            suffix = (f".{number}" if number else "") + self._suffix
            stem = os.fsencode(name)[: _MAX_NAME - len(suffix) - 1]
            temporary = os.path.join(directory, "." + os.fsdecode(stem) + suffix)
            if temporary not in (*self._temporary, *self._replaced):
                break
            number += 1  # two long names that begin alike
        _remove(temporary)
        self._temporary.append(temporary)
        return temporary

    def _write_beside(self, file: SavedFile, path: str) -> str:
        """The saved file under a temporary name; "" where the user cannot make it there as it was."""
        directory = os.path.dirname(path)
        if _status(directory) is None:
            os.makedirs(directory)
        elif not os.access(directory, os.W_OK | os.X_OK):
            return ""
        temporary = self._beside(path)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_gid != file.gid:
                try:
                    os.chown(fd, -1, file.gid)
                except PermissionError:
                    return ""  # left for the cleaning up: in place the group stays
            os.ftruncate(fd, file.size)
            self._write_extents(fd, file)
            _set_xattrs(fd, file)  # while its owner may write to it: user.* takes that
            os.fchmod(fd, stat.S_IMODE(file.mode))
            os.utime(fd, ns=(file.mtime, file.mtime))
            os.fsync(fd)
        finally:
            os.close(fd)
        return temporary

    def _write_extents(self, fd: int, file: SavedFile) -> None:
        for extent in file.extents or ():
            done = 0
            while done < extent.length:
                data = self._saved_bytes(extent.place + done, min(CHUNK, extent.length - done))
                done += os.pwrite(fd, data, extent.start + done)

    def _write_in_place(self, file: SavedFile, path: str) -> None:
        fd = _open_to_write(path)
        try:
            end = 0
            for extent in file.extents or ():
                _zero(fd, end, extent.start)
                end = extent.start + extent.length
            _zero(fd, end, file.size)
            self._write_extents(fd, file)
            os.ftruncate(fd, file.size)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._set_attributes(file)

    def _saved_bytes(self, place: int, count: int) -> bytes:
        data = os.pread(self._data, count, place)
        if len(data) < count:
            raise CorruptError("the checkpoint's copy of the job's files is too short")
        return data

    def _equal(self, fd: int, file: SavedFile) -> bool:
        """Whether the first file.size bytes are what was saved."""
        end = 0
        for extent in file.extents or ():
            if not _zeros(fd, end, extent.start):
                return False
            for offset in range(0, extent.length, CHUNK):
                count = min(CHUNK, extent.length - offset)
                if os.pread(fd, count, extent.start + offset) != self._saved_bytes(extent.place + offset, count):
                    return False
            end = extent.start + extent.length
        return _zeros(fd, end, file.size)

    def _set_attributes(self, file: SavedFile) -> None:
        """Mode, times and extended attributes of something that is there. Only its owner can, and for others they have
        not changed."""
        path = os.fsdecode(file.path)
        if attributes(path) != file.xattrs:
            with suppress(PermissionError):
                os.chmod(path, stat.S_IMODE(file.mode) | stat.S_IWUSR)  # which user.* takes
            _set_xattrs(path, file)
        status = os.stat(path, follow_symlinks=False)
        if status.st_mode != file.mode:
            os.chmod(path, stat.S_IMODE(file.mode))
        if status.st_mtime_ns != file.mtime:
            with suppress(PermissionError):
                os.utime(path, ns=(status.st_atime_ns, file.mtime), follow_symlinks=False)

    def _remove_later_names(self) -> None:
        """In the trees: what has been made since."""
        known = {os.fsdecode(file.path) for file in self._saved.files if file.mode}
        # What holds something that is excluded stays too.
        kept = known | {parent for path in self._excluded for parent in _parents(path)}
        for tree in self._saved.trees:
            found = walk(os.fsdecode(tree), self._excluded.__contains__, _raise)
            for path, status in reversed([*found]):
                # The temporary files of another capsule's rollback are still wanted.
                foreign = path.endswith(TEMPORARY) and not path.endswith(self._suffix)
                if path in kept or foreign or stat.S_ISSOCK(status.st_mode) or below(path, self._spared):
                    continue
                _remove(path)
                self._changed += 1
                self._directories.add(os.path.dirname(path))


class _named:
    """Gives an OSError in its block the name of the file and becomes an HpccrError."""

    def __init__(self, file: SavedFile) -> None:
        self._path = os.fsdecode(file.path)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise _failure(self._path, error) from None


def _failure(path: str, error: OSError) -> HpccrError:
    return HpccrError(f"cannot put {path} back as it was at the checkpoint: {error.strerror}", hint=_hint(error))


def _hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room: a file that is put back is written anew beside the old one"
    return "what the job writes must be on storage that this node has too, with the permissions it had"


def _raise(error: OSError) -> None:
    if error.errno != errno.ENOENT:
        raise error


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remove(path: str) -> None:
    """Whatever is there."""
    status = _status(path)
    if status is None:
        return
    with suppress(FileNotFoundError):  # another capsule was faster
        if stat.S_ISDIR(status.st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def _unlink(paths: Iterable[str]) -> None:
    """As far as they are there."""
    for path in paths:
        with suppress(OSError):
            os.unlink(path)


def _exchange(temporary: str, path: str) -> None:
    status = _status(path)
    if status is not None and stat.S_ISDIR(status.st_mode):
        shutil.rmtree(path)
    os.rename(temporary, path)


def _open_to_compare(path: str) -> int:
    try:
        return os.open(path, _READ)
    except PermissionError:
        return -1  # its mode has changed: it is written anew


def _check_writable(path: str, status: os.stat_result) -> None:
    """Raises OSError if a file that has to be written in place cannot be."""
    if status.st_uid != os.geteuid():
        os.close(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC))


def _open_to_write(path: str) -> int:
    """Its owner can, whatever its mode, which changes: _set_attributes comes after."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except PermissionError:
        os.chmod(path, 0o600)
        return os.open(path, flags)


def _cut(path: str, size: int) -> None:
    fd = _open_to_write(path)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _inodes_of_several(saved: SavedFiles) -> set[tuple[int, int]]:
    """Device and inode of every file whose names were those of different files at the checkpoint."""
    seen: set[tuple[int, int]] = set()
    several: set[tuple[int, int]] = set()
    for file in saved.files:
        if stat.S_ISREG(file.mode) and not file.same:
            status = _status(os.fsdecode(file.path))
            if status is not None:
                inode = (status.st_dev, status.st_ino)
                (several if inode in seen else seen).add(inode)
    return several


def _set_xattrs(where: int | str, file: SavedFile) -> None:
    """As far as the file system knows them and the user may: those that were there, and no others."""
    now = attributes(where)
    for name in now.keys() | file.xattrs.keys():
        value = file.xattrs.get(name)
        try:
            if value is None:
                os.removexattr(where, name)
            elif now.get(name) != value:
                os.setxattr(where, name, value)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.ENODATA):
                raise


def _zeros(fd: int, begin: int, end: int) -> bool:
    for start, stop in data_ranges(fd, end, begin):
        for offset in range(start, stop, CHUNK):
            data = os.pread(fd, min(CHUNK, stop - offset), offset)
            if data.count(0) != len(data):
                return False
    return True


def _zero(fd: int, begin: int, end: int) -> None:
    """Write zeros where a file has something else."""
    for start, stop in [*data_ranges(fd, end, begin)]:
        for offset in range(start, stop, CHUNK):
            os.pwrite(fd, bytes(min(CHUNK, stop - offset)), offset)


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _parents(path: str) -> list[str]:
    found = []
    while (parent := os.path.dirname(path)) != path:
        found.append(parent)
        path = parent
    return found
