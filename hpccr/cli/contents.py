"""What a capsule's images say of the processes in it, read straight from the blocks of the store.

The images are the user's own files and are not trusted: whatever is in them, the worst is a wrong table. Needs pycriu.
Formats: CRIU's images/pstree.proto, core.proto, mm.proto, fdinfo.proto, regfile.proto, sk-inet.proto, sk-unix.proto.
"""

from __future__ import annotations

import ipaddress
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from hpccr.errors import CorruptError, UnsupportedError, encodable
from hpccr.store.blocks import Reader
from hpccr.store.index import read_index
from hpccr.store.pagemap import messages, pages, pages_name

RANKS = ("PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
"""Variables by which MPI libraries tell a process its rank."""
MAX_TEXT = 256 << 10
"""Bytes of arguments or environment that are looked at."""
_INET = {6: "tcp", 17: "udp"}
_TCP_STATES = dict(enumerate(
    ("", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait", "close", "close-wait",
     "last-ack", "listen", "closing")
))  # fmt: skip
_UNIX_TYPES = {1: "unix stream", 2: "unix datagram", 5: "unix packet"}


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """memory: bytes of pages in the images. rank: of MPI, None if it is none. files, sockets: descriptors."""

    pid: int
    parent: int
    name: str
    command: str
    rank: int | None
    threads: int
    memory: int
    files: int
    sockets: int


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A regular file. position: of its descriptor, bytes."""

    path: str
    access: str
    position: int
    pids: tuple[int, ...]


class Socket(msgspec.Struct, frozen=True, kw_only=True):
    """local, peer: ADDRESS:PORT, or a unix socket's name; empty: none."""

    kind: str
    state: str
    local: str
    peer: str
    pids: tuple[int, ...]


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """One capsule's images. sizes: bytes of them by kind."""

    capsule: int
    memory: int
    ranks: int
    processes: tuple[Process, ...]
    files: tuple[File, ...]
    sockets: tuple[Socket, ...]
    sizes: dict[str, int]


def read(directory: Path, capsule: int) -> Contents:
    """The contents of a capsule's directory of the store. Raises UnsupportedError without pycriu, CorruptError,
    OSError."""
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from pycriu.images import pagemap_pb2  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"cannot look into the images: {error}", hint="install python3-pycriu here, or ask on a compute node"
        ) from None
    found = read_index(directory)
    with Reader(directory, found, check=True) as reader:
        try:
            return _Images(reader, {file.name: file.size for file in found.header.files}).contents(capsule)
        except (DecodeError, ValueError, KeyError, struct.error) as error:
            raise CorruptError(f"the images in {directory} are not CRIU's: {error!r}") from None


class _Images:
    def __init__(self, reader: Reader, sizes: dict[str, int]) -> None:
        self._reader = reader
        self._sizes = sizes

    def _all(self, name: str) -> bytes:
        return b"".join(self._reader.stream(name))

    def _entries(self, name: str, kind: Any) -> Iterator[Any]:
        for message in messages(self._all(name)):
            entry = kind()
            entry.ParseFromString(message)
            yield entry

    def _first(self, name: str, kind: Any) -> Any:
        return next(self._entries(name, kind))

    def contents(self, capsule: int) -> Contents:
        from pycriu.images import core_pb2, fdinfo_pb2, mm_pb2, pstree_pb2

        opened = {entry.id: entry for entry in self._entries("files.img", fdinfo_pb2.file_entry)}
        users: dict[int, set[int]] = {}
        processes = []
        for node in self._entries("pstree.img", pstree_pb2.pstree_entry):
            if f"mm-{node.pid}.img" not in self._sizes:
                continue  # a zombie
            core = self._first(f"core-{node.pid}.img", core_pb2.core_entry)
            memory = self._first(f"mm-{node.pid}.img", mm_pb2.mm_entry)
            ids = self._first(f"ids-{node.pid}.img", core_pb2.task_kobj_ids_entry)
            counts = [0, 0]
            for entry in self._entries(f"fdinfo-{ids.files_id}.img", fdinfo_pb2.fdinfo_entry):
                file = opened.get(entry.id)
                if file is not None:
                    users.setdefault(entry.id, set()).add(node.pid)
                    counts[0] += file.HasField("reg")
                    counts[1] += file.HasField("isk") or file.HasField("usk")
            pages_id, found = pages(self._all(f"pagemap-{node.pid}.img"))
            runs = list(found)
            environment = self._memory(pages_id, runs, memory.mm_env_start, memory.mm_env_end).split(b"\0")
            arguments = self._memory(pages_id, runs, memory.mm_arg_start, memory.mm_arg_end).split(b"\0")
            processes.append(
                Process(
                    pid=node.pid,
                    parent=node.ppid,
                    name=_text(core.tc.comm),
                    command=" ".join(word.decode(errors="replace") for word in arguments if word),
                    rank=_rank(environment),
                    threads=len(node.threads),
                    memory=sum(length for _, length, _ in runs),
                    files=counts[0],
                    sockets=counts[1],
                )
            )
        shown = [(opened[number], tuple(sorted(pids))) for number, pids in sorted(users.items())]
        return Contents(
            capsule=capsule,
            memory=sum(process.memory for process in processes),
            ranks=_ranks(processes),
            processes=tuple(processes),
            files=tuple(_file(entry.reg, pids) for entry, pids in shown if entry.HasField("reg")),
            sockets=tuple(
                [_inet(entry.isk, pids) for entry, pids in shown if entry.HasField("isk")]
                + [_unix(entry.usk, pids) for entry, pids in shown if entry.HasField("usk")]
            ),
            sizes=self._by_kind(),
        )

    def _memory(self, pages_id: int, runs: list[tuple[int, int, int]], begin: int, end: int) -> bytes:
        """What is at these addresses, as far as it is in the images."""
        found = b""
        end = min(end, begin + MAX_TEXT)
        for address, length, offset in runs:
            start, stop = max(begin, address), min(end, address + length)
            if start < stop:
                found += self._reader.read(pages_name(pages_id), offset + start - address, stop - start)
        return found

    def _by_kind(self) -> dict[str, int]:
        sizes = {"memory": 0, "processes": 0, "other": 0}
        for name, size in self._sizes.items():
            kind = "memory" if name.startswith("pages-") else "processes" if name.endswith(".img") else "other"
            sizes[kind] += size
        return sizes


def _rank(environment: list[bytes]) -> int | None:
    variables = dict(word.split(b"=", 1) for word in environment if b"=" in word)
    for name in RANKS:
        value = variables.get(name.encode(), b"")
        if value.isdigit():
            return int(value)
    return None


def _ranks(processes: list[Process]) -> int:
    """Distinct ranks: a rank's children inherit its variables."""
    return len({process.rank for process in processes if process.rank is not None})


def _text(found: str | bytes) -> str:
    """What protobuf has for a string in an image: bytes where it is not UTF-8."""
    return encodable(os.fsdecode(found))


def _file(entry: Any, pids: tuple[int, ...]) -> File:
    access = ("read", "write", "read, write", "path")[entry.flags & os.O_ACCMODE]
    if entry.flags & os.O_APPEND:
        access += ", append"
    return File(path=_text(entry.name), access=access, position=entry.pos, pids=pids)


def _inet(entry: Any, pids: tuple[int, ...]) -> Socket:
    kind = _INET.get(entry.proto, f"protocol {entry.proto}")
    state = _TCP_STATES.get(entry.state, str(entry.state)) if kind == "tcp" else ""
    local, peer = _address(entry.src_addr, entry.src_port), _address(entry.dst_addr, entry.dst_port)
    return Socket(kind=kind, state=state, local=local, peer=peer if entry.dst_port else "", pids=pids)


def _address(words: Any, port: int) -> str:
    raw = struct.pack(f"={len(words)}I", *words)  # as the kernel has them, in network order
    if len(raw) == 4:
        return f"{ipaddress.IPv4Address(raw)}:{port}"
    if len(raw) == 16:
        return f"[{ipaddress.IPv6Address(raw)}]:{port}"
    return f":{port}"


def _unix(entry: Any, pids: tuple[int, ...]) -> Socket:
    name = entry.name.replace(b"\0", b"@", 1).rstrip(b"\0").decode(errors="replace")
    state = _TCP_STATES.get(entry.state, str(entry.state))
    kind = _UNIX_TYPES.get(entry.type, "unix")
    return Socket(kind=kind, state=state, local=name, peer=f"inode {entry.peer}" if entry.peer else "", pids=pids)
