"""Checks of what comes back in a restored capsule beside memory and files, run as capsule_init_checks.py's are."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path

from hpccr.noded.control import InitDumped
from hpccr.wire.messages import Abort, Aborted, Restored, Started
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
