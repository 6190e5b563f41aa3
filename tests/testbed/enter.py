"""Running a command inside a node, or inside the root file system alone."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
from pathlib import Path

import boot
import cgroups
from overlay import mount_scratch_root
from paths import CHECKOUT, Instance, TestbedError
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


def run_in_node(instance: Instance, node: str, user: str, command: list[str]) -> int:
    """Run `command` on the node as `user` with this process's stdio; its exit status as a shell gives it.

    The command is killed with this process; SIGINT, SIGTERM and SIGHUP are passed on to it.
    """
    boot.known(instance, node)
    pid = boot.pid_one(instance, node)
    accounts = boot.Accounts(Path(f"/proc/{pid}/root"))
    environment = _environment(accounts, user)
    pidfd = os.pidfd_open(pid)
    setns(pidfd, CLONE_NEWPID)  # for the children; the caller stays what it is
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            cgroups.join(instance.name, node)
            setns(pidfd, _ENTERED)
            _exec(accounts, user, command, environment, parent)
        except TestbedError as error:
            os.write(2, f"testbed: error: {error}\n".encode())
        except OSError as error:
            os.write(2, f"testbed: error: entering {node}: {error}\n".encode())
        finally:
            os._exit(1)
    return _wait_passing_signals(child)


def run_in_chroot(layers: list[Path], user: str, command: list[str]) -> int:
    """Run `command` in a fresh copy of the root file system: /src read-only, no network but loopback, nothing kept."""

    def inside() -> int:
        os.setsid()
        _loopback_up()
        root = _scratch_root(layers)
        accounts = boot.Accounts(root)
        environment = _environment(accounts, user) | _TOOLS_WRITE_ELSEWHERE
        os.chroot(root)
        os.chdir("/src")
        child = os.fork()
        if child == 0:
            try:
                _exec(accounts, user, command, environment, 1)
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


def _environment(accounts: boot.Accounts, user: str) -> dict[str, str]:
    environment = {
        "PATH": _PATH,
        "HOME": accounts.home(user),
        "USER": user,
        "LOGNAME": user,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
    }
    passed = ("TERM", "HPCCR_SOAK", "HPCCR_SEED", "CI", "HYPOTHESIS_PROFILE")
    return environment | {key: os.environ[key] for key in passed if key in os.environ}


def _exec(accounts: boot.Accounts, user: str, command: list[str], environment: dict[str, str], parent: int) -> None:
    """Become `command` run by `user`, in its home unless the directory is set already; does not return normally."""
    uid, gid = accounts.ids(user)
    os.setgroups(accounts.groups(user))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    os.umask(0o022)
    # Changing ids clears this, so it comes after.
    die_with_parent(parent)
    if os.getcwd() == "/":
        os.chdir(environment["HOME"])
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(2, f"testbed: error: cannot run {command[0]}: {error.strerror}\n".encode())
        os._exit(_NOT_FOUND)


def _wait_passing_signals(child: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, _: os.kill(child, signum))
    return wait_status(child)


def _scratch_root(layers: list[Path]) -> Path:
    root = mount_scratch_root(layers)
    bind(CHECKOUT, root / "src", read_only=True)
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
