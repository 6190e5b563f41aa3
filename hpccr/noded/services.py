"""Unix sockets of the job with a peer outside its capsule: well-known services, which a program can connect to anew.

CRIU cannot dump a socket whose peer is in another network namespace, and the peer would not be there after a restart.
So at the freeze these connections are cut: the program finds them closed, now and after a restart, as if the daemon had
been restarted, which the client libraries of all of these are made for.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hpccr.errors import UnsupportedError
from hpccr.noded import sockdiag, syscalls
from hpccr.noded.scan import Task, Tree, below

WELL_KNOWN = (
    "/var/lib/sss/pipes",
    "/run/nscd",
    "/var/run/nscd",
    "/run/nslcd",
    "/var/run/nslcd",
    "/run/munge",
    "/var/run/munge",
    "/dev/log",
    "/run/systemd",
    "/run/dbus",
    "/var/run/dbus",
)
"""Where stateless services have their sockets: sssd, nscd, nslcd, munge, syslog, journal, userdb, dbus."""

PATIENCE = 2.0
"""Seconds a service has to close its end after ours was shut down."""


@dataclass(frozen=True)
class Link:
    """A unix socket of a task that is connected to outside the capsule."""

    task: Task
    fd: int
    inode: int
    path: str
    """The peer's; empty if it has no name."""
    kind: int


def links(tree: Tree) -> list[Link]:
    """All of them, by process. A socket that several processes share is listed for each."""
    # Where the other end is tells nothing: the end a server accepts belongs to the client's network namespace.
    own = {inode for task in tree.tasks for inode in _sockets(task)}
    outside = {inode for inode, peer in sockdiag.unix_peers().items() if inode in own and peer and peer not in own}
    return [link for task in tree.tasks for link in _links_of(task, outside)] if outside else []


def _sockets(task: Task) -> Iterator[int]:
    try:
        for name in os.listdir(f"/proc/{task.pid}/fd"):
            text = os.readlink(f"/proc/{task.pid}/fd/{name}")
            if text.startswith("socket:["):
                yield int(text[8:-1])
    except (FileNotFoundError, ProcessLookupError):
        return  # it has ended, or closed that one


def _links_of(task: Task, outside: set[int]) -> Iterator[Link]:
    try:
        pidfd = os.pidfd_open(task.pid)
    except ProcessLookupError:
        return
    try:
        for name in os.listdir(f"/proc/{task.pid}/fd"):
            text = os.readlink(f"/proc/{task.pid}/fd/{name}")
            if text.startswith("socket:[") and (inode := int(text[8:-1])) in outside:
                with socket.socket(fileno=syscalls.pidfd_getfd(pidfd, int(name))) as copy:
                    yield Link(task, int(name), inode, _peer_name(copy), copy.type)
    except (FileNotFoundError, ProcessLookupError):
        return  # it has ended
    finally:
        os.close(pidfd)


def _peer_name(copy: socket.socket) -> str:
    name = copy.getpeername()
    return name if isinstance(name, str) else "@" + bytes(name[1:]).decode(errors="replace")


def check(tree: Tree) -> None:
    """Raises UnsupportedError naming the first connection that is to none of WELL_KNOWN."""
    for link in links(tree):
        if not below(link.path, WELL_KNOWN):
            raise UnsupportedError(
                f"process {link.task} has a unix socket to a process outside the job: {link.path or 'without a name'} "
                f"(descriptor {link.fd})",
                hint="start that service inside the job, or close the connection before the checkpoint",
            )


async def cut(tree: Tree) -> None:
    """Disconnect all of them; the tasks are frozen. Returns when the services have closed their ends.

    Raises UnsupportedError for a service that does not within PATIENCE.
    """
    found = links(tree)
    for link in found:
        _cut(link)
    limit = time.monotonic() + PATIENCE
    pause = 0.0005
    while left := [link for link in found if link.kind != socket.SOCK_DGRAM and sockdiag.unix_peers().get(link.inode)]:
        if time.monotonic() > limit:
            raise UnsupportedError(
                f"{left[0].path} does not close its connection with process {left[0].task}",
                hint="the service may be stuck: restart it",
            )
        # There is no event for what the other end does with a socket that we have shut down.
        await asyncio.sleep(pause)
        pause *= 2


def _cut(link: Link) -> None:
    pidfd = os.pidfd_open(link.task.pid)
    try:
        with socket.socket(fileno=syscalls.pidfd_getfd(pidfd, link.fd)) as copy:
            if link.kind == socket.SOCK_DGRAM:
                syscalls.disconnect(copy.fileno())
            else:
                copy.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(pidfd)
