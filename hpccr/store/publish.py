"""Writing to the store: the only module that does. Every file appears whole or not at all, also after a power cut.

A file is written under a temporary name in its own directory, synced, renamed, and the directory synced. Temporary
names start with a dot and so can never be a name the model allows (model.Name).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Buffer
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from blake3 import blake3

from hpccr.errors import CorruptError, HpccrError

TEMPORARY = ".tmp-"
DIRECTORY_MODE = 0o700
FILE_MODE = 0o600


class PendingFile:
    """A file being written; it gets its name at commit(). Leaving the `with` block without a commit removes it.

    Raises OSError like the system calls do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._temporary, flags, FILE_MODE)
        self._done = False

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        while view:
            written = os.write(self._fd, view)
            self.size += written
            view = view[written:]

    def commit(self, *, sync: bool = True, sync_directory: bool = True) -> None:
        """Give the file its name. With sync_directory=False the caller syncs the directory after its last file; with
        sync=False it may be empty after a crash."""
        if sync:
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        os.rename(self._temporary, self.path)
        self._done = True
        if sync_directory:
            fsync_directory(self.path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if not self._done:
            self._temporary.unlink(missing_ok=True)


def publish_bytes(path: Path, data: Buffer) -> None:
    """Make `path` hold exactly `data`, replacing what was there in one step. Raises OSError."""
    with PendingFile(path) as pending:
        pending.write(data)
        pending.commit()


def publish(path: Path, record: msgspec.Struct, *, durable: bool = True) -> None:
    """Make `path` hold text(record). durable=False: it need not outlive a crash of the node. Raises OSError."""
    with PendingFile(path) as pending:
        pending.write(text(record))
        pending.commit(sync=durable, sync_directory=durable)


def text(record: msgspec.Struct) -> bytes:
    """The JSON text of a record. One that has a field `digest` gets it filled in: the BLAKE3 of its compact JSON text
    with an empty digest."""
    if hasattr(record, "digest"):
        record = msgspec.structs.replace(record, digest=_digest(record))
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def _digest(record: msgspec.Struct) -> str:
    return blake3(msgspec.json.encode(msgspec.structs.replace(record, digest=""))).hexdigest()


def read[T: msgspec.Struct](path: Path, kind: type[T]) -> T:
    """The record in a JSON file of the store; its field `digest`, if it has one, is checked and empty.

    Raises CorruptError naming the file if it is no `kind`, FileNotFoundError if it is not there, or another OSError.
    """
    data = path.read_bytes()
    hint = "hpccr uses the checkpoint before it, if there is one"
    try:
        record = msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(
            f"{path} is not a {kind.__name__} record of this version of hpccr: {error}",
            hint=f"it was damaged or written by another version; {hint}",
        ) from None
    if digest := getattr(record, "digest", ""):
        if digest != _digest(record):
            raise CorruptError(f"{path} has been changed: its BLAKE3 digest is not the recorded one", hint=hint)
        record = msgspec.structs.replace(record, digest="")
    return record


def read_if_there[T: msgspec.Struct](path: Path, kind: type[T]) -> T | None:
    """As read(), but None if there is no such file (also when its directory is gone)."""
    try:
        return read(path, kind)
    except (FileNotFoundError, NotADirectoryError):
        return None


def make_directory(path: Path) -> None:
    """Make a directory of the store with those above it that are missing, 0700, durably. Raises OSError, HpccrError.

    An existing directory is used only if it is a real directory: a symbolic link in the last place is refused.
    """
    if not path.parent.is_dir():
        make_directory(path.parent)
    make_one_directory(path)


def make_one_directory(path: Path) -> None:
    """As make_directory(), but the directory above must be there: what is missing may be a file system that is not
    mounted, and what is below is then none of the store. Raises OSError, HpccrError."""
    try:
        os.mkdir(path, DIRECTORY_MODE)
    except FileExistsError:
        if not path.is_dir() or path.is_symlink():
            raise HpccrError(f"{path} exists but is not a directory", hint="move it out of the way") from None
        return
    except (FileNotFoundError, NotADirectoryError):
        if path.parent.is_dir():
            raise
        if path.parent.exists():
            raise HpccrError(f"{path.parent} exists but is not a directory", hint="move it out of the way") from None
        raise HpccrError(
            f"there is no {path.parent} on {os.uname().nodename}",
            hint="is the store's file system mounted on this node?",
        ) from None
    fsync_directory(path.parent)


def claim(path: Path) -> bool:
    """Make an empty file; True if this call made it, False if it was there. Exactly one of many callers gets True.

    O_EXCL is atomic on local file systems and on NFS from version 3 on (open(2)). Raises OSError.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    except FileExistsError:
        return False
    os.close(fd)
    fsync_directory(path.parent)
    return True


def link(source: Path, target: Path) -> None:
    """Give a file of the store a second name. Durable after the directory's next sync. Raises OSError."""
    os.link(source, target, follow_symlinks=False)


def rename(source: Path, target: Path) -> None:
    """Give a directory that is whole and durable its place in another one. Raises OSError, also if one is there."""
    os.rename(source, target)
    fsync_directory(target.parent)


def append_line(path: Path, line: bytes) -> None:
    """Append `line` and a newline by a single write. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, FILE_MODE)
    try:
        os.write(fd, line + b"\n")
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file or nothing; durable after the directory's next sync. Raises OSError."""
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it. It is renamed first, so that nobody sees half of it.

    Several may do so at the same time; what cannot go yet (a file that is open on NFS) stays under the temporary name.
    Raises OSError.
    """
    doomed = path.with_name(f"{TEMPORARY}{path.name}.{secrets.token_hex(4)}")
    try:
        os.rename(path, doomed)
    except FileNotFoundError:
        return
    fsync_directory(path.parent)

    def tolerate(call: object, name: str, error: BaseException) -> None:
        if not isinstance(error, OSError) or error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY):
            raise error

    shutil.rmtree(doomed, onexc=tolerate)


def fsync_directory(path: Path) -> None:
    """Make the directory's entries durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
