"""Whether a checkpoint in the store is whole: every fragment, pack, block, file and digest. Needs no key.

That a fragment was made by an hpccrd of this site, and for this user, is in its seal, which only hpccrd can check: it
does so at every restore.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from hpccr.errors import CorruptError
from hpccr.model import FRAGMENT_NAME, FileEntry, Fragment, Manifest
from hpccr.store import index, publish
from hpccr.store.blocks import Reader, open_pack
from hpccr.store.index import INDEX_NAME, Index, Pack
from hpccr.store.layout import FLUSH_NAME, Checkpoint, check_belongs, check_place

CHUNK = 1 << 20


@dataclass(frozen=True)
class Finding:
    """Something wrong: the path it is about, and what. damage: what was written is not there as it was; else it was
    never whole, or cannot be read now."""

    path: str
    problem: str
    damage: bool = True


def verify(checkpoint: Checkpoint, *, read: Callable[[int], None] | None = None) -> list[Finding]:
    """Everything that is wrong with a checkpoint; [] means that it is complete and undamaged.

    read: called with the number of bytes each time some have been read. Raises OSError only for the directory itself.
    """
    return list(_findings(checkpoint, read or (lambda count: None)))


def _findings(checkpoint: Checkpoint, read: Callable[[int], None]) -> Iterator[Finding]:
    path = str(checkpoint.manifest_path)
    try:
        manifest = checkpoint.manifest_if_there()
        if manifest is None:
            yield Finding(path, "is missing: the checkpoint was never finished", False)
            return
        check_place(manifest, checkpoint)
        if checkpoint.manifest_path.read_bytes() != publish.text(manifest):
            yield Finding(path, "has been changed: it is not as hpccr writes it")
    except CorruptError as error:
        yield Finding(path, error.message)
        return
    for capsule in range(manifest.capsules):
        yield from _capsule(checkpoint, manifest, capsule, read)
    for capsule in checkpoint.capsules_there():
        if capsule >= manifest.capsules:
            yield Finding(str(checkpoint.capsule_path(capsule)), "is not a part of this checkpoint")


def _capsule(
    checkpoint: Checkpoint, manifest: Manifest, capsule: int, read: Callable[[int], None]
) -> Iterator[Finding]:
    directory = checkpoint.capsule_path(capsule)
    path = directory / FRAGMENT_NAME
    try:
        fragment = checkpoint.fragment(capsule)
        if fragment is None:
            yield Finding(str(path), "is missing: this capsule's flush has not ended", False)
            return
        check_belongs(fragment, manifest, capsule, path)
    except (CorruptError, OSError) as error:
        yield _told(path, error)
        return
    try:
        found = index.read_index(directory)
    except (CorruptError, OSError) as error:
        yield _told(directory / INDEX_NAME, error)
        return
    yield from _recorded(directory, found, fragment)
    for pack in found.header.packs:
        try:
            _check_pack(directory, pack, read)
        except (CorruptError, OSError) as error:
            yield _told(directory / pack.name, error)
    with Reader(directory, found, check=True) as reader:
        for file in fragment.files:
            try:
                _check_file(reader, file, read)
            except (CorruptError, OSError) as error:
                yield _told(directory / file.name, error)
    yield from _unlisted(directory, found)


def _told(path: Path, error: CorruptError | OSError) -> Finding:
    return Finding(str(path), str(error), isinstance(error, CorruptError))


def _recorded(directory: Path, found: Index, fragment: Fragment) -> Iterator[Finding]:
    """What the index says of the fragment."""
    path = directory / FRAGMENT_NAME
    try:
        check_fragment(path, path.read_bytes(), found)
    except (CorruptError, OSError) as error:
        yield _told(path, error)
    listed = {file.name for file in fragment.files}
    for file in found.header.files:
        if file.name not in listed:
            yield Finding(str(directory / INDEX_NAME), f"has {file.name}, which is not a file of this fragment")


def check_fragment(path: Path, text: bytes, found: Index) -> None:
    """Raises CorruptError unless the text of a fragment.json is what the index beside it was made with."""
    if blake3(text).hexdigest() != found.header.fragment:
        raise CorruptError(f"{path} has been changed: its BLAKE3 digest is not the recorded one")


def _check_pack(directory: Path, pack: Pack, read: Callable[[int], None]) -> None:
    hasher = blake3()
    with os.fdopen(open_pack(directory, pack), "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            hasher.update(data)
            read(len(data))
    if hasher.hexdigest() != pack.digest:
        raise CorruptError("has been changed: its BLAKE3 digest is not the recorded one")


def _check_file(reader: Reader, file: FileEntry, read: Callable[[int], None]) -> None:
    hasher, size = blake3(), 0
    for data in reader.stream(file.name):
        hasher.update(data)
        size += len(data)
        read(len(data))
    if size != file.size:
        raise CorruptError(f"has {size} bytes, not {file.size}")
    if hasher.hexdigest() != file.digest:
        raise CorruptError("has been changed: its BLAKE3 digest is not the recorded one")


def _unlisted(directory: Path, found: Index) -> Iterator[Finding]:
    listed = {pack.name for pack in found.header.packs} | {FRAGMENT_NAME, INDEX_NAME, FLUSH_NAME}
    for name in sorted(os.listdir(directory)):
        if name not in listed and not name.startswith("."):
            yield Finding(str(directory / name), "is not a file of this fragment")
