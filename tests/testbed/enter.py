"""Running a command inside a node, or inside the root file system alone."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import boot
import cgroups
from overlay import mount_scratch_root
from paths import CHECKOUT, Instance
from syscalls import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    bind,
    contained,
    die_with_parent,
    mount,
    setns,
    wait_status,
)

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENTERED = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP
_NOT_FOUND = 127


class Entry:
    """A user's way into a node: all that can be looked up before the fork, so that little is done after it."""

    def __init__(self, instance: Instance, node: str, user: str, outside: Mapping[str, str] = os.environ) -> None:
        """outside: whose variables of some names are passed on. Raises TestbedError for a node or user that is not."""
        boot.known(instance, node)
        pid = boot.pid_one(instance, node)
        self._instance, self._node, self._user = instance, node, user
        self._accounts = boot.Accounts(Path(f"/proc/{pid}/root"))
        self.environment = _environment(self._accounts, user, outside)
        self._pidfd = os.pidfd_open(pid)
        cgroups.hierarchies()  # in the child /proc is another's

    def close(self) -> None:
        os.close(self._pidfd)

    @contextmanager
    def children(self) -> Iterator[None]:
        """What this thread forks in this block is among the node's processes; the thread itself stays what it is."""
        own = os.open("/proc/thread-self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(self._pidfd, CLONE_NEWPID)
            try:
                yield
            finally:
                setns(own, CLONE_NEWPID)
        finally:
            os.close(own)

    def become(self) -> None:
        """In a child of that block, which is killed when its parent ends: the user's, in its home on the node. What
        goes wrong is said on stderr, and ends it."""
        try:
            cgroups.join(self._instance.name, self._node)
            setns(self._pidfd, _ENTERED)
            _become(self._accounts, self._user)
            # In a pid namespace of its own it does not see its parent, which is there, or the signal would be.
            die_with_parent(0)
            os.chdir(self.environment["HOME"])
        except BaseException as error:
            os.write(2, f"testbed: error: entering {self._node}: {error}\n".encode())
            os._exit(1)


def run_in_node(instance: Instance, node: str, user: str, command: list[str]) -> int:
    """Run `command` on the node as `user` with this process's stdio; its exit status as a shell gives it.

    The command is killed with this process; SIGINT, SIGTERM and SIGHUP are passed on to it.
    """
    entry = Entry(instance, node, user)
    with entry.children():
        child = os.fork()
        if child == 0:
            entry.become()
            _exec(command, entry.environment)
    return _wait_passing_signals(child)


def compile_sources(layers: list[Path]) -> None:
    """The nodes see the checkout read-only, so each process would compile anew what it imports of hpccr: leave Python's
    own cache beside the sources, as an installation has it."""
    run_in_chroot(layers, "root", ["python", "-m", "compileall", "-q", "/src/hpccr"], writable=True)


def run_in_chroot(layers: list[Path], user: str, command: list[str], *, writable: bool = False) -> int:
    """Run `command` in a fresh copy of the root file system: no network but loopback, nothing kept; writable: /src is
    not read-only."""

    def inside() -> int:
        os.setsid()
        _loopback_up()
        root = _scratch_root(layers, writable)
        accounts = boot.Accounts(root)
        environment = _environment(accounts, user) | _TOOLS_WRITE_ELSEWHERE
        os.chroot(root)
        os.chdir("/src")
        child = os.fork()
        if child == 0:
            try:
                _become(accounts, user)
                die_with_parent(1)
                _exec(command, environment)
            finally:
                os._exit(1)
        # This is pid 1: it takes in orphans until the command has ended.
        while True:
            pid, status = os.wait()
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code

    return contained(inside, CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)


# The checkout is read-only there, and hypothesis and pytest warn when they cannot keep their notes.
_TOOLS_WRITE_ELSEWHERE = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "MYPY_CACHE_DIR": "/tmp/mypy",
    "RUFF_CACHE_DIR": "/tmp/ruff",
    "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
    "PYTEST_ADDOPTS": "-p no:cacheprovider",
    "PATH": f"/opt/hpccr/bin:{_PATH}",
}


def _environment(accounts: boot.Accounts, user: str, outside: Mapping[str, str] = os.environ) -> dict[str, str]:
    environment = {
        "PATH": _PATH,
        "HOME": accounts.home(user),
        "USER": user,
        "LOGNAME": user,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
    }
    passed = ("TERM", "HPCCR_SOAK", "HPCCR_SEED", "CI", "HYPOTHESIS_PROFILE")
    return environment | {key: outside[key] for key in passed if key in outside}


def _become(accounts: boot.Accounts, user: str) -> None:
    uid, gid = accounts.ids(user)
    os.setgroups(accounts.groups(user))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    os.umask(0o022)


def _exec(command: list[str], environment: dict[str, str]) -> NoReturn:
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(2, f"testbed: error: cannot run {command[0]}: {error.strerror}\n".encode())
    os._exit(_NOT_FOUND)


def _wait_passing_signals(child: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, _: os.kill(child, signum))
    return wait_status(child)


def _scratch_root(layers: list[Path], writable: bool) -> Path:
    root = mount_scratch_root(layers)
    bind(CHECKOUT, root / "src", read_only=not writable)
    mount("proc", root / "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", root / "sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    boot.make_devices(root / "dev")
    for directory, mode in {"tmp": "1777", "run": "0755"}.items():
        mount("tmpfs", root / directory, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode}")
    boot.make_homes(root / "shared")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    return root


def _loopback_up() -> None:
    """Set IFF_UP on lo (netdevice(7), SIOCSIFFLAGS)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 1))
