"""What a new fragment may refer to: packs of the same capsule in the newest checkpoint before it.

A pack that is referred to is hard-linked into the new capsule's directory, before anything relies on it. So every
directory holds all that it needs, removing a checkpoint is removing its directory, the file system itself counts who
still needs a pack, and no lock is needed between a flush on one node and a gc on another. Where a file system has no
hard links (or a gc was faster) the blocks are written again.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from blake3 import blake3

from hpccr.errors import CorruptError
from hpccr.model import FRAGMENT_NAME
from hpccr.store import damage, index, publish
from hpccr.store.index import INDEX_NAME, ROW, ZERO_PACK, Index, Known, Pack

log = logging.getLogger(__name__)

SHARE = 20
"""Checkpoints that may rest on one pack, unless said otherwise; then what is left of it is written again. So the reach
of damage to one file, and the number of packs of a checkpoint, stay bounded."""
READ_AGAIN = 4
"""A pack is read again, and compared with its digest, before the first checkpoint refers to it that did not write it,
and before each so many further ones; and always while a damaged checkpoint of the step is there."""
CHUNK = 1 << 20
MIN_LIVE = 0.5
"""Part of a pack that must still be in use; what is left of a pack below is written again, and the pack can go."""
BLOCK = 64 << 10
MAX_BLOCKS = 512 << 10
"""Blocks are doubled in size rather than more than that many made, which bounds the memory of a flush."""

_CHECKPOINT = re.compile(r"^ckpt-(\d{6})$")


@dataclass
class Inheritance:
    """block: size to cut to. packs: those linked, numbered from 0, with live = 0. known: their blocks."""

    block: int
    packs: list[Pack] = field(default_factory=list)
    known: Known = field(default_factory=Known)


def block_size(total: int) -> int:
    """The size of blocks for that many bytes of images."""
    block = BLOCK
    while total > block * MAX_BLOCKS and block < index.MAX_BLOCK:
        block *= 2
    return block


def inherit(
    directory: Path, total: int, *, share: int = SHARE, alive: Callable[[], None] = lambda: None
) -> Inheritance:
    """Find the parent of the capsule's directory that is being written, and link what can be referred to.

    share: how many checkpoints may rest on one pack, the one that wrote it included. alive: called now and then while
    packs are read again; one that is damaged is not referred to, and the parent is marked. At most `total` bytes are
    read for that: who waits for this has its size in mind, and a parent may be of a time when the job was far larger.

    Raises OSError for what is wrong with the new directory itself, never for anything about older checkpoints.
    """
    block = block_size(total)
    parent, suspicious = _parent(directory)
    if parent is None:
        return Inheritance(block)
    if block // 2 <= parent.header.block <= block * 2:
        # Near a limit the size must not change back and forth: nothing would be found then.
        block = parent.header.block
    found = Inheritance(block)
    numbers: dict[int, int] = {}
    left = total
    for pack in parent.header.packs:
        if pack.generation + 1 >= share or pack.live < pack.size * MIN_LIVE:
            continue
        reads = pack.size if suspicious or pack.generation % READ_AGAIN == 0 else 0
        if reads > left:
            continue
        if not _link(parent.path.with_name(pack.name), directory / pack.name, pack.size):
            continue
        left -= reads
        if reads and not _intact(parent, pack, alive):
            publish.remove(directory / pack.name)
            continue
        numbers[pack.number] = len(found.packs)
        found.packs.append(
            msgspec.structs.replace(pack, number=len(found.packs), generation=pack.generation + 1, live=0)
        )
    for number in range(len(parent)):
        digest, offset, old, stored, length = ROW.unpack(parent.raw(number))
        if old != ZERO_PACK and old in numbers and found.known.find(digest) < 0:
            found.known.add(ROW.pack(digest, offset, numbers[old], stored, length))
    return found


def _intact(parent: Index, pack: Pack, alive: Callable[[], None]) -> bool:
    """Whether a pack is what was written, as the storage has it now. If not, the parent is marked."""
    path = parent.path.with_name(pack.name)
    try:
        digest = _digest(path, alive)
        if digest != pack.digest:
            what = f"{path} has been changed: its BLAKE3 digest is not the recorded one"
            damage.mark(parent.path.parent.parent, what)
    except OSError as error:
        log.warning("nothing is referred to in %s: %s", path, error)
        return False
    return digest == pack.digest


def _digest(path: Path, alive: Callable[[], None]) -> str:
    hasher = blake3()
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0) as file:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # not what memory has of it
        while data := file.read(CHUNK):
            hasher.update(data)
            alive()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # memory is the job's
    return hasher.hexdigest()


def _parent(directory: Path) -> tuple[Index | None, bool]:
    """Index of the same capsule in the newest older checkpoint that has one published and is not known to be damaged;
    and whether one of them is."""
    own = _CHECKPOINT.match(directory.parent.name)
    if own is None:
        return None, False
    step = directory.parent.parent
    try:
        numbers = [int(match[1]) for match in map(_CHECKPOINT.match, os.listdir(step)) if match]
    except OSError:
        return None, False
    suspicious = False
    for number in sorted((number for number in numbers if number < int(own[1])), reverse=True):
        candidate = step / f"ckpt-{number:06d}" / directory.name
        try:
            if damage.found(candidate.parent):
                suspicious = True
            elif (candidate / FRAGMENT_NAME).exists():
                return index.read(candidate / INDEX_NAME), suspicious
        except (CorruptError, OSError) as error:
            log.warning("nothing is referred to in %s: %s", candidate, error)
    return None, suspicious


def _link(source: Path, target: Path, size: int) -> bool:
    try:
        publish.link(source, target)
    except OSError:
        return False
    status = os.lstat(target)
    if stat.S_ISREG(status.st_mode) and status.st_size == size:
        return True
    publish.remove(target)
    return False
