"""The files of a capsule's directory as blocks in packs: writing them from open files, and reading them back.

A block of zeros is not stored, a block that is known is referred to, any other is compressed and appended to a pack.
Threads read, hash and (de)compress, each a segment of about a mebibyte at a time; one thread keeps the order. What is
in memory is bounded by the number of threads, but for 60 bytes a block (see lineage.MAX_BLOCKS).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import zstandard
from blake3 import blake3

from hpccr.errors import CorruptError, HpccrError
from hpccr.model import FORMAT
from hpccr.store import index, publish
from hpccr.store.index import INDEX_NAME, PACK_SUFFIX, ROW, ZERO_PACK, Header, Index, IndexedFile, Pack, Row
from hpccr.store.lineage import Inheritance
from hpccr.store.publish import PendingFile

SEGMENT = 1 << 20
PACK_SIZE = 1 << 30
"""Bytes after which another pack is begun: few large files, and yet parts that can be done without one by one."""
MAX_THREADS = 8

_ZERO_ROW_DIGEST = bytes(32)
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""What open(2) says where there is no regular file."""


def threads() -> int:
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


class _Block(NamedTuple):
    """data: what to store if it is not known by then; None for zeros (digest is empty too) and for what is known."""

    digest: bytes
    length: int
    data: bytes | None


class _Segment(NamedTuple):
    future: Future[list[_Block]]
    file: int
    last: bool


class _Local(threading.local):
    compressor: zstandard.ZstdCompressor | None = None
    decompressor: zstandard.ZstdDecompressor | None = None


class Writer:
    """Writes the packs and the index of one capsule's directory. Not for several threads.

    read: called with the number of bytes each time some have been taken over, done: each time a file has been.
    Leaving the `with` block without finish() leaves the links and packs there: the caller clears the directory.
    """

    def __init__(
        self,
        directory: Path,
        inheritance: Inheritance,
        *,
        level: int,
        read: Callable[[int], None] = lambda count: None,
        done: Callable[[], None] = lambda: None,
        pack_size: int = PACK_SIZE,
    ) -> None:
        self._directory = directory
        self.block = inheritance.block
        self._known = inheritance.known
        self._packs = list(inheritance.packs)
        self._inherited = len(inheritance.packs)
        self._live = [0] * len(self._packs)
        self._level = level
        self._read, self._done = read, done
        self._pack_size = pack_size
        self._pack: _PendingPack | None = None
        self._commits: list[Future[None]] = []
        self._rows = bytearray()
        self._files: list[IndexedFile] = []
        self._counts: list[int] = []
        count = threads()
        self._window = 2 * count + 1
        self._pool = ThreadPoolExecutor(count, "blocks")
        self._syncs = ThreadPoolExecutor(1, "sync")
        self._segments: deque[_Segment] = deque()
        self._local = _Local()
        self._zeros = bytes(self.block)
        self._descriptors: dict[int, int] = {}

    @property
    def pending(self) -> bool:
        """Whether work() has something to do."""
        return bool(self._segments)

    def add(self, name: str, fd: int, size: int, ends: Sequence[int] | None = None) -> None:
        """Take over the first `size` bytes of an open file, cut at `ends` (ascending, the last is `size`; default: at
        every multiple of the block size). Takes the descriptor. Raises as work() does."""
        number = len(self._files)
        self._files.append(IndexedFile(name=name, size=size, rows=0))
        self._counts.append(0)
        if not size:
            os.close(fd)
            self._done()
            return
        self._descriptors[number] = fd
        begin = 0
        for cuts in _segments(size, self.block, ends):
            while len(self._segments) >= self._window:
                self.work()
            future = self._pool.submit(self._blocks, fd, begin, cuts)
            begin = cuts[-1]
            self._segments.append(_Segment(future, number, begin == size))

    def work(self) -> None:
        """Store the oldest segment, waiting for it if need be. Raises HpccrError when a file is shorter than was said,
        OSError for the store."""
        segment = self._segments.popleft()
        amount = 0
        for block in segment.future.result():
            self._counts[segment.file] += 1
            amount += block.length
            if not block.digest:
                self._rows += ROW.pack(_ZERO_ROW_DIGEST, 0, ZERO_PACK, 0, block.length)
                continue
            number = self._known.find(block.digest)
            if number < 0:
                if block.data is None:
                    raise AssertionError("a block that was known is not any more")
                number = self._known.add(self._store(block, block.data))
            row, first = self._known.use(number)
            if first:
                _, _, pack, stored, _ = ROW.unpack(row)
                self._live[pack] += stored
            self._rows += row
        self._read(amount)
        if segment.last:
            os.close(self._descriptors.pop(segment.file))
            self._done()

    def finish(self, fragment: bytes) -> None:
        """Make everything durable but for the directory's entries. fragment: the text of fragment.json to come.

        Raises as work() does.
        """
        while self._segments:
            self.work()
        self._end_pack()
        for commit in self._commits:
            commit.result()
        packs = []
        for pack, live in zip(self._packs, self._live, strict=True):
            if live or pack.number >= self._inherited:
                packs.append(Pack(pack.number, pack.name, pack.size, pack.digest, pack.generation, live))
            else:
                publish.remove(self._directory / pack.name)
        files = tuple(
            IndexedFile(name=file.name, size=file.size, rows=rows)
            for file, rows in zip(self._files, self._counts, strict=True)
        )
        digest = blake3(fragment).hexdigest()
        header = Header(format=FORMAT, block=self.block, fragment=digest, files=files, packs=tuple(packs))
        index.write(self._directory / INDEX_NAME, header, self._rows)

    def _blocks(self, fd: int, begin: int, ends: Sequence[int]) -> list[_Block]:
        """In a thread: read a segment, hash its blocks, compress those that are not known."""
        try:
            data = _pread(fd, ends[-1] - begin, begin)
        except OSError as error:
            # Not to be taken for an error of the store.
            raise HpccrError(
                f"the spool of this node cannot be read: {error.strerror}", hint="is the disk of node.spool well?"
            ) from None
        if len(data) != ends[-1] - begin:
            raise HpccrError("a file in the spool is shorter than it was")
        if self._local.compressor is None:
            self._local.compressor = zstandard.ZstdCompressor(level=self._level, write_checksum=False)
        found = []
        at = 0
        for end in ends:
            piece = data[at : end - begin]
            at = end - begin
            if piece == (self._zeros if len(piece) == self.block else bytes(len(piece))):
                found.append(_Block(b"", len(piece), None))
                continue
            digest = blake3(piece).digest()
            if self._known.find(digest) >= 0:
                found.append(_Block(digest, len(piece), None))
                continue
            packed = self._local.compressor.compress(piece)
            found.append(_Block(digest, len(piece), packed if len(packed) < len(piece) else piece))
        return found

    def _store(self, block: _Block, data: bytes) -> bytes:
        if self._pack is None:
            self._pack = _PendingPack(self._directory, len(self._packs))
            self._packs.append(Pack(self._pack.number, self._pack.path.name, 0, "0" * 64, 0, 0))
            self._live.append(0)
        pack = self._pack
        row = ROW.pack(block.digest, pack.size, pack.number, len(data), block.length)
        pack.write(data)
        if pack.size >= self._pack_size:
            self._end_pack()
        return row

    def _end_pack(self) -> None:
        pack, self._pack = self._pack, None
        if pack is not None:
            entry = pack.end()
            self._packs[pack.number] = entry
            # The sync of a gigabyte takes its time; the next pack need not wait.
            self._commits.append(self._syncs.submit(pack.commit))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._syncs.shutdown()
        if self._pack is not None:
            self._pack.abandon()
        for fd in self._descriptors.values():
            os.close(fd)


class _PendingPack:
    """A pack being written, in large pieces."""

    def __init__(self, directory: Path, number: int) -> None:
        self.path = directory / (secrets.token_hex(8) + PACK_SUFFIX)
        self.number = number
        self.size = 0
        self._pending = PendingFile(self.path)
        self._hasher = blake3()
        self._buffer = bytearray()

    def write(self, data: bytes) -> None:
        self._buffer += data
        self.size += len(data)
        if len(self._buffer) >= SEGMENT:
            self._write()

    def _write(self) -> None:
        self._hasher.update(self._buffer)
        self._pending.write(self._buffer)
        self._buffer.clear()

    def end(self) -> Pack:
        """Nothing more comes: its entry in the index. commit() follows, in any thread."""
        try:
            self._write()
        except BaseException:
            self.abandon()
            raise
        return Pack(self.number, self.path.name, self.size, self._hasher.hexdigest(), 0, 0)

    def commit(self) -> None:
        with self._pending as pending:
            pending.commit(sync_directory=False)

    def abandon(self) -> None:
        self._pending.__exit__(None, None, None)


def _segments(size: int, block: int, ends: Sequence[int] | None) -> Iterator[Sequence[int]]:
    """Ends of blocks, as many at a time as make up a segment."""
    if ends is None:
        per = max(1, SEGMENT // block)
        for first in range(block, size + block, block * per):
            yield [min(end, size) for end in range(first, min(first + block * per, size + block), block)]
        return
    some = array("Q")
    begin = 0
    for end in ends:
        some.append(end)
        if end - begin >= SEGMENT:
            yield some
            some, begin = array("Q"), end
    if some:
        yield some


def _pread(fd: int, count: int, offset: int) -> bytes:
    """Less than `count` bytes only at the end of the file."""
    data = os.pread(fd, count, offset)
    while len(data) < count:
        more = os.pread(fd, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


class Reader:
    """Reads files of a capsule's directory, several blocks ahead. check: compare the digest of every block."""

    def __init__(self, directory: Path, found: Index, *, check: bool = False) -> None:
        self._directory = directory
        self._index = found
        self._check = check
        self._packs = {pack.number: pack for pack in found.header.packs}
        self._descriptors: dict[int, int] = {}
        self._opening = threading.Lock()
        count = threads()
        self._window = 2 * count + 1
        self._pool = ThreadPoolExecutor(count, "blocks")
        self._local = _Local()

    def stream(self, name: str) -> Iterator[bytes]:
        """The content of a file in pieces of at most SEGMENT bytes or one block, not empty.

        Raises CorruptError naming the pack or index that is damaged, also for a name that the index does not have.
        """
        if self._index.file(name) is None:
            raise CorruptError(f"{self._index.path} has no file {name}")
        under_way: deque[Future[bytes]] = deque()
        try:
            for rows in _batches(self._index.rows(name)):
                if len(under_way) >= self._window:
                    yield under_way.popleft().result()
                under_way.append(self._pool.submit(self._data, rows))
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()

    def read(self, name: str, offset: int, count: int) -> bytes:
        """A part of a file. Raises as stream()."""
        if self._index.file(name) is None:
            raise CorruptError(f"{self._index.path} has no file {name}")
        wanted: list[Row] = []
        at = first = 0
        for row in self._index.rows(name):
            if at < offset + count and at + row.length > offset:
                first = first if wanted else at
                wanted.append(row)
            at += row.length
        data = self._data(wanted)
        return data[offset - first : offset - first + count]

    def _data(self, rows: list[Row]) -> bytes:
        """In a thread: the content of some blocks."""
        if self._local.decompressor is None:
            self._local.decompressor = zstandard.ZstdDecompressor()
        pieces: list[bytes | memoryview] = []
        at = 0
        while at < len(rows):
            row = rows[at]
            if row.pack == ZERO_PACK:
                pieces.append(bytes(row.length))
                at += 1
                continue
            # Blocks that lie one behind the other are read at once.
            end, stop = at, row.offset
            while end < len(rows) and rows[end].pack == row.pack and rows[end].offset == stop:
                stop += rows[end].stored
                end += 1
            data = memoryview(self._read(row.pack, stop - row.offset, row.offset))
            for one in rows[at:end]:
                begin = one.offset - row.offset
                pieces.append(self._block(one, data[begin : begin + one.stored], self._local.decompressor))
            at = end
        return b"".join(pieces)

    def _block(self, row: Row, data: memoryview, decompressor: zstandard.ZstdDecompressor) -> bytes | memoryview:
        piece: bytes | memoryview = data
        if row.stored != row.length:
            try:
                # A damaged frame may claim any size, and that is what would be allocated.
                if zstandard.frame_content_size(data) != row.length:
                    raise self._damaged(row, "its size is not what it was")
                piece = decompressor.decompress(data, max_output_size=row.length)
            except zstandard.ZstdError as error:
                raise self._damaged(row, str(error)) from None
        if len(piece) != row.length or (self._check and blake3(piece).digest() != row.digest):
            raise self._damaged(row, "it is not what was written")
        return piece

    def _damaged(self, row: Row, problem: str) -> CorruptError:
        path = self._directory / self._packs[row.pack].name
        return CorruptError(f"{path}: the block at {row.offset} is damaged: {problem}")

    def _read(self, number: int, count: int, offset: int) -> bytes:
        with self._opening:
            fd = self._descriptors.get(number)
            if fd is None:
                fd = self._descriptors[number] = open_pack(self._directory, self._packs[number])
        data = _pread(fd, count, offset)
        if len(data) != count:
            raise CorruptError(f"{self._directory / self._packs[number].name} is shorter than it was")
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        for fd in self._descriptors.values():
            os.close(fd)


def open_pack(directory: Path, pack: Pack) -> int:
    """A descriptor for reading. Raises CorruptError unless it is a regular file of the size it had; OSError for what
    says nothing of the file: storage that does not answer."""
    path = directory / pack.name
    try:
        # O_NONBLOCK: a fifo in its place must not stop us here for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise CorruptError(f"cannot open {path}: {error.strerror}") from None
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size == pack.size:
        return fd
    os.close(fd)
    if stat.S_ISREG(status.st_mode):
        raise CorruptError(f"{path} has {status.st_size} bytes, not {pack.size}")
    raise CorruptError(f"{path} is not a regular file")


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        if batch and size + row.length > SEGMENT:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += row.length
    if batch:
        yield batch
