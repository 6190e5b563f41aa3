"""The store worker over its real socket, in a process of its own, as hpccrd runs it."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hpccr
from hpccr.model import FlushProgress
from hpccr.store import damage, privileges, worker
from hpccr.store.publish import make_directory, read

SOURCE = str(Path(hpccr.__file__).parent.parent)


class Peer:
    """hpccrd's end, speaking the protocol from its text."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(20)

    def send(self, *, descriptor: int | None = None, **message: Any) -> None:
        body = msgspec.msgpack.encode(message)
        frame = len(body).to_bytes(4, "big") + body
        if descriptor is None:
            self.sock.sendall(frame)
        else:
            assert socket.send_fds(self.sock, [frame], [descriptor]) == len(frame)

    def until(self, kind: str) -> dict[str, Any]:
        """The next message that is not about progress, which must be of that kind."""
        while (answer := self.receive()) is not None and answer["t"] == "moved" != kind:
            pass
        assert answer is not None and answer["t"] == kind, answer
        return answer

    def receive(self) -> dict[str, Any] | None:
        header = self._read(4)
        return msgspec.msgpack.decode(self._read(int.from_bytes(header, "big"))) if header else None

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                assert not data, "cut off inside a frame"
                return b""
            data += more
        return data

    def put(self, name: str, data: bytes, size: int | None = None) -> None:
        fd = os.memfd_create("spool")
        try:
            os.pwrite(fd, data, 0)
            self.send(t="file", name=name, size=len(data) if size is None else size, descriptor=fd)
        finally:
            os.close(fd)

    def get(self, name: str) -> bytes:
        self.send(t="get", name=name)
        data = b""
        while (answer := self.receive())["t"] == "data":
            assert len(answer["data"]) <= worker.MAX_DATA
            data += answer["data"]
        assert answer == {"t": "end"}
        return data


@contextmanager
def process(mode: str, ids: tuple[int, ...] = ()) -> Iterator[tuple[Peer, "subprocess.Popen[bytes]"]]:
    """`python -m hpccr.store.worker MODE UID GID GROUP...` with its socket on descriptor 3."""
    ours, theirs = socket.socketpair()
    code = f"import sys; sys.path.insert(0, {SOURCE!r}); from hpccr.store import worker; sys.exit(worker.main())"

    def to_three() -> None:
        os.dup2(theirs.fileno(), 3)

    with ours:
        with theirs:
            arguments = map(str, ids or (os.getuid(), os.getgid()))
            child = subprocess.Popen(
                [sys.executable, "-I", "-c", code, mode, *arguments], preexec_fn=to_three, pass_fds=(3,)
            )
        with child:
            try:
                yield Peer(ours), child
            finally:
                ours.close()
                child.wait(timeout=20)


@contextmanager
def thread(mode: str) -> Iterator[Peer]:
    """The same without the cost of a process."""
    ours, theirs = socket.socketpair()
    runner = threading.Thread(target=worker.serve, args=(mode, theirs))
    runner.start()
    try:
        with ours:
            yield Peer(ours)
    finally:
        runner.join(timeout=20)
        theirs.close()
    assert not runner.is_alive()


def test_a_fragment_goes_up_and_comes_back_unchanged(tmp_path: Path) -> None:
    directory = tmp_path / "cluster-1" / "0" / "ckpt-000001" / "capsule-0"
    files = {"pages-1.img": os.urandom(3 * worker.MAX_DATA + 17), "empty.img": b"", "core-5.img": b"x"}
    make_directory(directory.parent)
    with process("flush") as (peer, child):
        peer.send(t="open", directory=str(directory), total=sum(map(len, files.values())))
        assert peer.receive() == {"t": "ok"}
        progress = read(directory / "flush.json", FlushProgress)
        assert progress.total == sum(map(len, files.values())) and abs(time.time() - progress.updated) < 10
        for name, data in files.items():
            peer.put(name, data)
        while (answer := peer.until("moved"))["files"] < len(files):
            assert 0 <= answer["done"] <= sum(map(len, files.values()))
        assert not (directory / "fragment.json").exists()
        peer.send(t="publish", fragment=b'{"text": "of the fragment"}')
        assert peer.receive() == {"t": "ok"}
        assert peer.receive() is None
        assert child.wait(timeout=20) == 0
    (pack,) = directory.glob("*.pack")
    assert sorted(os.listdir(directory)) == sorted([pack.name, "index.bin", "fragment.json"])
    assert (directory / "fragment.json").read_bytes() == b'{"text": "of the fragment"}'
    for path in [directory, *directory.parents][:4]:
        assert path.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.iterdir())

    with process("fetch") as (peer, child):
        peer.send(t="open", directory=str(directory))
        assert peer.receive() == {"t": "fragment", "fragment": b'{"text": "of the fragment"}'}
        assert {name: peer.get(name) for name in files} == files
        peer.sock.shutdown(socket.SHUT_WR)
        assert peer.receive() is None
        assert child.wait(timeout=20) == 0


def test_the_user_cannot_trace_it() -> None:
    """It has the user's ids and no right; and it is not dumpable: it is outside of any job, and nobody gets into it."""
    uid, gid = (1001, 1002) if os.getuid() == 0 else (os.getuid(), os.getgid())
    with tempfile.TemporaryDirectory(dir="/tmp") as place, process("flush", (uid, gid)) as (peer, child):
        os.chown(place, uid, gid)
        peer.send(t="open", directory=f"{place}/capsule-0", total=0)
        assert peer.receive() == {"t": "ok"}
        proc = Path("/proc", str(child.pid))
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        assert status["Uid"].split() == [str(uid)] * 4 and status["Gid"].split() == [str(gid)] * 4
        assert [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh")] == [0, 0, 0]
        assert status["NoNewPrivs"].strip() == "1"
        limits = (proc / "limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits)
        assert re.search(rf"Max data size +{privileges.DATA} +{privileges.DATA} ", limits)
        assert re.search(r"Max open files +\d{1,4} +\d{1,4} ", limits)
        # What belongs to root in /proc belongs to a process that is not dumpable (proc(5)).
        assert {(proc / name).stat().st_uid for name in ("mem", "environ", "fd")} == {0}
        assert Path(place, "capsule-0").stat().st_uid == uid


def test_nothing_is_written_where_the_store_is_not(tmp_path: Path) -> None:
    """The checkpoint's directory was there when its manifest was written: what is missing is a file system."""
    with thread("flush") as peer:
        peer.send(t="open", directory=str(tmp_path / "ckpt-000001" / "capsule-0"), total=0)
        answer = peer.receive()
    assert answer["t"] == "error" and "mounted" in answer["hint"] and str(tmp_path / "ckpt-000001") in answer["message"]
    assert list(tmp_path.iterdir()) == []


def test_damage_is_marked(tmp_path: Path) -> None:
    directory = tmp_path / "ckpt-000001" / "capsule-0"
    make_directory(directory)
    with thread("mark") as peer:
        peer.send(t="mark", directory=str(directory), what="a pack is missing")
        assert peer.receive() == {"t": "ok"}
    assert damage.found(directory.parent) == "it was found damaged: a pack is missing"
    damage.unmark(directory.parent)
    assert damage.found(directory.parent) == ""


def test_progress_is_rewritten_while_nothing_comes(tmp_path: Path) -> None:
    assert worker.PROGRESS_INTERVAL < 2
    with thread("flush") as peer:
        peer.send(t="open", directory=str(tmp_path / "c"), total=5)
        assert peer.receive() == {"t": "ok"}
        first = read(tmp_path / "c" / "flush.json", FlushProgress).updated
        deadline = time.monotonic() + 10
        while read(tmp_path / "c" / "flush.json", FlushProgress).updated == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_leftovers_of_a_killed_worker_are_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "capsule-0"
    with process("flush") as (peer, child):
        peer.send(t="open", directory=str(directory), total=1)
        peer.receive()
        peer.put("old.img", b"x")
        deadline = time.monotonic() + 10
        while not any(".pack" in name for name in os.listdir(directory)):
            assert time.monotonic() < deadline
        child.kill()
        child.wait()
        assert any(".pack" in name for name in os.listdir(directory))
    with thread("flush") as peer:
        peer.send(t="open", directory=str(directory), total=1)
        assert peer.receive() == {"t": "ok"}
        peer.put("new.img", b"x")
        peer.send(t="publish", fragment=b"{}")
        peer.until("ok")
    (pack,) = directory.glob("*.pack")
    assert sorted(os.listdir(directory)) == sorted([pack.name, "fragment.json", "index.bin"])


FILE = {"t": "file", "name": "a", "size": 2, "data": b"xx"}
BAD = {
    "a file before open": [FILE],
    "data": [{"t": "data", "data": b""}],
    "a slash in a name": [FILE | {"name": "../a"}],
    "a hidden name": [FILE | {"name": ".a"}],
    "no descriptor": [{"t": "file", "name": "a", "size": 2}],
    "a descriptor of no file": [{"t": "file", "name": "a", "size": 0, "descriptor": "directory"}],
    "too few bytes": [FILE | {"size": 3}],
    "too many bytes": [FILE | {"size": 1}],
    "the same file twice": [FILE, FILE],
    "an unknown message": [{"t": "nonsense"}],
    "another open": [{"t": "open", "directory": "/", "total": 0}],
    "a level that zstd has not": [{"t": "open", "directory": "/", "total": 0, "level": 99}],
}


@pytest.mark.parametrize("what", BAD)
def test_a_flush_that_breaks_the_protocol_leaves_nothing(tmp_path: Path, what: str) -> None:
    directory = tmp_path / "capsule-0"
    with thread("flush") as peer:
        if what not in ("a file before open", "a level that zstd has not"):
            peer.send(t="open", directory=str(directory), total=0)
            assert peer.receive() == {"t": "ok"}
            peer.put("good.img", b"data")
        try:
            for message in BAD[what]:
                if "data" in message and message["t"] == "file":
                    peer.put(message["name"], message["data"], message["size"])
                elif "descriptor" in message:
                    fd = os.open(tmp_path, os.O_RDONLY)
                    peer.send(**message | {"descriptor": fd})
                    os.close(fd)
                else:
                    peer.send(**message)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = peer.until("error")
        assert answer["code"] == 1 and answer["message"]
    assert not directory.exists()


@pytest.mark.parametrize("directory", ["relative/capsule-0", "/tmp/../etc"])
def test_only_absolute_plain_paths(directory: str) -> None:
    with thread("flush") as peer:
        peer.send(t="open", directory=directory, total=0)
        assert "absolute" in peer.receive()["message"]


def test_the_end_of_the_socket_removes_everything(tmp_path: Path) -> None:
    directory = tmp_path / "capsule-0"
    with process("flush") as (peer, child):
        peer.send(t="open", directory=str(directory), total=0)
        assert peer.receive() == {"t": "ok"}
        peer.put("a.img", b"abc")
        peer.until("moved")
        peer.sock.close()
        assert child.wait(timeout=20) == 1
    assert not directory.exists()


def test_a_published_fragment_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "fragment.json").write_text("published")
    (tmp_path / "pages.img").write_text("data")
    with thread("flush") as peer:
        peer.send(t="open", directory=str(tmp_path), total=0)
        answer = peer.receive()
        assert answer["t"] == "error" and answer["code"] == 11
    assert (tmp_path / "fragment.json").read_text() == "published"
    assert (tmp_path / "pages.img").read_text() == "data"


def test_no_room_or_no_permission_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with thread("flush") as peer:
        peer.send(t="open", directory=str(tmp_path / "file" / "capsule-0"), total=0)
        answer = peer.receive()
    assert answer["t"] == "error" and str(tmp_path) in answer["message"] and answer["message"]


def test_an_error_reaches_a_peer_that_keeps_sending(tmp_path: Path) -> None:
    """The peer reads the error after its send has failed."""
    with thread("flush") as peer:
        peer.send(t="open", directory=str(tmp_path / "c"), total=0)
        assert peer.receive() == {"t": "ok"}
        peer.put("a/b", b"x")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(10_000):
                peer.send(t="publish", fragment=b"x" * worker.MAX_DATA)
        assert peer.receive()["t"] == "error"


def test_fetch_says_what_is_missing(tmp_path: Path) -> None:
    def ask(name: str) -> dict[str, Any]:
        with thread("fetch") as peer:
            peer.send(t="open", directory=str(directory))
            assert peer.receive()["t"] == "fragment"
            with suppress(BrokenPipeError):  # an index that is missing may have been told by now
                peer.send(t="get", name=name)
            return peer.receive()

    with thread("fetch") as peer:
        peer.send(t="open", directory=str(tmp_path / "nothing"))
        assert peer.receive()["code"] == 10
    directory = tmp_path / "c"
    with thread("flush") as peer:
        peer.send(t="open", directory=str(directory), total=1)
        peer.put("pages.img", b"data")
        peer.send(t="publish", fragment=b"{}")
        peer.receive()
        peer.until("ok")
    assert ask("pages.img") == {"t": "data", "data": b"data"}
    assert ask("other.img")["code"] == 12
    assert ask("../target")["t"] == "error"
    (pack,) = directory.glob("*.pack")
    data = pack.read_bytes()
    for replace in (
        lambda: None,
        lambda: pack.symlink_to(tmp_path / "target"),
        lambda: os.mkfifo(pack),
        lambda: pack.write_bytes(data[:-1]),
    ):
        pack.unlink()
        replace()
        answer = ask("pages.img")
        assert answer["code"] == 12 and pack.name in answer["message"]
        pack.unlink(missing_ok=True)
        pack.write_bytes(data)
    (directory / "fragment.json").write_bytes(b"[]")
    answer = ask("pages.img")
    assert answer["code"] == 12 and "fragment.json" in answer["message"]
    assert "fragment.json" in damage.found(tmp_path), "root would only say that the seal is wrong"
    (directory / "index.bin").unlink()
    answer = ask("pages.img")
    assert answer["code"] == 12 and "index.bin" in answer["message"]


@pytest.mark.parametrize("damaged_on", ["main", "lane"])
def test_damage_is_told_while_the_other_lanes_are_open(tmp_path: Path, damaged_on: str) -> None:
    """hpccrd closes the lanes when it knows of the damage, so the worker may not wait for that before it tells."""
    directory = tmp_path / "c"
    with thread("flush") as peer:
        peer.send(t="open", directory=str(directory), total=1)
        peer.put("pages.img", os.urandom(5000))
        peer.send(t="publish", fragment=b"{}")
        peer.receive()
        peer.until("ok")
    (pack,) = directory.glob("*.pack")
    os.truncate(pack, pack.stat().st_size - 1)
    with thread("fetch") as peer:
        peer.send(t="open", directory=str(directory))
        assert peer.receive()["t"] == "fragment"
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                peer.send(t="lane", descriptor=theirs.fileno())
            asked = peer if damaged_on == "main" else Peer(ours)
            asked.send(t="get", name="pages.img")
            answer = asked.receive()
            assert answer["t"] == "error" and answer["code"] == 12 and pack.name in answer["message"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), mode=st.sampled_from(["flush", "fetch"]))
def test_any_bytes_end_in_an_error(data: bytes, mode: str) -> None:
    with thread(mode) as peer:
        peer.sock.sendall(data)
        peer.sock.shutdown(socket.SHUT_WR)
        answer = peer.receive()
        assert answer is not None and answer["t"] == "error"


def test_a_frame_above_the_limit_is_refused() -> None:
    with thread("flush") as peer:
        peer.sock.sendall((worker.MAX_FRAME + 1).to_bytes(4, "big"))
        assert "exceeds the limit" in peer.receive()["message"]
