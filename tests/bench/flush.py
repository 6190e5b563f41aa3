"""How fast a flush is, how much memory it takes and how much it stores, against the tools that do parts of it.

    flush.py [--size MIB] [--level N] [--dirty PART] [--checkpoints N] [--rounds N]

Run as root inside a node (`run.py flush` and `run.py memory` do). The images are made up: ranks with zeros, tables,
random numbers and text, of which a part changes from one checkpoint to the next, and a mapping that grows at a low
address, so that all that follows shifts within the image. Prints ratios of one run:
  throughput of a flush to that of the slower of `zstd -T0` and b3sum (each alone, over the same files, output synced)
  throughput of a fetch to that of a plain copy
  bytes stored per checkpoint to the size of its images
  peak memory of the larger of the two processes of a flush, MiB
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pairs import quartiles, ratio

RANKS = 4
PAGE = 4096
USER = "user1"
"""Whose store it is."""


class Images:
    """A directory of images as CRIU makes them: a pagemap and pages for each rank."""

    def __init__(self, size: int) -> None:
        self._random = np.random.default_rng(1)
        self._pages = size // RANKS // PAGE
        self._grown = 1
        self._contents = [self._rank() for _ in range(RANKS)]

    def _rank(self) -> np.ndarray:
        """Pages: a quarter zeros, a quarter a table of small numbers, a quarter random, a quarter text."""
        quarter = self._pages // 4
        pages = np.zeros((self._pages, PAGE), dtype=np.uint8)
        table = self._random.integers(1 << 12, size=(quarter, PAGE // 8), dtype=np.uint64)
        pages[quarter : 2 * quarter] = table.view(np.uint8)
        pages[2 * quarter : 3 * quarter] = self._noise(quarter)
        text = b"%09d of a text that goes on and on; " * (PAGE // 45)
        for page in pages[3 * quarter :]:
            line = text % tuple(self._random.integers(1 << 29, size=PAGE // 45))
            page[: len(line)] = np.frombuffer(line, dtype=np.uint8)
        return pages

    def _noise(self, count: int) -> np.ndarray:
        return np.frombuffer(self._random.bytes(count * PAGE), dtype=np.uint8).reshape(count, PAGE)

    def change(self, part: float) -> None:
        """Runs of pages change, `part` of all; the heap of each rank grows by a few pages."""
        self._grown += 3
        for pages in self._contents:
            for _ in range(int(len(pages) * part / 64)):
                start = int(self._random.integers(len(pages) - 64))
                pages[start : start + 64] = self._noise(64)

    def write(self, directory: Path) -> int:
        from pycriu.images import pagemap_pb2

        directory.mkdir()
        for rank, pages in enumerate(self._contents):
            runs = ((0x1000, self._grown), (0x7F0000, len(pages)))
            messages = [pagemap_pb2.pagemap_head(pages_id=rank)]
            for first, count in runs:
                messages.append(pagemap_pb2.pagemap_entry(vaddr=first * PAGE, compat_nr_pages=count, flags=4))
            with (directory / f"pagemap-{rank}.img").open("wb") as file:
                file.write(bytes(8))
                for message in messages:
                    text = message.SerializeToString()
                    file.write(len(text).to_bytes(4, "little") + text)
            with (directory / f"pages-{rank}.img").open("wb") as file:
                file.write(self._noise(self._grown))
                file.write(pages)
        os.sync()
        return sum(path.stat().st_size for path in directory.iterdir())


def alone(*arguments: object) -> tuple[float, int]:
    """This script's --one in a process of its own: (seconds, peak KiB of the larger of its two processes)."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    from hpccr.noded.storeworker import KEEP_FREED

    # As noded.transferring starts a transfer.
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, **KEEP_FREED})
    took, peak = json.loads(done.stdout.splitlines()[-1])
    return took, peak


def one(what: str, spool: str, store: str, sequence: str, level: str) -> None:
    act = {"flush": flush, "fetch": fetch}[what]
    peaks = {0: 0}
    done = threading.Event()

    def watch() -> None:
        # The peak of a process stays until it ends; getrusage() would count what its parent had before exec.
        while not done.wait(0.02):
            for pid in (os.getpid(), *children()):
                peaks[pid] = max(peaks.get(pid, 0), peak_of(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    took = seconds(act, Path(spool), Path(store), int(sequence), int(level))
    done.set()
    watcher.join()
    print(json.dumps((took, max(peaks.values()))))


def children() -> list[int]:
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in found.split()]


def peak_of(pid: int) -> int:
    """KiB; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def seconds(act: Callable[..., object], *arguments: object) -> float:
    began = time.monotonic()
    act(*arguments)
    return time.monotonic() - began


def flush(spool: Path, store: Path, sequence: int, level: int) -> None:
    """As hpccrd's transfer process does it, with a worker of its own."""
    from hpccr.model import FORMAT, CapsuleImage, Fragment, Stdio, StepKey
    from hpccr.noded import transfer

    fragment = Fragment(
        format=FORMAT,
        key=StepKey(cluster="bench", job="1", step="0"),
        checkpoint=f"{sequence:032x}",
        sequence=sequence,
        capsule=0,
        capsules=1,
        uid=user().pw_uid,
        gid=user().pw_gid,
        created=0.0,
        node="node1",
        image=CapsuleImage(root_pid=300, max_pid=300, tasks=RANKS, stdio=Stdio(0, 1, 1)),
        files=(),
    )
    job = transfer.FlushJob(
        user=the_user(),
        key=bytes(32),
        directory=str(capsule(store, sequence)),
        spool=str(spool),
        fragment=fragment,
        level=level,
        nice=0,
    )
    fd = opened(spool)
    try:
        transfer.flush(job, fd)
    finally:
        os.close(fd)


def fetch(spool: Path, store: Path, sequence: int, level: int) -> None:
    del level
    from hpccr.model import StepKey
    from hpccr.noded import transfer
    from hpccr.noded.spool import Limits

    job = transfer.FetchJob(
        user=the_user(),
        key=bytes(32),
        directory=str(capsule(store, sequence)),
        claimed=0,
        limits=Limits(str(spool.parent)),
        step=StepKey(cluster="bench", job="1", step="0"),
        checkpoint=f"{sequence:032x}",
        sequence=sequence,
        capsule=0,
        capsules=1,
    )
    spool.mkdir()
    fd = opened(spool)
    try:
        transfer.fetch(job, fd)
    finally:
        os.close(fd)
    os.sync()


def opened(directory: Path) -> int:
    """A descriptor at a number that leaves the worker's free."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return high


def user() -> pwd.struct_passwd:
    return pwd.getpwnam(USER)


def the_user() -> Any:
    from hpccr.noded.storeworker import User

    return User(uid=user().pw_uid, gid=user().pw_gid, groups=())


def capsule(store: Path, sequence: int) -> Path:
    return store / f"ckpt-{sequence:06d}" / "capsule-0"


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    os.sync()
    return target


def hashed(directory: Path) -> None:
    from blake3 import blake3

    for path in sorted(directory.iterdir()):
        hasher = blake3(max_threads=blake3.AUTO)
        hasher.update_mmap(path)
        hasher.digest()


def zstd(directory: Path, target: Path, level: int) -> None:
    files = sorted(map(str, directory.iterdir()))
    with target.open("wb") as out:
        subprocess.run(["zstd", "-T0", f"-{level}", "-q", "-c", *files], stdout=out, check=True)
        os.fsync(out.fileno())


def run(work: Path, options: argparse.Namespace) -> None:
    images = Images(options.size << 20)
    source = work / "images"
    size = images.write(source)
    if options.rounds:
        speed(work, source, options)
        print(f"bytes of `zstd -{options.level}` to those of the images: {(work / 'z').stat().st_size / size:.3f}")
    stored: list[float] = []
    peaks: list[int] = []
    store = made(work / "store")
    for sequence in range(1, options.checkpoints + 1):
        made(capsule(store, sequence).parent)
        _, peak = alone("flush", copied(source, work / "spool"), store, sequence, options.level)
        peaks.append(peak >> 10)
        new = sum(path.stat().st_size for path in capsule(store, sequence).iterdir() if path.stat().st_nlink == 1)
        stored.append(round(new / size, 3))
        if sequence < options.checkpoints:
            shutil.rmtree(source)
            images.change(options.dirty)
            size = images.write(source)
    print("bytes stored to those of the images, each checkpoint:", *stored)
    print(f"peak memory of the larger process of a flush of {size >> 20} MiB: {max(peaks)} MiB")


def speed(work: Path, source: Path, options: argparse.Namespace) -> None:
    """Each thing once per round, one after the other, compared within the round."""
    times: dict[str, list[float]] = {"zstd": [], "b3sum": [], "flush": [], "copy": [], "fetch": []}
    for number in range(options.rounds):
        store, back, copy = made(work / f"store-{number}"), work / "back", work / "copy"
        made(capsule(store, 1).parent)
        times["zstd"].append(seconds(zstd, source, work / "z", options.level))
        times["flush"].append(alone("flush", copied(source, work / "spool"), store, 1, options.level)[0])
        times["b3sum"].append(seconds(hashed, source))
        times["copy"].append(seconds(copied, source, copy))
        times["fetch"].append(alone("fetch", back, store, 1, 0)[0])
        subprocess.run(["diff", "-r", str(source), str(back)], check=True)
        for path in (store, back, copy):
            shutil.rmtree(path)
    print(f"seconds for {options.size} MiB (lower quartile, median, upper quartile):")
    for name, taken in times.items():
        print(f"  {name:6}" + " ".join(f"{value:7.2f}" for value in quartiles(taken)))
    slower = [max(pair) for pair in zip(times["zstd"], times["b3sum"], strict=True)]
    print(f"throughput of a flush to that of the slower of `zstd -T0` and b3sum: {ratio(slower, times['flush'])}")
    print(f"throughput of a fetch to that of a copy: {ratio(times['copy'], times['fetch'])}")


def made(store: Path) -> Path:
    store.mkdir()
    os.chown(store, user().pw_uid, user().pw_gid)
    return store


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="MiB of images (default: 512)")
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--dirty", type=float, default=0.1, help="part that changes between checkpoints (default: 0.1)")
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(*options.one)
        return 0
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        work = Path(directory)
        work.chmod(0o755)
        run(work, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
