"""The block index of a capsule's directory: which blocks its files consist of, and where those are.

    "hpccrix" 0x01 | length of the header, 4 bytes | header, msgpack of Header | rows, ROW each | BLAKE3 of all before

Numbers are little-endian. The rows of all files follow one another in the order of Header.files; the blocks of a file,
in their order, are the file. The index is for finding data and damage: that a restored file is what was dumped is known
from the sealed fragment alone.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from blake3 import blake3

from hpccr.errors import CorruptError
from hpccr.model import FORMAT, HexDigest, Name, Size
from hpccr.store import publish

INDEX_NAME = "index.bin"
PACK_SUFFIX = ".pack"

ROW = struct.Struct("<32sQIII")
"""BLAKE3 of the block, offset of its stored form in the pack, number of the pack, stored length, length.

Stored length == length: as it is, else one zstd frame.
"""
ZERO_PACK = 0xFFFFFFFF
"""Pack number of blocks of zeros, of which nothing is stored (digest, offset and stored length are 0)."""
MAX_BLOCK = 8 << 20

_MAGIC = b"hpccrix\x01"
_LENGTH = struct.Struct("<I")
_DIGEST = 32


class IndexedFile(msgspec.Struct, frozen=True):
    """One file of the fragment: the next `rows` rows."""

    name: Name
    size: Size
    rows: Size


class Pack(msgspec.Struct, frozen=True):
    """A pack file beside the index, by the number that rows refer to.

    generation: checkpoints since the one that wrote it (0: this one). live: its bytes that this index refers to.
    """

    number: Size
    name: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\.pack$")]
    size: Size
    digest: HexDigest
    generation: Size
    live: Size


class Header(msgspec.Struct, frozen=True):
    """block: size in bytes that blocks were cut to. fragment: BLAKE3 of the text of fragment.json."""

    format: int
    block: Size
    fragment: HexDigest
    files: tuple[IndexedFile, ...]
    packs: tuple[Pack, ...]


class Usage(NamedTuple):
    """Bytes that a capsule's directory takes: `own`, written by its flush, and `shared`, referred to in older packs."""

    own: int
    shared: int


class Row(NamedTuple):
    digest: bytes
    offset: int
    pack: int
    stored: int
    length: int


class Index:
    """An index in memory. `rows` holds ROWs."""

    def __init__(self, path: Path, header: Header, rows: memoryview) -> None:
        self.path = path
        self.header = header
        self._rows = rows
        self._first: dict[str, tuple[IndexedFile, int]] = {}
        first = 0
        for file in header.files:
            self._first[file.name] = file, first
            first += file.rows

    def __len__(self) -> int:
        return len(self._rows) // ROW.size

    @property
    def usage(self) -> Usage:
        packs = self.header.packs
        own = sum(pack.size for pack in packs if not pack.generation) + len(self._rows)
        return Usage(own, sum(pack.live for pack in packs if pack.generation))

    def raw(self, number: int) -> memoryview:
        return self._rows[number * ROW.size : (number + 1) * ROW.size]

    def file(self, name: str) -> IndexedFile | None:
        found = self._first.get(name)
        return found[0] if found else None

    def rows(self, name: str) -> Iterator[Row]:
        """The blocks of a file. Raises CorruptError when they cannot be right."""
        file, first = self._first[name]
        sizes = {pack.number: pack.size for pack in self.header.packs}
        left = file.size
        for fields in ROW.iter_unpack(self._rows[first * ROW.size : (first + file.rows) * ROW.size]):
            row = Row(*fields)
            left -= row.length
            if (
                not 0 < row.length <= MAX_BLOCK
                or row.stored > row.length  # nobody writes such a frame, and it would be read into memory whole
                or left < 0
                or (row.pack != ZERO_PACK and row.offset + row.stored > sizes.get(row.pack, -1))
            ):
                raise CorruptError(f"{self.path}: a block of {name} cannot be where it is said to be")
            yield row
        if left:
            raise CorruptError(f"{self.path}: {left} bytes of {name} are in no block")


def read(path: Path) -> Index:
    """Raises CorruptError naming the file for anything that is not a whole index, FileNotFoundError, OSError."""
    data = memoryview(path.read_bytes())
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    start = len(_MAGIC) + _LENGTH.size
    if bytes(data[: len(_MAGIC)]) != _MAGIC or len(data) < start + _DIGEST or blake3(body).digest() != digest:
        raise CorruptError(
            f"{path} has been changed or cut off, or was written by another version of hpccr",
            hint="hpccr uses the checkpoint before it, if there is one",
        )
    (length,) = _LENGTH.unpack(data[len(_MAGIC) : start])
    try:
        header = msgspec.msgpack.decode(body[start : start + length], type=Header)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CorruptError(f"{path} is not an index of this version of hpccr: {error}") from None
    rows = body[start + length :]
    if header.format != FORMAT or sum(file.rows for file in header.files) * ROW.size != len(rows):
        raise CorruptError(f"{path} is not an index of this version of hpccr")
    return Index(path, header, rows)


def read_index(directory: Path) -> Index:
    """The index of a capsule's directory that has a fragment. Raises CorruptError, also if it is not there; OSError."""
    path = directory / INDEX_NAME
    try:
        return read(path)
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing", hint="hpccr uses the checkpoint before it, if there is one") from None


def write(path: Path, header: Header, rows: bytearray) -> None:
    """Publish an index. The caller syncs the directory. Raises OSError."""
    text = msgspec.msgpack.encode(header)
    hasher = blake3()
    with publish.PendingFile(path) as pending:
        for part in (_MAGIC, _LENGTH.pack(len(text)), text, rows):
            hasher.update(part)
            pending.write(part)
        pending.write(hasher.digest())
        pending.commit(sync_directory=False)


class Known:
    """Rows by the digest of their block: a hash table that takes 60 bytes a row, so that gigabytes of images fit.

    find() may be called from any thread while one thread adds.
    """

    def __init__(self) -> None:
        self._rows = bytearray()
        self._slots = array("I", bytes(4 << 10))
        self._used = bytearray()

    def __len__(self) -> int:
        return len(self._used)

    def find(self, digest: bytes) -> int:
        """Number of the row; -1 if there is none."""
        slots, rows = self._slots, self._rows
        at = int.from_bytes(digest[:8], "little") & (len(slots) - 1)
        while slot := slots[at]:
            begin = (slot - 1) * ROW.size
            if rows[begin : begin + _DIGEST] == digest:
                return slot - 1
            at = (at + 1) & (len(slots) - 1)
        return -1

    def add(self, row: bytes | memoryview) -> int:
        """Add one that find() does not know; its number."""
        self._rows += row
        self._used.append(0)
        if len(self._used) * 2 > len(self._slots):
            slots = array("I", bytes(len(self._slots) * 8))
            for number in range(len(self._used)):
                self._enter(slots, number)
            self._slots = slots
        else:
            self._enter(self._slots, len(self._used) - 1)
        return len(self._used) - 1

    def _enter(self, slots: array[int], number: int) -> None:
        begin = number * ROW.size
        at = int.from_bytes(self._rows[begin : begin + 8], "little") & (len(slots) - 1)
        while slots[at]:
            at = (at + 1) & (len(slots) - 1)
        slots[at] = number + 1

    def use(self, number: int) -> tuple[bytes, bool]:
        """(the row, whether this is its first use)."""
        first = not self._used[number]
        self._used[number] = 1
        return bytes(self._rows[number * ROW.size : (number + 1) * ROW.size]), first
