"""The job's stdio outside the capsule: nothing lost, nothing twice, positions right."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hpccr.agent.stdio import WINDOW, JobPipes
from hpccr.coordinator import sink as sink_module
from hpccr.coordinator.sink import Sink
from hpccr.coordinator.streams import Source, outputs, same_file, stdin_kind
from hpccr.model import Stream
from hpccr.wire import messages as m

DEADLINE = 20


def open_output(path: Path, *, append: bool) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else 0), 0o600)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0)


class Told:
    """What a sink said."""

    def __init__(self) -> None:
        self.taken = 0
        self.warnings: list[str] = []
        self.broken = 0

    def sink(self, fd: int, journal: Path | None) -> Sink:
        def taken(count: int) -> None:
            self.taken += count

        def broken() -> None:
            self.broken += 1

        return Sink(fd, taken=taken, warn=self.warnings.append, broken=broken, journal=journal)


def use_sink(fd: int, journal: Path | None, use: Callable[[Sink], Awaitable[object]]) -> Told:
    told = Told()

    async def run() -> None:
        sink = told.sink(fd, journal)
        await use(sink)
        await sink.close()
        await asyncio.sleep(0)

    asyncio.run(run())
    return told


def at(path: Path, position: int, *foreign: tuple[int, int]) -> Stream:
    return Stream(position, foreign, path.stat().st_ino, str(path))


def test_a_mark_counts_what_was_put_before_it_and_nothing_after(tmp_path: Path) -> None:
    fd = open_output(tmp_path / "out", append=True)
    os.write(fd, b"from the script\n")

    async def use(sink: Sink) -> None:
        sink.put(b"a" * 100_000)
        mark = asyncio.ensure_future(sink.mark())
        await asyncio.sleep(0)
        sink.put(b"b" * 100_000)
        assert await mark == at(tmp_path / "out", 16 + 100_000)

    assert use_sink(fd, None, use).taken == 200_000
    assert (tmp_path / "out").stat().st_size == 200_016


def test_a_pipe_has_no_position() -> None:
    reader, writer = os.pipe()

    async def use(sink: Sink) -> None:
        sink.put(b"x")
        assert await sink.mark() == Stream(None)
        assert not sink.rewinds

    use_sink(writer, None, use)
    assert os.read(reader, 10) == b"x"


def test_a_reader_that_is_gone_is_told_for_all_that_comes() -> None:
    reader, writer = os.pipe()
    os.close(reader)

    async def use(sink: Sink) -> None:
        sink.put(b"x" * 10)
        sink.put(b"y" * 10)
        await sink.mark()
        assert sink.error is not None

    told = use_sink(writer, None, use)
    assert (told.taken, told.broken, len(told.warnings)) == (20, 2, 1)


class Full:
    """os.write() of a disk that has no room for one file until it is given some; each write is short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
        self.room = 0
        self.asked = 0
        self._fd = fd
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, fd: int, data: bytes) -> int:
        if fd != self._fd:
            return self._write(fd, data)
        self.asked += 1
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(fd, data[: min(self.room, 1000)])
        self.room -= written
        return written


def test_a_full_disk_is_waited_for_and_nothing_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_module, "RETRY", 0.001)
    fd = open_output(tmp_path / "out", append=True)
    disk = Full(monkeypatch, fd)
    data = os.urandom(5000)

    async def use(sink: Sink) -> None:
        sink.put(data)
        sink.put(b"end")
        disk.room = 1500
        await until(lambda: "No space" in sink.trouble)
        disk.room = 10_000
        assert (await sink.mark()).position == 5003
        assert not sink.trouble and sink.error is None

    told = use_sink(fd, None, use)
    assert (tmp_path / "out").read_bytes() == data + b"end"
    assert told.taken == 5003 and not told.broken
    assert "waits" in told.warnings[0] and "nothing is missing" in told.warnings[-1]


def test_what_a_full_disk_did_not_take_is_dropped_by_a_cut_and_by_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fd = open_output(out, append=True)
    disk = Full(monkeypatch, fd)
    told = Told()

    async def run() -> None:
        sink = told.sink(fd, None)
        disk.room = 4
        sink.put(b"one\ntwo\n")
        await until(lambda: bool(sink.trouble))
        sink.cut_back(at(out, 4))
        assert (await sink.mark()).position == 4
        sink.put(b"for ever")
        await until(lambda: bool(sink.trouble))
        closing = asyncio.create_task(sink.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), DEADLINE))
    assert out.read_bytes() == b"one\n"


def test_a_file_at_its_limit_ends_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = open_output(tmp_path / "out", append=True)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "write", full)

    async def use(sink: Sink) -> None:
        sink.put(b"x")

    assert use_sink(fd, None, use).broken == 1


@pytest.mark.parametrize("append", [True, False])
def test_cut_back_removes_what_came_after_the_checkpoint(tmp_path: Path, append: bool) -> None:
    out = tmp_path / "out"
    fd = open_output(out, append=append)

    async def first(sink: Sink) -> None:
        sink.put(b"one\ntwo\nthree\n")

    use_sink(fd, tmp_path / "journal", first)
    os.write(fd, b"prelude of the requeued script\n")

    async def again(sink: Sink) -> None:
        sink.cut_back(at(out, 8))
        sink.put(b"three again\n")

    assert not use_sink(fd, tmp_path / "journal", again).warnings
    assert out.read_bytes() == b"one\ntwo\nthree again\n"


@pytest.mark.parametrize("append", [True, False])
def test_a_start_from_the_beginning_takes_the_first_ones_output_back(tmp_path: Path, append: bool) -> None:
    """The script is requeued before there is a checkpoint; without O_APPEND it empties the file itself."""
    out, journal = tmp_path / "out", tmp_path / "journal"
    fd = open_output(out, append=append)
    os.write(fd, b"head\n")
    began: list[Stream] = []

    async def first(sink: Sink) -> None:
        began.append(sink.position)
        sink.cut_back(began[0], start=True)
        sink.put(b"one\ntwo\n")

    use_sink(fd, journal, first)
    if not append:
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"head\n")

    async def again(sink: Sink) -> None:
        sink.cut_back(began[0], start=True)
        sink.put(b"1\n2\n3\n")

    assert not use_sink(fd, journal, again).warnings
    assert out.read_bytes() == b"head\n1\n2\n3\n"
    if append:
        return
    # The copy is of the second start only: after a requeue that restores, its lines are put back.
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"head\n")
    assert not use_sink(fd, journal, lambda sink: cut(sink, at(out, 9))).warnings
    assert out.read_bytes() == b"head\n1\n2\n"


async def cut(sink: Sink, position: Stream) -> None:
    sink.cut_back(position)


def test_another_file_is_not_cut(tmp_path: Path) -> None:
    """`hpccr restore JOB >> all.log`."""
    (tmp_path / "out").write_bytes(b"one\ntwo\n")
    fd = open_output(tmp_path / "all.log", append=True)
    os.write(fd, b"of somebody else\n")

    async def use(sink: Sink) -> None:
        sink.cut_back(at(tmp_path / "out", 4))
        sink.put(b"two\n")
        assert (await sink.mark()).path == str(tmp_path / "all.log")

    (warning,) = use_sink(fd, None, use).warnings
    assert str(tmp_path / "out") in warning and str(tmp_path / "all.log") in warning
    assert (tmp_path / "all.log").read_bytes() == b"of somebody else\ntwo\n"


def test_a_copied_file_of_the_same_name_is_cut(tmp_path: Path) -> None:
    """The job was taken to another cluster with its directory."""
    out = tmp_path / "out"
    out.write_bytes(b"one\ntwo\n")
    position = Stream(4, (), out.stat().st_ino + 1, str(out))
    assert not use_sink(open_output(out, append=True), None, lambda sink: cut(sink, position)).warnings
    assert out.read_bytes() == b"one\n"


def test_what_a_truncating_redirection_took_is_put_back(tmp_path: Path) -> None:
    out, journal = tmp_path / "out", tmp_path / "journal"
    fd = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"head\n")

    async def first(sink: Sink) -> None:
        sink.put(b"one\n")
        sink.put(b"two\nlost\n")

    use_sink(fd, journal, first)
    os.close(fd)
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(fd, b"head\n")

    async def again(sink: Sink) -> None:
        sink.cut_back(at(out, 13))
        sink.put(b"three\n")

    assert not use_sink(fd, journal, again).warnings
    assert out.read_bytes() == b"head\none\ntwo\nthree\n"
    # and once more, from a later position: the copy has followed the cut
    os.ftruncate(fd, 5)
    os.lseek(fd, 5, os.SEEK_SET)
    assert not use_sink(fd, journal, lambda sink: cut(sink, at(out, 19))).warnings
    assert out.read_bytes() == b"head\none\ntwo\nthree\n"


def test_a_full_store_costs_the_copy_and_not_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, journal = tmp_path / "out", tmp_path / "journal"
    fd = open_output(out, append=False)
    write = os.write

    def no_room(into: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{into}") == str(journal):
            if os.fstat(into).st_size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[:2]
        return write(into, data)

    monkeypatch.setattr(os, "write", no_room)

    async def use(sink: Sink) -> None:
        for line in (b"one\n", b"two\n"):
            sink.put(line)

    told = use_sink(fd, journal, use)
    assert out.read_bytes() == b"one\ntwo\n" and journal.read_bytes() == b"on"
    assert len(told.warnings) == 1 and "copy" in told.warnings[0] and not told.broken
    monkeypatch.undo()

    async def again(sink: Sink) -> None:
        sink.cut_back(at(out, 8))
        sink.put(b"three\n")

    # What is missing in the copy is known to be missing.
    assert not use_sink(fd, journal, again).warnings
    os.ftruncate(fd, 0)
    (warning,) = use_sink(fd, journal, lambda sink: cut(sink, at(out, 14))).warnings
    assert "lines are lost" in warning


def test_output_goes_on_where_no_copy_of_it_can_be_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "journal.base").mkdir()

    async def use(sink: Sink) -> None:
        sink.cut_back(sink.position, start=True)
        sink.put(b"one\n")

    told = use_sink(open_output(out, append=False), tmp_path / "journal", use)
    assert out.read_bytes() == b"one\n" and len(told.warnings) == 1 and "copy" in told.warnings[0]


def test_a_truncated_append_file_is_told(tmp_path: Path) -> None:
    fd = open_output(tmp_path / "out", append=True)
    told = use_sink(fd, tmp_path / "journal", lambda sink: cut(sink, at(tmp_path / "out", 100)))
    assert "open-mode=append" in told.warnings[0]


def read_source(data: bytes, skip: int, tmp_path: Path, *, as_file: bool) -> bytes:
    if as_file:
        (tmp_path / "in").write_bytes(data)
        fd = os.open(tmp_path / "in", os.O_RDONLY)
    else:
        fd, writer = os.pipe()

    async def run() -> bytes:
        got: list[bytes] = []
        source = Source(fd, skip=skip, feed=got.append)
        source.start()
        if not as_file:
            await asyncio.to_thread(lambda: (os.write(writer, data), os.close(writer)))
        async with asyncio.timeout(DEADLINE):
            while not got or got[-1]:
                await asyncio.sleep(0)
                while source._in_flight:
                    source.taken(1)
        assert source.sent == len(data)
        return b"".join(got)

    return asyncio.run(run())


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("skip", [0, 1, 40_000])
def test_input_is_read_to_its_end_after_what_was_consumed(tmp_path: Path, skip: int, as_file: bool) -> None:
    data = bytes(i % 251 for i in range(60_000))
    assert read_source(data, skip, tmp_path, as_file=as_file) == data[skip:]


def test_input_waits_for_the_job_that_is_restored() -> None:
    fd, writer = os.pipe()

    async def run() -> None:
        got: list[bytes] = []
        source = Source(fd, skip=0, feed=got.append)
        source.start()
        os.write(writer, b"before")
        await until(lambda: got == [b"before"])
        source.taken(6)
        source.pause()
        os.write(writer, b"meanwhile")
        await until(lambda: source._held == [b"meanwhile"])
        assert source.sent == 6
        source.start()
        assert got == [b"before", b"meanwhile"] and source.sent == 15
        source.taken(9)
        os.close(writer)
        await until(lambda: not got[-1])
        # Another restart: the new job's stdin ends as well.
        source.pause()
        got.clear()
        source.start()
        assert got == [b""]

    asyncio.run(run())


def test_kinds_of_streams(tmp_path: Path) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    reader, writer = os.pipe()
    assert (stdin_kind(null), stdin_kind(reader)) == ("null", "pipe")
    assert same_file(reader, os.dup(reader)) and not same_file(null, writer)


class Job:
    """JobPipes with the job's ends in hand and the messages that came out."""

    def __init__(self, *, stdin: bool, merged: bool) -> None:
        self.messages: list[m.Message] = []
        self.pipes = JobPipes(stdin=stdin, merged=merged, post=self.messages.append)
        self.ends = [os.dup(fd) for fd in self.pipes.job_ends]
        self.pipes.started()

    def output(self, stream: int) -> bytes:
        return b"".join(o.data for o in self.messages if isinstance(o, m.Output) and o.stream == stream)


def test_output_is_passed_on_by_stream() -> None:
    async def run() -> None:
        job = Job(stdin=False, merged=False)
        os.write(job.ends[0], b"out")
        os.write(job.ends[1], b"err")
        await until(lambda: bool(job.output(1) and job.output(2)))
        assert (job.output(1), job.output(2)) == (b"out", b"err")
        job.pipes.close()

    asyncio.run(run())


def test_the_window_stops_the_pump_but_not_the_drain() -> None:
    async def run() -> None:
        job = Job(stdin=False, merged=True)
        os.set_blocking(job.ends[0], False)
        sent = 0
        async with asyncio.timeout(DEADLINE):
            while sent < WINDOW + 2 * 65536:
                try:
                    sent += os.write(job.ends[0], b"x" * 65536)
                except BlockingIOError:
                    if len(job.output(1)) >= WINDOW:
                        break
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        stuck = len(job.output(1))
        assert WINDOW <= stuck < sent
        job.pipes.drain()
        assert len(job.output(1)) == sent
        job.pipes.output_taken(sent)
        os.write(job.ends[0], b"more")
        await until(lambda: job.output(1).endswith(b"more"))
        job.pipes.close()

    asyncio.run(run())


def test_consumed_input_is_what_the_job_has_read() -> None:
    async def run() -> None:
        job = Job(stdin=True, merged=True)
        job.pipes.feed(b"x" * 200_000)
        assert job.pipes.stdin_consumed() == 0
        assert len(os.read(job.ends[0], 1000)) == 1000
        assert job.pipes.stdin_consumed() == 1000
        job.pipes.feed(b"")
        got = 1000
        while chunk := await asyncio.to_thread(os.read, job.ends[0], 65536):
            got += len(chunk)
        assert got == 200_000 == job.pipes.stdin_consumed()
        assert sum(x.count for x in job.messages if isinstance(x, m.InputTaken)) == 200_000
        job.pipes.close()

    asyncio.run(run())


def test_what_is_left_in_the_pipe_after_the_end_of_the_input_is_not_consumed() -> None:
    async def run() -> None:
        job = Job(stdin=True, merged=True)
        job.pipes.feed(b"x" * 100)
        job.pipes.feed(b"")
        assert len(os.read(job.ends[0], 40)) == 40
        assert job.pipes.stdin_consumed() == 40
        assert os.read(job.ends[0], 100) == b"x" * 60
        assert job.pipes.stdin_consumed() == 100
        assert os.read(job.ends[0], 100) == b""
        job.pipes.close()

    asyncio.run(run())


def test_input_for_a_job_that_closed_its_stdin_is_dropped_and_taken() -> None:
    async def run() -> None:
        job = Job(stdin=True, merged=True)
        os.close(job.ends[0])
        job.pipes.feed(b"x" * 10)
        await until(lambda: any(isinstance(x, m.InputTaken) for x in job.messages))
        job.pipes.feed(b"")
        job.pipes.close()

    asyncio.run(run())


def test_slurms_notice_of_a_requeue_is_taken_out_and_other_writers_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fd = open_output(out, append=True)
    other = open_output(out, append=True)
    notice = b"slurmstepd-node1: error: *** JOB 32 ON node1 CANCELLED AT 2026-01-01T00:00:00 DUE TO JOB REQUEUE ***\n"
    marks: list[Stream] = []

    async def first(sink: Sink) -> None:
        sink.put(b"one\n")
        await sink.mark()
        os.write(other, b"said by the script\n" + notice)
        sink.put(b"two\n")
        marks.append(await sink.mark())
        os.write(other, notice)

    use_sink(fd, None, first)
    assert marks[0].position == len(b"one\nsaid by the script\n" + notice + b"two\n")

    async def again(sink: Sink) -> None:
        sink.cut_back(marks[0])
        sink.put(b"three\n")
        assert (await sink.mark()).position == out.stat().st_size

    assert not use_sink(fd, None, again).warnings
    assert out.read_bytes() == b"one\nsaid by the script\ntwo\nthree\n"


def test_a_stream_that_nobody_reads_gives_the_job_a_broken_pipe() -> None:
    async def run() -> None:
        job = Job(stdin=False, merged=False)
        os.write(job.ends[0], b"unread")
        job.pipes.close_output(1)
        job.pipes.close_output(1)
        with pytest.raises(BrokenPipeError):
            os.write(job.ends[0], b"x")
        os.write(job.ends[1], b"err")
        await until(lambda: job.output(2) == b"err")
        job.pipes.drain()
        job.pipes.close()

    asyncio.run(run())


def test_the_files_that_another_process_writes(tmp_path: Path) -> None:
    """As the batch script does while its `hpccr run` has other ones."""
    with (tmp_path / "log").open("w") as log:
        other = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.DEVNULL)
    assert outputs(other.pid) == (str(tmp_path / "log"),)
    other.communicate()
    assert outputs(other.pid) == ()


BEGINNING = """
import asyncio, os, sys
from pathlib import Path
from hpccr.coordinator.streams import Positions, Streams
from hpccr.model import Stream

async def main():
    nothing = lambda *what: None
    streams = Streams(journal=Path(sys.argv[1]), began=None, taken=nothing, feed=nothing, warn=nothing, broken=nothing)
    then = Positions(Stream(0), Stream(4, (), os.fstat(1).st_ino), Stream(None))
    sizes = []
    streams.begin(then)
    await streams.positions(0)
    sizes.append(os.fstat(1).st_size)
    await streams.cut_back(then)
    sizes.append(os.fstat(1).st_size)
    print(*sizes, file=sys.stderr)

asyncio.run(main())
"""


def test_output_is_cut_by_itself(tmp_path: Path) -> None:
    """When a boot begins it is not certain which checkpoint it comes to restore."""
    (tmp_path / "out").write_bytes(b"one\ntwo\n")
    with (tmp_path / "out").open("ab") as out:
        argv = [sys.executable, "-c", BEGINNING, str(tmp_path / "journal")]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, check=True)
    assert done.stderr == b"8 4\n" and (tmp_path / "out").read_bytes() == b"one\n"


SYNCING = """
import asyncio, errno, os, sys, threading
from pathlib import Path
from hpccr.coordinator import streams as module
from hpccr.coordinator.streams import Streams

fdatasync, stuck, how = os.fdatasync, threading.Event(), ""

def sync(fd):
    if how == "fails":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    if how == "hangs":
        stuck.wait()
    print(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd).st_size, file=sys.stderr)
    fdatasync(fd)

os.fdatasync = sync

async def main():
    global how
    nothing = lambda *what: None
    warn = lambda text: print(text, file=sys.stderr)
    streams = Streams(journal=Path(sys.argv[1]), began=None, taken=nothing, feed=nothing, warn=warn, broken=nothing)
    streams.output(1, b"12345")
    for how in ("", "fails", "hangs", "hangs"):
        print("at", (await streams.positions(0)).stdout.position, file=sys.stderr)
        module.SYNC = 0.1
    stuck.set()
    await streams.close()

asyncio.run(main())
"""


def test_output_is_on_its_disk_before_a_checkpoint_says_how_long_it_is(tmp_path: Path) -> None:
    """So is the copy of it. A disk that fails, or hangs, costs no checkpoint."""
    with (tmp_path / "out").open("wb") as out:
        argv = [sys.executable, "-c", SYNCING, str(tmp_path / "journal")]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, check=True, text=True)
    lines = [line.split(" (")[-1].split(")")[0] for line in done.stderr.splitlines()]
    assert lines[:3] == ["out 5", "journal.stdout 5", "at 5"]
    assert lines[3:8] == [os.strerror(errno.EIO), "at 5", "it takes more than 0 s", "at 5", "the last time is not over"]
