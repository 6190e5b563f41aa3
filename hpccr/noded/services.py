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
from contextlib import suppress
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
    own = {inode for task in tree.tasks for _, inode in _sockets(tree, task)}
    outside = {inode for inode, peer in sockdiag.unix_peers().items() if inode in own and peer and peer not in own}
    return [link for task in tree.tasks for link in _links_of(tree, task, outside)] if outside else []


def _sockets(tree: Tree, task: Task) -> Iterator[tuple[int, int]]:
    for fd, link in tree.links(task):
        if link.startswith("socket:["):
            yield int(fd), int(link[8:-1])


def _links_of(tree: Tree, task: Task, outside: set[int]) -> Iterator[Link]:
    for fd, inode in _sockets(tree, task):
        if inode in outside:
            # It has ended, or closed that one.
            with suppress(OSError), _copy(task.pid, fd) as copy:
                yield Link(task, fd, inode, _peer_name(copy), copy.type)


def _copy(pid: int, fd: int) -> socket.socket:
    pidfd = os.pidfd_open(pid)
    try:
        return socket.socket(fileno=syscalls.pidfd_getfd(pidfd, fd))
    finally:
        os.close(pidfd)


def _peer_name(copy: socket.socket) -> str:
    name = copy.getpeername()
    return name if isinstance(name, str) else "@" + bytes(name[1:]).decode(errors="replace")


def check(tree: Tree) -> list[Link]:
    """What there is to cut. Raises UnsupportedError naming the first connection that is to none of WELL_KNOWN."""
    found = links(tree)
    for link in found:
        if not below(link.path, WELL_KNOWN):
            raise UnsupportedError(
                f"process {link.task} has a unix socket to a process outside the job: {link.path or 'without a name'} "
                f"(descriptor {link.fd})",
                hint="start that service inside the job, or close the connection before the checkpoint",
            )
    return found


async def cut(found: list[Link]) -> None:
    """Disconnect all of them; the tasks are frozen. Returns when the services have closed their ends.

    Raises UnsupportedError for a service that does not within PATIENCE.
    """
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
    with _copy(link.task.pid, link.fd) as copy:
        if link.kind == socket.SOCK_DGRAM:
            syscalls.disconnect(copy.fileno())
        else:
            copy.shutdown(socket.SHUT_RDWR)
