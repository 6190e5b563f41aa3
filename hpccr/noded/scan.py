"""Looking at the tasks of a capsule through /proc: who they are and what they have open.

Everything is read below /proc/PID of tasks inside the capsule's own pid namespace. A task that ends while it is looked
at is no task: its files give ENOENT or ESRCH and it is left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from blake3 import blake3

from hpccr.errors import CorruptError, HpccrError, UnsupportedError
from hpccr.noded import child
from hpccr.noded.control import Identity

GONE = (FileNotFoundError, ProcessLookupError)
"""What a look at a task gives that has ended meanwhile."""

DELETED = " (deleted)"
"""What /proc puts after the name of a file that is not there any more."""


@dataclass(frozen=True)
class Task:
    """One process as /proc/PID/status tells it."""

    pid: int
    parent: int
    name: str
    state: str
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    capabilities: int
    """Of the inheritable, permitted, effective and ambient sets together."""
    tracer: int = 0
    """Pid of the process that traces it (ptrace(2))."""
    may_gain: bool = False
    """Whether a program it executes could give it more: it lacks no_new_privs, or its bounding set is not empty."""

    def __str__(self) -> str:
        return f"{self.pid} ({self.name})"


@dataclass
class Tree:
    """The tasks of a capsule: all of them but init and the helpers it started."""

    root: int
    tasks: list[Task] = field(default_factory=list)


def read_task(pid: int, thread: int | None = None) -> Task | None:
    """A process, or one of its threads. None when there is no such one (any more)."""
    try:
        with open(f"/proc/{pid}/task/{thread or pid}/status", errors="replace") as file:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    except GONE:
        return None
    capabilities = 0
    for key in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        capabilities |= int(fields.get(key, "0"), 16)
    return Task(
        pid=pid,
        parent=int(fields["PPid"]),
        name=fields["Name"],
        state=fields["State"][:1],
        uids=tuple(int(word) for word in fields["Uid"].split()),
        gids=tuple(int(word) for word in fields["Gid"].split()),
        groups=tuple(int(word) for word in fields.get("Groups", "").split()),
        capabilities=capabilities,
        tracer=int(fields.get("TracerPid", "0")),
        may_gain=fields.get("NoNewPrivs") != "1" or int(fields.get("CapBnd", "0"), 16) != 0,
    )


def processes() -> Iterator[Task]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (task := read_task(int(name))) is not None:
            yield task


def tree(root: int, *, helpers: Iterable[int] = ()) -> Tree:
    """All processes but init and, with what descends from them, `helpers`."""
    found = {task.pid: task for task in processes()}
    excluded = {1, *helpers}
    tasks = [task for task in found.values() if not _descends(task, found, excluded - {1}) and task.pid != 1]
    return Tree(root, sorted(tasks, key=lambda task: task.pid))


def _descends(task: Task, found: dict[int, Task], ancestors: set[int]) -> bool:
    current: Task | None = task
    while current is not None:
        if current.pid in ancestors:
            return True
        current = found.get(current.parent)
    return False


def check_whole(whole: Tree, uid: int) -> None:
    """Every task descends from the launch root and is only the user's. Raises UnsupportedError naming the first
    that does not. Zombies pass: nothing of theirs is dumped but their exit status."""
    found = {task.pid: task for task in whole.tasks}
    if whole.root not in found or found[whole.root].state == "Z":
        raise HpccrError("the job has ended")
    for task in whole.tasks:
        if not _descends(task, found, {whole.root}):
            raise UnsupportedError(
                f"process {task} has left the job's process tree: its parents have ended",
                hint="a daemon started before an earlier restart cannot be dumped again: end it, or start it anew",
            )
        if task.state == "Z":
            continue
        if set(task.uids) != {uid}:
            raise UnsupportedError(f"process {task} runs with the user ids {task.uids}, the job with {uid}")
        if task.capabilities:
            raise UnsupportedError(f"process {task} has capabilities ({task.capabilities:#x})")


def check_restored(whole: Tree, identity: Identity) -> None:
    """Every task has the user's ids and groups, and no capability nor a way to one. Raises CorruptError naming the
    first that differs."""
    groups = {identity.gid, *identity.groups}
    for task in whole.tasks:
        if task.state == "Z":
            continue
        ours = set(task.uids) == {identity.uid} and {*task.gids, *task.groups} <= groups
        if not ours or task.capabilities or task.may_gain:
            raise CorruptError(
                f"the restored process {task} would run with uids {task.uids}, gids {task.gids}, groups {task.groups}, "
                f"capabilities {task.capabilities:#x}{' or more' if task.may_gain else ''}: not the user's"
            )


def with_threads(whole: Tree) -> Tree:
    """The same with every thread as a task of its own: ids and capabilities are a thread's."""
    found: list[Task] = []
    for process in whole.tasks:
        try:
            numbers = [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]
        except GONE:
            continue
        found += [thread for number in numbers if (thread := read_task(process.pid, number)) is not None]
    return Tree(whole.root, found)


def highest_id(whole: Tree) -> int:
    """The highest pid, thread id, process group or session of the tasks."""
    highest = 0
    for task in whole.tasks:
        try:
            threads = [int(name) for name in os.listdir(f"/proc/{task.pid}/task")]
            highest = max(highest, task.pid, *threads, os.getpgid(task.pid), os.getsid(task.pid))
        except GONE:
            highest = max(highest, task.pid)
    return highest


def cpu_flags() -> tuple[str, ...]:
    """Features of the first CPU as /proc/cpuinfo names them; empty where it does not."""
    for line in lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return tuple(value.split())
    return ()


def lines(path: str) -> list[str]:
    """Of a file below /proc; none once the task has ended."""
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read().splitlines()
    except GONE:
        return []


def estimate(whole: Tree, private: Iterable[str], ghost_limit: int) -> int:
    """Bytes a dump may take: memory that is no file's, private directories, deleted files, and room for the rest."""
    kilobytes = 0
    ghosts: dict[tuple[int, int], int] = {}
    for task in whole.tasks:
        kilobytes += _memory(task.pid) + _PER_TASK
        for status in _deleted_files(task.pid):
            ghosts[status.st_dev, status.st_ino] = min(status.st_blocks * 512, ghost_limit)
    return kilobytes * 1024 + sum(ghosts.values()) + _used(private) + _segments(whole.root)


_PER_TASK = 128
"""Kilobytes of images per task beside its memory (measured 40-70 for MPI ranks)."""


def _memory(pid: int) -> int:
    """Kilobytes of anonymous and shared memory, shared pages counted by their share, but huge ones in full."""
    total = 0
    for line in lines(f"/proc/{pid}/smaps_rollup"):
        key, _, rest = line.partition(":")
        if key in ("Pss_Anon", "Pss_Shmem", "SwapPss", "Private_Hugetlb", "Shared_Hugetlb"):
            total += int(rest.split()[0])
    return total


def occupied(whole: Tree, private: Iterable[str]) -> int:
    """Bytes of memory and private directories: less exact than estimate(), and so quick that it may be asked of
    stopped tasks."""
    kilobytes = 0
    for task in whole.tasks:
        for line in lines(f"/proc/{task.pid}/status"):
            key, _, rest = line.partition(":")
            if key in ("RssAnon", "VmSwap", "HugetlbPages"):
                kilobytes += int(rest.split()[0])
    return kilobytes * 1024 + _used(private)


def _used(private: Iterable[str]) -> int:
    systems = [os.statvfs(place) for place in private]
    return sum((system.f_blocks - system.f_bfree) * system.f_frsize for system in systems)


def descriptors(pid: int) -> list[str]:
    """Numbers of the descriptors of a process."""
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except GONE:
        return []


def _deleted_files(pid: int) -> Iterator[os.stat_result]:
    for fd in descriptors(pid):
        path = f"/proc/{pid}/fd/{fd}"
        try:
            if os.readlink(path).endswith(DELETED):
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode):
                    yield status
        except GONE:
            continue


def ghosts(task: Task) -> Iterator[tuple[str, os.stat_result]]:
    """Name and status of files without any name that a task has open or mapped, but for those in memory only."""
    links = [(f"/proc/{task.pid}/fd/{fd}", "") for fd in descriptors(task.pid)]
    links += [(f"/proc/{task.pid}/map_files/{address}", path) for address, _, path in mappings(task.pid)]
    for link, name in links:
        with suppress(*GONE):
            path = name or os.readlink(link)
            if path.startswith("/") and path.endswith(DELETED) and not path.startswith(_MEMORY):
                status = os.stat(link)
                if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                    yield path.removesuffix(DELETED), status


_MEMORY = ("/memfd:", "/SYSV", "/dev/zero", "/anon_hugepage", "/[aio]")
"""How /proc names what is memory and no file of any file system."""


def _segments(root: int) -> int:
    """Bytes of SysV segments that nobody has attached (attached ones count as their users' memory)."""

    def read() -> int:
        # /proc/sysvipc shows the ipc namespace of who reads it.
        with open(f"/proc/{root}/ns/ipc") as namespace:
            os.setns(namespace.fileno(), os.CLONE_NEWIPC)
        total = 0
        for line in lines("/proc/sysvipc/shm")[1:]:
            words = line.split()
            total += int(words[3]) if words[6] == "0" else 0
        return total

    return int(child.call(read))


@dataclass(frozen=True)
class OpenFile:
    """A regular file that some task can write to, as the tasks have it. append: every writer uses O_APPEND."""

    path: str
    status: os.stat_result
    append: bool
    leased: tuple[int, int] | None = None
    """Pid and descriptor of a task that has a lease on it (fcntl(2)): to open it would break that."""

    @property
    def identity(self) -> bytes:
        """Equal for two capsules only where they have one file. While all tasks of the job are stopped."""
        return identity(self.path, self.status)


def identity(path: str, status: os.stat_result) -> bytes:
    """16 bytes that are equal where two nodes see one file on shared storage: nothing in it is a node's own."""
    facts = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return blake3(f"{facts} ".encode() + os.fsencode(path)).digest(length=16)


def open_files(whole: Tree, private: Iterable[str]) -> tuple[OpenFile, ...]:
    """Regular files some task can write to (open for writing, or mapped shared and writable), by path.

    Left out: deleted files (CRIU saves them; but see nameless_files) and what lies in a private directory (saved as a
    whole).
    """
    places = (*private, "/proc", "/sys")
    found: dict[str, OpenFile] = {}

    def note(path: str, status: os.stat_result, append: bool, leased: tuple[int, int] | None = None) -> None:
        if not stat.S_ISREG(status.st_mode) or not path.startswith("/") or path.endswith(DELETED):
            return
        if below(path, places):
            return
        before = found.get(path)
        if before is not None:
            append, leased = append and before.append, leased or before.leased
        found[path] = OpenFile(path, status, append, leased)

    for task in whole.tasks:
        for fd, flags, leased in descriptor_flags(task.pid):
            if flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR):
                link = f"/proc/{task.pid}/fd/{fd}"
                try:
                    holder = (task.pid, int(fd)) if leased else None
                    note(os.readlink(link), os.stat(link), bool(flags & os.O_APPEND), holder)
                except GONE:
                    continue
        for address, permissions, path in mappings(task.pid):
            if permissions[1] == "w" and permissions[3] == "s":
                try:
                    note(path, os.stat(f"/proc/{task.pid}/map_files/{address}"), False)
                except GONE:
                    continue
    return tuple(found[path] for path in sorted(found))


def read_files(whole: Tree, private: Iterable[str], written: Iterable[str]) -> dict[str, os.stat_result]:
    """By path: regular files that tasks have open or mapped and only read, but for programs and libraries.

    written: what some task can write to (open_files). Left out as there: deleted files, private directories.
    """
    places = (*private, "/proc", "/sys")
    found: dict[str, os.stat_result] = {}
    left_out = set(written)

    def note(path: str, link: str) -> None:
        if not path.startswith("/") or path.endswith(DELETED) or path in found or below(path, places):
            return
        with suppress(*GONE):
            status = os.stat(link)
            if stat.S_ISREG(status.st_mode):
                found[path] = status

    for task in whole.tasks:
        for fd, flags, leased in descriptor_flags(task.pid):
            if not flags & (os.O_PATH | os.O_ACCMODE) and not leased:
                link = f"/proc/{task.pid}/fd/{fd}"
                with suppress(*GONE):
                    note(os.readlink(link), link)
        for address, permissions, path in mappings(task.pid):
            if permissions[2] == "x":
                left_out.add(path)
            else:
                note(path, f"/proc/{task.pid}/map_files/{address}")
    return {path: found[path] for path in sorted(found.keys() - left_out)}


@dataclass(frozen=True)
class NamelessFile:
    """A regular file that some task has open or mapped by a name that was removed, while the file has other names.

    path: the removed name.
    """

    path: str
    status: os.stat_result
    holder: str

    @property
    def key(self) -> tuple[str, int, int]:
        """Which name of which file it is."""
        return self.path, self.status.st_dev, self.status.st_ino


def nameless_files(whole: Tree, private: Iterable[str]) -> tuple[NamelessFile, ...]:
    """All of them outside private directories, by path and inode. CRIU finds such a file again by a link of its own
    beside the removed name, which goes when the tasks run on."""
    places = (*private, "/proc", "/sys")
    found: dict[tuple[str, int, int], NamelessFile] = {}

    def note(link: str, name: str, task: Task) -> None:
        if not name.startswith("/") or not name.endswith(DELETED):
            return
        path = name.removesuffix(DELETED)
        status = os.stat(link)
        if not stat.S_ISREG(status.st_mode) or not status.st_nlink or below(path, places):
            return
        found[path, status.st_dev, status.st_ino] = NamelessFile(path, status, str(task))

    for task in whole.tasks:
        links = [(f"/proc/{task.pid}/fd/{fd}", "") for fd in descriptors(task.pid)]
        links += [(f"/proc/{task.pid}/map_files/{address}", path) for address, _, path in mappings(task.pid)]
        for link, name in links:
            try:
                note(link, name or os.readlink(link), task)
            except GONE:
                continue
    return tuple(found[key] for key in sorted(found))


def descriptor_flags(pid: int) -> Iterator[tuple[str, int, bool]]:
    """Descriptor, flags of open(2), whether there is a lease on it."""
    try:
        names = os.listdir(f"/proc/{pid}/fdinfo")
    except GONE:
        return
    for fd in names:
        facts = lines(f"/proc/{pid}/fdinfo/{fd}")
        leased = any(line.startswith("lock:") and " LEASE " in line for line in facts)
        for line in facts:
            if line.startswith("flags:"):
                yield fd, int(line.split()[1], 8), leased
                break


def mappings(pid: int) -> Iterator[tuple[str, str, str]]:
    """(address range as in map_files, permissions, path) of the file mappings of a process."""
    for line in lines(f"/proc/{pid}/maps"):
        words = line.split(None, 5)
        if len(words) == 6 and words[5].startswith("/") and words[4] != "0":
            start, _, end = words[0].partition("-")
            yield f"{int(start, 16):x}-{int(end, 16):x}", words[1], words[5]


def below(path: str, places: Iterable[str]) -> bool:
    """Whether `path` is one of the directories `places` or in one."""
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)
