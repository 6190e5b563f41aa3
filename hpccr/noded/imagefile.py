"""CRIU's image files as protobuf messages, entry by entry: pycriu's own reader makes dictionaries of them, which takes
tens of times as long, and a large node has thousands.

Layout (criu.org/Images, pycriu/images/images.py): two magic numbers, then size and message of each entry.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

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


def change(directory: int, name: str, kind: Callable[[], Any], edit: Callable[[Any], bool]) -> None:
    """Let edit() change the entries of an image, which nobody has read yet; it says whether it has."""
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    with os.fdopen(fd, "r+b") as file:
        data = file.read()
        entries = [*_entries(data, kind)]
        if [entry for entry in entries if edit(entry)]:
            file.seek(_HEAD)
            for entry in entries:
                message = entry.SerializeToString()
                file.write(_SIZE.pack(len(message)) + message)
            file.truncate()


def _entries(data: bytes, kind: Callable[[], Any]) -> Iterator[Any]:
    place = _HEAD
    while place < len(data):
        (size,) = _SIZE.unpack_from(data, place)
        place += _SIZE.size
        entry = kind()
        entry.ParseFromString(data[place : place + size])
        yield entry
        place += size
