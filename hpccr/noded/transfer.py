"""The transfer process: carries one capsule's images between the spool and the store, as root, beside hpccrd.

Started by noded.transferring as `python -I -m hpccr.noded.transfer FD [KEPT]`, FD being the locked spool directory and
KEPT the one with images of this very capsule that were kept, locked too. It reads one FlushJob or FetchJob (msgpack)
from stdin and writes Events as JSON lines to stdout; nobody has to read them: a flush goes on when hpccrd is gone. It
never opens a path in the store: the worker does (noded.storeworker), a child with the user's ids and no privileges.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import signal
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait

import msgspec
from blake3 import blake3

from hpccr.errors import CorruptError, ExitCode, HpccrError
from hpccr.model import CapsuleImage, FileEntry, Fragment, StepKey
from hpccr.noded import kept
from hpccr.noded.kept import Record
from hpccr.noded.seal import SiteKey
from hpccr.noded.spool import Directory, Limits, Spool
from hpccr.noded.storeworker import Data, End, FragmentText, Link, Ok, Taken, User, Worker

MAX_DATA = 1 << 20
MAX_GIVEN = 64
"""Files that the worker may have been given and not have taken over yet."""
MAX_ASKED = 64
"""Files that the worker may have been asked for at once, on one lane."""
LANES = 4
"""Files that are fetched at the same time."""
MAX_HELD = 4
"""Pieces of MAX_DATA, per lane, that have come and are not written yet."""
REPORT = 1.0
"""Seconds between two progress events."""

_IOPRIO_WHO_PROCESS = 1
_IOPRIO_BEST_EFFORT_LOWEST = (2 << 13) | 7
_SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "ppc64le": 273, "riscv64": 30}


class FlushJob(msgspec.Struct, frozen=True, tag=True):
    """Copy the spool directory to `directory`; `fragment` is complete but for its files. Once all is durable the spool
    directory, whose path is `spool`, becomes the capsule's kept image, or is removed if `keep` is None."""

    user: User
    key: bytes
    directory: str
    spool: str
    fragment: Fragment
    level: int = 1
    """Of zstd."""
    share: int = 20
    """Checkpoints that may rest on the same stored data."""
    nice: int = 10
    """Added to the niceness; with 0 the I/O priority stays as it is too."""
    keep: Limits | None = None


class FetchJob(msgspec.Struct, frozen=True, tag=True):
    """Copy the fragment in `directory` to the empty spool directory, if it is what the other fields say.

    limits: of the spool; claimed: bytes of it that are promised to dumps.
    """

    user: User
    key: bytes
    directory: str
    limits: Limits
    claimed: int
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
    """The end of a transfer that succeeded. image and local only of a fetch; local: nothing of the store was read."""

    bytes: int
    seconds: float
    image: CapsuleImage | None = None
    local: bool = False


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
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """From any thread."""
        with self._lock:
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
        # Packs that are read again come on top, and are at most as large as the images.
        link.allow(2 * total)
        link.send(t="open", directory=job.directory, total=total, level=job.level, share=job.share)
        while isinstance(message := link.receive(), Taken) and not message.done:
            pass
        if not isinstance(message, Ok):
            raise HpccrError(f"the store worker failed: it sent {type(message).__name__} where ok was due")
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
        text = msgspec.json.encode(SiteKey(job.key).seal(fragment))
        link.send(t="publish", fragment=text)
        link.expect_ok()
    finally:
        link.close()
        reads.close()
    finished = Finished(bytes=total, seconds=time.monotonic() - began)
    if not _kept(job, spool, fragment, Record(job.directory, text.decode())):
        Directory(job.spool, os.dup(spool)).remove()
    return finished


def _kept(job: FlushJob, spool: int, fragment: Fragment, record: Record) -> bool:
    if job.keep is None:
        return False
    try:
        return kept.keep(Spool(job.keep), job.spool, spool, fragment, record)
    except OSError as error:
        print(f"the images are not kept in the spool: {error}", file=sys.stderr)
        return False


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


def fetch(job: FetchJob, spool: int, *, copy: int = -1, worker: Callable[[str, User], Worker] = Worker) -> Finished:
    """copy: the kept image of this capsule, if there is one: used if it is intact, else the store is.

    Raises CorruptError naming what is wrong, or HpccrError.
    """
    began = time.monotonic()
    if copy >= 0:
        if (fragment := _local(job, spool, copy)) is not None:
            return Finished(bytes=fragment.bytes, seconds=time.monotonic() - began, image=fragment.image, local=True)
        fcntl.flock(copy, fcntl.LOCK_UN)  # what comes instead may need its room
    link = worker("fetch", job.user)
    try:
        link.send(t="open", directory=job.directory)
        text = _fragment_text(link)
        fragment = SiteKey(job.key).open(text, f"{job.directory}/fragment.json")
        check(job, fragment)
        _reserve(job, spool, fragment)
        report = Report(fragment.bytes)
        link.allow(fragment.bytes)
        _take_all(link, spool, fragment, report, job.directory)
    except _Damaged as error:
        link.close()
        _mark(job, error, worker)
        raise CorruptError(error.message, hint=error.hint) from None
    finally:
        link.close()
    return Finished(bytes=report.done, seconds=time.monotonic() - began, image=fragment.image)


class _Damaged(CorruptError):
    """What is in the store is not what was written there; not said of a seal, which may be of another site."""


def _fragment_text(link: Worker) -> bytes:
    try:
        message = link.receive()
    except CorruptError as error:
        raise _Damaged(error.message, hint=error.hint) from None
    if not isinstance(message, FragmentText):
        raise HpccrError(f"the store worker sent {type(message).__name__} where the fragment was due")
    return message.fragment


def _mark(job: FetchJob, error: CorruptError, worker: Callable[[str, User], Worker]) -> None:
    """Leave word in the store that this checkpoint is damaged, so that nothing is built on it."""
    try:
        link = worker("mark", job.user)
        try:
            link.send(t="mark", directory=job.directory, what=error.message)
            link.expect_ok()
        finally:
            link.close()
    except HpccrError as failure:
        print(f"the checkpoint cannot be marked as damaged: {failure}", file=sys.stderr)


def _reserve(job: FetchJob, spool: int, fragment: Fragment) -> None:
    """Make the files, with all the room they take: of several fetches none takes another's. Raises HpccrError."""
    area = Spool(job.limits)
    with area.locked():
        room = area.room() - job.claimed
        if fragment.bytes > room:
            raise HpccrError(
                f"the checkpoint takes {fragment.bytes >> 20} MiB and the spool of this node has "
                f"{max(0, room) >> 20} MiB",
                hint="free space in the spool directory (node.spool), or use another node",
            )
        area.make_room(fragment.bytes + job.claimed)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        for file in fragment.files:
            fd = os.open(file.name, flags, 0o600, dir_fd=spool)
            try:
                if file.size:
                    os.posix_fallocate(fd, 0, file.size)
            finally:
                os.close(fd)


def _take_all(link: Worker, spool: int, fragment: Fragment, report: Report, where: str) -> None:
    """All files, over as many lanes as it pays for, each lane in a thread. Raises the first error of any."""
    shares = _shares(fragment.files)
    lanes: list[Link] = [link]
    errors: list[BaseException] = []

    def serve(lane: Link, files: list[FileEntry]) -> None:
        try:
            _take_some(lane, spool, files, report, where)
        except BaseException as error:
            errors.append(_Damaged(error.message, hint=error.hint) if isinstance(error, CorruptError) else error)
            for other in lanes:
                other.shut()

    try:
        while len(lanes) < len(shares):
            lanes.append(link.lane())
        threads = [threading.Thread(target=serve, args=pair) for pair in zip(lanes, shares, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for lane in lanes[1:]:
            lane.close()
    if errors:
        raise errors[0]


def _shares(files: Sequence[FileEntry]) -> list[list[FileEntry]]:
    """The files in at most LANES parts of about the same size; one part if there is little."""
    large = sum(file.size >= MAX_DATA for file in files)
    shares: list[list[FileEntry]] = [[] for _ in range(max(1, min(LANES, large)))]
    sizes = [0] * len(shares)
    for file in sorted(files, key=lambda file: file.size, reverse=True):
        least = sizes.index(min(sizes))
        shares[least].append(file)
        sizes[least] += file.size
    return shares


def _take_some(link: Link, spool: int, files: list[FileEntry], report: Report, where: str) -> None:
    # Asked for ahead, so that the worker need not wait between small files.
    asked = iter(files)
    for file in itertools.islice(asked, MAX_ASKED):
        link.send(t="get", name=file.name)
    with ThreadPoolExecutor(1) as sink:
        for file in files:
            _take(link, spool, file, report, where, sink)
            for ahead in itertools.islice(asked, 1):
                link.send(t="get", name=ahead.name)


def _local(job: FetchJob, spool: int, copy: int) -> Fragment | None:
    """The fragment, its files linked into the spool directory; None, and nothing linked, if the copy is not intact."""
    try:
        fragment = kept.read(copy, SiteKey(job.key), job.directory)
        check(job, fragment)
        kept.use(copy, spool, fragment)
    except (HpccrError, OSError) as error:
        print(f"the copy in the spool cannot be used, reading the store: {error}", file=sys.stderr)
        for name in os.listdir(spool):
            os.unlink(name, dir_fd=spool)
        return None
    return fragment


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
            hint="the store's files were moved or exchanged",
        )


def _take(link: Link, spool: int, file: FileEntry, report: Report, where: str, sink: Executor) -> None:
    """One file; `sink`, a thread, hashes and writes what has come while more of it comes."""
    digest, size = blake3(), 0
    fd = os.open(file.name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=spool)
    under_way: deque[Future[None]] = deque()

    def write(view: memoryview) -> None:
        digest.update(view)
        report.add(len(view))
        while view:
            view = view[out.write(view) :]

    with os.fdopen(fd, "wb", buffering=0) as out:
        try:
            while not isinstance(message := link.receive(), End):
                if not isinstance(message, Data) or not message.data:
                    raise HpccrError(f"the store worker sent {type(message).__name__} inside the file {file.name}")
                size += len(message.data)
                if size > file.size:
                    break
                under_way.append(sink.submit(write, message.data))
                while len(under_way) > MAX_HELD:
                    under_way.popleft().result()
        finally:
            wait(under_way)
        for future in under_way:
            future.result()
    if size != file.size or digest.hexdigest() != file.digest:
        raise CorruptError(
            f"{where}/{file.name} is damaged: "
            + (f"it has not the {file.size} bytes it had" if size != file.size else "its content has changed"),
            hint="`hpccr status JOB` shows the checkpoints there are, `hpccr verify JOB SEQ` whether one is whole",
        )


def run(job: FlushJob | FetchJob, spool: int, copy: int = -1) -> Finished | Refused:
    """One transfer from beginning to end; never raises for what a user or a file system can cause."""
    try:
        return flush(job, spool) if isinstance(job, FlushJob) else fetch(job, spool, copy=copy)
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
    # Where the kernel groups processes by session (sched(7)), niceness counts within ours only; the group has its own.
    try:
        with open("/proc/self/autogroup", "w") as group:
            group.write(str(nice))
    except OSError:
        pass  # it does not
    if number := _SYS_IOPRIO_SET.get(os.uname().machine):
        # Only a wish: a kernel without I/O priorities refuses it, and nothing is lost.
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_BEST_EFFORT_LOWEST)


def main() -> int:
    # hpccrd is what the kernel is to spare when memory runs out: not this, whose size users decide.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")
    # A listener that went away is no reason to stop.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    # The same open directories, and so their locks, at numbers that leave the worker's free.
    given = [int(argument) for argument in sys.argv[1:]]
    spool, *copies = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, max(10, *given) + 1) for fd in given)
    for fd in given:
        os.close(fd)
    with open(0, "rb", closefd=False) as stdin, open(os.devnull) as null:
        job: FlushJob | FetchJob = msgspec.msgpack.decode(stdin.read(), type=FlushJob | FetchJob)
        os.dup2(null.fileno(), 0)  # the site key is in it: for no child to inherit
    if isinstance(job, FlushJob) and job.nice:
        yield_to_the_job(job.nice)
    result = run(job, spool, *copies)
    tell(result)
    return 1 if isinstance(result, Refused) else 0


if __name__ == "__main__":
    sys.exit(main())
