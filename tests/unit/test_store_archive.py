"""Export and import: what comes out is what went in, or nothing."""

import io
import os
import secrets
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_store import KEY, content, record, the_pack, write, write_manifest

from hpccr.errors import CorruptError, LockedError, NoCheckpointError
from hpccr.store import archive, gc, index, publish
from hpccr.store.blocks import Reader
from hpccr.store.layout import FINISHED, Checkpoint, Step, Store
from hpccr.store.verify import verify


@pytest.fixture
def step(tmp_path: Path) -> Step:
    step = Store.at(tmp_path / "store").step(KEY)
    publish.make_directory(step.path)
    publish.publish(step.record_path, record(FINISHED, 0))
    publish.publish_bytes(step.path / "slurm_script", b"#!/bin/sh\n")
    write(step.checkpoint(1))
    write(step.checkpoint(2))
    return step


def exported(checkpoint: Checkpoint) -> bytes:
    out = io.BytesIO()
    archive.write(checkpoint, out)
    return out.getvalue()


def test_there_and_back(step: Step, tmp_path: Path) -> None:
    other = Store.at(tmp_path / "other")
    checkpoint = archive.read(io.BytesIO(exported(step.checkpoint(2))), other)
    assert checkpoint.path == other.step(KEY).checkpoint(2).path and verify(checkpoint) == []
    for capsule in range(2):
        found = index.read_index(checkpoint.capsule_path(capsule))
        with Reader(checkpoint.capsule_path(capsule), found) as reader:
            assert b"".join(reader.stream("pages-1.img")) == content(2, capsule)
    came = other.step(KEY).record()
    assert came is not None and (came.state, came.exit_code, came.argv) == ("imported", None, record().argv)
    assert os.access(other.step(KEY).path / "slurm_script", os.X_OK)
    assert [name for name in os.listdir(other.root) if name.startswith(".")] == []
    with pytest.raises(LockedError, match="there already"):
        archive.read(io.BytesIO(exported(step.checkpoint(2))), other)
    # The older one may follow, and the record of the step stays.
    publish.publish(other.step(KEY).record_path, record("running"))
    assert archive.read(io.BytesIO(exported(step.checkpoint(1))), other).complete
    assert other.step(KEY).record() == record("running")


def test_only_complete_checkpoints_go_out(step: Step) -> None:
    write_manifest(step.checkpoint(3), 2)
    with pytest.raises(NoCheckpointError, match="incomplete"):
        exported(step.checkpoint(3))


@pytest.mark.parametrize("name", ["*.pack", "fragment.json", "index.bin"])
def test_what_is_damaged_does_not_go_out(step: Step, name: str) -> None:
    """Whoever has the archive may remove the original."""
    path = next(step.checkpoint(2).capsule_path(1).glob(name))
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises((CorruptError, NoCheckpointError)):
        exported(step.checkpoint(2))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_archive_leaves_nothing(step: Step, tmp_path: Path, data: st.DataObject) -> None:
    whole = exported(step.checkpoint(2))
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 12 * 1024))]
    else:
        at = data.draw(st.integers(0, len(whole) - 12 * 1024))
        damaged = whole[:at] + data.draw(st.binary(min_size=1, max_size=3)) + whole[at + 3 :]
    other = Store.at(tmp_path / secrets.token_hex(4))
    try:
        checkpoint = archive.read(io.BytesIO(damaged), other)
    except CorruptError:
        assert os.listdir(other.root) == []
    else:
        # A modification time, or padding.
        assert verify(checkpoint) == []
        assert (checkpoint.step.path / "slurm_script").read_bytes() == b"#!/bin/sh\n"
        came = checkpoint.step.record()
        assert came is not None and came.argv == record().argv


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x",
        "../0/step.json",
        "../7/ckpt-000001/capsule-0/0123456789abcdef.pack",
        "nojob/0/step.json",
        "tb-17/0/../../x",
        "tb-17/0/endpoint.json",
        "tb-17/0/ckpt-000001/capsule-0/x.img",
        "tb-17",
    ],
)
def test_no_other_name_is_taken(tmp_path: Path, name: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        made.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(CorruptError, match="not a part"):
        archive.read(io.BytesIO(out.getvalue()), Store.at(tmp_path / "s"))
    assert [path.name for path in tmp_path.rglob("*")] == ["s"]


def test_links_and_mixtures_are_refused(step: Step, tmp_path: Path) -> None:
    link = tarfile.TarInfo("tb-17/0/step.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for members in ([link], [tarfile.TarInfo("tb-17/0/step.json")], [tarfile.TarInfo("tb-1/0/step.json")]):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as made:
            for member in members:
                made.addfile(member)
        with pytest.raises(CorruptError):
            archive.read(io.BytesIO(out.getvalue()), Store.at(tmp_path / "s"))
    with pytest.raises(CorruptError, match="not an archive"):
        archive.read(io.BytesIO(b"x" * 10_000), Store.at(tmp_path / "s"))


def test_a_link_in_the_store_is_not_followed_out(step: Step, tmp_path: Path) -> None:
    pack = the_pack(step.checkpoint(2).capsule_path(0))
    (tmp_path / "secret").write_bytes(b"x")
    pack.unlink()
    pack.symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        exported(step.checkpoint(2))


def test_what_an_import_that_died_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-import.aa" / "tb-17").mkdir(parents=True)
    gc.sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    later = (tmp_path / ".tmp-import.aa").stat().st_mtime + 2 * gc.GRACE
    gc.sweep(tmp_path, now=later)
    assert list(tmp_path.iterdir()) == []
