"""What a checkpoint cannot carry, or would not bring back: found before anything is stopped, and refused by name.

CRIU refuses most of it too, but only in the middle of a dump, and not in the user's words.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress

from hpccr.errors import UnsupportedError
from hpccr.noded import devices, scan, syscalls, watches
from hpccr.noded.scan import DELETED, GONE, Task, Tree, below

_CARRIED_LINKS = frozenset(
    f"anon_inode:{name}" for name in ("[eventfd]", "[eventpoll]", "[timerfd]", "[signalfd]", "inotify", "[pidfd]")
)
_CLOSE = "close it before the checkpoint, or let the program do without it"
_REFUSED_LINKS = {
    "anon_inode:[io_uring]": ("an io_uring", "let the program use epoll (UV_USE_IO_URING=0 for libuv and node)"),
    "anon_inode:[userfaultfd]": ("a userfaultfd", "turn lazy or postcopy memory off in the program"),
    "anon_inode:[perf_event]": ("a perf event counter", "run without the profiler (PAPI, perf, likwid)"),
    "anon_inode:bpf-map": ("a BPF map", "run without the tracing tool"),
    "anon_inode:bpf-prog": ("a BPF program", "run without the tracing tool"),
    "anon_inode:[infinibandevent]": ("an RDMA device", devices.RDMA_HINT),
    "anon_inode:[uverbs-async-event]": ("an RDMA device", devices.RDMA_HINT),
    "anon_inode:[fanotify]": ("a fanotify group", "run without the program that watches the file system"),
}
_PROTOCOLS = frozenset(
    "TCP TCPv6 UDP UDPv6 UDP-Lite UDPLITEv6 RAW RAWv6 PING PINGv6 UNIX UNIX-STREAM NETLINK PACKET".split()  # noqa: SIM905
)
"""Those that CRIU knows (criu/sk-inet.c, can_dump_ipproto), by their names in the kernel."""
_UDP = frozenset({"UDP", "UDPv6", "UDP-Lite", "UDPLITEv6"})
_UDP_CORK = 1
"""Of linux/udp.h."""
_OF_THREAD = os.O_EXCL
"""PIDFD_THREAD of linux/pidfd.h, among the flags of the file."""
_MQUEUE = 0x19800202
"""MQUEUE_MAGIC of the kernel's ipc/mqueue.c."""
_NAMESPACES = ("pid", "mnt", "net", "user", "uts", "cgroup")
"""Those a task shares with init. ipc is the launch root's own; time is compared with the launch root's."""


def check_namespaces(whole: Tree) -> None:
    """No task has namespaces of its own. Raises UnsupportedError naming the first that has."""
    expected = {name: _namespace(1, name) for name in _NAMESPACES}
    expected["pid_for_children"] = expected["pid"]
    expected["time"] = expected["time_for_children"] = _namespace(whole.root, "time")
    for task in whole.tasks:
        for name, namespace in expected.items():
            found = _namespace(task.pid, name)
            if found != namespace and found and namespace:
                raise UnsupportedError(
                    f"process {task} is in a {name.split('_')[0]} namespace of its own",
                    hint="containers inside the job (Apptainer, podman, unshare) cannot be checkpointed",
                )


def check_open(whole: Tree, private: Iterable[str]) -> None:
    """Nothing is open or mapped that cannot be dumped or would not come back.

    Raises UnsupportedError naming process, resource and remedy.
    """
    places = tuple(private)
    for task in whole.tasks:
        if task.state == "Z":
            continue
        try:
            for fd, link in whole.links(task):
                with suppress(*GONE):
                    _check_descriptor(task, fd, link, places)
                    if link == "anon_inode:inotify":
                        _check_watches(whole, task, fd)
            _check_maps(task, whole.maps(task))
        except GONE:
            continue


def _namespace(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{name}")
    except GONE:
        return ""


def _check_descriptor(task: Task, fd: str, link: str, places: Iterable[str]) -> None:
    if link.startswith("anon_inode:") and link not in _CARRIED_LINKS:
        what, hint = _REFUSED_LINKS.get(link, (f"a {link.removeprefix('anon_inode:').strip('[]')}", _CLOSE))
        raise UnsupportedError(f"process {task} has {what} open (descriptor {fd})", hint=hint)
    if link == "anon_inode:[pidfd]" and (flags := scan.descriptor(task.pid, fd)[0]) >= 0 and flags & _OF_THREAD:
        raise UnsupportedError(f"process {task} has a pidfd of a thread open (descriptor {fd})", hint=_CLOSE)
    if link.startswith("socket:"):
        _check_socket(task, fd)
    if link.startswith("/dev/"):
        _check_device(task, fd, link)
    if link.startswith("/") and not below(link, places):
        _check_name(task, fd, link)


def _check_watches(whole: Tree, task: Task, fd: str) -> None:
    def held() -> set[tuple[int, int]]:
        return {(status.st_dev, status.st_ino) for _, status in scan.ghosts(whole.named())}

    if what := watches.lost(scan.lines(f"/proc/{task.pid}/fdinfo/{fd}"), held):
        raise UnsupportedError(
            f"process {task} watches {what} by inotify (descriptor {fd})",
            hint="let the program remove the watch before the checkpoint, or keep what it watches in /tmp, with a name",
        )


def _check_name(task: Task, fd: str, link: str) -> None:
    if link.count("/") == 1 and _is_queue(task, fd):
        raise UnsupportedError(f"process {task} has the POSIX message queue {link} open", hint=_CLOSE)
    # What NFS calls a file that was removed while it is open. It goes with the last descriptor.
    if os.path.basename(link).startswith(".nfs") and stat.S_ISREG(os.stat(f"/proc/{task.pid}/fd/{fd}").st_mode):
        raise UnsupportedError(
            f"process {task} has {link.removesuffix(DELETED)} open, a file of NFS whose name was removed",
            hint="let the program keep its scratch files in /tmp (TMPDIR) or not remove them while they are open",
        )


def _is_queue(task: Task, fd: str) -> bool:
    handle = os.open(f"/proc/{task.pid}/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
    try:
        return syscalls.file_system(handle) == _MQUEUE
    finally:
        os.close(handle)


def _check_socket(task: Task, fd: str) -> None:
    try:
        # The kernel's name for the protocol, without a copy of the socket (net/socket.c, sockfs_xattr_get).
        protocol = os.getxattr(f"/proc/{task.pid}/fd/{fd}", "system.sockprotoname").rstrip(b"\0").decode()
    except GONE:
        raise
    except OSError:
        return
    if protocol not in _PROTOCOLS:
        hint = "GODEBUG=multipathtcp=0 for programs written in Go" if protocol == "MPTCP" else _CLOSE
        raise UnsupportedError(f"process {task} has a socket of the protocol {protocol} open", hint=hint)
    if protocol in _UDP and _corked(task, fd):
        raise UnsupportedError(
            f"process {task} has a UDP socket with UDP_CORK set (descriptor {fd})",
            hint="let the program send what it holds back (UDP_CORK 0) before the checkpoint, or send without it",
        )


def _corked(task: Task, fd: str) -> bool:
    # Only its owner and who has a copy can ask: for these microseconds its port stays in use.
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(task.pid)
        try:
            with socket.socket(fileno=syscalls.pidfd_getfd(pidfd, int(fd))) as copy:
                return bool(copy.getsockopt(copy.proto, _UDP_CORK))
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOTSOCK):
                raise
        finally:
            os.close(pidfd)
    return False


def _check_device(task: Task, fd: str, link: str) -> None:
    # O_PATH: to look at a device must not open it.
    handle = os.open(f"/proc/{task.pid}/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
    finally:
        os.close(handle)
    if (found := devices.refusal(link, status)) is not None:
        raise UnsupportedError(f"process {task} has {found.what} open", hint=found.hint)


def _check_maps(task: Task, maps: Iterable[str]) -> None:
    for line in maps:
        if "[uverbs" in line or "[rdma" in line:
            raise UnsupportedError(f"process {task} has an RDMA device mapped", hint=devices.RDMA_HINT)
        if " /dev/" in line and (found := devices.known(line.split(None, 5)[5])) is not None:
            raise UnsupportedError(f"process {task} has {found.what} mapped", hint=found.hint)
        if "anon_inode:[io_uring]" in line:
            raise UnsupportedError(
                f"process {task} has an io_uring mapped", hint=_REFUSED_LINKS["anon_inode:[io_uring]"][1]
            )


def check_sessions(whole: Tree) -> None:
    """Every task can get its session back. Raises UnsupportedError naming one that cannot."""
    sessions: dict[int, int] = {}
    for task in whole.tasks:
        with suppress(*GONE):
            sessions[task.pid] = os.getsid(task.pid)
    if (lost := without_leader(whole, sessions)) is not None:
        raise UnsupportedError(
            f"process {lost} is in a session whose leader has ended, and its parent is in another one",
            hint="let the process that has called setsid(2) live, or its children be the job's own (no subreaper)",
        )


def without_leader(whole: Tree, sessions: Mapping[int, int]) -> Task | None:
    """A task that CRIU would dump, but not restore. sessions: by pid; tasks that are not in it count as in order.

    A task is restored in the session in which its parent was when it forked it, which CRIU looks for among its
    ancestors (criu/pstree.c, prepare_pstree_ids). Where the leader has ended it makes one, but only for children of the
    root, which is where orphans come to.
    """
    parents = {task.pid: task.parent for task in whole.tasks if task.pid in sessions}
    for pid, parent in [*parents.items()]:
        session = sessions[pid]
        if parent == whole.root and session not in (pid, sessions[whole.root]):
            parents[pid] = session
            parents.setdefault(session, whole.root)
    born: dict[int, int] = {}
    for task in whole.tasks:
        session = sessions.get(task.pid, task.pid)
        ancestor = parents.get(task.pid, session)
        if task.pid in (whole.root, session) or sessions.get(ancestor) == session:
            continue
        while ancestor != session:
            if ancestor not in parents or born.setdefault(ancestor, session) != session:
                return task
            ancestor = parents[ancestor]
    return None


def check_traced(whole: Tree) -> None:
    """No task is traced: CRIU traces them itself, and a process has one tracer. Not while CRIU does."""
    for task in whole.tasks:
        if task.tracer:
            raise UnsupportedError(
                f"process {task} is traced by process {task.tracer}",
                hint="run without the debugger or strace, or detach it before the checkpoint",
            )


def check_ghosts(whole: Tree, limit: int) -> None:
    """No file that has no name any more takes more than `limit` bytes. Raises UnsupportedError naming one."""
    for one, status in scan.ghosts(whole.named()):
        if status.st_blocks * 512 > limit:
            raise UnsupportedError(
                f"process {one.task} has {one.name.removesuffix(DELETED)} open, a file without a name any more, with "
                f"{status.st_blocks * 512} bytes; up to {limit} are saved with a checkpoint",
                hint="let the program keep large scratch files under a name, or have checkpoint.ghost_limit raised",
            )
