"""The page that the ranks of a capsule share with the capsule's init: layout and claims, as in mpi/page.h.

The protocol is in docs/internals/quiesce.md. Numbers are 64-bit words of the page unless said otherwise.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import sys
import time

PATH = "/dev/shm/hpccr-quiesce"  # noqa: S108 - each capsule has its own /dev/shm
MAGIC = 0x3230514343504848
MAX_ENTRIES = 1024
SIZE = 4096 + 128 * MAX_ENTRIES

MAGIC_WORD, CLAIMED = 0, 1
ASKED, ENDED, OUTCOMES, TARGETED, GO, RESTARTS, PATIENCE = 8, 9, 10, 12, 13, 14, 15  # two outcomes
ENTRIES, ENTRY = 512, 16
# Words of an entry: pid, size, rank, world and state are halves (32 bits) from the second word on.
GROUP, HALVES = 0, 2
PID, SIZE_OF_GROUP, RANK, WORLD, STATE = range(5)
COUNT, WAITING, ARRIVED, FINISHED, TARGET, PENDING, LEFT, GAP = range(8, 16)
ACTIVE, GONE = 1, 2
UNCOUNTED = 0xFFFFFFFFFFFFFFFF
"""In PENDING: this rank's messages were not counted."""

WISHES = "\0hpccr-request"
CLAIMS = "\0hpccr-claim"


def in_capsule() -> bool:
    """Whether this process is in a capsule.

    The variable alone does not tell: sbatch takes it along into other jobs. Its value neither: mpirun gives all its
    ranks its own environment, on whichever capsule they are.
    """
    kind, _, number = os.uname().nodename.partition("-")
    return os.environ.get("HPCCR_CAPSULE", "") != "" and kind == "hpccr" and number.isdecimal()


def private() -> memoryview:
    """A page in which nothing is ever asked, for outside of a capsule."""
    return memoryview(bytearray(SIZE)).cast("Q")


def attach() -> memoryview:
    """The page of this capsule as 64-bit words; outside of one, or where there can be none, a private one."""
    if not in_capsule():
        return private()
    try:
        fd = os.open(PATH, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, SIZE)
            page = memoryview(mmap.mmap(fd, SIZE)).cast("Q")
        finally:
            os.close(fd)
    except OSError:
        return private()
    if page[MAGIC_WORD] not in (0, MAGIC):
        print(
            f"hpccr: safe points are without effect: {PATH} was made by another version of hpccr's MPI library",
            file=sys.stderr,
        )
        return private()
    page[MAGIC_WORD] = MAGIC
    return page


def claim(page: memoryview, *, first: bool) -> tuple[memoryview, int]:
    """A page and the first word of an entry in it that is this process's and not active yet.

    The page is `page`, or a private one if that has no entry left. first: it is the first of this process.
    """
    if not in_capsule():
        return private(), ENTRIES
    halves = page.cast("B").cast("I")
    with _lock():
        claimed = page[CLAIMED]
        for place in range(min(claimed, MAX_ENTRIES) if first else 0):
            # Of one that had this process's number and died without MPI_Finalize.
            if halves[2 * (ENTRIES + ENTRY * place) + HALVES + PID] == os.getpid():
                halves[2 * (ENTRIES + ENTRY * place) + HALVES + PID] = 0
        place = 0
        while place < min(claimed, MAX_ENTRIES) and _in_use(halves[2 * (ENTRIES + ENTRY * place) + HALVES + PID]):
            place += 1
        if place == MAX_ENTRIES:
            print(
                f"hpccr: {MAX_ENTRIES} sets of communicators times ranks have safe points on this node; those of one "
                "more cannot be waited for by checkpoints",
                file=sys.stderr,
            )
            return private(), ENTRIES
        entry = ENTRIES + ENTRY * place
        halves[2 * entry + HALVES + STATE] = 0
        halves[2 * entry + HALVES + PID] = os.getpid()
        for word in range(COUNT, GAP + 1):
            page[entry + word] = 0
        if place == claimed:
            page[CLAIMED] = claimed + 1
    return page, entry


def _in_use(pid: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _lock() -> socket.socket:
    """A name in the capsule's network namespace that one process can have at a time, and loses when it dies.

    A file lock would do as well, but CRIU refuses processes that hold one.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    while True:
        try:
            sock.bind(CLAIMS)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                sock.close()
                raise
            time.sleep(0.0005)
        else:
            return sock
