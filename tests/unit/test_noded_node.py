"""What must not be left half done when a request is cancelled."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpccr.noded import node
from hpccr.noded.spool import Area, Directory


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    area = Area(str(tmp_path / "area"))
    area.prepare()
    made = area.create("one")
    (Path(made.path) / "pages-1.img").write_bytes(b"x" * 100)
    return made


def cancelled(work: Callable[[], Coroutine[None, None, object]], *, times: int = 1) -> None:
    """`work` is cancelled when it waits for a thread that cannot begin yet, as all threads are at work."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as threads:
            loop.set_default_executor(threads)
            release = threading.Event()
            busy = loop.run_in_executor(None, release.wait)
            task = asyncio.create_task(work())
            for _ in range(times):
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                task.cancel()
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            await busy
            if times > 1:
                await loop.run_in_executor(None, lambda: None)  # whatever was to be done before has been

    asyncio.run(run())


def test_a_directory_is_removed_whoever_is_cancelled(directory: Directory) -> None:
    cancelled(lambda: node.remove(directory))
    assert not Path(directory.path).exists() and directory.fd == -1


def test_a_second_cancellation_does_not_stop_it_either(directory: Directory) -> None:
    cancelled(lambda: node.remove(directory), times=2)
    assert not Path(directory.path).exists()


def test_what_a_thread_brings_is_not_lost(directory: Directory) -> None:
    got: list[int] = []

    async def take() -> None:
        got.append(await asyncio.to_thread(directory.open))

    cancelled(lambda: node.to_its_end(take()))
    assert len(got) == 1
    os.close(got[0])


def test_errors_and_results_come_through() -> None:
    async def run() -> None:
        assert await node.to_its_end(asyncio.sleep(0, "done")) == "done"
        with pytest.raises(FileNotFoundError):
            await node.to_its_end(asyncio.to_thread(Path("/nonexistent").stat))

    asyncio.run(run())
