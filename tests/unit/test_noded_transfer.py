"""The transfer process against a scripted worker: what the user's side may say, root's side must survive."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from hpccr.errors import CorruptError, HpccrError
from hpccr.model import FORMAT, CapsuleImage, FileEntry, Fragment, Stdio, StepKey
from hpccr.noded import storeworker, transfer
from hpccr.noded.seal import SiteKey
from hpccr.noded.spool import Limits
from hpccr.noded.storeworker import User, Worker
from hpccr.noded.transfer import FetchJob, FlushJob

KEY = SiteKey(bytes(range(32)))
STEP = StepKey(cluster="c", job="17", step="0")
USER = User(uid=1001, gid=1001, groups=())
IMAGE = CapsuleImage(root_pid=300, max_pid=301, tasks=2, stdio=Stdio(1, 2, 2))


class Peer:
    """The worker's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.descriptors: list[int] = []

    def say(self, **message: Any) -> None:
        body = msgspec.msgpack.encode(message)
        self.sock.sendall(struct.pack("!I", len(body)) + body)

    def hear(self) -> dict[str, Any]:
        header, descriptors, _, _ = socket.recv_fds(self.sock, 4, 4)
        self.descriptors += descriptors
        (length,) = struct.unpack("!I", header)
        heard: dict[str, Any] = msgspec.msgpack.decode(self.sock.recv(length, socket.MSG_WAITALL))
        return heard

    def hear_with_descriptor(self) -> tuple[dict[str, Any], int]:
        message = self.hear()
        return message, self.descriptors.pop()


class Scripted(Worker):
    """A Worker whose process is a thread that runs `script`."""

    def __init__(self, script: Callable[[Peer], None], stall: float = 10.0) -> None:
        ours, theirs = socket.socketpair()
        storeworker.Link.__init__(self, ours, stall)
        self._stderr = bytearray(b"last words\n")
        self.failure: BaseException | None = None

        def run() -> None:
            with theirs:
                try:
                    script(Peer(theirs))
                except BaseException as error:
                    self.failure = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def close(self) -> None:
        self._socket.close()
        self._thread.join()
        assert self.failure is None or isinstance(self.failure, OSError | struct.error), self.failure

    def _lost(self, reason: str) -> HpccrError:
        return HpccrError(f"the store worker failed: {reason}")


def fragment(**changes: Any) -> Fragment:
    made = Fragment(
        format=FORMAT,
        key=STEP,
        checkpoint="0" * 32,
        sequence=3,
        capsule=0,
        capsules=1,
        uid=1001,
        gid=1001,
        created=1.5,
        node="node1",
        image=IMAGE,
        files=(),
    )
    return msgspec.structs.replace(made, **changes)


def spool(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def flush(
    tmp_path: Path, script: Callable[[Peer], None], files: dict[str, bytes], kind: type[Scripted] = Scripted
) -> Any:
    directory = spool(tmp_path / "spool")
    for name, content in files.items():
        (tmp_path / "spool" / name).write_bytes(content)
    job = FlushJob(
        user=USER, key=KEY.secret, directory="/s", spool=str(tmp_path / "spool"), fragment=fragment(), level=7
    )
    try:
        return transfer.flush(job, directory, worker=lambda mode, user: kind(script))
    finally:
        os.close(directory)


def fetch(
    tmp_path: Path,
    script: Callable[[Peer], None],
    *,
    size: int = 0,
    claimed: int = 0,
    name: str = "spool",
    stall: float = 10.0,
    marks: list[str] | None = None,
) -> Any:
    """marks: what the store was told of damage."""
    directory = spool(tmp_path / name)
    job = FetchJob(
        user=USER,
        key=KEY.secret,
        directory="/s",
        limits=Limits(str(tmp_path), size=size),
        claimed=claimed,
        step=STEP,
        checkpoint="0" * 32,
        sequence=3,
        capsule=0,
        capsules=1,
    )

    def mark(peer: Peer) -> None:
        message = peer.hear()
        assert message["t"] == "mark" and message["directory"] == "/s"
        if marks is not None:
            marks.append(message["what"])
        peer.say(t="ok")

    try:
        return transfer.fetch(
            job, directory, worker=lambda mode, user: Scripted(mark if mode == "mark" else script, stall)
        )
    finally:
        os.close(directory)


def test_flush_gives_every_file_and_a_seal_over_what_is_in_them(tmp_path: Path) -> None:
    files = {"a.img": bytes(3 << 20), "b.img": b"", "c.img": b"hello"}
    got: dict[str, bytes] = {}
    sealed = b""

    def worker(peer: Peer) -> None:
        nonlocal sealed
        opened = peer.hear()
        assert (opened["t"], opened["directory"], opened["total"]) == ("open", "/s", (3 << 20) + 5)
        peer.say(t="ok")
        done = 0
        for name in sorted(files):
            message, descriptor = peer.hear_with_descriptor()
            assert message == {"t": "file", "name": name, "size": len(files[name])}
            with os.fdopen(descriptor, "rb") as file:
                got[name] = file.read()
            done += len(got[name])
            peer.say(t="moved", done=done, files=len(got))
        sealed = peer.hear()["fragment"]
        peer.say(t="ok")

    finished = flush(tmp_path, worker, files)
    assert finished.bytes == (3 << 20) + 5
    assert got == files
    assert list(got) == sorted(files), "the pagemaps before their pages"
    entries = {file.name: file for file in KEY.open(sealed, "it").files}
    assert {name: entry.digest for name, entry in entries.items()} == {
        name: blake3(content).hexdigest() for name, content in files.items()
    }
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize("moved", [{"done": 2, "files": 1}, {"done": 1, "files": 2}, {"done": -1, "files": 0}])
def test_progress_that_cannot_be_is_refused(tmp_path: Path, moved: dict[str, int]) -> None:
    def worker(peer: Peer) -> None:
        peer.hear()
        peer.say(t="ok")
        peer.say(t="moved", **moved)
        while True:  # until the other end closes: whoever closes first decides what the other finds
            peer.hear()

    with pytest.raises(HpccrError, match="during a flush"):
        flush(tmp_path, worker, {"a.img": b"x"})


def test_more_files_than_may_be_given_at_once(tmp_path: Path) -> None:
    count = 3 * transfer.MAX_GIVEN

    def worker(peer: Peer) -> None:
        peer.hear()
        peer.say(t="ok")
        taken = 0
        while peer.hear()["t"] == "file":
            assert len(peer.descriptors) <= transfer.MAX_GIVEN
            if len(peer.descriptors) == transfer.MAX_GIVEN or taken + len(peer.descriptors) == count:
                while peer.descriptors:
                    os.close(peer.descriptors.pop())
                    taken += 1
                peer.say(t="moved", done=taken, files=taken)
        peer.say(t="ok")

    assert flush(tmp_path, worker, {f"{number}.img": b"x" for number in range(count)}).bytes == count


def test_a_flush_that_fails_keeps_the_spool(tmp_path: Path) -> None:
    def worker(peer: Peer) -> None:
        peer.hear()
        peer.say(t="error", message="No space left on device", hint="make some", code=1)

    with pytest.raises(HpccrError, match="No space left") as caught:
        flush(tmp_path, worker, {"a.img": b"x"})
    assert caught.value.hint == "make some"
    assert (tmp_path / "spool" / "a.img").read_bytes() == b"x"


def test_an_error_in_the_middle_of_the_stream_is_told_as_it_came(tmp_path: Path) -> None:
    def worker(peer: Peer) -> None:
        peer.hear()
        peer.say(t="ok")
        peer.hear()
        peer.say(t="error", message="Stale file handle", hint="", code=1)
        peer.sock.shutdown(socket.SHUT_RD)

    with pytest.raises(HpccrError, match="Stale file handle"):
        flush(tmp_path, worker, {"a.img": bytes(20 << 20)})


@pytest.mark.parametrize(
    "script",
    [
        lambda peer: None,
        lambda peer: peer.say(t="ok") or peer.say(t="ok"),
        lambda peer: peer.say(t="end"),
        lambda peer: peer.say(t="nonsense"),
        lambda peer: peer.sock.sendall(struct.pack("!I", 0xFFFFFFFF)),
        lambda peer: peer.sock.sendall(struct.pack("!I", 5) + b"\xa1\xff\xff\xff\xff"),
        lambda peer: peer.sock.sendall(struct.pack("!I", 100) + b"x"),
    ],
)
def test_a_worker_that_does_not_keep_to_the_protocol(tmp_path: Path, script: Callable[[Peer], None]) -> None:
    with pytest.raises(HpccrError, match="store worker failed"):
        flush(tmp_path, script, {"a.img": bytes(8 << 20)})


@pytest.mark.parametrize("dribble", [False, True])
def test_a_worker_that_makes_no_progress(tmp_path: Path, dribble: bool) -> None:
    done = threading.Event()

    def worker(peer: Peer) -> None:
        peer.hear()
        peer.sock.sendall(struct.pack("!I", 1000))
        while dribble and not done.wait(0.02):
            peer.sock.sendall(b"x")
        done.wait(10)

    class Closing(Scripted):
        def close(self) -> None:
            done.set()
            super().close()

    directory = spool(tmp_path / "spool")
    with (tmp_path / "spool" / "a.img").open("wb") as file:
        file.truncate(100 << 20)  # so that the time for all of it is long, and only the worker's silence is too long
    job = FlushJob(user=USER, key=KEY.secret, directory="/s", spool="/none", fragment=fragment())
    with pytest.raises(HpccrError, match="no progress"):
        transfer.flush(job, directory, worker=lambda mode, user: Closing(worker, 0.2))
    os.close(directory)


def entry(name: str, content: bytes) -> FileEntry:
    return FileEntry(name=name, size=len(content), digest=blake3(content).hexdigest())


def serving(made: Fragment, files: dict[str, bytes], key: SiteKey = KEY) -> Callable[[Peer], None]:
    def worker(peer: Peer) -> None:
        assert peer.hear() == {"t": "open", "directory": "/s"}
        peer.say(t="fragment", fragment=msgspec.json.encode(key.seal(made)))
        serve(peer)

    def serve(peer: Peer) -> None:
        while True:
            message = peer.hear()
            if message["t"] == "lane":
                threading.Thread(target=lane, args=(socket.socket(fileno=peer.descriptors.pop()),)).start()
                continue
            content = files[message["name"]]
            for start in range(0, len(content), 1 << 20):
                peer.say(t="data", data=content[start : start + (1 << 20)])
            peer.say(t="end")

    def lane(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, struct.error):
            serve(Peer(sock))

    return worker


def test_fetch_brings_what_was_sealed(tmp_path: Path) -> None:
    files = {"a.img": os.urandom(3 << 20), "b.img": b""}
    made = fragment(files=tuple(entry(name, content) for name, content in files.items()))
    finished = fetch(tmp_path, serving(made, files))
    assert finished.image == IMAGE
    for name, content in files.items():
        path = tmp_path / "spool" / name
        assert path.read_bytes() == content
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("count", [2, 9])
def test_fetch_brings_several_large_files_at_once(tmp_path: Path, count: int) -> None:
    files = {f"{number}.img": os.urandom((1 << 20) + number * 77777) for number in range(count)} | {"small": b"x"}
    made = fragment(files=tuple(entry(name, content) for name, content in files.items()))
    finished = fetch(tmp_path, serving(made, files))
    assert finished.bytes == made.bytes
    assert {name: (tmp_path / "spool" / name).read_bytes() for name in files} == files


def test_damage_on_one_lane_ends_all(tmp_path: Path) -> None:
    files = {f"{number}.img": os.urandom(3 << 20) for number in range(4)}
    made = fragment(files=tuple(entry(name, content) for name, content in files.items()))
    files["2.img"] = files["2.img"][:-1] + bytes([files["2.img"][-1] ^ 1])
    with pytest.raises(CorruptError, match=r"/s/2\.img is damaged"):
        fetch(tmp_path, serving(made, files))


@pytest.mark.parametrize("content", [b"", b"hellO", b"hell", b"hello!", bytes(100)])
def test_fetch_names_the_file_that_is_damaged(tmp_path: Path, content: bytes) -> None:
    made = fragment(files=(entry("a.img", b"hello"),))
    with pytest.raises(CorruptError, match=r"/s/a\.img is damaged"):
        fetch(tmp_path, serving(made, {"a.img": content}))


def test_fetch_stops_a_file_that_does_not_end(tmp_path: Path) -> None:
    def worker(peer: Peer) -> None:
        peer.hear()
        peer.say(t="fragment", fragment=msgspec.json.encode(KEY.seal(fragment(files=(entry("a.img", b"hello"),)))))
        peer.hear()
        while True:
            peer.say(t="data", data=bytes(1 << 20))

    with pytest.raises(CorruptError, match=r"a\.img"):
        fetch(tmp_path, worker)
    assert (tmp_path / "spool" / "a.img").stat().st_size <= 5


@pytest.mark.parametrize("part", [{"t": "data", "data": b""}, {"t": "ok"}, {"t": "fragment", "fragment": b""}])
def test_fetch_takes_only_data_inside_a_file(tmp_path: Path, part: dict[str, Any]) -> None:
    def worker(peer: Peer) -> None:
        peer.hear()
        peer.say(t="fragment", fragment=msgspec.json.encode(KEY.seal(fragment(files=(entry("a.img", b"hello"),)))))
        peer.hear()
        peer.say(**part)

    with pytest.raises(HpccrError, match=r"inside the file a\.img"):
        fetch(tmp_path, worker)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"uid": 1002}, "user 1002, not 1001"),
        ({"key": StepKey(cluster="c", job="18", step="0")}, "step c-18/0, not c-17/0"),
        ({"checkpoint": "f" * 32}, "checkpoint"),
        ({"sequence": 4}, "sequence 4, not 3"),
        ({"capsule": 1, "capsules": 2}, "capsule 1, not 0; capsules 2, not 1"),
    ],
)
def test_fetch_refuses_what_was_not_asked_for(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    with pytest.raises(CorruptError, match=pattern):
        fetch(tmp_path, serving(fragment(**changes), {}))
    assert os.listdir(tmp_path / "spool") == []


def test_fetch_refuses_a_seal_of_another_key(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="seal"):
        fetch(tmp_path, serving(fragment(), {}, key=SiteKey(bytes(32))))


def test_fetch_asks_for_room_before_it_writes(tmp_path: Path) -> None:
    made = fragment(files=(FileEntry(name="a.img", size=2 << 20, digest="0" * 64),))
    for number, limits in enumerate(({"size": (2 << 20) - 1}, {"size": 3 << 20, "claimed": (1 << 20) + 1})):
        with pytest.raises(HpccrError, match="2 MiB and the spool of this node has 1 MiB"):
            fetch(tmp_path, serving(made, {}), name=f"spool{number}", **limits)
        assert os.listdir(tmp_path / f"spool{number}") == []


def test_fetches_at_the_same_time_share_the_room(tmp_path: Path) -> None:
    """The room of one is taken as soon as it is known, before anything comes."""
    content = os.urandom(2 << 20)
    made = fragment(files=(entry("a.img", content),))
    second: list[BaseException] = []

    def worker(peer: Peer) -> None:
        peer.hear()
        peer.say(t="fragment", fragment=msgspec.json.encode(KEY.seal(made)))
        peer.hear()  # it has reserved its room, and asks for the file
        try:
            fetch(tmp_path, serving(made, {"a.img": content}), size=3 << 20, name="other")
        except HpccrError as error:
            second.append(error)
        for start in (0, 1 << 20):
            peer.say(t="data", data=content[start : start + (1 << 20)])
        peer.say(t="end")

    fetch(tmp_path, worker, size=3 << 20)
    assert "the spool of this node has 1 MiB" in str(second[0])
    assert (tmp_path / "spool" / "a.img").read_bytes() == content


def test_damage_is_told_to_the_store_and_a_foreign_seal_is_not(tmp_path: Path) -> None:
    made = fragment(files=(entry("a.img", b"hello"),))
    marks: list[str] = []
    with pytest.raises(CorruptError):
        fetch(tmp_path, serving(made, {"a.img": b"hellO"}), name="changed", marks=marks)
    assert marks.pop().startswith("/s/a.img is damaged")

    def complaining(peer: Peer) -> None:
        peer.hear()
        peer.say(t="error", message="index.bin is missing", hint="", code=12)

    with pytest.raises(CorruptError):
        fetch(tmp_path, complaining, name="missing", marks=marks)
    assert marks.pop() == "index.bin is missing"
    with pytest.raises(CorruptError, match="seal"):
        fetch(tmp_path, serving(made, {}, key=SiteKey(bytes(32))), name="foreign", marks=marks)
    with pytest.raises(HpccrError, match="Stale"):
        fetch(
            tmp_path,
            lambda peer: peer.hear() and peer.say(t="error", message="Stale file handle", hint="", code=1),
            name="stale",
            marks=marks,
        )
    assert marks == []


@pytest.mark.parametrize("opened", [False, True])
def test_a_worker_that_only_seems_to_work_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    """It says something now and then, but for the bytes there were it takes too long."""
    monkeypatch.setattr(storeworker, "SLOWEST", 1 << 30)

    def worker(peer: Peer) -> None:
        peer.hear()
        if opened:
            peer.say(t="ok")
        with contextlib.suppress(OSError):
            while True:
                peer.say(t="moved", done=0, files=0)
                time.sleep(0.02)

    class Hurried(Scripted):
        """Patient with a silent worker, for a stall of this machine is no silence, but not with all in all."""

        def allow(self, count: int) -> None:
            super().allow(count)
            self.ends -= 2 * self._stall - 0.3

    with pytest.raises(HpccrError, match="MiB a second"):
        flush(tmp_path, worker, {"a.img": b"x"}, Hurried)


YIELDING = """
import ctypes, os, sys
from hpccr.noded import transfer
transfer.yield_to_the_job(10)
number = {"x86_64": 252, "aarch64": 31, "ppc64le": 274, "riscv64": 31}[os.uname().machine]
group = open("/proc/self/autogroup").read().split()[-1] if os.path.exists("/proc/self/autogroup") else "10"
print(os.nice(0), ctypes.CDLL(None).syscall(number, 1, 0), group)
"""


def test_a_flush_has_low_priorities() -> None:
    """Of the processor, of its session's group where the kernel has such, and of the disk (ioprio_get(2))."""
    done = subprocess.run(
        [sys.executable, "-c", YIELDING], capture_output=True, text=True, check=True, start_new_session=True,
        cwd=Path(transfer.__file__).parents[2],
    )  # fmt: skip
    nice, priority, group = map(int, done.stdout.split())
    assert (nice, priority >> 13, priority & 7) == (10, 2, 7)
    assert group in (10, 0)  # 0: there is such a file, but grouping is off


@settings(max_examples=100)
@given(st.binary(max_size=200), st.integers(0, 1 << 30))
def test_fetch_survives_any_bytes(tmp_path_factory: pytest.TempPathFactory, garbage: bytes, number: int) -> None:
    with pytest.raises(HpccrError):
        fetch(tmp_path_factory.mktemp("fuzz"), lambda peer: peer.sock.sendall(garbage), name=f"spool{number}")


def test_a_spool_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    directory = spool(tmp_path / "spool")
    os.close(directory)
    job = FlushJob(user=USER, key=KEY.secret, directory="/s", spool="/none", fragment=fragment())
    result = transfer.run(job, directory)
    assert isinstance(result, transfer.Refused)
    assert "spool failed" in result.message


def test_reads_that_are_shared_end_where_both_have_ended(tmp_path: Path) -> None:
    reads = transfer.SharedReads()
    opened = []
    for name, size in (("a", 10), ("b", 0), ("c", 5)):
        (tmp_path / name).write_bytes(bytes(size))
        opened.append(reads.begin(os.open(tmp_path / name, os.O_RDONLY), size))

    def still_open() -> list[int]:
        return [fd for fd in opened if os.path.exists(f"/proc/self/fd/{fd}")]

    for position, left in ((0, 3), (9, 3), (10, 1), (15, 1)):
        reads.end_before(position)
        assert still_open() == opened[-left:]
    reads.close()
    assert still_open() == []
