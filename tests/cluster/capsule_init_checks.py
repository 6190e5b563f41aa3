"""Checks of capsule init with real CRIU, run as root inside one node of the testbed: `capsule_init_checks.py CASE`.

Each case talks noded/control.py to an init of its own and exits 0, or prints what was wrong and exits 1. Without a case
the names of all are printed, one a line; test_capsule_init.py runs each through `testbed exec`.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
from hpccr.model import FILES_LIST, FileRules, SavedFile, SavedFiles
from hpccr.noded import interface, netlink
from hpccr.noded.addresses import GATEWAY_MAC
from hpccr.noded.control import (
    MAX_PACKET,
    Build,
    Built,
    Identity,
    InitDumped,
    InitPrepare,
    InitReply,
    InitRestore,
    InitRollBack,
    Launch,
    Network,
    NetworkReady,
    Peer,
)
from hpccr.wire.messages import (
    Abort,
    Aborted,
    Dump,
    Exited,
    Failed,
    Freeze,
    Frozen,
    Prepared,
    Quiesce,
    Quiesced,
    Release,
    Released,
    Restored,
    Resume,
    Resumed,
    RolledBack,
    Signal,
    Started,
    Unheld,
    Unhold,
    Wanted,
)

from talkers import TALKERS

USER = 1001
PYTHON = "/usr/bin/python3"
DEADLINE = 60.0

IDENTITY = Identity(
    uid=USER,
    gid=USER,
    groups=(USER,),
    umask=0o027,
    rlimits=((7, 512, 1024),),
    cpus=(0,),
    nice=3,
)

CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """A check; its argument is an empty directory that the user owns."""
    CASES[function.__name__] = function
    return function


class Capsule:
    """hpccrd's end of an init, with the job's stdio."""

    def __init__(
        self, *, private: tuple[str, ...] = ("/tmp",), identity: Identity = IDENTITY, cgroups: Sequence[int] = ()
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(DEADLINE)
        os.set_inheritable(theirs.fileno(), True)
        self.socket = ours
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-m", "hpccr.noded.init", "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self.exits: list[int] = []
        self.output = bytearray()
        self.stdin = -1
        self.stdout = -1
        with open("/proc/self/ns/mnt") as namespace:
            built = self.ask(
                Build(
                    hostname="hpccr-0",
                    boot_id="11111111-2222-3333-4444-555555555555",
                    hosts="127.0.0.1 localhost\n10.90.0.10 hpccr-0\n",
                    private=private,
                    first_pid=300,
                    criu="criu",
                    identity=identity,
                ),
                [namespace.fileno(), *cgroups],
            )
        assert isinstance(built, Built), built
        self.pid = built.pid
        self.process.wait(DEADLINE)

    def send(self, message: msgspec.Struct, fds: list[int] | None = None) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([msgspec.msgpack.encode(message)], ancillary)

    def receive(self) -> InitReply | None:
        """The next packet that is no Exited."""
        while True:
            data = self.socket.recv(MAX_PACKET)
            if not data:
                return None
            message: InitReply = msgspec.msgpack.decode(data, type=InitReply)
            if not isinstance(message, Exited):
                return message
            self.exits.append(message.code)

    def ask(self, message: msgspec.Struct, fds: list[int] | None = None) -> InitReply | None:
        self.send(message, fds)
        return self.receive()

    def exited(self) -> int:
        """Wait for the end of the launch root."""
        while not self.exits:
            message = msgspec.msgpack.decode(self.socket.recv(MAX_PACKET), type=InitReply)
            assert isinstance(message, Exited), message
            self.exits.append(message.code)
        return self.exits.pop()

    def pipes(self) -> list[int]:
        """New stdin and stdout (stderr merged); gives the job's ends."""
        job_in, self.stdin = os.pipe()
        self.stdout, job_out = os.pipe()
        return [job_in, job_out]

    def launch(self, argv: list[str], *, cwd: str = "/", env: dict[str, str] | None = None) -> InitReply | None:
        memfd = os.memfd_create("environment")
        whole = {"PATH": "/usr/bin:/bin", **(env or {})}
        os.write(memfd, msgspec.msgpack.encode({os.fsencode(k): os.fsencode(v) for k, v in whole.items()}))
        ends = self.pipes()
        request = Launch(argv=tuple(map(os.fsencode, argv)), cwd=os.fsencode(cwd), stdin="pipe", merged=True)
        reply = self.ask(request, [memfd, *ends])
        for fd in (memfd, *ends):
            os.close(fd)
        return reply

    def script(self, text: str, *, cwd: str = "/") -> int:
        """Run a Python program as the job; its pid in the capsule."""
        reply = self.launch([PYTHON, "-u", "-c", textwrap.dedent(text)], cwd=cwd)
        assert isinstance(reply, Started), reply
        return reply.pid

    def read_until(self, wanted: bytes) -> bytes:
        """All output since the last call up to and with `wanted`; more stays for the next call."""
        limit = time.monotonic() + DEADLINE
        while wanted not in self.output:
            ready, _, _ = select.select([self.stdout], [], [], max(0.0, limit - time.monotonic()))
            data = os.read(self.stdout, 65536) if ready else b""
            assert data, f"no {wanted!r} in the output, but {bytes(self.output)!r}"
            self.output += data
        end = self.output.index(wanted) + len(wanted)
        result = bytes(self.output[:end])
        del self.output[:end]
        return result

    def read_rest(self) -> bytes:
        """All output to the end of file."""
        self.read_rest_into()
        result = bytes(self.output)
        self.output.clear()
        return result

    def read_rest_into(self) -> None:
        """Add all output to the end of file to `output`."""
        while data := os.read(self.stdout, 65536):
            self.output += data

    def drain(self) -> None:
        """What is in the pipe now, without waiting."""
        while select.select([self.stdout], [], [], 0)[0]:
            data = os.read(self.stdout, 65536)
            if not data:
                return
            self.output += data

    def write(self, data: bytes) -> None:
        os.write(self.stdin, data)

    def prepare(
        self,
        spool: int,
        *,
        outside: str = "allow",
        room: int = 1 << 40,
        files: FileRules | None = None,
        private_limit: int = 1 << 30,
        freeze_timeout: float = 10.0,
    ) -> InitReply | None:
        request = InitPrepare(
            freeze_timeout=freeze_timeout,
            ghost_limit=1 << 30,
            outside=outside,
            room=room,
            files=files or FileRules(),
            private_limit=private_limit,
        )
        return self.ask(request, [spool])

    def checkpoint(
        self, spool: int, *, kill: bool = False, files: FileRules | None = None
    ) -> tuple[InitDumped, Released]:
        prepared = self.prepare(spool, files=files)
        assert isinstance(prepared, Prepared), prepared
        frozen = self.ask(Freeze())
        assert isinstance(frozen, Frozen), frozen
        self.drain()
        dumped = self.ask(Dump())
        assert isinstance(dumped, InitDumped), dumped
        released = self.ask(Release(kill=kill))
        assert isinstance(released, Released), released
        return dumped, released

    def roll_back(self, spool: int, dumped: InitDumped) -> InitReply | None:
        return self.ask(InitRollBack(image=dumped.image), [spool])

    def restore(self, spool: int, dumped: InitDumped) -> InitReply | None:
        rolled = self.roll_back(spool, dumped)
        if not isinstance(rolled, RolledBack):
            return rolled
        ends = self.pipes()
        reply = self.ask(
            InitRestore(image=dumped.image, stdin="pipe", merged=True, ghost_limit=1 << 30), [spool, *ends]
        )
        for fd in ends:
            os.close(fd)
        return reply

    def restart(self, spool: int, dumped: InitDumped) -> Restored:
        restored = self.restore(spool, dumped)
        assert isinstance(restored, Restored), restored
        assert isinstance(self.ask(Resume()), Resumed)
        assert isinstance(self.ask(Unhold()), Unheld)
        return restored

    def enter(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command as root inside the capsule's namespaces."""
        return subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "-u", "-n", "-p", *argv], capture_output=True, text=True, timeout=30
        )

    def close(self) -> None:
        """End the capsule and wait until it is gone."""
        pidfd = os.pidfd_open(self.pid)
        self.socket.close()
        assert select.select([pidfd], [], [], DEADLINE)[0], "init lives on after its socket closed"
        for fd in (pidfd, self.stdin, self.stdout):
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def capsule(**options: object) -> Iterator[Capsule]:
    one = Capsule(**options)  # type: ignore[arg-type]
    try:
        yield one
    finally:
        one.close()


@contextlib.contextmanager
def spool() -> Iterator[int]:
    """A spool directory as hpccrd makes it, as a descriptor."""
    path = tempfile.mkdtemp(prefix="spool-", dir="/var/tmp")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)
        shutil.rmtree(path)


COUNTER = """
    import sys
    print("ready", flush=True)
    total = 0
    for line in sys.stdin:
        total += int(line)
        print("total", total, flush=True)
"""


def expect_failed(reply: InitReply | None, *words: str, code: int = 1) -> Failed:
    assert isinstance(reply, Failed), reply
    for word in words:
        assert word in reply.message + " " + reply.hint, reply
    assert reply.code == code, reply
    return reply


def processes_of_user() -> list[str]:
    """Command lines of all processes of the user's on this node."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            text = status.read_text()
            if f"\nUid:\t{USER}\t" in text and "State:\tZ" not in text:
                found.append(text.splitlines()[0])
    return found


# --- safe points ------------------------------------------------------------------------------------------------

HOSTILE_PAGES = """
    import os, struct, sys
    page = "/dev/shm/hpccr-quiesce"
    magic, entry = struct.pack("<QQ", 0x3230514343504848, 1 << 40), struct.pack("<QIIIIII96x", 5, 1, 2, 0, 0, 1, 0)

    def whole():
        with open(page, "wb") as file:
            file.write(magic.ljust(4096, b"\\0") + 1024 * entry)

    def short():
        whole()
        os.truncate(page, 4096 + 100)

    makers = {
        "link": lambda: os.symlink("/etc/passwd", page),
        "outside": lambda: os.symlink("/proc/self/mem", page),
        "fifo": lambda: os.mkfifo(page),
        "directory": lambda: os.mkdir(page),
        "empty": lambda: open(page, "w").close(),
        "closed": lambda: (whole(), os.chmod(page, 0)),
        "short": short,
        "whole": whole,
    }
    for line in sys.stdin:
        name = line.strip()
        if name == "gone":
            os.rmdir(page) if os.path.isdir(page) else os.unlink(page)
        elif name == "cut":
            os.truncate(page, 64)
        else:
            makers[name]()
        print("made", name, flush=True)
"""


@case
def pages_that_are_none(home: Path) -> None:
    """Whatever the user makes of the page of the safe points, init answers, and the job can still be checkpointed."""
    with capsule() as one, spool() as directory:
        one.script(HOSTILE_PAGES)

        def make(name: str) -> None:
            one.write(f"{name}\n".encode())
            one.read_until(f"made {name}\n".encode())

        def stage(name: str, *targets: tuple[int, int]) -> Quiesced:
            if name == "ask":
                prepared = one.prepare(directory)
                assert isinstance(prepared, Prepared), prepared
            reply = one.ask(Quiesce(name, 100, targets))  # type: ignore[arg-type]
            assert isinstance(reply, Quiesced), (name, reply)
            return reply

        for name in ("link", "outside", "fifo", "directory", "empty", "closed"):
            make(name)
            assert stage("ask") == stage("arrive", (5, 1)) == stage("finish", (5, 1)) == Quiesced(()), name
            assert isinstance(one.ask(Abort("no")), Aborted)
            make("gone")
        make("short")
        assert stage("ask") == Quiesced(())
        assert isinstance(one.ask(Abort("no")), Aborted)
        make("whole")
        # More entries claimed than there can be: init looks at no more. Pid 1 is its own, and none of the page's.
        ranks = stage("ask").ranks
        assert len(ranks) == 1024 and all(rank.gone for rank in ranks)
        assert not any(rank.arrived for rank in stage("arrive", (5, 1)).ranks)
        make("cut")
        assert stage("finish", (5, 1)) == Quiesced(())
        assert isinstance(one.ask(Abort("no")), Aborted)
        one.checkpoint(directory)


@case
def wishes_for_checkpoints(home: Path) -> None:
    """Many within a second are one; after it another one is heard, whatever came before."""
    with capsule() as one:
        one.script("""
            import contextlib, socket, sys
            for line in sys.stdin:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                    for _ in range(int(line)):
                        with contextlib.suppress(BlockingIOError):  # what does not fit is the same wish
                            sock.sendto(b"c", socket.MSG_DONTWAIT, "\\0hpccr-request")
        """)
        start = time.monotonic()
        one.write(b"5\n")
        assert isinstance(one.receive(), Wanted)
        one.write(b"1\n")  # the same wish
        heard = select.select([one.socket], [], [], 0)[0]
        while not heard:
            one.write(b"1\n")
            heard = select.select([one.socket], [], [], 0.1)[0]
        assert isinstance(one.receive(), Wanted)
        assert time.monotonic() - start >= 0.9, "a second one within a second"


# --- launching --------------------------------------------------------------------------------------------------


@case
def exit_codes(home: Path) -> None:
    for text, code in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 15)", -15)):
        with capsule() as one:
            one.script(text)
            assert one.exited() == code


@case
def signals_are_passed(home: Path) -> None:
    with capsule() as one:
        one.script(COUNTER)
        one.read_until(b"ready\n")
        one.send(Signal(signum=signal.SIGTERM))
        assert one.exited() == -signal.SIGTERM


@case
def the_job_is_only_the_users(home: Path) -> None:
    with capsule() as one:
        pid = one.script(
            """
            import json, os, resource, signal
            status = dict(line.rstrip().split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
            try:
                os.kill(1, 9)
                killed = True
            except PermissionError:
                killed = False
            try:
                open("/proc/1/fd/0")
                peeked = True
            except PermissionError:
                peeked = False
            print(json.dumps({
                "ids": os.getresuid() + os.getresgid(), "groups": os.getgroups(),
                "caps": [status[k] for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
                "nnp": status["NoNewPrivs"], "umask": status["Umask"], "nofile": resource.getrlimit(7),
                "cpus": list(os.sched_getaffinity(0)), "nice": os.getpriority(0, 0), "sid": os.getsid(0),
                "pid": os.getpid(), "ppid": os.getppid(), "fds": os.listdir("/proc/self/fd"), "cwd": os.getcwd(),
                "oom": open("/proc/self/oom_score_adj").read(),
                "ignored": status["SigIgn"], "blocked": status["SigBlk"],
                "killed": killed, "peeked": peeked, "env": dict(os.environ),
                "host": os.uname().nodename, "hosts": open("/etc/hosts").read(),
                "boot": open("/proc/sys/kernel/random/boot_id").read().strip(),
                "pids": sorted(int(n) for n in os.listdir("/proc") if n.isdigit()),
                "tmp": os.listdir("/tmp"), "shm": os.listdir("/dev/shm"), "mode": oct(os.stat("/tmp").st_mode),
                "net": os.listdir("/sys/class/net"), "cgroup": len(os.listdir("/sys/fs/cgroup")),
                "ipc": os.readlink("/proc/self/ns/ipc"),
            }))
            """,
            cwd=str(home),
        )
        found = json.loads(one.read_until(b"\n"))
        assert one.exited() == 0
        assert found["ids"] == [USER] * 6 and found["groups"] == [USER], found
        assert found["caps"] == ["0" * 16] * 5 and found["nnp"] == "1", found
        assert found["umask"] == "0027" and found["nofile"] == [512, 1024], found
        assert found["cpus"] == [0] and found["nice"] == 3, found
        assert found["sid"] == found["pid"] == pid >= 300 and found["ppid"] == 1, found
        assert sorted(found["fds"]) == ["0", "1", "2", "3"], found  # 3: listdir's own
        assert found["cwd"] == str(home) and found["oom"].strip() == "0", found
        # 32 and 33 are the C library's own: through it no program can change whether they are ignored or blocked, and
        # whoever started the cluster may have had them so.
        internal = 1 << 31 | 1 << 32
        python = 1 << 12 | 1 << 24  # ignores SIGPIPE and SIGXFSZ by itself
        assert int(found["ignored"], 16) & ~(internal | python) == 0, found
        assert int(found["blocked"], 16) & ~internal == 0, found
        assert not found["killed"] and not found["peeked"], found
        assert set(found["env"]) - {"LC_CTYPE"} == {"PATH"}, found
        assert found["host"] == "hpccr-0" and "hpccr-0" in found["hosts"], found
        assert found["boot"] == "11111111-2222-3333-4444-555555555555", found
        assert found["pids"] == [1, pid], found
        assert found["tmp"] == found["shm"] == [] and found["mode"] == "0o41777", found
        assert found["net"] == ["lo"] and found["cgroup"] > 0, found
        assert found["ipc"] != os.readlink("/proc/self/ns/ipc"), found


@case
def a_setuid_program_gains_nothing(home: Path) -> None:
    program = home / "id"
    shutil.copy("/usr/bin/id", program)
    os.chown(program, 0, 0)
    program.chmod(0o4755)
    with capsule() as one:
        reply = one.launch([str(program)])
        assert isinstance(reply, Started), reply
        assert "euid" not in one.read_rest().decode()
        assert one.exited() == 0


@case
def a_failed_launch_says_why(home: Path) -> None:
    with capsule() as one:
        expect_failed(one.launch([PYTHON], cwd="/nowhere"), "/nowhere", "No such file", "every node")
        expect_failed(one.launch([PYTHON], cwd="/tmp/job"), "/tmp/job", "/tmp is private to each capsule")
        expect_failed(one.launch([PYTHON], cwd="/root"), "/root", "Permission denied")
        expect_failed(one.launch(["/nowhere/root.py"]), "/nowhere/root.py", "No such file")
        one.script("print('at last')")
        assert one.read_rest() == b"at last\n"
        assert one.exited() == 0


@case
def a_missing_private_directory_is_named(home: Path) -> None:
    try:
        with capsule(private=("/nowhere",)):
            raise AssertionError("built without the directory")
    except AssertionError as error:
        assert "/nowhere" in str(error) and "capsule.private" in str(error), error


@case
def nothing_is_left_behind(home: Path) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    for barrier in ("launched", "prepared", "frozen", "dumped", "restored"):
        with spool() as directory:
            with capsule() as one:
                one.script(COUNTER)
                one.read_until(b"ready\n")
                assert one.exits == []
                if barrier != "launched":
                    assert isinstance(one.prepare(directory), Prepared)
                if barrier in ("frozen", "dumped"):
                    assert isinstance(one.ask(Freeze()), Frozen)
                if barrier == "dumped":
                    assert isinstance(one.ask(Dump()), InitDumped)
                if barrier == "restored":
                    one.ask(Abort(reason="again"))
                    dumped, _ = one.checkpoint(directory)
                    with capsule() as two:
                        assert isinstance(two.restore(directory, dumped), Restored)
            assert processes_of_user() == [], barrier
    assert Path("/proc/self/mountinfo").read_text() == mounts


# --- checkpointing ----------------------------------------------------------------------------------------------


@case
def aborted_at_each_barrier_the_job_goes_on(home: Path) -> None:
    with capsule() as one:
        one.script(TALKERS)
        one.read_until(b"ready\n")
        for number, barrier in enumerate(("prepared", "frozen", "dumped", "none")):
            with spool() as directory:
                if barrier != "none":
                    assert isinstance(one.prepare(directory), Prepared)
                if barrier in ("frozen", "dumped"):
                    assert isinstance(one.ask(Freeze()), Frozen)
                if barrier == "dumped":
                    assert isinstance(one.ask(Dump()), InitDumped)
                assert isinstance(one.ask(Abort(reason="test")), Aborted)
                one.write(b"%d\n" % number)
                assert one.read_until(b"\n") == b"echo %d\n" % number
        with spool() as directory:
            one.checkpoint(directory)
            one.write(b"last\n")
            assert one.read_until(b"\n") == b"echo last\n"
        assert one.exits == []


@case
def aborted_in_the_middle_the_job_goes_on(home: Path) -> None:
    with capsule() as one:
        one.script(
            """
            import sys
            memory = bytearray(b"x" * (400 << 20))
            print("ready", flush=True)
            for line in sys.stdin:
                print(len(memory), flush=True)
            """
        )
        one.read_until(b"ready\n")
        for request in (Freeze(), Dump()):
            with spool() as directory:
                assert isinstance(one.prepare(directory), Prepared)
                if isinstance(request, Dump):
                    assert isinstance(one.ask(Freeze()), Frozen)
                one.send(request)
                one.send(Abort(reason="too slow"))
                first = one.receive()
                # The request may have been answered before the abort was read.
                if not isinstance(first, Frozen | InitDumped):
                    expect_failed(first, "aborted: too slow")
                assert isinstance(one.receive(), Aborted)
                one.write(b"go\n")
                assert one.read_until(b"\n") == b"%d\n" % (400 << 20)


@case
def a_task_that_cannot_be_stopped_is_told_in_time(home: Path) -> None:
    """One in state D, as a hung file server makes them; here it waits for its child to execute a program. CRIU says so
    before whoever waits for the answer gives up, and an abort in that moment hurts nothing."""
    limit = 6.0
    os.mkfifo(home / "fifo", 0o666)
    os.chmod(home / "fifo", 0o666)
    with capsule() as one, spool() as first, spool() as second, spool() as third:
        one.script(f"""
            import os
            print("ready", flush=True)
            opens = [(os.POSIX_SPAWN_OPEN, 0, {str(home / "fifo")!r}, os.O_RDONLY, 0)]
            os.waitpid(os.posix_spawn("/bin/true", ["true"], {{}}, file_actions=opens), 0)
            print("stopped", input(), flush=True)
        """)
        one.read_until(b"ready\n")
        for directory in (first, second):
            assert isinstance(one.prepare(directory, freeze_timeout=limit), Prepared)
            one.send(Freeze())
            if directory == second:
                one.send(Abort(reason="too slow"))
                expect_failed(one.receive(), "aborted: too slow")
            else:
                waited = 0.0  # as this process lives it: a stall of the machine counts as one tick
                while not select.select([one.socket], [], [], 0.1)[0]:
                    waited += 0.1
                    assert waited < limit
                expect_failed(one.receive(), "freeze", "state D")
                one.send(Abort(reason="test"))
            assert isinstance(one.receive(), Aborted)
        (home / "fifo").write_bytes(b"")
        one.checkpoint(third, kill=False)
        one.write(b"1\n")
        one.read_until(b"stopped 1\n")


@case
def out_of_turn_requests_are_refused(home: Path) -> None:
    with capsule() as one, spool() as directory:
        expect_failed(one.prepare(directory), "no job")
        expect_failed(one.ask(Freeze()), "no checkpoint")
        one.script(COUNTER)
        one.read_until(b"ready\n")
        for request in (Dump(), Release(kill=True), Resume()):
            expect_failed(one.ask(request))
        assert isinstance(one.prepare(directory), Prepared)
        expect_failed(one.prepare(directory), "under way")
        one.write(b"1\n")
        one.read_until(b"total 1\n")


@case
def too_little_room_is_refused(home: Path) -> None:
    with capsule() as one, spool() as directory:
        one.script("""
            import time
            memory = bytearray(b"x" * (64 << 20))
            open("/tmp/file", "wb").write(memory[:16 << 20])
            print("ready", flush=True)
            time.sleep(1000)
        """)
        one.read_until(b"ready\n")
        expect_failed(one.prepare(directory, room=64 << 20), "node.spool", "spool_reserve", str(64 << 20))
        limited = one.prepare(directory, private_limit=8 << 20)
        expect_failed(limited, "directory /tmp holds", str(8 << 20), "capsule.private_limit", code=13)
        prepared = one.prepare(directory)
        assert isinstance(prepared, Prepared) and 80 << 20 < prepared.estimate < 160 << 20, prepared


@case
def while_frozen_nothing_moves_on_the_network(home: Path) -> None:
    with capsule() as one, spool() as directory:
        one.script(COUNTER)
        one.read_until(b"ready\n")
        reach = (
            "python3",
            "-c",
            "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname(), 1)",
        )
        assert one.enter(*reach).returncode == 0
        assert isinstance(one.prepare(directory), Prepared)
        assert one.enter(*reach).returncode == 0
        assert isinstance(one.ask(Freeze()), Frozen)
        held = one.enter(*reach)
        assert "timed out" in held.stderr, held
        assert isinstance(one.ask(Dump()), InitDumped)
        assert isinstance(one.ask(Release(kill=False)), Released)
        assert one.enter(*reach).returncode == 0


@case
def killed_at_release_not_one_instruction_more(home: Path) -> None:
    count = home / "count"
    with spool() as directory:
        with capsule() as one:
            one.script(
                f"""
                import os, sys
                print("ready", flush=True)
                if os.fork() == 0:
                    for number in range(1 << 60):
                        os.write(1, b".")
                with open("{count}", "ab", buffering=0) as file:
                    while True:
                        file.write(b".")
                """
            )
            one.read_until(b"ready\n")
            while not count.exists() or count.stat().st_size < 10000:
                one.read_until(b".")
            assert isinstance(one.prepare(directory), Prepared)
            one.drain()
            one.send(Freeze())
            while not select.select([one.socket], [], [], 0)[0]:
                one.drain()
            assert isinstance(one.receive(), Frozen)
            size = count.stat().st_size
            one.drain()
            output = len(one.output)
            dumped = one.ask(Dump())
            assert isinstance(dumped, InitDumped), dumped
            assert isinstance(one.ask(Release(kill=True)), Released)
            assert processes_of_user() == []
            one.read_rest_into()
            assert len(one.output) == output and count.stat().st_size == size
            (recorded,) = saved_files(directory)
            assert (recorded.path, recorded.size) == (os.fsencode(count), size)
            one.socket.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                one.receive()
            assert one.exits == [], "an Exited after the kill"
        with capsule() as two:
            two.restart(directory, dumped)
            two.read_until(b"." * 1000)
            assert count.stat().st_size > size


@case
def criu_killed_from_outside_the_job_goes_on(home: Path) -> None:
    """As the kernel does when memory runs out: at post-dump, when all sockets are in TCP's repair mode."""
    waiting = TALKERS.replace(
        "while data := peer.recv(100):", "while select.select([peer], [], []) and (data := peer.recv(100)):"
    )
    with capsule() as one:
        one.script(waiting.replace("import os,", "import os, select,"))
        one.read_until(b"ready\n")
        with spool() as directory:
            assert isinstance(one.prepare(directory), Prepared)
            assert isinstance(one.ask(Freeze()), Frozen)
            assert isinstance(one.ask(Dump()), InitDumped)
            assert one.enter("pkill", "-KILL", "-x", "criu").returncode == 0
            assert isinstance(one.ask(Abort(reason="CRIU died")), Aborted)
        one.write(b"on\n")
        assert one.read_until(b"\n") == b"echo on\n"
        with spool() as directory:
            one.checkpoint(directory)
        one.write(b"and on\n")
        assert one.read_until(b"\n") == b"echo and on\n"


@case
def services_outside_are_cut_and_come_back_closed(home: Path) -> None:
    os.makedirs("/run/munge", exist_ok=True)
    path = "/run/munge/check.socket"
    text = f"""
        import os, socket, sys
        stream = socket.socket(socket.AF_UNIX)
        stream.connect("{path}")
        stream.sendall(b"question")
        stream.recv(100)
        datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        datagram.connect("{path}.dgram")
        pair = socket.socketpair()
        print("ready", flush=True)
        for line in sys.stdin:
            found = [stream.recv(10)]
            for each in (stream, datagram):
                try:
                    each.send(b"more")
                    found.append("sent")
                except OSError as error:
                    found.append(type(error).__name__)
            pair[0].send(b"x")
            print(found, pair[1].recv(1), flush=True)
    """
    expected = b"[b'', 'BrokenPipeError', 'OSError'] b'x'\n"
    with socket.socket(socket.AF_UNIX) as service, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        for each, name in ((service, path), (log, path + ".dgram")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            each.bind(name)
            os.chmod(name, 0o666)
        service.listen()

        def serve() -> None:
            talk, _ = service.accept()
            while data := talk.recv(100):
                talk.sendall(data)
            talk.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with spool() as directory:
            with capsule() as one:
                one.script(text)
                one.read_until(b"ready\n")
                dumped, _ = one.checkpoint(directory)
                thread.join()
                one.write(b"1\n")
                line = one.read_until(b"\n")
                assert line == expected, line
            with capsule() as two:
                two.restart(directory, dumped)
                two.write(b"1\n")
                line = two.read_until(b"\n")
                assert line == expected.replace(b"'OSError'", b"'OSError'"), line
    for name in (path, path + ".dgram"):
        os.unlink(name)


@case
def other_sockets_to_outside_are_refused(home: Path) -> None:
    path = str(home / "socket")
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(path)
        os.chmod(path, 0o666)
        service.listen()
        accepted: list[socket.socket] = []

        def serve() -> None:
            accepted.append(service.accept()[0])
            accepted[0].send(b"y")  # a connection that is not accepted yet is refused for another reason

        thread = threading.Thread(target=serve)
        thread.start()
        text = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect('{path}'); s.send(b'x'); s.recv(1)"
        refused(text, "python3", path)
        thread.join()
        accepted[0].close()


@case
def odd_process_trees_come_back(home: Path) -> None:
    """A zombie, a session, a process group whose leader is gone, a stopped child."""
    with spool() as directory:
        with capsule() as one:
            one.script(
                """
                import ctypes, os, signal, sys, time
                ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
                def spawn(act):
                    pid = os.fork()
                    if pid == 0:
                        act()
                        os._exit(0)
                    return pid
                def wait():
                    while True:
                        time.sleep(1000)
                zombie = spawn(lambda: os._exit(9))
                os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
                def grouped():
                    os.setpgid(0, 0)
                    spawn(wait)
                os.waitpid(spawn(grouped), 0)
                said, saying = os.pipe()
                spawn(lambda: (os.setsid(), os.write(saying, b"x"), wait()))
                os.read(said, 1)
                os.close(said)
                os.close(saying)
                stopped = spawn(wait)
                os.kill(stopped, signal.SIGSTOP)
                os.waitpid(stopped, os.WUNTRACED)
                print("ready", flush=True)
                for line in sys.stdin:
                    tasks = sorted(int(n) for n in os.listdir("/proc") if n.isdigit() and n != "1")
                    state = [open(f"/proc/{n}/stat").read().rpartition(")")[2].split()[:4] for n in tasks]
                    print(tasks, str(state).replace("R", "S"), flush=True)
                os.kill(stopped, signal.SIGKILL)
                print(os.waitpid(zombie, 0)[1], flush=True)
                """
            )
            one.read_until(b"ready\n")
            one.write(b"1\n")
            before = one.read_until(b"\n")
            dumped, _ = one.checkpoint(directory, kill=True)
            assert dumped.image.tasks == 5, dumped
        with capsule() as two:
            two.restart(directory, dumped)
            two.write(b"1\n")
            after = two.read_until(b"\n")
            assert after == before, (before, after)
            os.close(two.stdin)
            two.stdin = -1
            assert two.read_until(b"\n") == b"2304\n"
            assert two.exited() == 0


@case
def orphans_stay_in_the_tree_over_restarts(home: Path) -> None:
    """A task whose session leader has ended is the subreaper's before and after, so a later checkpoint has it too."""
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(capsule())
        pid = one.script(
            """
            import ctypes, os, sys, time
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
            leader = os.fork()
            if leader == 0:
                os.setsid()
                if os.fork() == 0:
                    while True:
                        time.sleep(1000)
                os._exit(0)
            os.waitpid(leader, 0)
            print("ready", flush=True)
            for line in sys.stdin:
                orphan = leader + 1
                flag = ctypes.c_int()
                ctypes.CDLL(None).prctl(37, ctypes.byref(flag), 0, 0, 0)
                print(open(f"/proc/{orphan}/stat").read().split()[3:6], flag.value, flush=True)
            """
        )
        one.read_until(b"ready\n")
        expected = f"['{pid}', '{pid + 1}', '{pid + 1}'] 1\n".encode()
        for _ in range(3):
            one.write(b"1\n")
            found = one.read_until(b"\n")
            assert found == expected, found
            directory = stack.enter_context(spool())
            dumped, _ = one.checkpoint(directory, kill=True)
            assert dumped.image.tasks == 2
            one = stack.enter_context(capsule())
            one.restart(directory, dumped)
        one.write(b"1\n")
        assert one.read_until(b"\n") == expected
        one.send(Signal(signum=signal.SIGTERM))
        assert one.exited() == -signal.SIGTERM


@case
def the_job_is_in_its_cgroups_and_on_its_cpus(home: Path) -> None:
    with contextlib.ExitStack() as stack, spool() as directory:
        places = []
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            if rest.split()[0] in ("cgroup", "cgroup2"):
                places.append(Path(fields.split()[4]))
        assert places, "no cgroup is mounted"
        procs = []
        charged: list[Path] = []
        for place in places:
            group = place / "capsule-check"
            try:
                group.mkdir(exist_ok=True)
                for name in ("cpuset.cpus", "cpuset.mems"):
                    if (group / name).exists():
                        (group / name).write_text((place / name).read_text())
                fd = os.open(group / "cgroup.procs", os.O_WRONLY)
            except OSError:
                continue  # a hierarchy that this node may not use
            stack.callback(group.rmdir)
            stack.callback(os.close, fd)
            procs.append(fd)
            charged += [path for name in ("memory.usage_in_bytes", "memory.current") if (path := group / name).exists()]
        assert procs
        text = """
            import os, sys
            open("/tmp/large", "wb").write(bytes(range(256)) * (1 << 18))
            print("ready", flush=True)
            for line in sys.stdin:
                print(open("/proc/self/cgroup").read().count("capsule-check"), os.sched_getaffinity(0), flush=True)
        """
        with capsule(cgroups=procs) as one:
            one.script(text)
            one.read_until(b"ready\n")
            one.write(b"1\n")
            first = one.read_until(b"\n")
            assert int(first.split()[0]) == len(procs) and b"{0}" in first, first
            dumped, _ = one.checkpoint(directory)
        with capsule(cgroups=procs) as two:
            two.restart(directory, dumped)
            two.write(b"1\n")
            assert two.read_until(b"\n") == first
            # Also what a restore has put into the private directories is the job's memory.
            assert charged and all(int(path.read_text()) > 64 << 20 for path in charged)


# --- restoring --------------------------------------------------------------------------------------------------


@case
def restart_with_stdio(home: Path) -> None:
    with spool() as directory:
        with capsule() as one:
            one.script(COUNTER)
            one.read_until(b"ready\n")
            one.write(b"1\n2\n")
            one.read_until(b"total 3\n")
            dumped, released = one.checkpoint(directory)
            assert 0 < released.criu_freeze_seconds <= released.frozen_seconds < 5, released
            one.write(b"5\n")
            one.read_until(b"total 8\n")
        with capsule() as two:
            two.restart(directory, dumped)
            two.write(b"4\n")
            assert two.read_until(b"\n") == b"total 7\n"
            with spool() as again:
                later, _ = two.checkpoint(again)
                two.write(b"1\n")
                assert two.read_until(b"\n") == b"total 8\n"
                with capsule() as three:
                    three.restart(again, later)
                    three.write(b"2\n")
                    assert three.read_until(b"\n") == b"total 9\n"
                    three.send(Signal(signum=signal.SIGTERM))
                    assert three.exited() == -signal.SIGTERM
            os.close(two.stdin)
            two.stdin = -1
            assert two.exited() == 0


@case
def input_in_the_pipe_is_not_read_twice(home: Path) -> None:
    with spool() as directory:
        with capsule() as one:
            one.script("""
                import os, signal
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
                print("ready", flush=True)
                signal.sigwait({signal.SIGUSR1})
                data = b""
                while b"end" not in data:
                    data += os.read(0, 100)
                print(data, flush=True)
            """)
            one.read_until(b"ready\n")
            one.write(b"pending")
            dumped, _ = one.checkpoint(directory)
            one.write(b"end")
            one.send(Signal(signum=signal.SIGUSR1))
            assert one.read_until(b"\n") == b"b'pendingend'\n"
        with capsule() as two:
            two.restart(directory, dumped)
            # What was pending is fed again by who kept it: the new pipe starts empty.
            two.write(b"pending")
            two.write(b"end")
            two.send(Signal(signum=signal.SIGUSR1))
            assert two.read_until(b"\n") == b"b'pendingend'\n"


@case
def memory_files_and_connections_come_back(home: Path) -> None:
    with spool() as directory:
        with capsule() as one:
            one.script(
                """
                import ctypes, mmap, os, socket, sys, threading, time
                libc = ctypes.CDLL(None, use_errno=True)
                libc.shmat.restype = ctypes.c_void_p
                segment = libc.shmget(4711, 4096, 0o1600)
                sysv = (ctypes.c_char * 4096).from_address(libc.shmat(segment, None, 0))
                sysv.value = b"sysv"
                shm = os.open("/dev/shm/segment", os.O_RDWR | os.O_CREAT, 0o600)
                os.ftruncate(shm, 1 << 20)
                posix = mmap.mmap(shm, 1 << 20)
                posix[:5] = b"posix"
                gone = os.open("/dev/shm/gone", os.O_RDWR | os.O_CREAT, 0o600)
                os.ftruncate(gone, 4096)
                ghost = mmap.mmap(gone, 4096)
                ghost[:5] = b"ghost"
                os.unlink("/dev/shm/gone")
                anonymous = mmap.mmap(-1, 4096)
                os.makedirs("/tmp/deep/er", 0o700)
                with open("/tmp/deep/er/file", "w") as file:
                    file.write("kept")
                os.symlink("er/file", "/tmp/deep/link")
                listening = socket.create_server(("127.0.0.1", 0))
                unix = socket.socket(socket.AF_UNIX)
                unix.bind("/tmp/socket")
                unix.listen()
                child = os.fork()
                if child == 0:
                    peer = socket.create_connection(listening.getsockname())
                    anonymous[:5] = b"child"
                    while data := peer.recv(100):
                        if data == b"end":
                            os._exit(5)
                        peer.sendall(b" ".join([data, sysv.value, posix[:5], ghost[:5]]))
                talk, _ = listening.accept()
                event = threading.Event()
                threading.Thread(target=event.wait, daemon=True).start()
                print("ready", os.getpid(), child, flush=True)
                for line in sys.stdin:
                    talk.sendall(b"hello")
                    print(talk.recv(100), anonymous[:5], open("/tmp/deep/link").read(), os.path.exists("/tmp/socket"),
                          os.getpid(), threading.active_count(), flush=True)
                talk.sendall(b"end")
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
                new = os.posix_spawn("/bin/true", ["true"], {})
                print(new > child, flush=True)
                """
            )
            one.read_until(b"\n")
            one.write(b"1\n")
            before = one.read_until(b"\n")
            assert b"hello sysv posix ghost" in before and b"child" in before and b"kept True" in before, before
            dumped, _ = one.checkpoint(directory, kill=True)
            assert {tree.path for tree in dumped.image.private} == {"/dev/shm", "/tmp"}, dumped
            assert dumped.image.tasks == 2 and dumped.image.max_pid > dumped.image.root_pid, dumped
            assert dumped.image.criu_version >= 40000 and dumped.image.kernel and dumped.image.cpu_flags, dumped
        with capsule() as two:
            restored = two.restart(directory, dumped)
            assert restored.tasks == 2
            two.write(b"2\n")
            assert two.read_until(b"\n") == before
            os.close(two.stdin)
            two.stdin = -1
            assert two.read_until(b"\n") == b"5\n"
            assert two.read_until(b"\n") == b"True\n"
            assert two.exited() == 0


def saved_files(spool: int) -> tuple[SavedFile, ...]:
    fd = os.open(FILES_LIST, os.O_RDONLY, dir_fd=spool)
    with os.fdopen(fd, "rb") as file:
        return msgspec.msgpack.decode(file.read(), type=SavedFiles).files


@case
def files_are_rolled_back(home: Path) -> None:
    appended, inplace, mapped = home / "appended", home / "inplace", home / "mapped"
    with spool() as directory:
        with capsule() as one:
            one.script(
                f"""
                import mmap, os, sys
                a = os.open("{appended}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                b = os.open("{inplace}", os.O_RDWR | os.O_CREAT, 0o640)
                c = os.open("{mapped}", os.O_RDWR | os.O_CREAT, 0o640)
                os.ftruncate(c, 4096)
                m = mmap.mmap(c, 4096)
                os.close(c)
                scratch = open("/tmp/scratch", "w")
                print("ready", flush=True)
                for line in sys.stdin:
                    os.write(a, line.encode())
                    os.write(b, line.encode())
                    print("wrote", flush=True)
                """
            )
            one.read_until(b"ready\n")
            one.write(b"one\n")
            one.read_until(b"wrote\n")
            dumped, _ = one.checkpoint(directory)
            assert {Path(os.fsdecode(file.path)): file.size for file in saved_files(directory)} == {
                appended: 4,
                inplace: 4,
                mapped: 4096,
            }
            one.write(b"lost\n")
            one.read_until(b"wrote\n")
        assert appended.read_text() == inplace.read_text() == "one\nlost\n"
        with capsule() as two:
            two.restart(directory, dumped)
            two.write(b"two\n")
            two.read_until(b"wrote\n")
        assert appended.read_text() == inplace.read_text() == "one\ntwo\n"
        os.truncate(inplace, 2)
        appended.unlink()
        inplace.chmod(0o600)
        mapped.write_bytes(b"not any more" * 1000)
        with capsule() as three:
            three.restart(directory, dumped)
            three.write(b"three\n")
            three.read_until(b"wrote\n")
        assert appended.read_text() == inplace.read_text() == "one\nthree\n"
        assert mapped.read_bytes() == bytes(4096) and inplace.stat().st_mode & 0o777 == 0o640
        # A log that is too large to be saved is cut back, if it is still there.
        limited, path = FileRules(snapshot_limit=2), os.fsencode(appended)
        with capsule() as four:
            four.script(f"import time; file = open('{appended}', 'a'); print('ready', flush=True); time.sleep(1000)")
            four.read_until(b"ready\n")
            dumped, _ = four.checkpoint(directory, files=limited)
            assert [(file.path, file.extents) for file in saved_files(directory)] == [(path, None)]
        os.truncate(appended, 2)
        with capsule() as five:
            expect_failed(five.restore(directory, dumped), str(appended), "2 bytes and had 10")
        with capsule() as six:
            six.script(f"import time; file = open('{inplace}', 'r+'); print('ready', flush=True); time.sleep(1000)")
            six.read_until(b"ready\n")
            refused = six.prepare(directory, files=limited)
            expect_failed(refused, str(inplace), "10 bytes", "up to 2 bytes", "files.snapshot_limit", code=13)
        assert processes_of_user() == []


@case
def a_file_the_user_cannot_open_is_not_restored(home: Path) -> None:
    secret = home / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    with spool() as directory:
        with capsule() as one:
            one.script(f"file = open('{secret}'); import time; print('ready', flush=True); time.sleep(1000)")
            one.read_until(b"ready\n")
            dumped, _ = one.checkpoint(directory)
        # CRIU would compare the mode: take the way to it instead.
        os.chown(home, 0, 0)
        home.chmod(0o700)
        with capsule() as two:
            expect_failed(two.restore(directory, dumped), str(secret), "cannot open", code=12)
            assert processes_of_user() == []


@case
def a_restore_given_up_leaves_nothing(home: Path) -> None:
    for text in (COUNTER, COUNTER.replace("import sys", "import ctypes, sys; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)")):
        given_up(text)


def given_up(text: str) -> None:
    with spool() as directory:
        with capsule() as one:
            one.script(text)
            one.read_until(b"ready\n")
            dumped, _ = one.checkpoint(directory, kill=True)
        with capsule() as two:
            assert isinstance(two.restore(directory, dumped), Restored)
            assert processes_of_user()
            assert isinstance(two.ask(Abort(reason="another node failed")), Aborted)
            assert processes_of_user() == [] and two.exits == []
        with capsule() as three:
            three.restart(directory, dumped)
            three.write(b"3\n")
            assert three.read_until(b"\n") == b"total 3\n"


@case
def tampered_images_fail_cleanly(home: Path) -> None:
    with spool() as directory:
        with capsule() as one:
            one.script(COUNTER)
            one.read_until(b"ready\n")
            dumped, _ = one.checkpoint(directory, kill=True)
        path = Path(os.readlink(f"/proc/self/fd/{directory}"))
        root = dumped.image.root_pid
        for name in (
            "inventory.img",
            f"core-{root}.img",
            f"mm-{root}.img",
            f"pagemap-{root}.img",
            "pstree.img",
            "files.img",
        ):
            whole = (path / name).read_bytes()
            for damaged in (whole[: len(whole) // 2], whole[:12] + bytes(len(whole) - 12), b""):
                (path / name).write_bytes(damaged)
                with capsule() as two:
                    reply = two.restore(directory, dumped)
                    assert isinstance(reply, Failed), (name, reply)
                    assert processes_of_user() == []
            (path / name).write_bytes(whole)
        with capsule(identity=msgspec.structs.replace(IDENTITY, uid=1002, gid=1002, groups=(1002,))) as three:
            expect_failed(three.restore(directory, dumped), f"core-{root}.img", "1001", code=12)
        with capsule() as four:
            four.restart(directory, dumped)
            four.write(b"3\n")
            assert four.read_until(b"\n") == b"total 3\n"


# --- the network ------------------------------------------------------------------------------------------------

UNDERLAY = "192.0.2.1"
VNI = 4000


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def underlay() -> Iterator[None]:
    """An address of this node's that VXLAN packets go to and come from, so that capsules here reach each other."""
    ip("address", "add", f"{UNDERLAY}/32", "dev", "lo")
    try:
        yield
    finally:
        ip("address", "del", f"{UNDERLAY}/32", "dev", "lo")


def connect(one: Capsule, number: int, vnis: list[int], *, uplink: bool = False) -> None:
    """Give capsule `number` its devices, and set them up, as hpccrd does."""
    device = f"check{vnis[number]}"
    ip(
        "link",
        "add",
        device,
        "type",
        "vxlan",
        "id",
        str(vnis[number]),
        "local",
        UNDERLAY,
        "dstport",
        "8473",
        "nolocalbypass",
        "nolearning",
    )
    ip("link", "set", device, "netns", str(one.pid), "name", "hpc0")
    if uplink:
        ip(
            "link",
            "add",
            "checkup",
            "address",
            GATEWAY_MAC,
            "type",
            "veth",
            "peer",
            "name",
            "up0",
            "netns",
            str(one.pid),
        )
        ip("address", "add", "169.254.96.1/30", "dev", "checkup")
        ip("link", "set", "checkup", "up")
    wanted = Network(
        device="hpc0",
        mac=f"02:68:70:00:00:{number:02x}",
        address=f"10.90.0.{10 + number}",
        prefix=16,
        mtu=1400,
        own=number,
        peers=tuple(
            Peer(capsule=k, mac=f"02:68:70:00:00:{k:02x}", address=f"10.90.0.{10 + k}", underlay=UNDERLAY, vni=vni)
            for k, vni in enumerate(vnis)
        ),
        uplink="up0" if uplink else "",
        uplink_address="169.254.96.2" if uplink else "",
        uplink_prefix=30 if uplink else 0,
        uplink_gateway="169.254.96.1" if uplink else "",
        outside_source="169.254.95.1" if uplink else "",
    )
    namespace = os.open(f"/proc/{one.pid}/ns/net", os.O_RDONLY)
    try:
        with netlink.inside(namespace) as route:
            interface.configure(route, wanted)
    finally:
        os.close(namespace)
    reply = one.ask(wanted)
    assert isinstance(reply, NetworkReady), reply


SERVER = """
    import socket
    listening = socket.create_server(("", 7777))
    print("ready", flush=True)
    talk, _ = listening.accept()
    while data := talk.recv(100):
        talk.sendall(data)
"""

CLIENT = """
    import socket, sys
    talk = socket.create_connection((sys.argv[1] if len(sys.argv) > 1 else "10.90.0.10", 7777))
    print("ready", talk.getsockname()[0], flush=True)
    for line in sys.stdin:
        talk.sendall(line.encode())
        print("echo", talk.recv(100).decode(), end="", flush=True)
"""


@case
def connections_between_capsules_survive(home: Path) -> None:
    with underlay(), spool() as first, spool() as second:
        with capsule() as server, capsule() as client:
            vnis = [VNI, VNI + 1]
            connect(server, 0, vnis)
            connect(client, 1, vnis)
            server.script(SERVER)
            server.read_until(b"ready\n")
            client.script(CLIENT)
            assert client.read_until(b"\n") == b"ready 10.90.0.11\n"
            client.write(b"one\n")
            assert client.read_until(b"\n") == b"echo one\n"
            for each, directory in ((server, first), (client, second)):
                prepared = each.prepare(directory, outside="refuse")
                assert isinstance(prepared, Prepared), prepared
            for each in (server, client):
                assert isinstance(each.ask(Freeze()), Frozen)
            dumps = []
            for each in (server, client):
                dumped = each.ask(Dump())
                assert isinstance(dumped, InitDumped), dumped
                dumps.append(dumped)
            for each in (server, client):
                assert isinstance(each.ask(Release(kill=False)), Released)
            client.write(b"two\n")
            assert client.read_until(b"\n") == b"echo two\n"
        with capsule() as server, capsule() as client:
            vnis = [VNI + 2, VNI + 3]
            connect(server, 0, vnis)
            connect(client, 1, vnis)
            for each, directory, dumped in ((server, first, dumps[0]), (client, second, dumps[1])):
                restored = each.restore(directory, dumped)
                assert isinstance(restored, Restored), restored
            for request, reply in ((Resume(), Resumed), (Unhold(), Unheld)):
                for each in (client, server):
                    assert isinstance(each.ask(request), reply)
            client.write(b"three\n")
            assert client.read_until(b"\n") == b"echo three\n"


@case
def connections_to_outside_are_allowed_or_refused(home: Path) -> None:
    with underlay(), spool() as directory:
        with capsule() as one:
            connect(one, 0, [VNI + 4], uplink=True)
            with socket.create_server((UNDERLAY, 7777)) as world:
                one.script(
                    CLIENT.replace("10.90.0.10", UNDERLAY)
                    .replace(
                        "talk.sendall(line.encode())",
                        """
        try:
            talk.sendall(line.encode())
            data = talk.recv(100)
        except ConnectionError as error:
            print(type(error).__name__, flush=True)
            continue""",
                    )
                    .replace("talk.recv(100).decode()", "data.decode()")
                )
                # Bound to the address that every capsule has, seen under this capsule's own.
                line = one.read_until(b"\n")
                assert line == b"ready 169.254.95.1\n", line
                talk, (address, _) = world.accept()
                with talk:
                    assert address == "169.254.96.2", address
                    expect_failed(one.prepare(directory, outside="refuse"), "python3", f"{UNDERLAY} port 7777", code=13)
                    dumped, _ = one.checkpoint(directory)
                    one.write(b"on\n")
                    assert talk.recv(100) == b"on\n"
                    talk.sendall(b"and on\n")
                    assert one.read_until(b"\n") == b"echo and on\n"
        with capsule() as two:
            connect(two, 0, [VNI + 5], uplink=True)
            two.restart(directory, dumped)
            two.write(b"anybody?\n")
            assert two.read_until(b"\n") == b"ConnectionAbortedError\n"


# --- refusals ---------------------------------------------------------------------------------------------------


def refused(text: str, *words: str, code: int = 13, outside: str = "allow") -> None:
    """The program (it prints "ready") is refused in prepare with these words, and runs on."""
    with capsule() as one, spool() as directory:
        one.script(
            textwrap.dedent(text) + "\nimport sys\nprint('ready', flush=True)\nprint('on', sys.stdin.readline())"
        )
        one.read_until(b"ready\n")
        expect_failed(one.prepare(directory, outside=outside), *words, code=code)
        one.write(b"x\n")
        one.read_until(b"on x\n")


@case
def io_uring_is_refused(home: Path) -> None:
    refused(
        "import ctypes; assert ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120)) >= 0",
        "python3",
        "io_uring",
        "UV_USE_IO_URING",
    )


@case
def userfaultfd_is_refused(home: Path) -> None:
    refused("import ctypes; assert ctypes.CDLL(None).syscall(323, 1) >= 0", "python3", "userfaultfd", "postcopy")


@case
def perf_events_are_refused(home: Path) -> None:
    """One that the kernel counts by itself: it needs nothing of the processor."""
    refused(
        """
        import ctypes, struct
        attributes = bytearray(128)
        struct.pack_into("IIQ", attributes, 0, 1, 128, 0)  # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK
        struct.pack_into("Q", attributes, 40, 1 << 5 | 1 << 6)  # exclude_kernel, exclude_hv
        assert ctypes.CDLL(None).syscall(298, bytes(attributes), 0, -1, -1, 0) >= 0
        """,
        "python3",
        "perf event counter",
        "PAPI",
    )


@contextlib.contextmanager
def shared() -> Iterator[Path]:
    """A directory of the user's on a file system whose files have handles."""
    path = Path(tempfile.mkdtemp(prefix="check-", dir="/shared"))
    os.chown(path, USER, USER)
    try:
        yield path
    finally:
        shutil.rmtree(path)


WATCHING = """
    import ctypes, os, sys
    libc, path = ctypes.CDLL(None), b"PLACE/watched file"
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    watching = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watching, path, 2) == 1
"""


@case
def watches_that_would_not_come_back_are_refused(home: Path) -> None:
    """One on a directory with a name, in a private place, is carried: programs/world.py."""
    nameless = WATCHING + "    os.unlink(path)\n"
    for place in ("/tmp", "/dev/shm"):
        refused(nameless.replace("PLACE", place), "python3", "without a name", "inotify")
    # The node's root file system is an overlayfs, whose files have no handles.
    refused(WATCHING.replace("PLACE", str(home)), "python3", "overlayfs", "inotify")
    with shared() as place:
        path = place / "watched file"
        path.touch()
        os.chown(path, USER, USER)
        with path.open():  # by nobody of the job
            refused(
                nameless.replace("PLACE", str(place)) + "    os.close(held)\n", "python3", "without a name", "inotify"
            )


@case
def watches_on_shared_storage_come_back(home: Path) -> None:
    """On a file with a name, and on one that a task has open and whose name was removed."""
    told = """
    print("ready", flush=True)
    sys.stdin.readline()
    os.write(held, b"x")
    print("told", len(os.read(watching, 4096)))
    """
    for removed in ("", "    os.unlink(path)\n"):
        with shared() as place, spool() as directory:
            with capsule() as one:
                one.script(WATCHING.replace("PLACE", str(place)) + removed + told.lstrip("\n"))
                one.read_until(b"ready\n")
                image, _ = one.checkpoint(directory, kill=True)
            with capsule() as again:
                again.restart(directory, image)
                again.write(b"x\n")
                again.read_until(b"told 16\n")


@case
def sockets_and_pidfds_that_criu_does_not_know_are_refused(home: Path) -> None:
    refused(
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(17, 1, 1)",
        "python3",
        "UDP_CORK",
    )
    refused("import os; fd = os.pidfd_open(os.getpid(), os.O_EXCL)", "python3", "pidfd of a thread")


@case
def nested_namespaces_are_refused(home: Path) -> None:
    refused("import os; os.unshare(os.CLONE_NEWUSER)", "python3", "user namespace", "Apptainer")
    refused("import os; os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)", "python3", "namespace")


@case
def a_process_that_left_the_tree_is_refused(home: Path) -> None:
    # The program is no subreaper, as a launch root would be: its grandchild ends up with init.
    refused(
        """
        import os, time
        if os.fork() == 0:
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        os.wait()
        """,
        "has left the job's process tree",
    )


@case
def repeated_checkpoints_leak_nothing(home: Path) -> None:
    with capsule() as one:
        one.script(COUNTER)
        one.read_until(b"ready\n")
        counts = []
        for number in range(4):
            with spool() as directory:
                assert isinstance(one.prepare(directory), Prepared)
                if number % 2:
                    assert isinstance(one.ask(Abort(reason="test")), Aborted)
                else:
                    one.ask(Abort(reason="test"))
                    one.checkpoint(directory)
            counts.append(len(os.listdir(f"/proc/{one.pid}/fd")))
        assert len(set(counts[1:])) == 1, counts


def main() -> int:
    if len(sys.argv) != 2:
        print("\n".join(CASES))
        return 0
    home = Path(tempfile.mkdtemp(prefix="check-", dir="/var/tmp"))
    os.chown(home, USER, USER)
    try:
        CASES[sys.argv[1]](home)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
