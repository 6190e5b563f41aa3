"""The store: what is published is whole, what is incomplete is never taken for complete, gc keeps what is needed."""

import errno
import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from hpccr.errors import CorruptError, HpccrError, NoCheckpointError, UsageError
from hpccr.model import (
    FORMAT,
    CapsuleImage,
    FileEntry,
    FlushProgress,
    Fragment,
    Manifest,
    SealedFragment,
    Stdio,
    StepKey,
    StepRecord,
    Stream,
)
from hpccr.store import damage, events, gc, index, publish
from hpccr.store.blocks import Writer
from hpccr.store.layout import FLUSH_STALE, Checkpoint, State, Step, Store
from hpccr.store.lineage import BLOCK, inherit
from hpccr.store.steps import anothers, claim_step
from hpccr.store.verify import verify

KEY = StepKey(cluster="tb", job="17", step="0")
IMAGE = CapsuleImage(root_pid=300, max_pid=310, tasks=2, stdio=Stdio(0, 1, 2))


def content(sequence: int, capsule: int) -> bytes:
    """Half of it is the same in all checkpoints."""
    return random.Random(capsule).randbytes(BLOCK) + f"pages of {sequence} {capsule} ".encode() * 50


def manifest(checkpoint: Checkpoint, capsules: int) -> Manifest:
    return Manifest(
        format=FORMAT,
        key=checkpoint.step.key,
        checkpoint=f"{checkpoint.sequence:032x}",
        sequence=checkpoint.sequence,
        capsules=capsules,
        created=1000.0 + checkpoint.sequence,
        stdin=Stream(None),
        stdout=Stream(5),
        stderr=Stream(None),
    )


def fragment(checkpoint: Checkpoint, capsule: int, capsules: int) -> SealedFragment:
    data = content(checkpoint.sequence, capsule)
    body = Fragment(
        format=FORMAT,
        key=checkpoint.step.key,
        checkpoint=f"{checkpoint.sequence:032x}",
        sequence=checkpoint.sequence,
        capsule=capsule,
        capsules=capsules,
        uid=1001,
        gid=1001,
        created=1000.0,
        node=f"node{capsule}",
        image=IMAGE,
        files=(FileEntry("pages-1.img", len(data), blake3(data).hexdigest()),),
    )
    return SealedFragment(msgspec.json.encode(body).decode(), "0" * 64)


def write_manifest(checkpoint: Checkpoint, capsules: int) -> None:
    publish.make_directory(checkpoint.path)
    publish.publish(checkpoint.manifest_path, manifest(checkpoint, capsules))


def write_capsule(checkpoint: Checkpoint, capsule: int, capsules: int) -> None:
    directory = checkpoint.capsule_path(capsule)
    publish.make_directory(directory)
    data = content(checkpoint.sequence, capsule)
    text = publish.text(fragment(checkpoint, capsule, capsules))
    with Writer(directory, inherit(directory, len(data)), level=1) as writer:
        writer.add("pages-1.img", opened(data), len(data))
        writer.finish(text)
    publish.fsync_directory(directory)
    publish.publish_bytes(directory / "fragment.json", text)


def opened(data: bytes) -> int:
    """A descriptor of an open file."""
    fd = os.memfd_create("spool")
    os.pwrite(fd, data, 0)
    return fd


def the_pack(directory: Path) -> Path:
    """The pack that this fragment's own flush wrote."""
    (pack,) = (pack for pack in index.read_index(directory).header.packs if not pack.generation)
    return directory / pack.name


def write(checkpoint: Checkpoint, capsules: int = 2) -> Checkpoint:
    write_manifest(checkpoint, capsules)
    for capsule in range(capsules):
        write_capsule(checkpoint, capsule, capsules)
    return checkpoint


def with_two_checkpoints(root: Path) -> Step:
    """A step with two complete checkpoints of one capsule, 1 and 2."""
    step = Store.at(root).step(StepKey("tb", "17", "0"))
    for sequence in (1, 2):
        write(step.checkpoint(sequence), capsules=1)
    return step


def record(state: str = "running", exit_code: int | None = None) -> StepRecord:
    return StepRecord(FORMAT, KEY, ("mpirun", "./app"), state, 1000.0, 2, ("node1", "node2"), exit_code=exit_code)


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return Store.at(tmp_path / "store").step(KEY)


# --- publishing ---------------------------------------------------------------------------------------------------


class Crash:
    """Makes the n-th system call that changes the store the last thing this process does."""

    CALLS = ("mkdir", "open", "write", "fsync", "link", "rename", "unlink", "rmdir", "utime")

    def __init__(self, at: int) -> None:
        self.left = at

    def arm(self) -> None:
        for name in self.CALLS:
            setattr(publish.os, name, self.counting(getattr(os, name)))

    def counting(self, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            if self.left == 0:
                os._exit(77)
            self.left -= 1
            return call(*args, **kwargs)

        return counted


def crashes_at(call: int, act: Callable[[], None]) -> bool:
    """Run `act` in a process that dies before its call number `call`; whether it got that far."""
    child = os.fork()
    if child == 0:
        Crash(call).arm()
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 77)
    return code == 77


@pytest.mark.parametrize("order", ["manifest first", "manifest last"])
def test_a_crash_at_any_point_loses_no_complete_checkpoint_and_makes_no_false_one(tmp_path: Path, order: str) -> None:
    """Checkpoint 1 is complete, 2 is being written, and the writer dies at every one of its system calls in turn."""

    def second(step: Step) -> None:
        checkpoint = step.checkpoint(2)
        if order == "manifest first":
            write(checkpoint)
            return
        write_capsule(checkpoint, 1, 2)
        write_capsule(checkpoint, 0, 2)
        write_manifest(checkpoint, 2)

    done = False
    for call in itertools.count():
        step = Store.at(tmp_path / str(call)).step(KEY)
        write(step.checkpoint(1))
        crashed = crashes_at(call, lambda step=step: second(step))  # type: ignore[misc]
        for checkpoint in step.complete():
            assert verify(checkpoint) == []
            assert checkpoint.manifest() == manifest(checkpoint, 2)
            assert checkpoint.bytes() == sum(len(content(checkpoint.sequence, k)) for k in range(2))
        complete = [checkpoint.sequence for checkpoint in step.complete()]
        assert complete in ([1], [2, 1])
        for checkpoint in step.checkpoints():
            assert (checkpoint.state().state is State.COMPLETE) == (checkpoint.sequence in complete)
            if checkpoint.sequence not in complete:
                assert verify(checkpoint)
        # What the crash left does not hinder the next attempt, nor gc.
        assert gc.collect(step, keep=1, now=time.time() + 1e6).removed == ((1,) if complete == [2, 1] else ())
        write(step.checkpoint(step.next_sequence()))
        assert step.complete()[0].sequence == step.next_sequence() - 1
        gc.collect(step, keep=1, now=time.time() + 1e6)
        assert len(step.checkpoints()) == 1
        assert [name for name in os.listdir(step.path) if name.startswith(".")] == []
        if not crashed:
            done = True
            break
    assert done and call > 20


@settings(max_examples=25)
@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 12))
def test_a_replaced_file_is_the_old_or_the_new_one(
    tmp_path_factory: pytest.TempPathFactory, old: bytes, new: bytes, call: int
) -> None:
    path = tmp_path_factory.mktemp("d") / "step.json"
    publish.publish_bytes(path, old)
    crashed = crashes_at(call, lambda: publish.publish_bytes(path, new))
    assert path.read_bytes() in ((old, new) if crashed else (new,))


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "flush.json"
    records = [FlushProgress(done=size, total=10**size, updated=1.0) for size in range(18)]
    publish.publish(path, records[0])
    stop = threading.Event()

    def rewrite() -> None:
        for item in itertools.cycle(records):
            publish.publish(path, item)
            if stop.is_set():
                return

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(500):
            assert publish.read(path, FlushProgress) in records
    finally:
        stop.set()
        writer.join()


def test_a_pending_file_that_is_not_committed_vanishes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), publish.PendingFile(tmp_path / "a") as pending:
        pending.write(b"x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_modes_and_strange_directories(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        publish.make_directory(tmp_path / "a" / "b")
        publish.publish_bytes(tmp_path / "a" / "b" / "f", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "b" / "f").stat().st_mode & 0o777 == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("link", "a/b/f"):
        with pytest.raises(HpccrError, match="not a directory"):
            publish.make_directory(tmp_path / name)


def test_records_that_are_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    for text in (b"", b"{", b"[]", b'{"format": 1}', b"\xff", b"[" * 100_000):
        path.write_bytes(text)
        with pytest.raises(CorruptError, match=str(path)):
            publish.read(path, StepRecord)
    assert publish.read_if_there(tmp_path / "nothing" / "x", StepRecord) is None


# --- layout -------------------------------------------------------------------------------------------------------


def test_an_empty_store(tmp_path: Path, step: Step) -> None:
    store = Store.at(tmp_path / "store")
    assert store.jobs() == [] and step.checkpoints() == [] and step.record() is None and step.endpoint() is None
    assert step.next_sequence() == 1 and events.read(step.events_path) == []
    assert step.checkpoint(1).state().state is State.INCOMPLETE
    with pytest.raises(NoCheckpointError):
        step.checkpoint(1).manifest()
    with pytest.raises(HpccrError, match="no job 17"):
        store.find("17")


def test_a_store_whose_path_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"caf\\udce9 has bytes"):
        Store.at(tmp_path / os.fsdecode(b"caf\xe9"))


def test_an_event_tells_of_files_whose_names_are_no_text(tmp_path: Path) -> None:
    events.append(tmp_path / "events", "warning", text=os.fsdecode(b"caf\xe9"))
    assert events.read(tmp_path / "events")[0]["text"] == r"caf\udce9"


def test_finding_jobs_and_steps(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    for cluster, job, steps in (("a", "9", 2), ("a", "10", 11), ("b-c", "10", 1), ("local", "20260101_ab", 1)):
        for number in range(steps):
            publish.make_directory(store.step(StepKey(cluster=cluster, job=job, step=str(number))).path)
    (tmp_path / "stray").write_text("")
    (tmp_path / "a-9" / "notes").write_text("")
    assert [job.path.name for job in store.jobs()] == ["a-9", "a-10", "b-c-10", "local-20260101_ab"]
    assert [step.key.step for step in store.find("a-10").steps()] == [str(n) for n in range(11)]
    assert store.find("9").cluster == "a"
    assert store.find("20260101_ab") == store.find("local-20260101_ab")
    assert store.find("10", cluster="b-c").path.name == "b-c-10"
    with pytest.raises(UsageError, match=r"a-10, b-c-10"):
        store.find("10")


def test_a_checkpoint_is_complete_when_its_last_fragment_is_there(step: Step) -> None:
    checkpoint = step.checkpoint(3)
    write_capsule(checkpoint, 0, 3)
    assert "checkpoint.json" in checkpoint.state().problem
    write_manifest(checkpoint, 3)
    assert checkpoint.state().missing == (1, 2)
    publish.make_directory(checkpoint.capsule_path(2))
    now = time.time()
    publish.publish(checkpoint.capsule_path(2) / "flush.json", FlushProgress(done=3, total=9, updated=now))
    state = checkpoint.state()
    assert (state.state, state.missing, state.done, state.total) == (State.FLUSHING, (1, 2), 3, 9)
    assert checkpoint.state(now=now + FLUSH_STALE + 1).state is State.INCOMPLETE
    write_capsule(checkpoint, 2, 3)
    write_capsule(checkpoint, 1, 3)
    assert checkpoint.state().state is State.COMPLETE and checkpoint.state().problem == ""
    assert [c.sequence for c in step.checkpoints()] == [3] and step.next_sequence() == 4


def test_parts_of_different_checkpoints_do_not_make_one(step: Step) -> None:
    first, second = write(step.checkpoint(1)), write(step.checkpoint(2))
    os.replace(first.capsule_path(1) / "fragment.json", second.capsule_path(1) / "fragment.json")
    assert "does not belong" in second.state().problem and not second.complete
    write(first)
    os.rename(first.path, step.checkpoint(7).path)
    assert not step.checkpoint(7).complete
    third = write(step.checkpoint(3))
    other = StepKey(cluster="tb", job="18", step="0")
    moved = Step(step.root, other)
    publish.make_directory(moved.path)
    os.rename(third.path, moved.checkpoint(3).path)
    assert not moved.checkpoint(3).complete


def test_a_fragment_that_cannot_be_read_is_told(step: Step) -> None:
    checkpoint = write(step.checkpoint(1))
    path = checkpoint.capsule_path(1) / "fragment.json"
    for text in ("", "{}", '{"body": "{}", "seal": "' + "0" * 64 + '"}'):
        path.write_text(text)
        assert str(path) in checkpoint.state().problem
        with pytest.raises(CorruptError, match=str(path)):
            checkpoint.fragment(1)


# --- verify -------------------------------------------------------------------------------------------------------


def test_verify_finds_each_kind_of_damage(step: Step) -> None:
    def damage(act: Callable[[Path], object]) -> list[str]:
        # Afresh each time: the next one would refer to what was damaged.
        publish.remove_tree(step.path)
        checkpoint = write(step.checkpoint(1))
        assert verify(checkpoint) == []
        act(checkpoint.capsule_path(1))
        return [finding.problem for finding in verify(checkpoint)]

    def flip(path: Path) -> None:
        data = bytearray(the_pack(path).read_bytes())
        data[7] ^= 1
        the_pack(path).write_bytes(data)

    def link(path: Path) -> None:
        pack = the_pack(path)
        os.rename(pack, path / "elsewhere")
        pack.symlink_to("elsewhere")

    assert "digest" in damage(flip)[0]
    assert "bytes, not" in damage(lambda p: os.truncate(the_pack(p), 3))[0]
    assert "No such file" in damage(lambda p: os.unlink(the_pack(p)))[0]
    assert "missing" in damage(lambda p: os.unlink(p / "index.bin"))[0]
    assert len(damage(link)) == 3
    assert "not ended" in damage(lambda p: os.unlink(p / "fragment.json"))[0]
    assert "never finished" in damage(lambda p: os.unlink(p.parent / "checkpoint.json"))[0]
    assert "not a part" in damage(lambda p: publish.make_directory(p.parent / "capsule-2"))[0]
    assert "not a file of this fragment" in damage(lambda p: (p / "more.img").write_text(""))[0]


# --- steps, events ------------------------------------------------------------------------------------------------


def test_the_nth_run_after_a_requeue_is_the_nth_before(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    assert [claim_step(store, "tb", "17", 0).key.step for _ in range(3)] == ["0", "1", "2"]
    assert [claim_step(store, "tb", "17", 1).key.step for _ in range(4)] == ["0", "1", "2", "3"]
    assert claim_step(store, "tb", "18", 1).key.step == "0"


def test_steps_of_an_earlier_job_of_the_same_number_are_left_alone(tmp_path: Path) -> None:
    """Where slurmctld has lost its state. The second job's steps are the same ones in all of its runs."""
    store = Store.at(tmp_path)

    def claim(incarnation: int, *, began: float) -> str:
        step = claim_step(store, "tb", "17", incarnation, began=began)
        if step.record() is None:
            publish.publish(step.record_path, msgspec.structs.replace(record(), started=began + 100))
        return step.key.step

    assert [claim(0, began=1000) for _ in range(2)] == ["0", "1"]
    assert [claim(1, began=90_000) for _ in range(3)] == ["0", "1", "2"]
    assert [claim(0, began=500_000) for _ in range(2)] == ["3", "4"]
    assert [claim(1, began=600_000) for _ in range(3)] == ["3", "4", "5"]
    assert [anothers(step) for step in store.job("tb", "17").steps()] == [True] * 3 + [False] * 3


def test_concurrent_runs_get_different_steps(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    names: list[str] = []
    start = threading.Barrier(8)

    def claim() -> None:
        start.wait()
        names.append(claim_step(store, "tb", "1", 0).key.step)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == [str(number) for number in range(8)]


def test_a_finished_step_is_seen(step: Step) -> None:
    publish.make_directory(step.path)
    publish.publish(step.record_path, record("finished", 3))
    assert step.record() == record("finished", 3)


def test_events_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events.append(path, "started", nodes=["node1"])
    with path.open("ab") as file:
        file.write(b'{"time": 5, "event": "to')
    assert [event["event"] for event in events.read(path)] == ["started"]
    events.append(path, "lost")
    events.append(path, "finished", code=0)
    assert [event["event"] for event in events.read(path)] == ["started", "finished"]
    path.write_text("a\nb\n")
    with pytest.raises(CorruptError, match="holds no event"):
        events.read(path)


# --- gc -----------------------------------------------------------------------------------------------------------

STATES = st.sampled_from([State.COMPLETE, State.FLUSHING, State.INCOMPLETE])


@given(st.lists(st.tuples(STATES, st.floats(0, 2000)), max_size=12), st.integers(1, 4))
def test_what_gc_may_remove(states: list[tuple[State, float]], keep: int) -> None:
    entries = [gc.Entry(number, state, 10_000 - age) for number, (state, age) in enumerate(states, 1)]
    removed = set(gc.superfluous(entries, keep=keep, now=10_000))
    complete = [entry.sequence for entry in entries if entry.state is State.COMPLETE]
    left = [number for number in complete if number not in removed]
    assert left == complete[-keep:]
    for entry in entries:
        if entry.sequence in removed:
            assert entry.state is not State.FLUSHING
            assert entry.state is State.COMPLETE or 10_000 - entry.changed > gc.GRACE
        elif entry is not entries[-1] and entry.state is State.INCOMPLETE:
            assert 10_000 - entry.changed <= gc.GRACE, "failed ones pile up"
    if entries:
        assert entries[-1].sequence not in removed, "its number could be used again"


def test_gc_does_not_count_what_the_job_did_not_go_on_from() -> None:
    """Nor does it go before it would have, had the job gone on from it."""

    def removed(*abandoned: bool) -> list[int]:
        entries = [gc.Entry(number, State.COMPLETE, 0, left) for number, left in enumerate(abandoned, 1)]
        return gc.superfluous(entries, keep=2, now=10_000)

    assert removed(False, False, True) == removed(False, False, True, True) == []
    assert removed(False, False, True, False) == [1]
    assert removed(False, False, True, False, False) == [3, 2, 1]
    assert removed(False, True, True) == removed(True, True, True) == []


def test_gc_removes_what_is_old_and_nothing_else(step: Step) -> None:
    for sequence in (1, 2, 4, 5):
        write(step.checkpoint(sequence))
    write_capsule(step.checkpoint(3), 0, 2)
    write_manifest(step.checkpoint(6), 2)
    (step.path / ".tmp-step.json.1.aa").write_text("")
    later = time.time() + 2 * gc.GRACE
    dry = gc.collect(step, keep=2, now=later, dry=True)
    assert dry.removed == (3, 2, 1) and len(step.checkpoints()) == 6
    done = gc.collect(step, keep=2, now=later)
    assert done == dry
    # What checkpoint 5 refers to did not go.
    assert 0 < done.freed < BLOCK
    assert [c.sequence for c in step.checkpoints()] == [6, 5, 4]
    assert not any(name.startswith(".tmp") for name in os.listdir(step.path))
    assert gc.collect(step, keep=2, now=later).removed == ()


def test_failed_checkpoints_do_not_pile_up(step: Step) -> None:
    """Where none completes any more, because the store is full of them."""
    write(step.checkpoint(1))
    for sequence in (2, 3, 4):
        write_manifest(step.checkpoint(sequence), 2)
        write_capsule(step.checkpoint(sequence), 0, 2)
    assert gc.collect(step, keep=2).removed == (), "changed a moment ago"
    assert gc.collect(step, keep=2, now=time.time() + 2 * gc.GRACE).removed == (3, 2)


# --- damage -------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_not_counted_nor_built_upon(step: Step) -> None:
    """After a fall back the job makes the very pages again that were damaged."""
    for sequence in (1, 2):
        write(step.checkpoint(sequence))
    flip(the_pack(step.checkpoint(2).capsule_path(0)))
    damage.mark(step.checkpoint(2).path, "a pack has been changed")
    assert [c.sequence for c in step.complete()] == [1]
    assert "found damaged: a pack" in step.checkpoint(2).state().problem
    write(step.checkpoint(3))
    assert gc.collect(step, keep=2, now=time.time() + 2 * gc.GRACE).removed == (2,)
    assert [c.sequence for c in step.complete()] == [3, 1]
    assert verify(step.checkpoint(3)) == verify(step.checkpoint(1)) == []
    damage.unmark(step.checkpoint(3).path)


def test_what_a_flush_would_refer_to_is_read_again(step: Step) -> None:
    """Damage to a pack does not reach the next checkpoint, and is told."""
    write(step.checkpoint(1))
    flip(the_pack(step.checkpoint(1).capsule_path(0)))
    write(step.checkpoint(2))
    assert verify(step.checkpoint(2)) == []
    assert [c.sequence for c in step.complete()] == [2]
    assert str(the_pack(step.checkpoint(1).capsule_path(0))) in step.checkpoint(1).state().problem


def test_what_cannot_be_read_now_is_not_damaged(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write(step.checkpoint(1))
    real = os.open

    def failing(path: os.PathLike[str] | str, *args: int, **kwargs: int) -> int:
        if str(path).endswith(".pack"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    found = verify(checkpoint)
    assert found and not any(finding.damage for finding in found)


def test_gc_leaves_a_flush_alone(step: Step) -> None:
    write_manifest(step.checkpoint(1), 2)
    publish.make_directory(step.checkpoint(1).capsule_path(0))
    later = time.time() + 2 * gc.GRACE
    flush = step.checkpoint(1).capsule_path(0) / "flush.json"
    publish.publish(flush, FlushProgress(done=0, total=9, updated=later))
    write(step.checkpoint(2))
    assert gc.collect(step, keep=1, now=later).removed == ()
    assert gc.collect(step, keep=1).removed == (), "changed a moment ago"
    assert gc.collect(step, keep=1, now=later + gc.GRACE).removed == (1,)


def test_each_bit_of_each_file_counts(step: Step) -> None:
    """A bit flipped anywhere in a checkpoint is found: some of each file; in the long form all of the smaller ones."""
    write(step.checkpoint(1))
    checkpoint = write(step.checkpoint(2))
    files = [path for path in checkpoint.path.rglob("*") if path.is_file()]
    assert len(files) == 1 + 2 * 4, "a manifest; each capsule a fragment, an index, a pack of its own and one from 1"
    for path in files:
        data = path.read_bytes()
        bits = range(len(data) * 8)
        some = bits if len(data) < 1000 and os.environ.get("HPCCR_SOAK") else random.sample(bits, 40)
        for bit in some:
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert verify(checkpoint), f"bit {bit} of {path}"
        path.write_bytes(data)
    assert verify(checkpoint) == []


def test_dead_parts_of_packs_count_too(step: Step) -> None:
    """What no block of this checkpoint lies in."""
    for sequence in (1, 2):
        checkpoint = write(step.checkpoint(sequence))
    directory = checkpoint.capsule_path(0)
    (old,) = (pack for pack in index.read_index(directory).header.packs if pack.generation)
    assert 0 < old.live < old.size
    data = bytearray((directory / old.name).read_bytes())
    data[-1] ^= 1
    (directory / old.name).write_bytes(data)
    assert [finding.path for finding in verify(checkpoint)] == [str(directory / old.name)]
