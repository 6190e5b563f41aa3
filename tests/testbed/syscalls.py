"""System calls that Python 3.11's standard library does not have, each ending in one errno check."""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Callable

from paths import TestbedError

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, flags: int) -> None:
    """Join namespaces: `fd` is a namespace (flags 0) or a pidfd (flags name the kinds)."""
    _check(_libc.setns(fd, flags), f"setns({flags:#x})")


def mount(source: str, target: object, fstype: str = "", flags: int = 0, data: str = "") -> None:
    result = _libc.mount(
        source.encode(), os.fsencode(str(target)), fstype.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    )
    _check(result, f"mount {fstype or source} on {target}")


def bind(source: object, target: object, *, read_only: bool = False) -> None:
    """Bind-mount with everything mounted below; `read_only` holds for the topmost mount, without setuid and devices."""
    mount(str(source), target, flags=MS_BIND | MS_REC)
    if read_only:
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def pivot_root(new_root: object) -> None:
    """Make `new_root` (a mount point) the root of this mount namespace and forget the old one."""
    os.chdir(str(new_root))
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    # Old root stacked on the new one, then taken off: no directory for it is needed (pivot_root(2), NOTES).
    _check(_libc.syscall(number, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def sethostname(name: str) -> None:
    _check(_libc.sethostname(name.encode(), len(name)), "sethostname")


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when its parent, pid `parent`, ends; at once if that has happened already."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    # A parent in another pid namespace reads as 0.
    if os.getppid() not in (parent, 0):
        os.kill(os.getpid(), signal.SIGKILL)


def spawn(body: Callable[[], int]) -> int:
    """Fork a child that runs `body`, exits with its result and dies with this process; its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        die_with_parent(parent)
        status = body()
    except TestbedError as error:
        os.write(2, f"testbed: error: {error}\n".encode())
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def wait_status(pid: int) -> int:
    """The child's exit status as a shell gives it: its code, or 128 + the signal."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def contained(body: Callable[[], int], namespaces: int = 0) -> int:
    """Run `body` as pid 1 of a pid and mount namespace of its own; its exit status.

    Its mounts are seen nowhere else, and whatever it starts and mounts is gone when it ends or when this process dies.
    """

    def inside() -> int:
        mount("none", "/", flags=MS_REC | MS_PRIVATE)
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        return body()

    def outside() -> int:
        unshare(CLONE_NEWNS | CLONE_NEWPID | namespaces)
        return wait_status(spawn(inside))

    return wait_status(spawn(outside))
