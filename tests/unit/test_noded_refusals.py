"""What is refused before a freeze: this process and its children stand for a capsule's tasks."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from hpccr.errors import UnsupportedError
from hpccr.noded import refusals, scan, watches

LIBC = ctypes.CDLL(None, use_errno=True)


def own_tree() -> scan.Tree:
    own = scan.read_task(os.getpid())
    assert own is not None
    return scan.Tree(own.pid, [own])


def refused(words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        refusals.check_open(own_tree(), [])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("processes", "lost"),
    [
        # pid: (parent, session); 301 is the root.
        ({301: (1, 301), 302: (301, 301), 303: (302, 303), 304: (303, 303)}, None),
        ({301: (1, 301), 310: (301, 305), 311: (310, 305), 312: (301, 305)}, None),  # a daemon: 305 has ended
        ({301: (1, 301), 303: (301, 303), 304: (303, 301)}, None),  # forked before its parent's setsid()
        ({301: (1, 301), 310: (301, 305), 311: (310, 301)}, None),  # the same of an orphan
        ({301: (1, 301), 302: (301, 301), 311: (302, 309)}, 311),  # 302 has taken it in
        ({301: (1, 301), 302: (301, 302), 303: (302, 303), 304: (303, 302), 305: (303, 301)}, 305),
        ({301: (1, 301), 302: (301, 301), 303: (302, 0)}, 303),
    ],
)
def test_tasks_whose_session_criu_could_not_make_again(processes: dict[int, tuple[int, int]], lost: int | None) -> None:
    own = scan.read_task(os.getpid())
    assert own is not None
    tree = scan.Tree(301, [replace(own, pid=pid, parent=parent) for pid, (parent, _) in processes.items()])
    found = refusals.without_leader(tree, {pid: session for pid, (_, session) in processes.items()})
    assert (found.pid if found else None) == lost
    # One that has ended meanwhile is nobody's affair.
    assert refusals.without_leader(tree, {301: 301}) is None


def test_an_orphan_in_a_session_of_its_own_is_refused_by_name() -> None:
    """A subreaper below the root takes in a process whose session leader has ended."""
    script = """
import ctypes, os, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
reading, writing = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    os.write(writing, b"x")
    time.sleep(60)
os.wait()
os.read(reading, 1)
print("ready", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        relatives = os.getpid(), process.pid
        family = [task for task in scan.processes() if task.pid in relatives or task.parent == process.pid]
        tree = scan.Tree(os.getpid(), family)
        try:
            with pytest.raises(UnsupportedError, match=r"\(python\S*\) is in a session whose leader has ended"):
                refusals.check_sessions(tree)
        finally:
            for task in tree.tasks:
                if task.parent == process.pid:
                    os.kill(task.pid, signal.SIGKILL)
            process.kill()


def test_an_io_uring_is_refused_by_name() -> None:
    number = LIBC.syscall(425, 4, ctypes.create_string_buffer(120))
    if number < 0:
        refusals.check_open(own_tree(), [])  # this kernel gives nobody one
        return
    try:
        with pytest.raises(UnsupportedError, match=r"io_uring open") as caught:
            refusals.check_open(own_tree(), [])
        assert "epoll" in caught.value.hint
    finally:
        os.close(number)


def test_what_every_program_has_passes(tmp_path: Path) -> None:
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    kinds = [(family, kind) for family in families for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
    sockets = [socket.socket(*kind) for kind in (*kinds, (socket.AF_NETLINK, socket.SOCK_RAW))]
    fds = [os.eventfd(0), os.memfd_create("m"), os.pidfd_open(os.getpid()), LIBC.inotify_init(), LIBC.epoll_create(1)]
    fds += [LIBC.timerfd_create(1, 0), LIBC.signalfd(-1, ctypes.create_string_buffer(128), 0)]
    try:
        assert min(fds) >= 0
        refusals.check_open(own_tree(), [])
        refusals.check_traced(own_tree())
    finally:
        for one in sockets:
            one.close()
        for fd in fds:
            os.close(fd)


def test_a_protocol_that_criu_does_not_know_is_named() -> None:
    for family, protocol, name in ((socket.AF_INET, 262, "MPTCP"), (40, 0, "AF_VSOCK")):
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM, protocol):
            refused(f"protocol {name} open")


def test_what_a_corked_socket_holds_back_is_told() -> None:
    for family, protocol in ((socket.AF_INET, socket.IPPROTO_UDP), (socket.AF_INET6, socket.IPPROTO_UDPLITE)):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM, protocol) as one:
            refusals.check_open(own_tree(), [])
            one.setsockopt(protocol, 1, 1)
            refused(f"UDP_CORK set .descriptor {one.fileno()}")


def test_a_pidfd_of_a_thread_is_named() -> None:
    try:
        fd = os.pidfd_open(os.getpid(), os.O_EXCL)
    except OSError as error:
        assert error.errno == errno.EINVAL  # before Linux 6.9
        return
    try:
        refused(f"pidfd of a thread open .descriptor {fd}")
    finally:
        os.close(fd)


def test_what_is_watched_is_read_from_the_kernel(tmp_path: Path) -> None:
    """As fs/notify/fdinfo.c writes it."""
    fd = LIBC.inotify_init()
    try:
        assert LIBC.inotify_add_watch(fd, os.fsencode(tmp_path), 0x100) == 1
        with open(f"/proc/self/fdinfo/{fd}") as file:
            (watch,) = watches.parse(file)
        status = tmp_path.stat()
        assert watch.inode == status.st_ino and len(watch.handle) >= 8
        assert watches.lost([], set) == ""
        # Not st_dev everywhere: btrfs and overlayfs have numbers of their own for it.
        assert watch.device in [status.st_dev, *_devices()]
    finally:
        os.close(fd)
    (bare,) = watches.parse(["pos:\t0", "inotify wd:1 ino:5 sdev:800003 mask:100 ignored_mask:0 "])
    assert bare == watches.Watch(os.makedev(8, 3), 5, 0, b"")


def _devices() -> list[int]:
    with open("/proc/self/mountinfo") as file:
        return [os.makedev(*map(int, line.split()[2].split(":"))) for line in file]


def test_a_message_queue_is_named() -> None:
    name = f"/hpccr-{os.getpid()}".encode()
    queue = LIBC.mq_open(name, os.O_RDWR | os.O_CREAT, 0o600, None)
    assert queue >= 0, os.strerror(ctypes.get_errno())
    try:
        refused(f"message queue {name.decode()}")
    finally:
        os.close(queue)
        LIBC.mq_unlink(name)


def test_a_traced_task_is_named() -> None:
    (own,) = own_tree().tasks
    with pytest.raises(UnsupportedError, match=r"is traced by process 77"):
        refusals.check_traced(scan.Tree(own.pid, [replace(own, tracer=77)]))


def test_who_is_traced_is_read_from_the_kernel() -> None:
    pid = os.fork()
    if pid == 0:
        LIBC.ptrace(0, 0, None, None)
        signal.raise_signal(signal.SIGSTOP)
        os._exit(0)
    try:
        os.waitpid(pid, os.WUNTRACED)
        found = scan.read_task(pid)
        assert found is not None and found.tracer == os.getpid()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_large_file_without_a_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "mappings", lambda pid: ())  # only root can look at what is mapped
    path = tmp_path / "scratch"
    with path.open("wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        refusals.check_ghosts(own_tree(), 1)
        path.unlink()
        refusals.check_ghosts(own_tree(), 2 << 20)
        with pytest.raises(UnsupportedError, match=f"{path} open, a file without a name") as caught:
            refusals.check_ghosts(own_tree(), 1 << 19)
        assert "ghost_limit" in caught.value.hint
