"""A file system on which root may open nothing: fanotify(7) asks before every open; root is refused and noted."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
from pathlib import Path

_CLASS_CONTENT, _CLOEXEC, _UNLIMITED_QUEUE = 0x4, 0x1, 0x10
_MARK_ADD, _MARK_FILESYSTEM = 0x1, 0x100
_OPEN_PERM, _ONDIR = 0x10000, 0x40000000
_ALLOW, _DENY = 1, 2
_EVENT = struct.Struct("=IBBHQii")
_AT_FDCWD = -100


class Opens:
    """While it is entered, no process with uid 0 but this one can open anything on the file system of `path`.

    by_root: what was tried. by_users: the uids of those who were let.
    """

    def __init__(self, path: Path) -> None:
        self.by_root: list[str] = []
        self.by_users: set[int] = set()
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.fanotify_init(_CLASS_CONTENT | _CLOEXEC | _UNLIMITED_QUEUE, os.O_RDONLY | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "fanotify_init")
        libc.fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]
        if libc.fanotify_mark(
            self._fd, _MARK_ADD | _MARK_FILESYSTEM, _OPEN_PERM | _ONDIR, _AT_FDCWD, os.fsencode(path)
        ):
            raise OSError(ctypes.get_errno(), "fanotify_mark")
        self._stop, self._stopping = os.pipe()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Opens:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._stopping)
        self._thread.join()
        os.close(self._fd)  # whoever still waits is let
        os.close(self._stop)

    def _serve(self) -> None:
        while self._stop not in select.select([self._fd, self._stop], [], [])[0]:
            events = os.read(self._fd, 4096)
            while events:
                length, _, _, _, _, fd, pid = _EVENT.unpack(events[: _EVENT.size])
                events = events[length:]
                os.write(self._fd, struct.pack("=iI", fd, _ALLOW if self._may(fd, pid) else _DENY))
                os.close(fd)

    def _may(self, fd: int, pid: int) -> bool:
        if pid == os.getpid():
            return True
        uid = _uid(pid)
        if uid:
            self.by_users.add(uid)
            return True
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        self.by_root.append(f"{command}: {os.readlink(f'/proc/self/fd/{fd}')}")
        return False


def _uid(pid: int) -> int:
    """Of a process's file accesses. It waits for our answer, so it is there."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[4])
    raise AssertionError("no Uid")
