"""The paths in CRIU's images, gone over with the user's ids before CRIU goes them as root.

CRIU opens, links, removes and binds by these paths, and what they lead to is the user's to change. All but the names of
unix sockets are the kernel's own words and so without symbolic links; while CRIU restores, none is followed anywhere
(mounts.links). What is left to see to here: that the user may still have what is named, also what no task's
descriptors show afterwards (descriptors in a socket's queue, O_PATH, fifos); and the names of sockets, which are the
user's words.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hpccr.errors import CorruptError
from hpccr.noded import imagefile, syscalls

_FILES, _REMAPS = "files.img", "remap-fpath.img"
_GHOST, _PROCFS = 1, 2
"""remap_type (images/remap-file-path.proto)."""
_EXTERNAL = 1
"""A socket that CRIU does not bind: USK_EXTERN of uflags (criu/include/sockets.h)."""
_MAX_NAME = 107
"""Bytes of a socket's name (unix(7))."""
_OF_A_PROCESS = re.compile(rb"/proc/[0-9]+(/|$)")


@dataclass(frozen=True)
class File:
    """A file, fifo, device or directory that some task has, or that lies in a queue.

    kind: as stat.S_IFMT gives it; 0 if it is not recorded. removed: its name was removed, and CRIU makes it again
    beside the old place for a moment.
    """

    path: bytes
    flags: int
    kind: int
    removed: bool


@dataclass(frozen=True)
class Recorded:
    """All of an image directory's. sockets: the names of unix sockets."""

    files: tuple[File, ...]
    sockets: tuple[bytes, ...]

    @property
    def of_processes(self) -> frozenset[bytes]:
        """Files below /proc that belong to a process: they can only be looked at when that is there again."""
        return frozenset(file.path for file in self.files if _OF_A_PROCESS.match(file.path))


def read(images: ModuleType, directory: int, uid: int) -> Recorded:
    """What the images in `directory` name. Raises CorruptError for what is no image, or a removed set-id program."""
    removed: dict[int, int] = {}
    for entry in imagefile.read(directory, _REMAPS, images.pb.remap_file_path_entry):
        removed[entry.orig_id] = entry.remap_type
        if entry.remap_type == _GHOST:
            ghost = imagefile.first(directory, f"ghost-file-{entry.remap_id:x}.img", images.pb.ghost_file_entry)
            if ghost.mode & (stat.S_ISUID | stat.S_ISGID) and ghost.uid != uid and stat.S_ISREG(ghost.mode):
                raise CorruptError("the job has a set-id program open that has since been removed")
    files: list[File] = []
    sockets: list[bytes] = []
    for entry in imagefile.read(directory, _FILES, images.pb.file_entry):
        if entry.HasField("reg") and not entry.reg.ext and removed.get(entry.reg.id) != _PROCFS:
            reg = entry.reg
            # CRIU's own link to a file whose name was removed comes without a mode.
            kind = stat.S_IFMT(reg.mode) if reg.HasField("mode") else 0
            files.append(File(b"/" + os.fsencode(reg.name).lstrip(b"/"), reg.flags, kind, reg.id in removed))
        elif entry.HasField("usk") and (path := _socket_path(entry.usk)):
            sockets.append(path)
    return Recorded(tuple(dict.fromkeys(files)), tuple(dict.fromkeys(sockets)))


def _socket_path(entry: Any) -> bytes:
    """Empty where CRIU goes no path: abstract and unnamed sockets, and those with a peer outside."""
    name = entry.name.rstrip(b"\0")
    if not name or entry.name.startswith(b"\0") or entry.uflags & _EXTERNAL:
        return b""
    return os.path.join(os.fsencode(entry.name_dir) or b"/", name)


# --- with the user's ids ------------------------------------------------------------------------------------------


def real_places(sockets: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    """Of the directories in which sockets have names those that are reached by a symbolic link, and where they are
    really: as a home directory may be. With the user's ids."""
    found = []
    for place in sorted({os.path.dirname(path) for path in sockets}):
        real = os.path.realpath(place)
        if real != os.path.normpath(place):
            found.append((place, real))
    return found


def check(recorded: Recorded) -> None:
    """Raises CorruptError naming the first path that this user may not have, or that leads by a symbolic link.

    What is not there passes: CRIU says so better. With the user's ids.
    """
    for file in recorded.files:
        if _OF_A_PROCESS.match(file.path):
            continue
        try:
            if file.removed:
                os.close(_nearest(file.path))
            else:
                _check_file(file)
        except OSError as error:
            raise _refusal("has {} open", file.path, error) from None
    for path in recorded.sockets:
        try:
            _check_socket(path)
        except OSError as error:
            raise _refusal("has a socket named {}", path, error) from None


def _refusal(has: str, path: bytes, error: OSError) -> CorruptError:
    what = has.format(path.decode(errors="replace"))
    if error.errno == errno.ELOOP:
        return CorruptError(
            f"the job {what}, and that path leads by a symbolic link now",
            hint="a restore follows none: put back what the link stands for",
        )
    return CorruptError(
        f"the job {what}, which the user cannot open: {error.strerror}",
        hint="the permissions of that file or of a directory above it have changed since the checkpoint",
    )


def _check_file(file: File) -> None:
    try:
        fd = _look(file.path, os.O_NOFOLLOW if file.kind == stat.S_IFLNK else 0)
    except FileNotFoundError:
        return
    try:
        found = os.fstat(fd)
        if file.kind and stat.S_IFMT(found.st_mode) != file.kind:
            raise CorruptError(f"{file.path.decode(errors='replace')} is another kind of file than at the checkpoint")
        # The flags of directories, programs and mappings are not recorded: those are compared after the restore.
        if file.flags and not file.flags & os.O_PATH:
            _access(fd, {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK}.get(file.flags & os.O_ACCMODE, os.R_OK | os.W_OK))
    finally:
        os.close(fd)


def _check_socket(path: bytes) -> None:
    place = _nearest(path)
    try:
        _access(place, os.W_OK | os.X_OK)
        above = os.fstat(place)
        try:
            there = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return
        # CRIU removes what is there.
        sticky = above.st_mode & stat.S_ISVTX and os.geteuid() not in (above.st_uid, there.st_uid)
        if sticky or stat.S_ISLNK(there.st_mode):
            raise PermissionError(errno.EEXIST, os.strerror(errno.EEXIST))
    finally:
        os.close(place)


def _nearest(path: bytes) -> int:
    """The directory of `path`, or the nearest one above that there is: where CRIU makes what is missing."""
    while True:
        path = os.path.dirname(path)
        try:
            return _look(path)
        except FileNotFoundError:
            if path == b"/":
                raise


def _look(path: bytes, flags: int = 0) -> int:
    return syscalls.openat2(path, flags | os.O_PATH | os.O_CLOEXEC, resolve=syscalls.RESOLVE_NO_SYMLINKS)


def _access(fd: int, mode: int) -> None:
    # As access(2) of a path, which also asks the server of a network file system; and nothing is opened. The user's own
    # is open to the user whatever its mode: a program may write to a file that it made read-only.
    if os.fstat(fd).st_uid != os.geteuid() and not os.access(f"/proc/self/fd/{fd}", mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


# --- as root ------------------------------------------------------------------------------------------------------


def rename_sockets(images: ModuleType, directory: int, places: dict[bytes, bytes]) -> None:
    """Have the sockets named in the directories `places` made in the real ones instead (real_places).

    A name too long for that becomes relative to its directory.
    """

    def edit(entry: Any) -> bool:
        return entry.HasField("usk") and _rename_socket(entry.usk, places)

    imagefile.change(directory, _FILES, images.pb.file_entry, edit)


def _rename_socket(entry: Any, places: dict[bytes, bytes]) -> bool:
    place, name = os.path.split(_socket_path(entry))
    if place not in places:
        return False
    end = entry.name[len(entry.name.rstrip(b"\0")) :]
    whole = os.path.join(places[place], name)
    if not entry.name_dir and len(whole) <= _MAX_NAME:
        entry.name = whole + end
    else:
        entry.name_dir = os.fsdecode(places[place])
        entry.name = name + end
    return True
