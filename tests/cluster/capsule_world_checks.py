"""Checks of what comes back in a restored capsule beside memory and files, run as capsule_init_checks.py's are."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hpccr.errors import ExitCode
from hpccr.model import FILES_DATA, FileRules
from hpccr.noded import ahead
from hpccr.noded.control import InitDumped
from hpccr.wire.messages import (
    Abort,
    Aborted,
    Dump,
    Failed,
    Freeze,
    Frozen,
    Prepared,
    Release,
    Released,
    Restored,
    Resume,
    Resumed,
    RolledBack,
    Started,
    Unheld,
    Unhold,
)
from msgspec import structs

import capsule_init_checks
from capsule_init_checks import IDENTITY, PYTHON, USER, capsule, case, spool

PROGRAMS = Path(__file__).with_name("programs")


@case
def all_that_a_process_can_have_comes_back(home: Path) -> None:
    """programs/world.py: restored twice in a row, each time from a checkpoint of the restored one, and once more from
    the first. The clock stands still while there are no processes."""
    argv = [PYTHON, "-u", "-W", "ignore", str(PROGRAMS / "world.py"), str(home)]
    down = 3.0
    images: dict[int, InitDumped] = {}
    with spool() as first, spool() as second:
        with capsule() as one:
            assert isinstance(one.launch(argv), Started)
            one.read_until(b"ready\n")
            look(one)
            images[first], _ = one.checkpoint(first)
            look(one)
        time.sleep(down)
        for source in (first, second, first):
            with capsule() as again:
                again.restart(source, images[source])
                ran, passed = look(again)
                if source == first:
                    assert passed - ran > down / 2, f"{ran} s have passed for the job, {passed} s for the world"
                look(again)
                if source == first:
                    images[second], _ = again.checkpoint(second)


PRIVATE = """
    import hashlib, json, os, socket, stat, sys

    def describe(top):
        found = {}
        for directory, names, files in os.walk(os.fsencode(top)):
            for name in [b".", *names, *files]:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                what = ""
                if stat.S_ISREG(status.st_mode):
                    digest = hashlib.sha256()
                    with open(path, "rb") as file:
                        while data := file.read(1 << 20):
                            digest.update(data)
                    what = [digest.hexdigest(), status.st_size, status.st_nlink, status.st_blocks < 4096]
                elif stat.S_ISLNK(status.st_mode):
                    what = os.readlink(path).hex()
                attributes = {key: os.getxattr(path, key, follow_symlinks=False).hex()
                              for key in os.listxattr(path, follow_symlinks=False)}
                facts = [status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, what, attributes]
                found[path.hex()] = facts
        return found

    def fill(top):
        os.makedirs(f"{top}/d/e", exist_ok=True)
        os.chmod(f"{top}/d", 0o2751)
        open(f"{top}/d/e/file", "w").write("text")
        os.chown(f"{top}/d/e/file", -1, 1002)
        os.chmod(f"{top}/d/e/file", 0o4711)
        open(os.fsencode(top) + b"/d/e/\\xff\\n not text", "wb").write(b"x")
        os.link(f"{top}/d/e/file", f"{top}/d/e/again")
        os.symlink("nowhere", f"{top}/d/link")
        os.mkfifo(f"{top}/d/fifo", 0o620)
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(f"{top}/d/socket")
        with open(f"{top}/d/sparse", "wb") as file:
            file.truncate(1 << 28)
            file.seek(1 << 27)
            file.write(b"middle")
        try:
            os.setxattr(f"{top}/d/e/file", "user.hpccr", bytes(range(9)))
        except OSError:
            pass  # tmpfs has them since Linux 6.6
        os.mkdir(f"{top}/d/locked", 0o000)
        os.utime(f"{top}/d/e", ns=(10**18, 10**18 + 123456789))
        os.utime(f"{top}/d/link", ns=(10**18, 10**18 + 1), follow_symlinks=False)
        held = open(f"{top}/d/gone", "w+")
        held.write("nobody else has this")
        held.flush()
        os.unlink(held.name)
        return held

    places = ["/tmp", "/dev/shm", "/var/tmp"]
    held = [fill(place) for place in places]
    print("ready", flush=True)
    for line in sys.stdin:
        for file in held:
            file.seek(0)
            assert file.read() == "nobody else has this"
        print(json.dumps({place: describe(place) for place in places}), flush=True)
"""


@case
def private_places_come_back_in_full(home: Path) -> None:
    """/tmp, /dev/shm and one that capsule.private adds: owners, modes, times, attributes and every kind of file."""
    private = ("/tmp", "/var/tmp")
    identity = structs.replace(IDENTITY, groups=(USER, 1002))
    with spool() as directory:
        with capsule(private=private, identity=identity) as one:
            one.script(PRIVATE)
            one.read_until(b"ready\n")
            before = described(one)
            dumped, _ = one.checkpoint(directory)
        with capsule(private=private, identity=identity) as two:
            two.restart(directory, dumped)
            after = described(two)
    assert len(before["/tmp"]) > 10 and all(before.values())
    for place, names in before.items():
        for name, facts in names.items():
            found = after[place].get(name)
            assert found == facts, f"{bytes.fromhex(name)!r}: {facts} became {found}"
        assert after[place].keys() == names.keys(), [bytes.fromhex(n) for n in after[place].keys() - names.keys()]


def described(one: capsule_init_checks.Capsule) -> dict[str, dict[str, list[object]]]:
    one.write(b"describe\n")
    found: dict[str, dict[str, list[object]]] = json.loads(one.read_until(b"\n"))
    return found


REMOVED = """
    import json, mmap, os, sys

    os.chdir(sys.argv[1])

    def make(name, size=0):
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        os.ftruncate(fd, size)
        os.link(name, f"{name}-other")
        return fd

    written, twice, mapped, read, again = (make(name, 4096 * (name == "mapped")) for name in
                                           ("written", "twice", "mapped", "read", "again"))
    second = os.open("twice", os.O_WRONLY | os.O_APPEND)
    memory = mmap.mmap(mapped, 4096)
    os.close(mapped)
    os.write(read, b"read")
    os.close(read)
    read = os.open("read", os.O_RDONLY)
    os.link("written", "written-third")
    for name in ("written", "twice", "mapped", "read", "again"):
        os.unlink(name)
    # Another file has the name now: CRIU calls the first one again.cr_link.
    named = os.open("again", os.O_RDWR | os.O_CREAT, 0o600)
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        data = line.strip().encode()
        if data != b"look":
            os.pwrite(written, data, 3 * number)
            os.write(twice, data)
            os.write(second, data)
            memory[3 * number : 3 * number + len(data)] = data
            os.write(again, data)
            os.write(named, data[::-1])
        found = {name: [os.stat(name).st_nlink, open(name, "rb").read().hex()] for name in sorted(os.listdir())}
        for name, fd in (("written", written), ("twice", twice), ("twice", second), ("read", read), ("again", again)):
            same = os.path.sameopenfile(fd, other := os.open(f"{name}-other", os.O_RDONLY))
            os.close(other)
            found[fd] = [same, os.lseek(fd, 0, os.SEEK_CUR), os.fstat(fd).st_nlink,
                         os.readlink(f"/proc/self/fd/{fd}").replace(".cr_link", "")]
        found["memory"] = memory[:].hex()
        print(json.dumps(found), flush=True)
"""


@case
def files_with_removed_names_come_back(home: Path) -> None:
    """Names removed while the file is open, read, mapped, and has another name: it is the same file as that again."""

    def told(one: capsule_init_checks.Capsule, line: str) -> dict[str, object]:
        one.write(f"{line}\n".encode())
        found: dict[str, object] = json.loads(one.read_until(b"\n"))
        return found

    with spool() as first, spool() as second:
        with capsule() as one:
            assert isinstance(one.launch([PYTHON, "-u", "-c", textwrap.dedent(REMOVED), str(home)]), Started)
            one.read_until(b"ready\n")
            told(one, "abc")
            before = told(one, "look")
            dumped, _ = one.checkpoint(first)
            assert told(one, "look") == before
            expected = told(one, "def")
        (home / "twice-other").unlink()
        (home / "written-other").write_text("another")
        for _ in range(2):
            with capsule() as two:
                two.restart(first, dumped)
                assert told(two, "look") == before
                again, _ = two.checkpoint(second)
                assert told(two, "def") == expected
        with capsule() as three:
            three.restart(second, again)
            assert told(three, "look") == before
        with capsule() as four:
            assert isinstance(four.restore(first, dumped), Restored)
            assert isinstance(four.ask(Abort(reason="another node failed")), Aborted)
        assert not [path for path in home.iterdir() if "link" in path.name]


@case
def trees_are_copied_while_the_job_runs(home: Path) -> None:
    """What rests is not copied again when everything stands still, and what changed since is: even what was written
    through a page that was dirty already, by whoever has the file mapped."""
    # Files in memory, and on an overlay, are not copied ahead.
    place = Path(tempfile.mkdtemp(prefix="check-", dir="/shared"))
    try:
        tree = place / "tree"
        tree.mkdir()
        for name in ("rests", "changed", "mapped", "removed"):
            (tree / name).write_bytes(os.urandom(LARGE))
        (tree / "linked").hardlink_to(tree / "rests")
        for path in (place, tree, *tree.iterdir()):
            os.chown(path, USER, USER)
        with (tree / "mapped").open("r+b") as file:
            memory = mmap.mmap(file.fileno(), LARGE)
        memory[:5] = b"first"
        newest = max(path.stat().st_ctime for path in tree.iterdir())
        while time.time() < newest + 1.1 * ahead.SETTLED:
            time.sleep(0.05)
        with spool() as directory:
            with capsule() as one:
                one.script(capsule_init_checks.COUNTER)
                one.read_until(b"ready\n")
                prepared = one.prepare(directory, files=FileRules(trees=(bytes(tree),)))
                assert isinstance(prepared, Prepared), prepared
                copied = used(directory)
                assert 4 * LARGE <= copied < 5 * LARGE, copied
                memory[:5] = b"later"
                memory.close()
                times = (tree / "changed").stat()
                with (tree / "changed").open("r+b") as file:
                    file.write(b"changed")
                os.utime(tree / "changed", ns=(times.st_atime_ns, times.st_mtime_ns))
                (tree / "removed").unlink()
                (tree / "new").write_bytes(b"new")
                os.chown(tree / "new", USER, USER)
                assert isinstance(one.ask(Freeze()), Frozen)
                dumped = one.ask(Dump())
                assert isinstance(dumped, InitDumped), dumped
                assert isinstance(one.ask(Release(kill=False)), Released)
                # Two were copied again, and the room of what they were before, and of the removed one, was given back.
                assert 3 * LARGE <= used(directory) < 4 * LARGE, used(directory)
            expected = {path.name: path.read_bytes() for path in tree.iterdir()}
            assert expected["mapped"][:5] == b"later" and expected["changed"][:7] == b"changed"
            for path in tree.iterdir():
                path.unlink()
            with capsule() as two:
                rolled = two.roll_back(directory, dumped)
                assert isinstance(rolled, RolledBack), rolled
            assert {path.name: path.read_bytes() for path in tree.iterdir()} == expected
            assert (tree / "linked").samefile(tree / "rests")
    finally:
        shutil.rmtree(place)


LARGE = 8 << 20


def used(spool: int) -> int:
    """Bytes of storage that the contents of files take."""
    return os.stat(FILES_DATA, dir_fd=spool).st_blocks * 512


SEMAPHORE = """
    import ctypes, os, sys
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sem_open.restype = ctypes.c_void_p
    name = b"/hpccr-check"
    first = libc.sem_open(name, os.O_CREAT | os.O_EXCL, 0o600, 2)
    large = open("/dev/shm/large", "wb")
    large.write(bytes(range(256)) * (1 << 20))
    large.flush()
    print("ready", flush=True)
    for line in sys.stdin:
        again = libc.sem_open(name, 0)
        assert libc.sem_post(ctypes.c_void_p(first)) == 0
        value = ctypes.c_int()
        assert libc.sem_getvalue(ctypes.c_void_p(again), ctypes.byref(value)) == 0
        print(value.value, sorted(os.listdir("/dev/shm")), flush=True)
"""


@case
def a_semaphore_in_shared_memory_comes_back(home: Path) -> None:
    """It is a file whose first name was removed, for which CRIU makes a name while the directory is archived."""
    images: dict[int, InitDumped] = {}
    with spool() as first, spool() as second:
        with capsule() as one:
            one.script(SEMAPHORE)
            one.read_until(b"ready\n")
            images[first], _ = one.checkpoint(first)
            one.write(b"look\n")
            assert (line := one.read_until(b"\n")) == b"3 ['large', 'sem.hpccr-check']\n", line
        for source, target in ((first, second), (second, first)):
            with capsule() as two:
                two.restart(source, images[source])
                images[target], _ = two.checkpoint(target)
                two.write(b"look\n")
                assert (line := two.read_until(b"\n")) == b"3 ['large', 'sem.hpccr-check']\n", line


CHURN = """
    import os
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        for place in ("/tmp", "/dev/shm"):
            open(f"{place}/{number}", "w").close()
            os.unlink(f"{place}/{number}")
"""


@case
def files_that_come_and_go_in_private_places_hurt_nothing(home: Path) -> None:
    with spool() as directory, capsule() as one:
        one.script(CHURN)
        one.read_until(b"ready\n")
        for _ in range(5):
            one.checkpoint(directory)


READ_ONLY = """
    import os, sys
    os.chdir(sys.argv[1])
    written = os.open("result", os.O_RDWR | os.O_CREAT, 0o444)
    print("ready", flush=True)
    for line in sys.stdin:
        os.write(written, line.encode())
        print(os.pread(written, 100, 0), flush=True)
"""


@case
def a_file_may_be_read_only_while_it_is_written(home: Path) -> None:
    with spool() as directory:
        with capsule() as one:
            assert isinstance(one.launch([PYTHON, "-u", "-c", textwrap.dedent(READ_ONLY), str(home)]), Started)
            one.read_until(b"ready\n")
            one.write(b"one\n")
            one.read_until(b"\n")
            dumped, _ = one.checkpoint(directory)
            one.write(b"lost\n")
            one.read_until(b"\n")
        with capsule() as two:
            two.restart(directory, dumped)
            two.write(b"two\n")
            assert (line := two.read_until(b"\n")) == b"b'one\\ntwo\\n'\n", line


@case
def a_program_that_can_only_be_executed_is_refused(home: Path) -> None:
    program = home / "sleep"
    shutil.copy("/usr/bin/sleep", program)
    program.chmod(0o711)
    with spool() as directory, capsule() as one:
        one.script(
            f"import subprocess; p = subprocess.Popen(['{program}', '1000']); print('ready', flush=True); p.wait()"
        )
        one.read_until(b"ready\n")
        capsule_init_checks.expect_failed(one.prepare(directory), str(program), "cannot open again", code=13)


@case
def a_restore_that_fails_late_leaves_the_older_checkpoint_good(home: Path) -> None:
    """The files are back as they were at the newer one when it fails: the older one puts them back once more."""
    log, table, tree = home / "log", home / "table", home / "tree"
    tree.mkdir()
    os.chown(tree, USER, USER)
    script = f"""
        import os, sys
        log, table = open("{log}", "a"), os.open("{table}", os.O_RDWR | os.O_CREAT, 0o640)
        print("ready", flush=True)
        for number, line in enumerate(sys.stdin):
            print(line, end="", file=log, flush=True)
            os.pwrite(table, line.encode(), 0)
            open(f"{tree}/{{number}}", "w").write(line)
            print("did", line, end="", flush=True)
        """
    rules = FileRules(trees=(bytes(tree),))
    with spool() as older, spool() as newer:
        with capsule() as one:
            one.script(script)
            one.read_until(b"ready\n")
            one.write(b"first\n")
            one.read_until(b"did first\n")
            first, _ = one.checkpoint(older, files=rules)
            expected = state(home)
            one.write(b"last\n")
            one.read_until(b"did last\n")
            last, _ = one.checkpoint(newer, files=rules)
        path = Path(os.readlink(f"/proc/self/fd/{newer}")) / f"mm-{last.image.root_pid}.img"
        path.write_bytes(path.read_bytes()[:12])
        log.unlink()
        with capsule() as two:
            capsule_init_checks.expect_failed(two.restore(newer, last), "CRIU could not restore")
            assert log.read_text() == "first\nlast\n" and table.read_text() == "last\n\n" and (tree / "1").exists()
        with capsule() as three:
            three.restart(older, first)
            assert state(home) == expected
            three.write(b"again\n")
            three.read_until(b"did again\n")
        assert log.read_text() == "first\nagain\n"


def state(top: Path) -> dict[str, object]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(top.rglob("*"))}


@case
def twenty_restarts_in_a_row(home: Path) -> None:
    """Each from a checkpoint of the one before; with files in place, appended to, and in a private directory."""
    log, table = home / "log", home / "table"
    script = f"""
        import os, sys
        log, table = open("{log}", "a"), os.open("{table}", os.O_RDWR | os.O_CREAT, 0o640)
        scratch = open("/tmp/scratch", "w+")
        print("ready", flush=True)
        for number, line in enumerate(sys.stdin):
            print(number, file=log, flush=True)
            print(number, file=scratch, flush=True)
            os.pwrite(table, number.to_bytes(8), 8 * number)
            scratch.seek(0)
            print(number, scratch.read() == open("{log}").read(), flush=True)
        """
    number = 0

    def step(one: capsule_init_checks.Capsule) -> None:
        one.write(b"next\n")
        assert (line := one.read_until(b"\n")) == f"{number} True\n".encode(), line

    with spool() as first, spool() as second:
        directories = (first, second)
        with capsule() as one:
            one.script(script)
            one.read_until(b"ready\n")
            step(one)
            dumped, _ = one.checkpoint(first, kill=True)
        for number in range(1, 21):
            with capsule() as next_one:
                next_one.restart(directories[(number - 1) % 2], dumped)
                step(next_one)
                dumped, _ = next_one.checkpoint(directories[number % 2], kill=True)
    assert log.read_text().split() == [str(n) for n in range(21)]
    assert table.read_bytes() == b"".join(n.to_bytes(8) for n in range(21))


DATAGRAMS = """
    import os, socket, sys
    talk = socket.socket(type=socket.SOCK_DGRAM)
    talk.settimeout(0.2)
    own, other = (f"10.90.0.{10 + int(word)}" for word in sys.argv[1:3])
    talk.bind((own, 7777))
    talk.connect((other, 7777))
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "hear\\n":
            print("heard", talk.recv(99).decode(), end="", flush=True)
        else:
            talk.send(line.encode())
            print("sent", flush=True)
"""


@case
def datagrams_between_capsules_find_their_way(home: Path) -> None:
    """UDP sockets are where they were, also connected ones. What waits in one is lost, as datagrams may be."""
    spools, vni = contextlib.ExitStack(), capsule_init_checks.VNI

    def say(source: capsule_init_checks.Capsule, target: capsule_init_checks.Capsule, word: bytes) -> None:
        source.write(word)
        source.read_until(b"sent\n")
        target.write(b"hear\n")
        assert (line := target.read_until(b"\n")) == b"heard " + word, line

    with capsule_init_checks.underlay(), spools:
        directories = [spools.enter_context(spool()) for _ in range(2)]
        with capsule() as one, capsule() as two:
            both = (one, two)
            for own, each in enumerate(both):
                capsule_init_checks.connect(each, own, [vni, vni + 1])
                argv = [PYTHON, "-u", "-c", textwrap.dedent(DATAGRAMS), str(own), str(1 - own)]
                assert isinstance(each.launch(argv), Started)
                each.read_until(b"ready\n")
            say(one, two, b"before\n")
            for each, directory in zip(both, directories, strict=True):
                prepared = each.prepare(directory)
                assert isinstance(prepared, Prepared), prepared
            for each in both:
                assert isinstance(each.ask(Freeze()), Frozen)
            dumps = [each.ask(Dump()) for each in both]
            for each in both:
                assert isinstance(each.ask(Release(kill=False)), Released)
            say(two, one, b"after\n")
        with capsule() as one, capsule() as two:
            both = (one, two)
            for own, (each, directory, dumped) in enumerate(zip(both, directories, dumps, strict=True)):
                capsule_init_checks.connect(each, own, [vni + 2, vni + 3])
                assert isinstance(dumped, InitDumped), dumped
                restored = each.restore(directory, dumped)
                assert isinstance(restored, Restored), restored
            for request, reply in ((Resume(), Resumed), (Unhold(), Unheld)):
                for each in both:
                    assert isinstance(each.ask(request), reply)
            say(one, two, b"restored\n")
            say(two, one, b"both ways\n")


READERS = """
    import mmap, os, sys
    os.chdir(sys.argv[1])
    follows, mapped = open("follows"), open("mapped", "rb")
    memory = mmap.mmap(mapped.fileno(), 0, prot=mmap.PROT_READ)
    script = os.open("script", os.O_RDONLY)
    print(follows.readline(), end="")
    print("ready", flush=True)
    for line in sys.stdin:
        print(follows.readline().strip(), memory[:2], os.pread(script, 100, 0), flush=True)
"""


@case
def files_that_are_only_read_may_change(home: Path) -> None:
    """They grow, are edited and change their mode while the job waits, as they might while it runs. Only another file
    at the name is refused."""
    for name in ("follows", "mapped", "script"):
        (home / name).write_text("first\n")
        os.chown(home / name, USER, USER)
    with spool() as directory:
        with capsule() as one:
            assert isinstance(one.launch([PYTHON, "-u", "-c", textwrap.dedent(READERS), str(home)]), Started)
            one.read_until(b"ready\n")
            dumped, _ = one.checkpoint(directory)
        for name in ("follows", "mapped"):
            with (home / name).open("a") as file:
                file.write("second\n")
        (home / "script").chmod(0o755)
        (home / "script").write_text("edited")
        with capsule() as two:
            two.restart(directory, dumped)
            two.write(b"look\n")
            assert (line := two.read_until(b"\n")) == b"second b'fi' b'edited'\n", line
        (home / "new").write_text("replaced by an editor")
        (home / "new").rename(home / "script")
        with capsule() as three:
            capsule_init_checks.expect_failed(three.restore(directory, dumped), str(home / "script"), "another file")


WAITING = """
    import ctypes, json, os, select, struct, sys, threading, time
    libc = ctypes.CDLL(None, use_errno=True)
    ended, threads, limits = {}, {}, []
    pipes = {name: os.pipe() for name in ("poll", "endless")}
    polled = {name: ctypes.create_string_buffer(struct.pack("ihh", pipes[name][0], 1, 0)) for name in pipes}
    request, left = (ctypes.c_long * 2)(100_000, 0), {name: (ctypes.c_long * 2)() for name in ("sleep", "clock")}
    word = ctypes.c_int(0)

    def waits(name, function):
        def run():
            threads[name] = threading.get_native_id()
            result = function()
            ended[name] = [result, ctypes.get_errno()]
        threading.Thread(target=run, daemon=True).start()

    waits("poll", lambda: libc.poll(polled["poll"], 1, 100_000_000))
    waits("endless", lambda: libc.poll(polled["endless"], 1, -1))
    waits("sleep", lambda: libc.syscall(35, ctypes.byref(request), ctypes.byref(left["sleep"])))
    waits("clock", lambda: libc.syscall(230, 1, 0, ctypes.byref(request), ctypes.byref(left["clock"])))
    waits("futex", lambda: libc.syscall(202, ctypes.byref(word), 0, 0, ctypes.byref(request), 0, 0))

    def calls():
        said = {}
        for name, thread in threads.items():
            try:
                words = ["running"]
                while words == ["running"]:  # on its way into the call that it makes again
                    with open(f"/proc/self/task/{thread}/syscall") as file:
                        words = file.read().split()
                said[name] = words[0]
                if name == "poll":
                    limits[:] = [int(words[3], 16)]
            except FileNotFoundError:
                said[name] = "ended"
        return said

    while sorted(calls().values()) != ["202", "230", "35", "7", "7"]:
        time.sleep(0.01)
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "end\\n":
            for _, writing in pipes.values():
                os.write(writing, b"x")
            libc.syscall(202, ctypes.byref(word), 1, 1)
            while len(ended) < 3:
                time.sleep(0.01)
        print(json.dumps([ended, calls() if line != "end\\n" else {}, [99_000 < left[name][0] for name in left],
                          limits]), flush=True)
"""


@case
def what_waits_goes_on_waiting(home: Path) -> None:
    """Calls that the kernel goes on with by itself after a stop, which end with EINTR in CRIU's images: poll, sleeps, a
    futex with a limit. Where the job runs on, after a restart, and after another one. The poll waits for what was left
    of its limit, or where a stall of the machine lets nobody know that (Checkpoint._waiting) for all of it."""
    images: dict[int, InitDumped] = {}
    named = {"poll": "7", "endless": "7", "sleep": "35", "clock": "230", "futex": "202"}

    def told(one: capsule_init_checks.Capsule, line: str) -> list[Any]:
        one.write(f"{line}\n".encode())
        answer = one.read_until(b"\n")
        assert answer.startswith(b"[{"), one.read_rest()
        found: list[Any] = json.loads(answer)
        return found

    with spool() as first, spool() as second:
        limit, began = 100_000_000, time.monotonic()
        with capsule() as one:
            one.script(WAITING)
            one.read_until(b"ready\n")
            one.checkpoint(second)
            *found, (left,) = told(one, "look")
            assert found == [{}, named, [True, True]] and 0 < left <= limit, (found, left)
            limit = left
            images[first], _ = one.checkpoint(first, kill=True)
        for source, target in ((first, second), (second, None)):
            with capsule() as two:
                two.restart(source, images[source])
                *found, (left,) = told(two, "look")
                assert found == [{}, named, [True, True]], found
                passed = (time.monotonic() - began) * 1000
                assert 100_000_000 - passed < left <= limit, (left, limit, passed)
                limit = left
                if target is not None:
                    images[target], _ = two.checkpoint(target, kill=True)
                else:
                    assert told(two, "end")[0] == {"poll": [1, 0], "endless": [1, 0], "futex": [0, 0]}
        assert left < 100_000_000


WAITERS = """
    import ctypes, json, os, signal, struct, sys, time
    libc = ctypes.CDLL(None, use_errno=True)
    pipes = {name: os.pipe() for name in ("poll", "endless", "told")}
    said, saying = os.pipe()
    polled = {name: ctypes.create_string_buffer(struct.pack("ihh", pipes[name][0], 1, 0)) for name in pipes}
    request, left, word = (ctypes.c_long * 2)(100_000, 0), (ctypes.c_long * 2)(), ctypes.c_int(0)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    children = {}

    def waits(name, function):
        children[name] = pid = os.fork()
        if pid == 0:
            libc.prctl(15, f"waits-{name}".encode(), 0, 0, 0)
            result = function()
            os.write(saying, json.dumps([name, result, ctypes.get_errno()]).encode() + b"\\n")
            os._exit(0)

    waits("poll", lambda: libc.poll(polled["poll"], 1, 100_000_000))
    waits("endless", lambda: libc.poll(polled["endless"], 1, -1))
    waits("told", lambda: libc.poll(polled["told"], 1, -1))
    waits("sleep", lambda: libc.syscall(35, ctypes.byref(request), ctypes.byref(left)))
    waits("short", lambda: libc.syscall(35, ctypes.byref(request), 0))
    waits("clock", lambda: libc.syscall(230, 1, 0, ctypes.byref(request), ctypes.byref(left)))
    waits("futex", lambda: libc.syscall(202, ctypes.byref(word), 0, 0, ctypes.byref(request), 0, 0))

    def calls():
        found = {}
        for name, pid in children.items():
            found[name] = ["running"]
            while found[name] == ["running"]:  # on its way into the call that it makes again
                with open(f"/proc/{pid}/syscall") as file:
                    found[name] = file.read().split()
        return found

    while sorted(words[0] for words in calls().values()) != ["202", "230", "35", "35", "7", "7", "7"]:
        time.sleep(0.01)
    print("ready", flush=True)
    os.set_blocking(said, False)
    for line in sys.stdin:
        if line == "end\\n":
            os.waitpid(children.pop("told"), 0)  # it says first that its call has ended
            for name in ("poll", "endless"):
                os.write(pipes[name][1], b"x")
                os.waitpid(children.pop(name), 0)
        try:
            ended = os.read(said, 4096).decode().splitlines()
        except BlockingIOError:
            ended = []
        found = calls() if line != "end\\n" else {}
        print(json.dumps([ended, {name: words[0] for name, words in found.items()},
                          int(found["poll"][3], 16) if found else 0]), flush=True)
"""


@case
def what_waits_goes_on_waiting_where_the_job_runs_on(home: Path) -> None:
    """The same calls, each in the first thread of a process, after dumps that let the job run on, and after one that is
    given up when CRIU is done. Whom a signal has reached meanwhile its call ends for, as ever."""
    named = {"poll": "7", "endless": "7", "told": "7", "sleep": "35", "short": "35", "clock": "230", "futex": "202"}

    def told(one: capsule_init_checks.Capsule, line: str) -> list[Any]:
        one.write(f"{line}\n".encode())
        answer = one.read_until(b"\n")
        assert answer.startswith(b"[["), answer + one.read_until(b"Error")
        found: list[Any] = json.loads(answer)
        return found

    with spool() as directory, capsule() as one:
        one.script(WAITERS)
        one.read_until(b"ready\n")
        limit = 100_000_000
        for number in range(3):
            if number < 2:
                one.checkpoint(directory)
            else:
                assert isinstance(one.prepare(directory), Prepared)
                assert isinstance(one.ask(Freeze()), Frozen)
                one.drain()
                assert isinstance(one.ask(Dump()), InitDumped)
                assert isinstance(one.ask(Abort(reason="test")), Aborted)
            ended, waiting, left = told(one, "look")
            assert ended == [] and waiting == named, (number, ended, waiting)
            assert 0 < left <= limit, (left, limit)  # as above
            limit = left
        assert left < 100_000_000
        assert isinstance(one.prepare(directory), Prepared)
        assert isinstance(one.ask(Freeze()), Frozen)
        one.drain()
        os.kill(process_called("waits-told"), signal.SIGUSR1)
        assert isinstance(one.ask(Dump()), InitDumped)
        assert isinstance(one.ask(Release(kill=False)), Released)
        assert told(one, "end")[0] == ['["told", -1, 4]', '["poll", 1, 0]', '["endless", 1, 0]']


def process_called(name: str) -> int:
    """The one whose first thread has set that name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has ended
            if path.read_text().strip() == name:
                found.append(int(path.parent.name))
    (pid,) = found
    return pid


IN_FLIGHT = """
    import socket, sys
    server, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    server.bind("/tmp/in-flight")
    server.listen()
    client.connect("/tmp/in-flight")
    client.sendall(b"hello")
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "accept\\n":
            peer, _ = server.accept()
        print(peer.recv(5).decode(), flush=True)
        client.sendall(b"again")
"""


@case
def a_connection_that_is_not_accepted_yet_is_a_matter_of_the_moment(home: Path) -> None:
    """CRIU cannot dump what was written to it before. That is told as what another try helps against."""
    with spool() as directory:
        with capsule() as one:
            one.script(IN_FLIGHT)
            one.read_until(b"ready\n")
            assert isinstance(one.prepare(directory), Prepared)
            assert isinstance(one.ask(Freeze()), Frozen)
            one.drain()
            reply = one.ask(Dump())
            assert isinstance(reply, Failed) and reply.code == ExitCode.LOCKED, reply
            assert isinstance(one.ask(Abort(reason="test")), Aborted)
            one.write(b"accept\n")
            one.read_until(b"hello\n")
            dumped, _ = one.checkpoint(directory, kill=True)
        with capsule() as two:
            two.restart(directory, dumped)
            two.write(b"more\n")
            two.read_until(b"again\n")


@case
def an_abort_meets_a_dump_that_fails_by_itself(home: Path) -> None:
    """As on two nodes that fail for the same reason: each request has its answer, and the job goes on."""
    large = 'open("/tmp/large", "wb").write(bytes(200 << 20))'  # tar is at it when CRIU gives up
    with capsule() as one:
        one.script(IN_FLIGHT.replace("server.listen()", f"server.listen(); {large}"))
        one.read_until(b"ready\n")
        for milliseconds in range(0, 60, 2):
            with spool() as directory:
                assert isinstance(one.prepare(directory), Prepared)
                assert isinstance(one.ask(Freeze()), Frozen)
                one.send(Dump())
                time.sleep(milliseconds / 1000)
                one.send(Abort(reason="another failed"))
                reply = one.receive()
                assert isinstance(reply, Failed), reply
                assert isinstance(one.receive(), Aborted)
        one.write(b"accept\n")
        one.read_until(b"hello\n")
        with spool() as directory:
            one.checkpoint(directory)
        one.write(b"more\n")
        one.read_until(b"again\n")


TERMINALS = """
    import os, select, sys
    (ended, slave), (waits, other), fresh = os.openpty(), os.openpty(), os.posix_openpt(os.O_RDWR)
    os.write(slave, b"last\\nwords")
    os.close(slave)
    masters = [ended, waits, fresh]
    epoll = select.epoll()
    for master in masters:
        epoll.register(master, select.EPOLLHUP)
    print("ready", flush=True)
    for line in sys.stdin:
        print("hung up:", *sorted(masters.index(fd) for fd, _ in epoll.poll(0)), flush=True)
        if line == "open\\n":
            os.unlockpt(fresh)
            os.write(os.open(os.ptsname(fresh), os.O_RDWR | os.O_NOCTTY), b"hello")
            print(os.read(fresh, 100).decode(), flush=True)
        if line == "read\\n":
            print(os.read(ended, 100).decode(), flush=True)
            try:
                os.read(ended, 100)
            except OSError as error:
                print(error.strerror, flush=True)
"""


@case
def a_terminal_whose_other_end_was_closed_is_still_hung_up(home: Path) -> None:
    """Whoever reads from it sees that those who wrote have ended, after all that they have written."""
    with spool() as first, spool() as second:
        with capsule() as one:
            one.script(TERMINALS)
            one.read_until(b"ready\n")
            one.checkpoint(second)
            one.write(b"\n")
            one.read_until(b"hung up: 0\n")
            dumped, _ = one.checkpoint(first, kill=True)
        with capsule() as two:
            two.restart(first, dumped)
            two.write(b"\n")
            two.read_until(b"hung up: 0\n")
            dumped, _ = two.checkpoint(second, kill=True)
        with capsule() as three:
            three.restart(second, dumped)
            three.write(b"read\n")
            three.read_until(b"hung up: 0\nlast\r\nwords\nInput/output error\n")
            three.write(b"open\n")
            three.read_until(b"hello\n")


HUGE = """
    import mmap, os, sys
    huge = mmap.MAP_ANONYMOUS | 0x40000
    size = int(sys.argv[1])
    private, shared = mmap.mmap(-1, size, huge | mmap.MAP_PRIVATE), mmap.mmap(-1, size, huge | mmap.MAP_SHARED)
    fd = os.memfd_create("huge", os.MFD_HUGETLB)
    os.ftruncate(fd, size)
    named = mmap.mmap(fd, size)
    for number, memory in enumerate((private, shared, named)):
        memory[:] = bytes([65 + number]) * size
    print("ready", flush=True)
    for line in sys.stdin:
        pages = [text.split()[1] for text in open("/proc/self/smaps") if text.startswith("KernelPageSize")]
        found = [memory[:1] + memory[-1:] for memory in (private, shared, named)]
        print(found, pages.count(str(size >> 10)), flush=True)
"""


@case
def huge_pages_come_back(home: Path) -> None:
    """Private, shared and of a memfd, as huge pages again."""
    memory = Path("/proc/meminfo").read_text().splitlines()
    (size,) = (int(line.split()[1]) << 10 for line in memory if line.startswith("Hugepagesize"))
    with setting("/proc/sys/vm/nr_hugepages", lambda now: now + 8), spool() as directory:
        with capsule() as one:
            assert isinstance(one.launch([PYTHON, "-u", "-c", textwrap.dedent(HUGE), str(size)]), Started)
            one.read_until(b"ready\n")
            prepared = one.prepare(directory)
            assert isinstance(prepared, Prepared) and prepared.estimate > 3 * size, prepared
            assert isinstance(one.ask(Abort(reason="again")), Aborted)
            dumped, _ = one.checkpoint(directory)
        with capsule() as two:
            two.restart(directory, dumped)
            two.write(b"look\n")
            line = two.read_until(b"\n")
            assert line == b"[b'AA', b'BB', b'CC'] 3\n", line


@contextlib.contextmanager
def setting(path: str, change: Callable[[int], int]) -> Iterator[None]:
    """A number of the kernel's is another one in this block."""
    file = Path(path)
    before = int(file.read_text())
    file.write_text(str(change(before)))
    assert int(file.read_text()) == change(before), f"{path}: {file.read_text()}"
    try:
        yield
    finally:
        file.write_text(str(before))


def look(one: capsule_init_checks.Capsule) -> tuple[float, float]:
    """All checks must be ok. Gives how long it was since the last, by both clocks."""
    one.write(b"look\n")
    said = one.read_until(b"checked\n").decode().splitlines()
    wrong = [line for line in said[:-1] if not line.endswith(" ok") and not line.startswith("clock: ")]
    assert not wrong and len(said) > 26, said
    (clock,) = [line.split() for line in said if line.startswith("clock: ")]
    return float(clock[1]), float(clock[7])


if __name__ == "__main__":
    sys.exit(capsule_init_checks.main())
