"""The job's stdio outside the capsule: nothing lost, nothing twice, positions right."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hpccr.agent.stdio import WINDOW, JobPipes
from hpccr.coordinator.streams import Sink, Source, same_file, stdin_kind
from hpccr.model import Stream
from hpccr.wire import messages as m

DEADLINE = 20


def open_output(path: Path, *, append: bool) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else 0), 0o600)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0)


async def use_sink(fd: int, journal: Path | None, use: Callable[[Sink], Awaitable[None]]) -> int:
    taken: list[int] = []
    sink = Sink(fd, taken=taken.append, journal=journal)
    await use(sink)
    await sink.close()
    await asyncio.sleep(0)
    return sum(taken)


def test_a_mark_counts_what_was_put_before_it_and_nothing_after(tmp_path: Path) -> None:
    fd = open_output(tmp_path / "out", append=True)
    os.write(fd, b"from the script\n")

    async def use(sink: Sink) -> None:
        sink.put(b"a" * 100_000)
        mark = asyncio.ensure_future(sink.mark())
        await asyncio.sleep(0)
        sink.put(b"b" * 100_000)
        assert await mark == Stream(16 + 100_000)

    assert asyncio.run(use_sink(fd, None, use)) == 200_000
    assert (tmp_path / "out").stat().st_size == 200_016


def test_a_pipe_has_no_position() -> None:
    reader, writer = os.pipe()

    async def use(sink: Sink) -> None:
        sink.put(b"x")
        assert await sink.mark() == Stream(None)
        assert "cannot be taken back" in sink.cut_back(Stream(None))
        assert sink.cut_back(Stream(None)) == ""  # it is said once

    asyncio.run(use_sink(writer, None, use))
    assert os.read(reader, 10) == b"x"


def test_a_reader_that_is_gone_drops_the_rest_but_takes_it() -> None:
    reader, writer = os.pipe()
    os.close(reader)

    async def use(sink: Sink) -> None:
        sink.put(b"x" * 10)
        sink.put(b"y" * 10)
        await sink.mark()
        assert sink.error is not None

    assert asyncio.run(use_sink(writer, None, use)) == 20


@pytest.mark.parametrize("append", [True, False])
def test_cut_back_removes_what_came_after_the_checkpoint(tmp_path: Path, append: bool) -> None:
    out = tmp_path / "out"
    fd = open_output(out, append=append)

    async def first(sink: Sink) -> None:
        sink.put(b"one\ntwo\nthree\n")

    asyncio.run(use_sink(fd, tmp_path / "journal", first))
    os.write(fd, b"prelude of the requeued script\n")

    async def again(sink: Sink) -> None:
        assert sink.cut_back(Stream(8)) == ""
        sink.put(b"three again\n")

    asyncio.run(use_sink(fd, tmp_path / "journal", again))
    assert out.read_bytes() == b"one\ntwo\nthree again\n"


def test_what_a_truncating_redirection_took_is_put_back(tmp_path: Path) -> None:
    out, journal = tmp_path / "out", tmp_path / "journal"
    fd = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"head\n")

    async def first(sink: Sink) -> None:
        sink.put(b"one\n")
        sink.put(b"two\nlost\n")

    asyncio.run(use_sink(fd, journal, first))
    os.close(fd)
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(fd, b"head\n")

    async def again(sink: Sink) -> None:
        assert sink.cut_back(Stream(13)) == ""
        sink.put(b"three\n")

    asyncio.run(use_sink(fd, journal, again))
    assert out.read_bytes() == b"head\none\ntwo\nthree\n"
    # and once more, from a later position: the copy has followed the cut
    os.ftruncate(fd, 5)
    os.lseek(fd, 5, os.SEEK_SET)
    asyncio.run(use_sink(fd, journal, lambda sink: third(sink)))
    assert out.read_bytes() == b"head\none\ntwo\nthree\n"


async def third(sink: Sink) -> None:
    assert sink.cut_back(Stream(19)) == ""


def test_a_truncated_append_file_is_told(tmp_path: Path) -> None:
    fd = open_output(tmp_path / "out", append=True)

    async def use(sink: Sink) -> None:
        assert "open-mode=append" in sink.cut_back(Stream(100))

    asyncio.run(use_sink(fd, tmp_path / "journal", use))


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

    asyncio.run(use_sink(fd, None, first))
    assert marks[0].position == len(b"one\nsaid by the script\n" + notice + b"two\n")

    async def again(sink: Sink) -> None:
        assert sink.cut_back(marks[0]) == ""
        sink.put(b"three\n")
        assert (await sink.mark()).position == out.stat().st_size

    asyncio.run(use_sink(fd, None, again))
    assert out.read_bytes() == b"one\nsaid by the script\ntwo\nthree\n"
