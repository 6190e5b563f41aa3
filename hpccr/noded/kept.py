"""Images that stay in the spool once they are durable, so that a restore on the same node reads nothing of the store.

Of each capsule of a step the newest one: a directory of the spool with the files of the fragment and a record with the
fragment itself, sealed as it is in the store. A copy is used only if its seal and every digest are right: the node may
have crashed while it was written, or its disk be damaged.
"""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import msgspec
from blake3 import blake3

from hpccr.errors import CorruptError
from hpccr.model import FileEntry, Fragment, StepKey
from hpccr.noded.seal import SiteKey
from hpccr.noded.spool import KEPT, Spool

RECORD = "kept.json"
MAX_RECORD = 64 << 20
THREADS = 4
CHUNK = 8 << 20
"""Bytes read at once: enough to be hashed by several threads."""


class Record(msgspec.Struct, frozen=True):
    """directory: the capsule's in the store. fragment: the text of its fragment.json."""

    directory: str
    fragment: str


def label(key: StepKey, uid: int, capsule: int) -> str:
    """What names of kept images of a capsule begin with."""
    text = msgspec.json.encode((key, uid, capsule))
    return f"{KEPT}{blake3(text).hexdigest()[:16]}-"


def name(key: StepKey, uid: int, capsule: int, sequence: int) -> str:
    return f"{label(key, uid, capsule)}{sequence:06d}"


def keep(spool: Spool, path: str, fd: int, fragment: Fragment, record: Record) -> bool:
    """Keep the images in the directory `path` (descriptor `fd`, locked), in place of older ones of the capsule.

    False if they are larger than what may be kept, or newer ones are there: the last flush before a requeue is quicker
    than the one before it. Raises OSError; the directory is then the caller's to remove.
    """
    prefix = label(fragment.key, fragment.uid, fragment.capsule)
    own = name(fragment.key, fragment.uid, fragment.capsule, fragment.sequence)
    newer = any(image.name.startswith(prefix) and image.name > own for image in spool.kept())
    if newer or fragment.bytes > spool.limit_kept():
        return False
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(RECORD, flags, 0o600, dir_fd=fd), "wb") as file:
        file.write(msgspec.json.encode(record))
    os.rename(path, os.path.join(spool.root, own))
    spool.drop(prefix, before=own)
    spool.evict()
    return True


def read(kept: int, key: SiteKey, directory: str) -> Fragment:
    """The fragment of a kept image whose place in the store is `directory`. Raises CorruptError, OSError."""
    with os.fdopen(os.open(RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=kept), "rb") as file:
        try:
            record = msgspec.json.decode(file.read(MAX_RECORD), type=Record)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise CorruptError(f"its record is damaged: {error}") from None
    if record.directory != directory:
        raise CorruptError(f"it is of {record.directory}")
    return key.open(record.fragment.encode(), "its record")


def use(kept: int, spool: int, fragment: Fragment) -> None:
    """Link the files of a kept image into an empty spool directory, and compare every digest.

    Raises CorruptError, OSError; what has been linked until then is the caller's to remove.
    """

    def one(file: FileEntry) -> None:
        os.link(file.name, file.name, src_dir_fd=kept, dst_dir_fd=spool, follow_symlinks=False)
        _check(spool, file)

    with ThreadPoolExecutor(THREADS) as pool:
        # The large ones first, so that none is left alone at the end.
        list(pool.map(one, sorted(fragment.files, key=lambda file: file.size, reverse=True)))


def _check(directory: int, file: FileEntry) -> None:
    fd = os.open(file.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != file.size:
            raise CorruptError(f"{file.name} is not the file of {file.size} bytes that it was")
        # Not mapped: a page that the disk cannot read would kill this process, instead of sending it to the store.
        digest = blake3(max_threads=blake3.AUTO)
        buffer = memoryview(bytearray(min(CHUNK, max(file.size, 1))))
        while count := os.readv(fd, [buffer]):
            digest.update(buffer[:count])
    finally:
        os.close(fd)
    if digest.hexdigest() != file.digest:
        raise CorruptError(f"{file.name} has changed")
