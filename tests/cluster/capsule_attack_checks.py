"""Checks of what a user can do to a restore by re-pointing paths beforehand, run as capsule_init_checks.py's are.

CRIU opens, makes and removes by the paths of a checkpoint, as root. Beside each attack is what must go on working.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from hpccr.noded.control import InitRestore
from hpccr.wire.messages import (
    Abort,
    Aborted,
    Freeze,
    Prepared,
    Restored,
    Resume,
    Resumed,
    RolledBack,
    Unheld,
    Unhold,
    Wanted,
)
from msgspec import structs

import capsule_init_checks
from capsule_init_checks import COUNTER, IDENTITY, PYTHON, USER, capsule, case, expect_failed, processes_of_user, spool


@contextlib.contextmanager
def of_root() -> Iterator[Path]:
    """A directory that only root may enter."""
    with tempfile.TemporaryDirectory(prefix="check-root-", dir="/var/tmp") as path:
        yield Path(path)


def attacked(program: str, home: Path, attack: Callable[[], object], *words: str) -> None:
    """Checkpoint the program, and roll back, attack, restore: that is refused, and no task is left."""
    with spool() as directory:
        with capsule() as one:
            one.script(program, cwd=str(home))
            one.read_until(b"ready\n")
            dumped, _ = one.checkpoint(directory, kill=True)
        with capsule() as two:
            assert isinstance(two.roll_back(directory, dumped), RolledBack)
            attack()
            ends = two.pipes()
            request = InitRestore(image=dumped.image, stdin="pipe", merged=True, ghost_limit=1 << 30)
            reply = two.ask(request, [directory, *ends])
            for fd in ends:
                os.close(fd)
            expect_failed(reply, *words, code=12)
            assert processes_of_user() == []


def repoint(path: Path, target: Path | str) -> None:
    path.rename(path.with_name(path.name + ".away"))
    path.symlink_to(target)


WAIT = "; print('ready', flush=True); import time; time.sleep(1000)"


@case
def a_file_becomes_the_memory_of_init(home: Path) -> None:
    for target in ("/proc/1/mem", "/proc/self/mem", "/proc/sysrq-trigger"):
        (home / "p").unlink(missing_ok=True)
        attacked(
            "import os; os.umask(0o077); f = open('p', 'w+')" + WAIT,
            home,
            lambda target=target: repoint(home / "p", target),  # type: ignore[misc]
            "symbolic link",
        )


QUEUED = """
    import os, socket
    one, other = socket.socketpair()
    fd = os.open("key", os.O_RDONLY)
    socket.send_fds(one, [b"x"], [fd])
    os.close(fd)
    print("ready", flush=True)
    import time; time.sleep(1000)
"""


@case
def a_queued_descriptor_becomes_a_key_of_roots(home: Path) -> None:
    """No task has it among its descriptors."""
    with of_root() as place:
        secret = place / "key"
        secret.write_text("s" * 65)
        secret.chmod(0o600)
        (home / "key").write_text("p" * 65)
        (home / "key").chmod(0o600)
        os.chown(home / "key", USER, USER)
        attacked(QUEUED, home, lambda: repoint(home / "key", secret), "symbolic link")
        (home / "key").unlink()
        (home / "key.away").rename(home / "key")
        attacked(QUEUED, home, lambda: os.chown(home / "key", 0, 0), "cannot open")


@case
def a_sockets_directory_becomes_a_services(home: Path) -> None:
    with of_root() as place:
        place.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as service:
            service.bind(str(place / "service"))
            before = (place / "service").stat()
            program = "import os, socket; os.mkdir('d'); s = socket.socket(socket.AF_UNIX); s.bind('{}'); s.listen()"
            for name in (str(home / "d/service"), "d/service"):
                attacked(program.format(name) + WAIT, home, lambda: repoint(home / "d", place), "cannot open", "socket")
                assert (place / "service").stat() == before
                (home / "d").unlink()
                (home / "d.away").rename(home / "e")
                (home / "e").rename(home / ("absolute" if name.startswith("/") else "relative"))


@case
def a_fifo_a_directory_and_a_removed_file_move_into_roots(home: Path) -> None:
    with of_root() as place:
        (place / "sub").mkdir()
        os.mkfifo(place / "f", 0o600)
        programs = {
            "a": "import os; os.mkdir('a'); os.mkfifo('a/f', 0o600); f = os.open('a/f', os.O_RDWR)",
            "b": "import os; os.makedirs('b/sub'); f = os.open('b/sub', os.O_PATH)",
            "c": "import os; os.mkdir('c'); f = open('c/gone', 'w+'); os.unlink('c/gone')",
        }
        for name, program in programs.items():
            attacked(program + WAIT, home, lambda name=name: repoint(home / name, place), "symbolic link")  # type: ignore[misc]
        assert sorted(path.name for path in place.iterdir()) == ["f", "sub"]


@case
def while_criu_works_no_link_is_followed(home: Path) -> None:
    """Also one that is put there after the look at the paths; before the tasks run all are followed again."""
    (home / "link").symlink_to("/etc/hostname")
    with spool() as directory:
        with capsule() as one:
            one.script(COUNTER)
            one.read_until(b"ready\n")
            dumped, _ = one.checkpoint(directory, kill=True)
        with capsule() as two:
            assert isinstance(two.restore(directory, dumped), Restored)
            refused = two.enter("/usr/bin/cat", str(home / "link"), "/dev/fd/0")
            assert "symbolic links" in refused.stderr and refused.stderr.count("\n") == 1, refused
            assert isinstance(two.ask(Resume()), Resumed)
            assert two.enter("/usr/bin/cat", str(home / "link")).returncode == 0
            assert isinstance(two.ask(Unhold()), Unheld)
            two.write(b"3\n")
            assert two.read_until(b"\n") == b"total 3\n"


HONEST = """
    import json, os, socket, sys
    home = sys.argv[1]
    os.chdir(home)
    os.mkfifo("fifo")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(home + "/service")
    sock.listen()
    near = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    near.bind("near")
    one, other = socket.socketpair()
    with open("queued", "w+") as file:
        socket.send_fds(one, [b"x"], [file.fileno()])
    gone = open("gone", "w+")
    gone.write("still here")
    gone.flush()
    os.unlink("gone")
    kept = [os.open(path, os.O_RDONLY) for path in
            ("/proc/self/stat", "/proc/self/maps", "/proc/meminfo", "/proc", "/proc/self/task", "/dev/null", home)]
    kept += [os.open("fifo", os.O_RDWR), os.open(home, os.O_PATH), os.open("/etc", os.O_PATH)]
    written = open(home + "/written", "w")
    print("ready", flush=True)
    for line in sys.stdin:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(home + "/service")
            sock.accept()[0].close()
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"n", "near")
        _, fds, _, _ = socket.recv_fds(other, 1, 1)
        socket.send_fds(one, [b"x"], fds)
        os.close(fds[0])
        gone.seek(0)
        written.write("more\\n")
        written.flush()
        print(json.dumps([near.recv(1).decode(), gone.read(), len(os.pread(kept[0], 100, 0)) > 0,
                          len(os.pread(kept[1], 100, 0)) > 0, os.listdir(kept[4]) == [str(os.getpid())],
                          len(open(home + "/written").read())]), flush=True)
"""


def heard(one: capsule_init_checks.Capsule, wanted: bytes) -> None:
    line = one.read_until(b"\n")
    assert line == wanted, line


@case
def honest_paths_come_back(home: Path) -> None:
    """A home directory that is reached by a link, sockets in it with long and short names, and whatever programs have
    open of /proc."""
    for length in (10, 90):
        real = home / ("r" * length)
        real.mkdir()
        os.chown(real, USER, USER)
        link = home / f"l{length}"
        link.symlink_to(real.name)
        with spool() as first, spool() as second:
            with capsule() as one:
                one.launch([PYTHON, "-u", "-c", textwrap.dedent(HONEST), str(link)])
                one.read_until(b"ready\n")
                one.write(b"1\n")
                heard(one, b'["n", "still here", true, true, true, 5]\n')
                dumped, _ = one.checkpoint(first, kill=True)
            with capsule() as two:
                two.restart(first, dumped)
                two.write(b"1\n")
                heard(two, b'["n", "still here", true, true, true, 10]\n')
                again, _ = two.checkpoint(second, kill=True)
            with capsule() as three:
                three.restart(second, again)
                three.write(b"1\n")
                heard(three, b'["n", "still here", true, true, true, 15]\n')
        assert stat.S_ISSOCK((real / "service").stat().st_mode)


@case
def limits_are_those_of_whoever_restores(home: Path) -> None:
    """A checkpoint brings no higher limit, no lower nice value and no protection from the OOM killer with it."""
    text = """
        import os, resource, sys
        resource.setrlimit(7, (300, 1024))
        print("ready", flush=True)
        for line in sys.stdin:
            limits = [resource.getrlimit(number) for number in (7, 4)]
            print(limits, os.nice(0), open("/proc/self/oom_score_adj").read().strip(), flush=True)
    """
    Path("/proc/self/oom_score_adj").write_text("100")
    rich = structs.replace(IDENTITY, rlimits=((7, 512, 1024), (4, 0, 1 << 20)), nice=1)
    poor = structs.replace(IDENTITY, rlimits=((7, 400, 400), (4, 0, 0)), nice=3)
    with spool() as directory:
        with capsule(identity=rich) as one:
            one.script(text)
            one.read_until(b"ready\n")
            one.write(b"1\n")
            assert one.read_until(b"\n") == b"[(300, 1024), (0, 1048576)] 1 0\n"
            dumped, _ = one.checkpoint(directory, kill=True)
        with capsule(identity=poor) as two:
            two.restart(directory, dumped)
            two.write(b"1\n")
            line = two.read_until(b"\n")
            assert line == b"[(300, 400), (0, 0)] 3 0\n", line


@case
def a_job_that_grows_after_its_room_was_found_is_refused(home: Path) -> None:
    """Others count on the room; the job goes on."""
    with capsule() as one, spool() as directory:
        one.script("""
            import sys
            held = []
            print("ready", flush=True)
            for line in sys.stdin:
                held.append(b"x" * (int(line) << 20))
                print("has", len(held), flush=True)
        """)
        one.read_until(b"ready\n")
        prepared = one.prepare(directory)
        assert isinstance(prepared, Prepared), prepared
        assert isinstance(one.ask(Abort(reason="no")), Aborted)
        assert isinstance(one.prepare(directory, room=prepared.estimate + (32 << 20)), Prepared)
        one.write(b"100\n")
        one.read_until(b"has 1\n")
        expect_failed(one.ask(Freeze()), "the dump may take")
        one.write(b"1\n")
        one.read_until(b"has 2\n")


@case
def a_flood_of_wishes_keeps_init_from_nothing(home: Path) -> None:
    with capsule() as one:
        one.script("""
            import os, socket
            for _ in range(3):
                os.fork()
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            sock.connect("\\0hpccr-request")
            print("ready", flush=True)
            while True:
                sock.send(b"c")
        """)
        one.read_until(b"ready\n")
        reply = one.receive()
        assert isinstance(reply, Wanted), reply
        for _ in range(3):
            one.send(Abort(reason="no"))
            while not isinstance(reply, Aborted):
                reply = one.receive()
                assert isinstance(reply, Aborted | Wanted), reply
            reply = one.receive()
            assert isinstance(reply, Wanted), reply


if __name__ == "__main__":
    sys.exit(capsule_init_checks.main())
