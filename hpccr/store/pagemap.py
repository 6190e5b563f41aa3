"""Where CRIU's page images are to be cut, so that a page finds its twin in the checkpoint before.

pages-N.img holds the contents of pages one after another; the pagemap image with the same pages_id says at which
addresses they were (images/pagemap.proto of CRIU). A page that is new shifts all that come after it, so blocks are cut
at addresses and not at offsets: a block never reaches over a multiple of the block size in the address space.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator

PREFIX = "pagemap-"
"""Names of pagemap images begin with this, of page images with "pages-"."""

_MAGIC_BYTES = 8
"""Two magic numbers in front of every CRIU image."""
_PRESENT = 1 << 2
"""PE_PRESENT: the pages are in this image."""


def pages_name(pages_id: int) -> str:
    return f"pages-{pages_id}.img"


def cuts(pagemap: bytes, block: int) -> tuple[int, array[int]]:
    """(pages_id, offsets in its page image at which a block ends, ascending) of a pagemap image.

    No block is longer than `block`, a power of two of at least a page. Needs pycriu: raises ImportError without it,
    ValueError for what is no pagemap image.
    """
    pages_id, runs = pages(pagemap)
    ends = array("Q")
    begin = offset = 0
    window = -1
    for address, length, _ in runs:
        end = address + length
        while address < end:
            step = min(end, (address // block + 1) * block) - address
            if offset > begin and (address // block != window or offset + step - begin > block):
                ends.append(offset)
                begin = offset
            window = address // block
            offset += step
            address += step
    if offset > begin:
        ends.append(offset)
    return pages_id, ends


def pages(pagemap: bytes) -> tuple[int, Iterator[tuple[int, int, int]]]:
    """(pages_id, (address, bytes, offset in its page image) of each run of pages that are there) of a pagemap image.

    Raises as cuts(), ValueError also while the runs are gone through: they may be millions, and are made one by one.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from pycriu.images import pagemap_pb2

    head = pagemap_pb2.pagemap_head()
    found = messages(pagemap)
    try:
        head.ParseFromString(next(found))
    except (DecodeError, StopIteration) as error:
        raise ValueError(f"not a pagemap image: {error}") from None

    def runs() -> Iterator[tuple[int, int, int]]:
        entry = pagemap_pb2.pagemap_entry()
        offset = 0
        for message in found:
            try:
                entry.ParseFromString(message)
            except DecodeError as error:
                raise ValueError(f"not a pagemap image: {error}") from None
            if not (entry.flags & _PRESENT if entry.HasField("flags") else not entry.in_parent):
                continue
            length = (entry.nr_pages or entry.compat_nr_pages) * mmap.PAGESIZE
            if length:
                yield entry.vaddr, length, offset
            offset += length

    return head.pages_id, runs()


def messages(image: bytes) -> Iterator[bytes]:
    """The entries of an image, of a kind without anything between them. Raises ValueError if it is cut off."""
    view = memoryview(image)
    at = _MAGIC_BYTES
    while at < len(view):
        size = int.from_bytes(view[at : at + 4], "little")
        at += 4 + size
        if at > len(view):
            raise ValueError("an image that is cut off")
        yield bytes(view[at - size : at])
