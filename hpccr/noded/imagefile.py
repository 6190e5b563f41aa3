"""CRIU's image files as protobuf messages, entry by entry: pycriu's own reader makes dictionaries of them, which takes
tens of times as long, and a large node has thousands.

Layout (criu.org/Images, pycriu/images/images.py): two magic numbers, then size and message of each entry.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

from hpccr.errors import CorruptError

_HEAD = 8
_SIZE = struct.Struct("=I")


def read(directory: int, name: str, kind: Callable[[], Any]) -> list[Any]:
    """The entries of an image of that kind of message; none where CRIU had nothing to put into it, and made none."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return []
    with os.fdopen(fd, "rb") as file:
        return [*_entries(file.read(), kind)]


def path(entry: Any) -> str:
    """The absolute path in a message of regular files (reg_file_entry); "" where it is not to be read as text."""
    try:
        return "/" + os.fsdecode(entry.name).lstrip("/")
    except UnicodeDecodeError:
        return ""  # what protobuf's Python makes of other bytes differs between its implementations


def first(directory: int, name: str, kind: Callable[[], Any]) -> Any:
    """The first entry of an image, after which other things may follow. Raises CorruptError if there is none."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        raise CorruptError(f"the images lack {name}") from None
    with os.fdopen(fd, "rb") as file:
        head = file.read(_HEAD + _SIZE.size)
        if len(head) < _HEAD + _SIZE.size:
            raise CorruptError(f"{name} is no image of CRIU's")
        return next(_entries(head + file.read(*_SIZE.unpack_from(head, _HEAD)), kind))


def change(directory: int, name: str, kind: Callable[[], Any], edit: Callable[[Any], bool]) -> None:
    """Let edit() change the entries of an image, which nobody has read yet; it says whether it has. Where the file has
    other names, what they lead to stays as it was: kept images are such."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    with os.fdopen(fd, "rb") as file:
        data = file.read()
    entries = [*_entries(data, kind)]
    if not [entry for entry in entries if edit(entry)]:
        return
    new = f"{name}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    with os.fdopen(fd, "wb") as file:
        file.write(data[:_HEAD])
        for entry in entries:
            message = entry.SerializeToString()
            file.write(_SIZE.pack(len(message)) + message)
    os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)


def _entries(data: bytes, kind: Callable[[], Any]) -> Iterator[Any]:
    place = _HEAD
    while place < len(data):
        entry = kind()
        try:
            (size,) = _SIZE.unpack_from(data, place)
            place += _SIZE.size
            entry.ParseFromString(data[place : place + size])
        except Exception as error:  # whatever protobuf raises for bytes that are no message
            raise CorruptError(f"this is no image of CRIU's: {error}") from None
        yield entry
        place += size
