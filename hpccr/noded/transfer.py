"""The transfer process: carries one capsule's images between the spool and the store, as root, beside hpccrd.

Started by noded.transferring as `python -I -m hpccr.noded.transfer FD`, FD being the locked spool directory. It reads
one FlushJob or FetchJob (msgpack) from stdin and writes Events as JSON lines to stdout; nobody has to read them: a
flush goes on when hpccrd is gone. It never opens a path in the store: that does the worker (noded.storeworker), a child
with the user's ids and no privileges.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import shutil
import signal
import stat
import sys
import time
from collections import deque
from collections.abc import Callable

import msgspec
from blake3 import blake3

from hpccr.errors import CorruptError, ExitCode, HpccrError
from hpccr.model import CapsuleImage, FileEntry, Fragment, StepKey
from hpccr.noded.seal import SiteKey
from hpccr.noded.storeworker import Data, End, FragmentText, Taken, User, Worker

MAX_DATA = 1 << 20
MAX_GIVEN = 64
"""Files that the worker may have been given and not have taken over yet."""
MAX_ASKED = 64
"""Files that the worker may have been asked for at once."""
REPORT = 1.0
"""Seconds between two progress events."""

_IOPRIO_WHO_PROCESS = 1
_IOPRIO_BEST_EFFORT_LOWEST = (2 << 13) | 7
_SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "ppc64le": 273, "riscv64": 30}


class FlushJob(msgspec.Struct, frozen=True, tag=True):
    """Copy the spool directory to `directory`; `fragment` is complete but for its files. Removes the spool directory,
    whose path is `spool`, once all is durable."""

    user: User
    key: bytes
    directory: str
    spool: str
    fragment: Fragment
    level: int = 1
    """Of zstd."""
    nice: int = 5
    """Added to the niceness; with 0 the I/O priority stays as it is too."""


class FetchJob(msgspec.Struct, frozen=True, tag=True):
    """Copy the fragment in `directory` to the empty spool directory, if it is what the other fields say.

    room: bytes that the spool can take.
    """

    user: User
    key: bytes
    directory: str
    room: int
    step: StepKey
    checkpoint: str
    sequence: int
    capsule: int
    capsules: int


class Moved(msgspec.Struct, frozen=True, tag=True):
    """Progress, in bytes."""

    done: int
    total: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end of a transfer that succeeded; image only of a fetch."""

    bytes: int
    seconds: float
    image: CapsuleImage | None = None


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The end of one that failed."""

    message: str
    hint: str
    code: int


Event = Moved | Finished | Refused


class Report:
    """Progress to whoever listens."""

    def __init__(self, total: int) -> None:
        self.done, self._total = 0, total
        self._last = 0.0

    def add(self, count: int) -> None:
        self.at(self.done + count)

    def at(self, done: int) -> None:
        self.done = done
        now = time.monotonic()
        if now - self._last >= REPORT:
            self._last = now
            tell(Moved(done=self.done, total=self._total))


def tell(event: Event) -> None:
    try:
        os.write(1, msgspec.json.encode(event) + b"\n")
    except OSError:
        pass  # hpccrd is gone, the transfer goes on


def flush(job: FlushJob, spool: int, *, worker: Callable[[str, User], Worker] = Worker) -> Finished:
    """Raises HpccrError; the spool directory is then as it was."""
    began = time.monotonic()
    names = sorted(os.listdir(spool))
    sizes = {name: os.stat(name, dir_fd=spool, follow_symlinks=False).st_size for name in names}
    total = sum(sizes.values())
    report = Report(total)
    link = worker("flush", job.user)
    taken = hashed = moved = 0
    reads = SharedReads()

    def listen() -> None:
        nonlocal taken, moved
        message = link.receive()
        if not isinstance(message, Taken) or not (0 <= message.done <= total and 0 <= message.files <= len(names)):
            raise HpccrError(f"the store worker failed: it sent {type(message).__name__} during a flush")
        taken, moved = message.files, message.done
        reads.end_before(min(hashed, moved))
        report.at(moved)

    try:
        link.send(t="open", directory=job.directory, total=total, level=job.level)
        link.expect_ok()
        files = []
        # Sorted, so that a pagemap comes before its pages: the worker cuts those by it.
        for number, name in enumerate(names):
            while number - taken >= MAX_GIVEN or link.ready():
                listen()
            digest = blake3()
            fd = reads.begin(_opened(spool, name), sizes[name])
            # The worker reads the file by itself, at the same time: what it makes of it is not trusted anyway.
            link.send(t="file", name=name, size=sizes[name], descriptor=fd)
            size = 0
            while chunk := os.pread(fd, MAX_DATA, size):
                digest.update(chunk)
                size += len(chunk)
                hashed += len(chunk)
                while link.ready():
                    listen()
            if size != sizes[name]:
                raise HpccrError(f"{name} in the spool has {size} bytes and had {sizes[name]}")
            files.append(FileEntry(name=name, size=size, digest=digest.hexdigest()))
        while taken < len(names):
            listen()
        fragment = msgspec.structs.replace(job.fragment, files=tuple(files))
        link.send(t="publish", fragment=msgspec.json.encode(SiteKey(job.key).seal(fragment)))
        link.expect_ok()
    finally:
        link.close()
        reads.close()
    for name in names:
        # Its space comes back also if somebody has kept the descriptor that the worker got.
        os.close(os.open(name, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=spool))
    shutil.rmtree(job.spool, ignore_errors=True)
    return Finished(bytes=total, seconds=time.monotonic() - began)


class SharedReads:
    """Files that two processes read, each once: what both have read is let go from memory, which is the job's."""

    def __init__(self) -> None:
        self._files: deque[tuple[int, int, int]] = deque()
        """Descriptor, and the bytes of all files that come before its beginning and its end."""
        self._begun = self._ended = 0

    def begin(self, fd: int, size: int) -> int:
        """Takes the descriptor of the next file, and gives it back for reading until its end is passed."""
        self._files.append((fd, self._begun, self._begun + size))
        self._begun += size
        return fd

    def end_before(self, position: int) -> None:
        """Both have read that many bytes of all files."""
        while self._files:
            fd, begin, end = self._files[0]
            start, stop = max(self._ended, begin), min(position, end)
            if start < stop:
                os.posix_fadvise(fd, start - begin, stop - start, os.POSIX_FADV_DONTNEED)
                self._ended = stop
            if position < end or len(self._files) == 1:
                return  # the last one may still be read: an empty file has no end to pass
            os.close(self._files.popleft()[0])

    def close(self) -> None:
        while self._files:
            os.close(self._files.popleft()[0])


def _opened(spool: int, name: str) -> int:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=spool)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise HpccrError(f"{name} in the spool is not a regular file")
    return fd


def fetch(job: FetchJob, spool: int, *, worker: Callable[[str, User], Worker] = Worker) -> Finished:
    """Raises CorruptError naming what is wrong, or HpccrError."""
    began = time.monotonic()
    link = worker("fetch", job.user)
    try:
        link.send(t="open", directory=job.directory)
        message = link.receive()
        if not isinstance(message, FragmentText):
            raise HpccrError(f"the store worker sent {type(message).__name__} where the fragment was due")
        fragment = SiteKey(job.key).open(message.fragment, f"{job.directory}/fragment.json")
        check(job, fragment)
        if fragment.bytes > job.room:
            raise HpccrError(
                f"the checkpoint takes {fragment.bytes >> 20} MiB and the spool of this node has {job.room >> 20} MiB",
                hint="free space in the spool directory (node.spool), or use another node",
            )
        report = Report(fragment.bytes)
        # Asked for ahead, so that the worker need not wait between small files.
        asked = iter(fragment.files)
        for file in itertools.islice(asked, MAX_ASKED):
            link.send(t="get", name=file.name)
        for file in fragment.files:
            _take(link, spool, file, report, job.directory)
            for ahead in itertools.islice(asked, 1):
                link.send(t="get", name=ahead.name)
    finally:
        link.close()
    return Finished(bytes=report.done, seconds=time.monotonic() - began, image=fragment.image)


def check(job: FetchJob, fragment: Fragment) -> None:
    """Raises CorruptError unless the fragment is the one that was asked for, of the user who asks."""
    pairs = {
        "user": (fragment.uid, job.user.uid),
        "step": (str(fragment.key), str(job.step)),
        "checkpoint": (fragment.checkpoint, job.checkpoint),
        "sequence": (fragment.sequence, job.sequence),
        "capsule": (fragment.capsule, job.capsule),
        "capsules": (fragment.capsules, job.capsules),
    }
    wrong = [f"{name} {has}, not {wanted}" for name, (has, wanted) in pairs.items() if has != wanted]
    if wrong:
        raise CorruptError(
            f"the fragment in {job.directory} belongs to another checkpoint: {'; '.join(wrong)}",
            hint="the store's files were moved or exchanged; `hpccr verify` names the checkpoints that are intact",
        )


def _take(link: Worker, spool: int, file: FileEntry, report: Report, where: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    digest, size = blake3(), 0
    fd = os.open(file.name, flags, 0o600, dir_fd=spool)
    with os.fdopen(fd, "wb", buffering=0) as out:
        while not isinstance(message := link.receive(), End):
            if not isinstance(message, Data) or not message.data:
                raise HpccrError(f"the store worker sent {type(message).__name__} inside the file {file.name}")
            size += len(message.data)
            if size > file.size:
                break
            digest.update(message.data)
            view = message.data
            while view:
                view = view[out.write(view) :]
            report.add(len(message.data))
    if size != file.size or digest.hexdigest() != file.digest:
        raise CorruptError(
            f"{where}/{file.name} is damaged: "
            + (f"it has not the {file.size} bytes it had" if size != file.size else "its content has changed"),
            hint="`hpccr verify` names the checkpoints that are intact",
        )


def run(job: FlushJob | FetchJob, spool: int) -> Finished | Refused:
    """One transfer from beginning to end; never raises for what a user or a file system can cause."""
    try:
        return flush(job, spool) if isinstance(job, FlushJob) else fetch(job, spool)
    except HpccrError as error:
        return Refused(message=error.message, hint=error.hint, code=int(error.code))
    except OSError as error:
        return Refused(
            message=f"the spool failed: {error}",
            hint="is there room left in the spool directory (node.spool)?",
            code=int(ExitCode.FAILED),
        )


def yield_to_the_job(nice: int) -> None:
    """A flush runs beside the job and is in no hurry; a fetch is what the job waits for."""
    os.nice(nice)
    if number := _SYS_IOPRIO_SET.get(os.uname().machine):
        # Only a wish: a kernel without I/O priorities refuses it, and nothing is lost.
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_BEST_EFFORT_LOWEST)


def main() -> int:
    # A listener that went away is no reason to stop.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    # The same open directory, and so its lock, at a number that leaves the worker's free.
    spool = fcntl.fcntl(int(sys.argv[1]), fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(int(sys.argv[1]))
    with open(0, "rb", closefd=False) as stdin:
        job: FlushJob | FetchJob = msgspec.msgpack.decode(stdin.read(), type=FlushJob | FetchJob)
    if isinstance(job, FlushJob) and job.nice:
        yield_to_the_job(job.nice)
    result = run(job, spool)
    tell(result)
    return 1 if isinstance(result, Refused) else 0


if __name__ == "__main__":
    sys.exit(main())
