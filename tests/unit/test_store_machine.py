"""The store under everything that may happen to it, drawn by Hypothesis: checkpoints are written and collected, each by
processes that stand still, go on or die before any of their system calls, while others do the same.

What always holds: a complete checkpoint reads back byte for byte, and gc keeps as many of them as it was asked to.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from blake3 import blake3
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_store import IMAGE, KEY, manifest

from hpccr.model import FORMAT, FileEntry, Fragment, SealedFragment
from hpccr.store import gc, index, lineage, publish, worker
from hpccr.store.blocks import Reader
from hpccr.store.layout import Checkpoint, State, Store
from hpccr.store.verify import verify

BLOCK = 4096
CAPSULES = 2
SHARE = 4
CALLS = ("mkdir", "open", "write", "fsync", "link", "rename", "unlink", "rmdir")
"""The system calls that change a store."""

Content = dict[str, bytes]


@dataclass
class Process:
    """A forked process that stops before one of its system calls on the store."""

    pid: int
    said: int
    answer: int
    flushes: tuple[int, int] | None
    """Number of the checkpoint, capsule."""

    @classmethod
    def start(cls, act: Callable[[], int], stop_at: int, flushes: tuple[int, int] | None = None) -> "Process":
        """Returns when it stands still, or has ended."""
        (said, say), (hear, answer) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(said)
                os.close(answer)
                stop_before(stop_at, say, hear)
                os._exit(act())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(99)
        os.close(say)
        os.close(hear)
        os.read(said, 1)
        return cls(pid, said, answer, flushes)

    def go_on(self) -> int:
        """Let it run to its end; its exit code."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.answer, b".")
        return self._wait()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._wait()

    def _wait(self) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.said)
        os.close(self.answer)
        return code


def stop_before(number: int, say: int, hear: int) -> None:
    write, read = os.write, os.read
    lock = threading.Lock()
    left = [number]

    def counting(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            with lock:
                stop = left[0] == 0
                left[0] -= 1
            if stop:
                write(say, b".")
                read(hear, 1)
            return call(*args, **kwargs)

        return counted

    for name in CALLS:
        setattr(os, name, counting(getattr(os, name)))


def flush(checkpoint: Checkpoint, capsule: int, files: Content) -> int:
    """As hpccrd's transfer does it, with a worker in this process."""
    ours, theirs = socket.socketpair()
    entries = tuple(FileEntry(name, len(data), blake3(data).hexdigest()) for name, data in files.items())
    body = Fragment(
        format=FORMAT,
        key=KEY,
        checkpoint=f"{checkpoint.sequence:032x}",
        sequence=checkpoint.sequence,
        capsule=capsule,
        capsules=CAPSULES,
        uid=1001,
        gid=1001,
        created=1000.0,
        node="node1",
        image=IMAGE,
        files=entries,
    )
    text = publish.text(SealedFragment(msgspec.json.encode(body).decode(), "0" * 64))

    def send(fd: int | None = None, **message: object) -> None:
        body = msgspec.msgpack.encode(message)
        socket.send_fds(ours, [len(body).to_bytes(4, "big") + body], [] if fd is None else [fd])

    def root() -> None:
        with contextlib.suppress(OSError):
            total = sum(map(len, files.values()))
            send(t="open", directory=str(checkpoint.capsule_path(capsule)), total=total, share=SHARE)
            for name, data in files.items():
                fd = os.memfd_create(name)
                os.pwrite(fd, data, 0)
                send(fd, t="file", name=name, size=len(data))
                os.close(fd)
            send(t="publish", fragment=text)

    thread = threading.Thread(target=root)
    thread.start()
    with ours:
        code = worker.serve("flush", theirs)
        thread.join()
    return code


def restored(checkpoint: Checkpoint, capsule: int) -> Content:
    found = index.read_index(checkpoint.capsule_path(capsule))
    with Reader(checkpoint.capsule_path(capsule), found) as reader:
        return {file.name: b"".join(reader.stream(file.name)) for file in found.header.files}


class StoreMachine(RuleBasedStateMachine):
    """Sequences and contents are the model; the directory is the thing."""

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp()
        self.step = Store.at(self.root).step(KEY)
        publish.make_directory(self.step.path)
        self.contents: dict[int, list[Content]] = {}
        self.processes: list[Process] = []
        self.kept = lineage.BLOCK
        lineage.BLOCK = BLOCK

    def teardown(self) -> None:
        lineage.BLOCK = self.kept
        for process in self.processes:
            process.kill()
        shutil.rmtree(self.root)

    @initialize(blocks=st.lists(st.integers(0, 9), min_size=1, max_size=12))
    def release_first(self, blocks: list[int]) -> None:
        self.release(blocks)

    @rule(blocks=st.lists(st.integers(0, 9), min_size=1, max_size=12))
    def release(self, blocks: list[int]) -> None:
        """A checkpoint is dumped: its manifest is there, and what is to be flushed."""
        checkpoint = self.step.checkpoint(max([*self.contents, self.step.next_sequence() - 1]) + 1)
        data = b"".join(random.Random(block).randbytes(BLOCK) if block else bytes(BLOCK) for block in blocks)
        self.contents[checkpoint.sequence] = [
            {"pages-1.img": data + bytes([capsule]) * 100, "core.img": b"core of %d" % checkpoint.sequence}
            for capsule in range(CAPSULES)
        ]
        publish.make_directory(checkpoint.path)
        publish.publish(checkpoint.manifest_path, manifest(checkpoint, CAPSULES))

    @precondition(lambda self: len(self.processes) < 3)
    @rule(which=st.integers(0, 1), capsule=st.integers(0, CAPSULES - 1), stop_at=st.integers(0, 45))
    def begin_flush(self, which: int, capsule: int, stop_at: int) -> None:
        """Of the newest checkpoint or the one before."""
        self._flush(which, capsule, stop_at)

    @rule(which=st.integers(0, 1))
    def whole_flush(self, which: int) -> None:
        for capsule in range(CAPSULES):
            if self._flush(which, capsule, -1):
                self.processes.pop().go_on()

    def _flush(self, which: int, capsule: int, stop_at: int) -> bool:
        sequence = sorted(self.contents, reverse=True)[min(which, len(self.contents) - 1)]
        if (sequence, capsule) in [process.flushes for process in self.processes]:
            return False  # hpccrd does not begin another one before it has seen the end of the first
        checkpoint, files = self.step.checkpoint(sequence), self.contents[sequence][capsule]
        self.processes.append(
            Process.start(lambda: flush(checkpoint, capsule, files), stop_at, flushes=(sequence, capsule))
        )
        return True

    @precondition(lambda self: len(self.processes) < 3)
    @rule(keep=st.integers(1, 2), stop_at=st.integers(0, 30))
    def begin_gc(self, keep: int, stop_at: int) -> None:
        self.processes.append(Process.start(lambda: self._collect(keep, 1e6), stop_at))

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        process = self.processes.pop(data.draw(st.integers(0, len(self.processes) - 1)))
        code = process.go_on()
        event(f"gone on to exit code {code}")
        assert code in (0, 1)

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        self.processes.pop(data.draw(st.integers(0, len(self.processes) - 1))).kill()

    @rule(keep=st.integers(1, 3), later=st.sampled_from([0.0, 1e6]))
    def collect(self, keep: int, later: float) -> None:
        before = [checkpoint.sequence for checkpoint in self.step.complete()]
        self._collect(keep, later)
        after = [checkpoint.sequence for checkpoint in self.step.complete()]
        assert after[:keep] == before[:keep], "gc took what it had to keep"

    def _collect(self, keep: int, later: float) -> int:
        gc.collect(self.step, keep=keep, now=time.time() + later)
        return 0

    @invariant()
    def what_is_complete_reads_back(self) -> None:
        for checkpoint in self.step.checkpoints():
            if checkpoint.state().state is not State.COMPLETE:
                continue
            assert verify(checkpoint) == []
            for capsule in range(CAPSULES):
                assert restored(checkpoint, capsule) == self.contents[checkpoint.sequence][capsule]
                generations = [p.generation for p in index.read_index(checkpoint.capsule_path(capsule)).header.packs]
                event(f"complete, oldest pack of generation {max(generations, default=0)}")


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=int(os.environ.get("HPCCR_SOAK") or 0) * 500 or 15, stateful_step_count=25, deadline=None
)
