"""Looking at the tasks of a capsule through /proc: who they are and what they have open.

Everything is read below /proc/PID of tasks inside the capsule's own pid namespace. A task that ends while it is looked
at is no task: its files give ENOENT or ESRCH and it is left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

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
    stopped: bool = False
    """No task runs, so that all keep what they have open."""
    _links: dict[int, list[tuple[str, str]]] = field(default_factory=dict, repr=False)
    _maps: dict[int, list[str]] = field(default_factory=dict, repr=False)
    _named: list[Named] | None = field(default=None, repr=False)

    def maps(self, task: Task) -> list[str]:
        """The lines of /proc/PID/maps; of stopped tasks as they were at the first call, but for what others do to the
        names in them."""
        found = self._maps.get(task.pid)
        if found is None:
            found = lines(f"/proc/{task.pid}/maps")
            if self.stopped:
                self._maps[task.pid] = found
        return found

    def named(self) -> list[Named]:
        """What the tasks have open or mapped and what has a name. Of stopped tasks only the names are looked at again
        in further calls, and not those of programs and libraries, which are most of them."""
        if self._named is not None:
            return [again for one in self._named if (again := _renamed(one)) is not None]
        found = list(_named(self))
        if self.stopped:
            programs = {one.name for one in found if one.program}
            self._named = [
                one
                for one in found
                if one.name not in programs or one.flags & os.O_ACCMODE or one.name.endswith(DELETED)
            ]
        return found

    def links(self, task: Task) -> list[tuple[str, str]]:
        """Each descriptor of a task, and what /proc says it leads to. Of stopped tasks only what has a name is looked
        at again in further calls: others can still rename and remove it."""
        known = self._links.get(task.pid)
        try:
            directory = os.open(f"/proc/{task.pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except GONE:
            return []
        try:
            found = list(_read_links(directory, known))
        finally:
            os.close(directory)
        if self.stopped:
            self._links[task.pid] = found
        return found


def _read_links(directory: int, known: list[tuple[str, str]] | None) -> Iterator[tuple[str, str]]:
    if known is None:
        try:
            known = [(fd, "/") for fd in os.listdir(directory)]
        except GONE:
            return
    for fd, link in known:
        if not link.startswith("/"):
            yield fd, link
            continue
        with suppress(*GONE):
            yield fd, os.readlink(fd, dir_fd=directory)


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


def tree(root: int, *, helpers: Iterable[int] = (), stopped: bool = False) -> Tree:
    """All processes but init and, with what descends from them, `helpers`."""
    found = {task.pid: task for task in processes()}
    excluded = {1, *helpers}
    tasks = [task for task in found.values() if not _descends(task, found, excluded - {1}) and task.pid != 1]
    return Tree(root, sorted(tasks, key=lambda task: task.pid), stopped)


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
        for status in _deleted_files(whole, task):
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


def _deleted_files(whole: Tree, task: Task) -> Iterator[os.stat_result]:
    for fd, link in whole.links(task):
        if link.endswith(DELETED):
            with suppress(*GONE):
                status = os.stat(f"/proc/{task.pid}/fd/{fd}")
                if stat.S_ISREG(status.st_mode):
                    yield status


@dataclass(frozen=True)
class Named:
    """What a task has open or mapped and what has a name: a file, a directory, a device, named memory."""

    task: Task
    link: str
    """Below /proc: leads to it whatever becomes of the name."""
    name: str
    """As /proc tells it: once it is removed, with DELETED at its end."""
    flags: int
    """Of open(2); of a mapping O_RDWR where what the task writes to it goes to the file."""
    leased: int = -1
    """The descriptor, if there is a lease on it (fcntl(2))."""
    program: bool = False
    """Mapped to be executed."""


def _named(whole: Tree) -> Iterator[Named]:
    """/proc/PID/fdinfo is read of these only: it takes long, and most descriptors have no name."""
    for task in whole.tasks:
        for fd, name in whole.links(task):
            if name.startswith("/"):
                flags, leased = descriptor(task.pid, fd)
                if flags >= 0:
                    yield Named(task, f"/proc/{task.pid}/fd/{fd}", name, flags, int(fd) if leased else -1)
        for one in mappings(whole.maps(task)):
            flags = os.O_RDWR if one.written else os.O_RDONLY
            yield Named(task, f"/proc/{task.pid}/map_files/{one.address}", one.path, flags, program=one.program)


def _renamed(one: Named) -> Named | None:
    try:
        name = os.readlink(one.link)
    except GONE:
        return None
    return one if name == one.name else replace(one, name=name)


def descriptor(pid: int, fd: str) -> tuple[int, bool]:
    """Flags of open(2), -1 where it is gone, and whether there is a lease on it."""
    facts = lines(f"/proc/{pid}/fdinfo/{fd}")
    leased = any(line.startswith("lock:") and " LEASE " in line for line in facts)
    return next((int(line.split()[1], 8) for line in facts if line.startswith("flags:")), -1), leased


def ghosts(seen: Iterable[Named]) -> Iterator[tuple[Named, os.stat_result]]:
    """Files without any name that tasks have open or mapped, but for those in memory only."""
    for one in seen:
        if one.name.endswith(DELETED) and not one.name.startswith(_MEMORY):
            with suppress(*GONE):
                status = os.stat(one.link)
                if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                    yield one, status


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


def open_files(seen: Iterable[Named], private: Iterable[str]) -> tuple[OpenFile, ...]:
    """Regular files some task can write to (open for writing, or mapped shared and writable), by path.

    Left out: deleted files (CRIU saves them; but see nameless_files) and what lies in a private directory (saved as a
    whole).
    """
    places = (*private, "/proc", "/sys")
    found: dict[str, OpenFile] = {}
    for one in seen:
        if one.flags & os.O_ACCMODE == os.O_RDONLY or one.name.endswith(DELETED) or below(one.name, places):
            continue
        with suppress(*GONE):
            status = os.stat(one.link)
            if not stat.S_ISREG(status.st_mode):
                continue
            append, leased = bool(one.flags & os.O_APPEND), (one.task.pid, one.leased) if one.leased >= 0 else None
            if (before := found.get(one.name)) is not None:
                append, leased = append and before.append, leased or before.leased
            found[one.name] = OpenFile(one.name, status, append, leased)
    return tuple(found[path] for path in sorted(found))


def read_files(seen: Iterable[Named], private: Iterable[str], written: Iterable[str]) -> dict[str, os.stat_result]:
    """By path: regular files that tasks have open or mapped and only read, but for programs and libraries.

    written: what some task can write to (open_files). Left out as there: deleted files, private directories.
    """
    places = (*private, "/proc", "/sys")
    found: dict[str, os.stat_result] = {}
    left_out = set(written)
    for one in seen:
        if one.program:
            left_out.add(one.name)
        if one.name in left_out or one.name in found or one.flags & os.O_PATH or one.leased >= 0:
            continue
        if one.flags & os.O_ACCMODE or one.name.endswith(DELETED) or below(one.name, places):
            continue
        with suppress(*GONE):
            status = os.stat(one.link)
            if stat.S_ISREG(status.st_mode):
                found[one.name] = status
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


def nameless_files(seen: Iterable[Named], private: Iterable[str]) -> tuple[NamelessFile, ...]:
    """All of them outside private directories, by path and inode. CRIU finds such a file again by a link of its own
    beside the removed name, which goes when the tasks run on."""
    places = (*private, "/proc", "/sys")
    found: dict[tuple[str, int, int], NamelessFile] = {}
    for one in seen:
        path = one.name.removesuffix(DELETED)
        if path == one.name or below(path, places):
            continue
        with suppress(*GONE):
            status = os.stat(one.link)
            if stat.S_ISREG(status.st_mode) and status.st_nlink:
                found[path, status.st_dev, status.st_ino] = NamelessFile(path, status, str(one.task))
    return tuple(found[key] for key in sorted(found))


@dataclass
class Mapping:
    """A file that a process has mapped, perhaps several times."""

    address: str
    """Of one of the mappings, as in map_files."""
    path: str
    written: bool = False
    """Whether what is written to one of the mappings goes to the file."""
    program: bool = False
    """Whether one of them is executed."""


def mappings(maps: Iterable[str]) -> list[Mapping]:
    """The files in the lines of a /proc file maps, each once."""
    found: dict[tuple[str, str, str], Mapping] = {}
    for line in maps:
        words = line.split(None, 5)
        if len(words) < 6 or not words[5].startswith("/") or words[4] == "0":
            continue
        address, permissions, _, device, inode, path = words
        mapping = found.get((path, device, inode))
        if mapping is None:
            start, _, end = address.partition("-")
            mapping = Mapping(f"{int(start, 16):x}-{int(end, 16):x}", path)
            found[path, device, inode] = mapping
        mapping.written |= permissions[1] == "w" and permissions[3] == "s"
        mapping.program |= permissions[2] == "x"
    return list(found.values())


def below(path: str, places: Iterable[str]) -> bool:
    """Whether `path` is one of the directories `places` or in one."""
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)
