"""Pseudo-terminals that nothing writes to any more.

When the last descriptor of a slave is closed its master is hung up: poll(2) says so, after what was written before, and
by that a terminal emulator, script(1), or an mpirun that gives its ranks one knows that they have ended. CRIU makes the
master anew, and the kernel takes it for one whose slave nobody has opened yet: whoever waits would wait for ever, and
what was not read is lost (CRIU saves that only where both ends are open). CRIU also makes it as root, so that the user
could not open the slave.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import termios
from collections.abc import Mapping
from contextlib import suppress

from hpccr.noded import child, scan, syscalls
from hpccr.noded.capsule import Capsule

_PLACE = "/dev/pts"
_TIOCGPTN, _TIOCGPKT = 0x80045430, 0x80045438
_CHUNK = 64 << 10
_MOST = 1 << 20
"""Bytes that can wait in a terminal, and then some: the user's processes outside the job may write to it meanwhile."""


def _file(number: int) -> str:
    """In the directory of the images: what was not read yet."""
    return f"terminal-{number}.data"


def save(capsule: Capsule, tree: scan.Tree, directory: int) -> tuple[int, ...]:
    """The numbers below /dev/pts of the masters that stopped tasks have and that are hung up. What is to be read from
    them is saved, and is there afterwards as it was. Raises HpccrError, OSError."""
    found: dict[int, bytes] = {}
    for task in tree.tasks:
        masters = [int(fd) for fd, link in tree.links(task) if link.endswith("/ptmx")]
        if not masters:
            continue
        pidfd = os.pidfd_open(task.pid)
        try:
            for fd in masters:
                copy = syscalls.pidfd_getfd(pidfd, fd)
                try:
                    with suppress(OSError):  # it is something else of that name
                        _read(copy, found)
                finally:
                    os.close(copy)
        finally:
            os.close(pidfd)
    unread = {number: data for number, data in found.items() if data}
    if unread:
        child.call(lambda: _hang_up(unread), identity=capsule.identity)
    for number, data in unread.items():
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with os.fdopen(os.open(_file(number), flags, 0o600, dir_fd=directory), "wb") as file:
            file.write(data)
    return tuple(sorted(found))


def _read(master: int, found: dict[int, bytes]) -> None:
    """If it is hung up, take what there is out of it."""
    poll = select.poll()
    poll.register(master, select.POLLIN)

    def state() -> int:
        return next((events for _, events in poll.poll(0)), 0)

    if not state() & select.POLLHUP:
        return
    (number,) = struct.unpack("i", fcntl.ioctl(master, _TIOCGPTN, bytes(4)))
    (packets,) = struct.unpack("i", fcntl.ioctl(master, _TIOCGPKT, bytes(4)))
    data = found.setdefault(number, b"")
    with suppress(OSError):  # EIO, at the end
        while len(data) < _MOST and state() & select.POLLIN and (piece := os.read(master, _CHUNK)):
            # In packet mode a byte of the kernel's comes first: 0 says that data follow (ioctl_tty(2)).
            data += piece if not packets else piece[1:] if piece[0] == 0 else b""
            found[number] = data


def restore(capsule: Capsule, numbers: tuple[int, ...], directory: int) -> None:
    """After CRIU has made the masters; numbers: what save() gave. Raises HpccrError, OSError."""
    uid = capsule.identity.uid
    place = os.open(_PLACE, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # The capsule's own devpts: there is nothing in it but the terminals of its tasks.
        for name in os.listdir(place):
            if name.isdecimal() and os.stat(name, dir_fd=place, follow_symlinks=False).st_uid != uid:
                os.chown(name, uid, -1, dir_fd=place, follow_symlinks=False)
    finally:
        os.close(place)
    if numbers:
        unread = {number: _saved(number, directory) for number in numbers}
        child.call(lambda: _hang_up(unread), identity=capsule.identity)


def _saved(number: int, directory: int) -> bytes:
    try:
        fd = os.open(_file(number), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return b""
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _hang_up(unread: Mapping[int, bytes]) -> None:
    """Open the slaves, write this into them and close them. As the user."""
    for number, data in unread.items():
        try:
            slave = os.open(f"{_PLACE}/{number}", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            print(f"hpccr: cannot hang up terminal {number}: {error}", file=sys.stderr)
            continue
        try:
            settings = termios.tcgetattr(slave)
            plain = [*settings]
            plain[1] &= ~termios.OPOST  # it has been processed
            termios.tcsetattr(slave, termios.TCSANOW, plain)
            left = memoryview(data)
            while left:
                left = left[os.write(slave, left) :]
            termios.tcsetattr(slave, termios.TCSANOW, settings)
        except OSError as error:
            print(f"hpccr: what was not read from terminal {number} is lost: {error}", file=sys.stderr)
        finally:
            os.close(slave)
