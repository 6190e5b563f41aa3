"""Images that stay in the spool: kept by a flush, used by a fetch only if they are what was sealed, gone in time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_noded_transfer import KEY, USER, Peer, Scripted, entry, fragment, serving

from hpccr.errors import CorruptError
from hpccr.model import Fragment, StepKey
from hpccr.noded import daemon, kept, transfer
from hpccr.noded.spool import Limits, Spool
from hpccr.noded.transfer import FetchJob, Finished, FlushJob

FILES = {"core-1.img": b"core", "pages-1.img": os.urandom(3 << 20), "empty.img": b""}


def sealed(files: dict[str, bytes] = FILES, **changes: Any) -> Fragment:
    return fragment(files=tuple(entry(name, content) for name, content in sorted(files.items())), **changes)


def taking(peer: Peer) -> None:
    """A worker that takes everything."""
    peer.hear()
    peer.say(t="ok")
    files = 0
    while peer.hear()["t"] == "file":
        os.close(peer.descriptors.pop())
        files += 1
        peer.say(t="moved", done=0, files=files)
    peer.say(t="ok")


def refusing(peer: Peer) -> None:
    raise AssertionError("the store was read")


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    made = Spool(Limits(str(tmp_path / "spool")))
    made.prepare()
    return made


def flush(spool: Spool, files: dict[str, bytes] = FILES, *, keep: bool = True, **changes: Any) -> list[str]:
    """Names of what is kept afterwards."""
    directory = spool.create("dump")
    for name, content in files.items():
        Path(directory.path, name).write_bytes(content)
    job = FlushJob(
        user=USER,
        key=KEY.secret,
        directory="/s",
        spool=directory.path,
        fragment=fragment(**changes),
        keep=spool.limits if keep else None,
    )
    transfer.flush(job, directory.fd, worker=lambda mode, user: Scripted(taking))
    directory.release()
    assert not Path(directory.path).exists()
    return [image.name for image in spool.kept()]


def fetch(spool: Spool, script: Callable[[Peer], None], directory: str = "/s", **changes: Any) -> Finished:
    """What is brought is compared with FILES."""
    wanted = fragment(**changes)
    copy = spool.take(kept.name(wanted.key, wanted.uid, wanted.capsule, wanted.sequence))
    target = spool.create("restore")
    job = FetchJob(
        user=USER,
        key=KEY.secret,
        directory=directory,
        limits=spool.limits,
        claimed=0,
        step=wanted.key,
        checkpoint=wanted.checkpoint,
        sequence=wanted.sequence,
        capsule=wanted.capsule,
        capsules=wanted.capsules,
    )
    try:
        finished = transfer.fetch(
            job, target.fd, copy=copy.fd if copy else -1, worker=lambda mode, user: Scripted(script)
        )
        assert {name: Path(target.path, name).read_bytes() for name in FILES} == FILES
        assert sorted(os.listdir(target.path)) == sorted(FILES)
        return finished
    finally:
        target.remove()
        if copy is not None:
            copy.release()


def test_what_was_flushed_comes_back_without_the_store(spool: Spool) -> None:
    flush(spool)
    for _ in range(2):  # a restore takes nothing away
        finished = fetch(spool, refusing)
        assert finished.local
        assert finished.image == fragment().image
        assert finished.bytes == sealed().bytes


def test_nothing_stays_unless_wanted(spool: Spool) -> None:
    assert flush(spool, keep=False) == []
    assert os.listdir(spool.root) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda image: (image / "pages-1.img").unlink(),
        lambda image: os.truncate(image / "pages-1.img", 5),
        lambda image: (image / "pages-1.img").write_bytes(bytes(3 << 20)),
        lambda image: (image / "core-1.img").write_bytes(b"corf"),
        lambda image: (image / "core-1.img").unlink() or (image / "core-1.img").symlink_to("/etc/hosts"),
        lambda image: (image / "core-1.img").unlink() or os.mkfifo(image / "core-1.img"),
        lambda image: (image / kept.RECORD).unlink(),
        lambda image: (image / kept.RECORD).write_bytes(b"{}"),
        lambda image: (image / kept.RECORD).write_bytes(b"\xff"),
        lambda image: (image / kept.RECORD).write_bytes((image / kept.RECORD).read_bytes().replace(b"node1", b"node2")),
    ],
)
def test_a_damaged_copy_is_not_used(spool: Spool, change: Callable[[Path], object]) -> None:
    (name,) = flush(spool)
    change(Path(spool.root, name))
    assert not fetch(spool, serving(sealed(), FILES)).local


def test_a_copy_is_of_one_place_and_one_checkpoint(spool: Spool) -> None:
    flush(spool)
    with pytest.raises(AssertionError, match="/elsewhere"):
        fetch(spool, serving(sealed(), FILES), directory="/elsewhere")  # serving() knows /s only
    with pytest.raises(CorruptError, match="checkpoint"):
        fetch(spool, serving(sealed(), FILES), checkpoint="f" * 32)
    assert not fetch(spool, serving(sealed(sequence=4), FILES), sequence=4).local
    other = StepKey(cluster="c", job="1", step="0")
    assert not fetch(spool, serving(sealed(key=other), FILES), key=other).local


def test_only_the_newest_of_a_capsule_stays(spool: Spool) -> None:
    other = flush(spool, capsule=1, capsules=2)
    (name,) = [name for name in flush(spool, sequence=4) if name not in other]
    assert len(flush(spool, sequence=5)) == 2
    assert name not in [image.name for image in spool.kept()]
    assert set(other) < {image.name for image in spool.kept()}


def test_a_flush_that_ends_late_takes_no_newer_image_away(spool: Spool) -> None:
    """The last one before a requeue does not wait for the one before it, and is in more of a hurry."""
    newer = flush(spool, sequence=10)
    assert flush(spool, sequence=9) == newer
    assert os.listdir(spool.root) == newer


def test_limits(tmp_path: Path) -> None:
    size = sealed().bytes
    spool = Spool(Limits(str(tmp_path / "spool"), size=3 * size))
    spool.prepare()
    for number in range(4):
        images = flush(spool, capsule=number, capsules=4)
        os.utime(Path(spool.root, images[-1]), (1000 + number, 1000 + number))
    # Their records count too, so that only two fit.
    assert len(spool.kept()) == 2
    assert spool.room() == 3 * size
    assert spool.room(evicting=False) < size
    spool.make_room(3 * size // 2)
    (left,) = spool.kept()
    assert left.name == kept.name(fragment().key, 1001, 3, 3)
    spool.make_room(1 << 50)
    assert spool.kept() == []
    small = Spool(Limits(spool.root, size=size - 1))
    assert flush(small) == []
    assert os.listdir(spool.root) == []


def test_one_that_is_being_read_stays(spool: Spool) -> None:
    (name,) = flush(spool)
    readers = [spool.take(name), spool.take(name)]
    reading = readers.pop()
    assert reading is not None and readers[0] is not None
    readers[0].release()
    spool.make_room(1 << 60)
    assert spool.expire(0.0, now=1e12) == []
    assert flush(spool, sequence=4)[0] == name
    reading.release()
    assert spool.expire(0.0, now=1e12) != []
    assert os.listdir(spool.root) == []


def test_room_that_is_promised_can_be_made(tmp_path: Path) -> None:
    spool = Spool(Limits(str(tmp_path / "spool"), size=1 << 24))
    spool.prepare()
    flush(spool)
    flush(spool, capsule=1, capsules=2)
    assert spool.room() == 1 << 24
    first, second = spool.kept()
    reading = spool.take(first.name)
    assert reading is not None
    assert spool.room() == (1 << 24) - first.bytes
    with removing(spool, second.name):
        # Nothing of it is gone yet, and all of it will be.
        assert spool.room() == (1 << 24) - first.bytes
    spool.make_room(1 << 60)
    assert spool.kept() == [first]
    assert spool.room(evicting=False) == spool.room()
    reading.release()
    assert spool.room() == 1 << 24


@contextmanager
def removing(spool: Spool, name: str) -> Iterator[None]:
    """Another process is about to remove a kept image."""
    fd = os.open(Path(spool.root, name), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        os.close(fd)


def test_a_damaged_copy_gives_its_room_to_what_comes_instead(tmp_path: Path) -> None:
    spool = Spool(Limits(str(tmp_path / "spool"), size=sealed().bytes + (64 << 10)))
    spool.prepare()
    (name,) = flush(spool)
    Path(spool.root, name, "core-1.img").write_bytes(b"corf")
    assert not fetch(spool, serving(sealed(), FILES)).local
    assert spool.kept() == []


def test_time_goes_by(spool: Spool) -> None:
    (name,) = flush(spool)
    since = spool.kept()[0].since
    assert spool.expire(60.0, now=since + 59) == []
    assert spool.leftovers() == []
    assert spool.expire(60.0, now=since + 61) == [name]


def test_what_a_transfer_left_goes_while_hpccrd_runs(spool: Spool) -> None:
    """One that outlived the hpccrd which started it, and then failed: nobody else knows of its directory."""
    (kept_image,) = flush(spool)
    under_way, left = spool.create("under-way"), spool.create("left")
    left.release()
    (removed,) = daemon.tidy(spool, 60.0)
    assert removed.startswith(left.path)
    assert sorted(os.listdir(spool.root)) == sorted([kept_image, under_way.name])
    under_way.remove()


def test_a_step_that_is_over(spool: Spool) -> None:
    flush(spool)
    flush(spool, capsule=1, capsules=2)
    spool.drop(kept.label(fragment().key, 1001, 0))
    (left,) = spool.kept()
    assert left.name.startswith(kept.label(fragment().key, 1001, 1))


def test_what_a_worker_holds_open_takes_no_room(spool: Spool) -> None:
    """Its descriptor keeps the file of a removed image, but nothing in it."""
    (name,) = flush(spool)
    with open(Path(spool.root, name, "pages-1.img"), "rb") as held:
        spool.make_room(1 << 60)
        assert os.fstat(held.fileno()).st_size == 0


def test_the_record_is_what_the_store_has(spool: Spool) -> None:
    (name,) = flush(spool)
    record = msgspec.json.decode(Path(spool.root, name, kept.RECORD).read_bytes(), type=kept.Record)
    assert record.directory == "/s"
    assert KEY.open(record.fragment.encode(), "it") == sealed()
    assert os.stat(Path(spool.root, name, kept.RECORD)).st_mode & 0o777 == 0o600
