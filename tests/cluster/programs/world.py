"""Holds one of everything that a process can have, and tells whether it still has it: `world.py DIRECTORY`.

Says "ready" when all is there. For each line on stdin every resource is looked at: one line each, its name and "ok" or
what is wrong, and at last "checked". Looking changes nothing, so that it can be done again.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import pty
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

libc = ctypes.CDLL(None, use_errno=True)
CHECKS: dict[str, Callable[[], object]] = {}
KEPT: list[object] = []
"""What must not be collected."""

IPC_PRIVATE, IPC_CREAT, IPC_STAT = 0, 0o1000, 2
MSG_PEEK = socket.MSG_PEEK
LONG = 10_000.0


def resource(function: Callable[[], Callable[[], object]]) -> None:
    """Makes it now; what it gives looks at it: None or True is good."""
    CHECKS[function.__name__] = function()


def call(result: int) -> int:
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def child(function: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.close(0)
        try:
            function()
        finally:
            os._exit(0)
    return pid


def echoing(read: Callable[[], bytes], write: Callable[[bytes], object]) -> None:
    while data := read():
        write(data.upper())


def asked(write: Callable[[bytes], object], read: Callable[[], bytes]) -> bool:
    write(b"hello")
    return read() == b"HELLO"


def waiting_in(fd: int) -> int:
    """Bytes that can be read (FIONREAD)."""
    return int(struct.unpack("i", fcntl.ioctl(fd, 0x541B, bytes(4)))[0])


directory = sys.argv[1]
# As the launch root of a real job is: daemons stay in its tree.
call(libc.prctl(36, 1, 0, 0, 0))


@resource
def pipe() -> Callable[[], object]:
    """Half full, to a child that answers, and one that nobody reads."""
    there, answer, full = os.pipe(), os.pipe(), os.pipe()
    child(lambda: (os.close(there[1]), echoing(lambda: os.read(there[0], 9), lambda d: os.write(answer[1], d))))
    os.write(full[1], b"x" * 70_000 if fcntl.fcntl(full[1], 1031, 1 << 17) >= 1 << 17 else b"")
    buffered = waiting_in(full[0])
    return lambda: (
        asked(lambda d: os.write(there[1], d), lambda: os.read(answer[0], 9)) and waiting_in(full[0]) == buffered
    )


@resource
def fifo() -> Callable[[], object]:
    path = "/tmp/world.fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    os.write(fd, b"kept")
    return lambda: waiting_in(fd) == 4 and os.path.exists(path)


@resource
def unix_stream() -> Callable[[], object]:
    ours, theirs = socket.socketpair()
    held, holder = socket.socketpair()
    holder.send(b"in flight")
    KEPT.append(holder)
    child(lambda: (ours.close(), echoing(lambda: theirs.recv(9), theirs.send)))
    return lambda: asked(ours.send, lambda: ours.recv(9)) and held.recv(9, MSG_PEEK) == b"in flight"


@resource
def unix_dgram() -> Callable[[], object]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for text in (b"one", b"two"):
        theirs.send(text)
    KEPT.append(theirs)
    return lambda: ours.recv(9, MSG_PEEK) == b"one"


def listening(address: str) -> Callable[[], object]:
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()

    def serve() -> None:
        while True:
            peer, _ = server.accept()
            if not os.fork():
                echoing(partial(peer.recv, 9), peer.send)
                os._exit(0)
            peer.close()

    child(lambda: (signal.signal(signal.SIGCHLD, signal.SIG_IGN), serve()))
    old = socket.socket(socket.AF_UNIX)
    old.connect(address)
    assert asked(old.send, lambda: old.recv(9))

    def check() -> bool:
        with socket.socket(socket.AF_UNIX) as new:
            new.connect(address)
            return asked(new.send, lambda: new.recv(9)) and asked(old.send, lambda: old.recv(9))

    return check


@resource
def unix_named() -> Callable[[], object]:
    return listening("/tmp/world.socket")


@resource
def unix_abstract() -> Callable[[], object]:
    return listening("\0world")


@resource
def udp() -> Callable[[], object]:
    one, two = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in "12")
    one.bind(("127.0.0.1", 0))
    two.connect(one.getsockname())
    one.connect(two.getsockname())
    child(lambda: echoing(lambda: one.recv(9), one.send))
    return lambda: asked(two.send, lambda: two.recv(9))


@resource
def tcp() -> Callable[[], object]:
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    peer, _ = server.accept()
    child(lambda: (client.close(), echoing(lambda: peer.recv(9), peer.send)))

    def check() -> bool:
        with socket.create_connection(server.getsockname()):
            server.accept()[0].close()
        return asked(client.send, lambda: client.recv(9))

    return check


@resource
def tcp_half_closed() -> Callable[[], object]:
    """CLOSE_WAIT with something to read at one end, FIN_WAIT2 at the other, which can still be written to."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    peer, _ = server.accept()
    KEPT.append(server)
    client.send(b"the last")
    client.shutdown(socket.SHUT_WR)

    def check() -> bool:
        said = peer.recv(9, MSG_PEEK)
        peer.send(b"answer")
        return said == b"the last" and client.recv(9) == b"answer"

    return check


@resource
def eventfd_and_epoll() -> Callable[[], object]:
    event = os.eventfd(5, os.EFD_NONBLOCK)
    empty, _ = os.pipe()
    KEPT.append(_)
    poll = select.epoll()
    poll.register(event, select.EPOLLIN)
    poll.register(empty, select.EPOLLIN)

    def check() -> bool:
        found = poll.poll(0)
        value = os.eventfd_read(event)
        os.eventfd_write(event, value)
        return found == [(event, select.EPOLLIN)] and value == 5

    return check


class Pulse(threading.Thread):
    """Notices for how long this process has stood still, by its own clock, and that this clock never goes back."""

    PERIOD = 0.05

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._last = time.monotonic()
        self._stood = 0.0
        self.went_back = False
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.start()  # what is sent to this process is the main thread's
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        while True:
            time.sleep(self.PERIOD)
            now = time.monotonic()
            self.went_back |= now < self._last
            self._stood += self._late(now)
            self._last = now

    def _late(self, now: float) -> float:
        late = now - self._last - self.PERIOD
        return late if late > self.PERIOD else 0.0

    def stood(self) -> float:
        """Seconds, what is not over yet among them."""
        return self._stood + self._late(time.monotonic())


pulse = Pulse()


def remains(left: float, begun: float) -> str | None:
    """A timer keeps what it has left when its process is dumped until it is restored, while the clock goes on."""
    least = LONG - (time.monotonic() - begun)
    most = least + pulse.stood()
    return None if least - 0.5 < left < most + 0.5 else f"{left} s left, which should be {least} to {most}"


@resource
def timerfd() -> Callable[[], object]:
    fd = call(libc.timerfd_create(time.CLOCK_MONOTONIC, 0))
    setting = (ctypes.c_long * 4)(0, 0, int(LONG), 0)
    call(libc.timerfd_settime(fd, 0, setting, None))
    begun = time.monotonic()

    def check() -> str | None:
        now = (ctypes.c_long * 4)()
        call(libc.timerfd_gettime(fd, now))
        return remains(now[2] + now[3] / 1e9, begun)

    return check


@resource
def interval_timer() -> Callable[[], object]:
    signal.setitimer(signal.ITIMER_REAL, LONG)
    begun = time.monotonic()
    return lambda: remains(signal.getitimer(signal.ITIMER_REAL)[0], begun)


@resource
def posix_timer() -> Callable[[], object]:
    timer = ctypes.c_void_p()
    call(libc.timer_create(time.CLOCK_MONOTONIC, None, ctypes.byref(timer)))
    call(libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, int(LONG), 0), None))
    begun = time.monotonic()

    def check() -> str | None:
        now = (ctypes.c_long * 4)()
        call(libc.timer_gettime(timer, now))
        return remains(now[2] + now[3] / 1e9, begun)

    return check


@resource
def signalfd_and_pending() -> Callable[[], object]:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    mask = ctypes.create_string_buffer(128)
    libc.sigemptyset(mask)
    libc.sigaddset(mask, int(signal.SIGUSR1))
    fd = call(libc.signalfd(-1, mask, os.O_NONBLOCK))
    os.kill(os.getpid(), signal.SIGUSR1)
    KEPT.append(fd)
    return lambda: signal.sigpending() == {signal.SIGUSR1} and bool(select.select([fd], [], [], 0)[0])


@resource
def inotify() -> Callable[[], object]:
    os.mkdir("/tmp/watched")
    fd = call(libc.inotify_init1(os.O_NONBLOCK))
    call(libc.inotify_add_watch(fd, b"/tmp/watched", 0x100))

    def check() -> bool:
        path = "/tmp/watched/new"
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.unlink(path)
        return b"new" in os.read(fd, 4096)

    return check


@resource
def memfd() -> Callable[[], object]:
    fd = os.memfd_create("world", os.MFD_ALLOW_SEALING)
    os.write(fd, b"content")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return lambda: os.pread(fd, 9, 0) == b"content" and fcntl.fcntl(fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SHRINK


@resource
def shared_memory() -> Callable[[], object]:
    memory = mmap.mmap(-1, 4096)
    memory[:4] = b"ours"
    child(lambda: [time.sleep(0.01) for _ in iter(lambda: memory.__setitem__(slice(4, 8), memory[:4]), 0)])
    while memory[4:8] != b"ours":
        time.sleep(0.001)

    def check() -> bool:
        memory[4:8] = bytes(4)
        limit = time.monotonic() + 20
        while memory[4:8] != b"ours" and time.monotonic() < limit:
            time.sleep(0.001)
        return bool(memory[4:8] == b"ours")

    return check


@resource
def sysv() -> Callable[[], object]:
    """A segment that is attached, one that is not, semaphores and a message."""
    libc.shmat.restype = ctypes.c_void_p
    one, two = (call(libc.shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0o600)) for _ in "12")
    address = libc.shmat(one, None, 0)
    ctypes.memmove(address, b"attached", 8)
    other = libc.shmat(two, None, 0)
    ctypes.memmove(other, b"detached", 8)
    call(libc.shmdt(ctypes.c_void_p(other)))
    semaphores = call(libc.semget(IPC_PRIVATE, 2, IPC_CREAT | 0o600))
    call(libc.semctl(semaphores, 1, 16, 7))
    queue = call(libc.msgget(IPC_PRIVATE, IPC_CREAT | 0o600))
    message = struct.pack("l", 1) + b"message"
    call(libc.msgsnd(queue, message, 7, 0))

    def check() -> bool:
        again = libc.shmat(two, None, 0)
        kept = ctypes.string_at(again, 8) == b"detached"
        call(libc.shmdt(ctypes.c_void_p(again)))
        found = ctypes.create_string_buffer(64)
        size = call(libc.msgrcv(queue, found, 56, 0, 0))
        call(libc.msgsnd(queue, found.raw, size, 0))
        return (
            kept
            and ctypes.string_at(address, 8) == b"attached"
            and call(libc.semctl(semaphores, 1, 12)) == 7
            and found.raw[8:15] == b"message"
        )

    return check


@resource
def threads() -> Callable[[], object]:
    counts = [0] * 4
    go = threading.Condition()

    def count(number: int) -> None:
        while True:
            with go:
                go.wait()
                counts[number] += 1

    for number in range(len(counts)):
        threading.Thread(target=count, args=(number,), daemon=True).start()

    def check() -> bool:
        before = list(counts)
        limit = time.monotonic() + 20
        while any(now <= then for now, then in zip(counts, before, strict=True)) and time.monotonic() < limit:
            with go:
                go.notify_all()
            time.sleep(0.001)
        return all(now > then for now, then in zip(counts, before, strict=True))

    return check


@resource
def zombie() -> Callable[[], object]:
    pid = os.fork()
    if pid == 0:
        os._exit(7)

    def check() -> bool:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return found is not None and found.si_status == 7

    return check


@resource
def daemon() -> Callable[[], object]:
    """In a session of its own, its parent gone."""
    ours, theirs = socket.socketpair()

    def begin() -> None:
        os.setsid()
        if os.fork() == 0:
            ours.close()
            echoing(lambda: theirs.recv(9), theirs.send)

    os.waitpid(child(begin), 0)
    return lambda: asked(ours.send, lambda: ours.recv(9))


@resource
def terminal() -> Callable[[], object]:
    """A session on a pseudo-terminal of its own, with a size."""
    pid, master = pty.fork()
    if pid == 0:
        os.execvp("cat", ["cat"])
    fcntl.ioctl(master, 0x5414, struct.pack("HHHH", 12, 34, 0, 0))

    def check() -> bool:
        os.write(master, b"line\n")
        said = b""
        while said.count(b"line") < 2 and select.select([master], [], [], 20)[0]:
            said += os.read(master, 99)
        size = struct.unpack("HHHH", fcntl.ioctl(master, 0x5413, bytes(8)))
        return said.count(b"line") == 2 and size[:2] == (12, 34)

    return check


@resource
def locks() -> Callable[[], object]:
    """Both kinds, on a file of the home directory: held against another process."""
    paths = [os.path.join(directory, name) for name in ("flock", "record")]
    fds = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths]
    fcntl.flock(fds[0], fcntl.LOCK_EX)
    fcntl.lockf(fds[1], fcntl.LOCK_EX, 10, 5)

    def attempt() -> int:
        held = 0
        for number, lock in enumerate((fcntl.flock, lambda f, how: fcntl.lockf(f, how, 1, 7))):
            with open(paths[number], "r+") as file:
                try:
                    lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    held += error.errno in (errno.EAGAIN, errno.EACCES)
        return held

    def check() -> bool:
        pid = os.fork()
        if pid == 0:
            os._exit(attempt())
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2

    return check


@resource
def working_directory_and_umask() -> Callable[[], object]:
    os.mkdir("/tmp/here")
    os.chdir("/tmp/here")
    os.umask(0o031)

    def check() -> bool:
        mask = os.umask(0)
        os.umask(mask)
        return os.getcwd() == "/tmp/here" and mask == 0o031

    return check


@resource
def seccomp() -> Callable[[], object]:
    """A filter that lets everything pass but one call, in a child."""
    ours, theirs = socket.socketpair()

    def begin() -> None:
        # if nr == getcpu (309 on x86-64): EDOM; else allow
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, 309), (0x06, 0, 0, 0x00050000 | errno.EDOM), (0x06, 0, 0, 0x7FFF0000)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
        header = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program))
        call(libc.prctl(38, 1, 0, 0, 0))
        call(libc.prctl(22, 2, ctypes.create_string_buffer(header), 0, 0))
        while theirs.recv(9):
            ctypes.set_errno(0)
            libc.syscall(309, 0, 0, 0)
            theirs.send(b"HELLO" if ctypes.get_errno() == errno.EDOM else b"no")

    child(lambda: (ours.close(), begin()))
    return lambda: asked(ours.send, lambda: ours.recv(9))


@resource
def deleted() -> Callable[[], object]:
    """Files and a directory without a name."""
    files = []
    for place in ("/tmp", "/dev/shm", directory):
        path = os.path.join(place, "deleted")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        os.write(fd, place.encode())
        os.unlink(path)
        files.append((fd, place.encode()))
    gone = os.path.join(directory, "gone")
    os.mkdir(gone)
    fd = os.open(gone, os.O_RDONLY | os.O_DIRECTORY)
    inside = child(lambda: (os.chdir(gone), signal.pause()))
    while os.readlink(f"/proc/{inside}/cwd") != gone:
        time.sleep(0.001)
    os.rmdir(gone)

    def check() -> bool:
        same = all(os.pread(fd, 999, 0) == content for fd, content in files)
        links = [os.readlink(f"/proc/{name}") for name in (f"self/fd/{fd}", f"{inside}/cwd")]
        return same and os.fstat(fd).st_nlink == 0 and all(link.endswith(" (deleted)") for link in links)

    return check


@resource
def clock() -> Callable[[], object]:
    last = [time.monotonic(), time.time()]

    def check() -> str | None:
        now, real = time.monotonic(), time.time()
        ran, passed = now - last[0], real - last[1]
        last[:] = now, real
        print(f"clock: {ran:.3f} s on the monotonic clock, {passed:.3f} s in the world")
        return None if 0 <= ran <= passed + 1 and not pulse.went_back else f"{ran} s have passed"

    return check


print("ready", flush=True)
for _line in sys.stdin:
    for name, check in CHECKS.items():
        try:
            result = check()
        except Exception as error:
            result = repr(error)
        print(name, "ok" if result is None or result is True else f"WRONG: {result}")
    print("checked", flush=True)
