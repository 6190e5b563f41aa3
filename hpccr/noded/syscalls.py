"""System calls that Python's os module lacks, each with one errno check. Numbers and flags: Linux uapi headers.

Every function raises OSError with what the kernel said; nothing here decides anything.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

MOUNT_ATTR_NOSYMFOLLOW = 0x00200000
RESOLVE_NO_SYMLINKS = 4

CLOSE_RANGE_CLOEXEC = 4

PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_SYNC_ALL = 1 | 2 | 4
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER."""
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

CAP_SYS_RESOURCE = 24
_CAPABILITY_VERSION_3 = 0x20080522
_KEYCTL_JOIN_SESSION_KEYRING = 1
_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219, "ppc64le": 271, "s390x": 280}
# The same on every architecture.
_SYS_OPENAT2, _SYS_PIDFD_GETFD, _SYS_MOUNT_SETATTR = 437, 438, 442
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_LAST_CAP = "/proc/sys/kernel/cap_last_cap"


def _check(result: int, *what: object) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{' '.join(str(w) for w in what)}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    encoded = (source.encode(), target.encode(), fstype.encode() or None)
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), data.encode() or None), "mount", fstype or source, "on", target)


def umount(target: str) -> None:
    _check(_libc.umount2(target.encode(), 0), "umount", target)


def mount_setattr(path: str, *, set: int = 0, clear: int = 0, recursive: bool = False) -> None:
    """Change attributes (MOUNT_ATTR_) of the mount at `path`, or of it and all below."""
    attributes = struct.pack("4Q", set, clear, 0, 0)  # struct mount_attr
    flags = _AT_RECURSIVE if recursive else 0
    arguments = (ctypes.c_char_p(path.encode()), flags, attributes, ctypes.c_size_t(len(attributes)))
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, *arguments), "mount_setattr", path)


def openat2(path: bytes, flags: int, *, resolve: int) -> int:
    """open(2), told how to go the path (RESOLVE_)."""
    how = struct.pack("3Q", flags, 0, resolve)  # struct open_how
    return _check(
        _libc.syscall(_SYS_OPENAT2, _AT_FDCWD, ctypes.c_char_p(path), how, ctypes.c_size_t(len(how))),
        "openat2",
        path.decode(errors="replace"),
    )


def open_by_handle_at(mount: int, kind: int, handle: bytes, flags: int) -> int:
    """A descriptor of the file with that handle (struct file_handle) on the file system that `mount` lies on."""
    what = struct.pack("Ii", len(handle), kind) + handle
    return _check(_libc.open_by_handle_at(mount, what, flags), "open_by_handle_at", mount)


def prctl(option: int, *arguments: int) -> int:
    padded = (*arguments, *(0,) * (4 - len(arguments)))
    return _check(_libc.prctl(option, *(ctypes.c_ulong(a) for a in padded)), "prctl", option)


def close_range(first: int, last: int = 0xFFFFFFFF, flags: int = 0) -> None:
    _check(_libc.close_range(ctypes.c_uint(first), ctypes.c_uint(last), flags), "close_range", first, last)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor from 3 on that is not in `keep`."""
    first = 3
    for fd in sorted(set(keep)):
        if fd > first:
            close_range(first, fd - 1)
        first = max(first, fd + 1)
    close_range(first)


def clear_capabilities() -> None:
    """Empty the effective, permitted and inheritable sets of the calling thread."""
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def has_capability(capability: int) -> bool:
    """Whether the calling thread has it in its effective set."""
    sets = ctypes.create_string_buffer(24)  # two of struct __user_cap_data_struct
    _check(_libc.capget(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), sets), "capget")
    low, _, _, high, _, _ = struct.unpack("6I", sets.raw)
    return bool((high << 32 | low) >> capability & 1)


def drop_bounding_set() -> None:
    """Nothing executed from here on can gain a capability, whatever the file says. Needs CAP_SETPCAP."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    with open(_LAST_CAP) as file:
        last = int(file.read())
    for capability in range(last + 1):
        prctl(PR_CAPBSET_DROP, capability)


def join_new_session_keyring() -> None:
    """Leave the inherited session keyring (root's) for an empty one; does nothing where the number is not known."""
    number = _SYS_KEYCTL.get(platform.machine())
    if number is not None:
        _check(_libc.syscall(number, _KEYCTL_JOIN_SESSION_KEYRING, None), "keyctl", "JOIN_SESSION_KEYRING")


def disconnect(fd: int) -> None:
    """Take a datagram socket's peer away (connect(2) with AF_UNSPEC)."""
    unspecified = struct.pack("H14x", 0)
    _check(_libc.connect(fd, unspecified, len(unspecified)), "connect", "AF_UNSPEC")


def file_system(fd: int) -> int:
    """Type of the file system of an open file (fstatfs(2), f_type; constants: linux/magic.h)."""
    found = ctypes.create_string_buffer(256)
    _check(_libc.fstatfs64(fd, found), "fstatfs", fd)
    (kind,) = struct.unpack_from("l", found)
    return int(kind) & 0xFFFFFFFF


def write_pages(fd: int) -> None:
    """Write out what is in memory of a file, and wait for it, without its attributes and without making the device keep
    it (sync_file_range(2))."""
    _check(_libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_ALL), "sync_file_range", fd)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back the room of a part of a file, which reads as zeros then (fallocate(2))."""
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    _check(_libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)), "fallocate", fd)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate of descriptor `fd` of the process behind `pidfd`; close-on-exec."""
    return _check(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0), "pidfd_getfd", fd)


_PTRACE_CONT, _PTRACE_STEP, _PTRACE_GETREGS, _PTRACE_SETREGS, _PTRACE_DETACH = 7, 9, 12, 13, 17
_PTRACE_SEIZE, _PTRACE_INTERRUPT = 0x4206, 0x4207


def _ptrace(request: int, pid: int, data: object = None) -> None:
    _check(_libc.ptrace(ctypes.c_long(request), pid, None, data), "ptrace", hex(request), pid)


def ptrace_seize(pid: int) -> None:
    _ptrace(_PTRACE_SEIZE, pid)


def ptrace_interrupt(pid: int) -> None:
    _ptrace(_PTRACE_INTERRUPT, pid)


def ptrace_step(pid: int) -> None:
    """Let a stopped tracee execute one instruction, system calls included."""
    _ptrace(_PTRACE_STEP, pid)


def ptrace_continue(pid: int, signal: int) -> None:
    """Let a stopped tracee go on with a signal that it was stopped for."""
    _ptrace(_PTRACE_CONT, pid, ctypes.c_void_p(signal))


def ptrace_detach(pid: int) -> None:
    _ptrace(_PTRACE_DETACH, pid)


def ptrace_get_registers(pid: int, into: ctypes.Structure) -> None:
    """into: struct user_regs_struct of this architecture."""
    _ptrace(_PTRACE_GETREGS, pid, ctypes.byref(into))


def ptrace_set_registers(pid: int, values: ctypes.Structure) -> None:
    _ptrace(_PTRACE_SETREGS, pid, ctypes.byref(values))
