"""Saving files and putting them back, as helpers of capsule init do it, without any task."""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpccr.errors import CorruptError, HpccrError, UnsupportedError
from hpccr.model import ReadFile, SavedFiles
from hpccr.noded import ahead, rollback, snapshot

LIMIT = 1 << 30


def wanted(path: Path, *, append: bool = False) -> snapshot.Wanted:
    status = path.stat()
    return snapshot.Wanted(str(path), status.st_dev, status.st_ino, append)


class Saved:
    """A checkpoint's files."""

    def __init__(self, *files: snapshot.Wanted, trees: tuple[Path, ...] = (), excluded: tuple[Path, ...] = (),
                 limit: int = LIMIT, nameless: tuple[snapshot.Nameless, ...] = (),
                 remaps: tuple[Path, ...] = ()) -> None:  # fmt: skip
        self.list, self.data = (os.memfd_create(name) for name in ("list", "data"))
        paths = [[str(path) for path in several] for several in (trees, excluded, remaps)]
        request = snapshot.Request(files, *paths[:2], limit, nameless=nameless, remaps=paths[2])
        room = snapshot.measure(request)
        self.count = snapshot.save(request, self.list, self.data)
        assert os.fstat(self.data).st_blocks * 512 <= room
        os.lseek(self.list, 0, os.SEEK_SET)

    @property
    def names(self) -> dict[str, bool]:
        """Which are saved with their content."""
        text = os.pread(self.list, 1 << 24, 0)
        return {os.fsdecode(f.path): f.extents is not None for f in msgspec.msgpack.decode(text, type=SavedFiles).files}

    def back(self, capsule: int = 0, excluded: tuple[Path, ...] = ()) -> int:
        return rollback.roll_back(self.list, self.data, capsule, map(str, excluded))


def contents(top: Path) -> dict[str, object]:
    """All that is in a directory, with what a program can see of it."""
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        what: object = None
        if stat.S_ISREG(status.st_mode):
            what = (path.read_bytes(), status.st_mtime_ns, status.st_nlink)
        elif path.is_symlink():
            what = os.readlink(path)
        found[str(path)] = (status.st_mode, what)
    return found


@contextmanager
def changed(top: Path, expected: int | None = None, **options: object) -> Iterator[None]:
    """What the block does to the files of `top` is undone by a rollback; a second one changes nothing."""
    saved = Saved(*(wanted(p) for p in sorted(top.rglob("*")) if p.is_file() and not p.is_symlink()), **options)  # type: ignore[arg-type]
    before = contents(top)
    yield
    count = saved.back()
    assert contents(top) == before
    assert expected is None or count == expected
    assert saved.back() == 0 and contents(top) == before


def test_rewritten_truncated_replaced_removed_grown(tmp_path: Path) -> None:
    names = ("rewritten", "truncated", "replaced", "removed", "grown", "mode", "same", "directory")
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 100_000)
    (tmp_path / "empty").touch()
    with changed(tmp_path, 8):
        with (tmp_path / "rewritten").open("r+b") as file:
            file.seek(300_000)
            file.write(b"x")
        os.truncate(tmp_path / "truncated", 5)
        (tmp_path / "temporary").write_bytes(b"new")
        (tmp_path / "temporary").rename(tmp_path / "replaced")
        (tmp_path / "removed").unlink()
        with (tmp_path / "grown").open("ab") as file:
            file.write(b"more")
        (tmp_path / "empty").write_bytes(b"not any more")
        (tmp_path / "directory").unlink()
        (tmp_path / "directory").mkdir()
        (tmp_path / "directory" / "in it").touch()
        os.chmod(tmp_path / "mode", 0o000)


def test_a_file_that_only_grew_is_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before|")
    saved = Saved(wanted(path, append=True))
    inode = path.stat().st_ino
    with path.open("a") as file:
        file.write("after")
    assert saved.back() == 1
    assert path.read_text() == "before|" and path.stat().st_ino == inode


def test_what_is_only_read_may_change_but_not_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_text("12345")

    def check() -> None:
        rollback.link(saved)

    status = path.stat()
    saved = os.memfd_create("list")
    read = ReadFile(os.fsencode(path), status.st_ino, status.st_size)
    snapshot.save(snapshot.Request((), (), (), LIMIT, read=[read]), saved, os.memfd_create("data"))
    check()
    with path.open("a") as file:
        file.write("6")
    check()
    other = tmp_path / "other"
    other.write_text("54321")
    other.rename(path)
    check()  # as on another node, where the same file has another inode
    other.write_text("another")
    other.rename(path)
    with pytest.raises(HpccrError, match=f"reading {path} .* had 5 bytes and has 7"):
        check()
    path.unlink()
    with pytest.raises(HpccrError, match=f"reading {path} .* not there"):
        check()


def test_a_removed_directory_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    path.parent.mkdir(parents=True)
    path.write_text("text")
    saved = Saved(wanted(path))
    path.unlink()
    path.parent.rmdir()
    path.parent.parent.rmdir()
    saved.back()
    assert path.read_text() == "text"


def test_sparse_files_stay_sparse(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 36)
        file.seek(1 << 35)
        file.write(b"middle")
    saved = Saved(wanted(path))
    assert os.fstat(saved.data).st_blocks * 512 < 1 << 20
    with path.open("r+b") as file:
        file.seek(1 << 34)
        file.write(b"where there was nothing")
    assert saved.back() == 1
    assert path.stat().st_size == 1 << 36 and path.stat().st_blocks * 512 < 1 << 20
    with path.open("rb") as file:
        file.seek(1 << 34)
        assert not any(file.read(64))
        file.seek(1 << 35)
        assert file.read(7) == b"middle\0"
    assert saved.back() == 0


def test_one_file_of_two_names_stays_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("shared")
    two.hardlink_to(one)
    with changed(tmp_path):
        one.write_text("written through")
    assert one.samefile(two)
    with changed(tmp_path):
        two.unlink()
        two.write_text("another")
    assert one.samefile(two)


def test_the_room_of_hard_links_is_that_of_one_file(tmp_path: Path) -> None:
    """In the estimate as in what is saved, whether a task has the file open or not."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("a", "b"):
        (tree / name).write_bytes(os.urandom(1 << 20))
        for number in range(3):
            (tree / f"{name}{number}").hardlink_to(tree / name)
    removed = nameless(tree / "b1", "removed")
    request = snapshot.Request([wanted(tree / "a2")], [str(tree)], (), LIMIT, nameless=[removed])
    assert 2 << 20 < snapshot.measure(request) < 3 << 20
    saved = Saved(wanted(tree / "a2"), trees=(tree,), nameless=(removed,))  # which compares with the estimate
    assert all(saved.names[str(tree / name)] for name in ("a2", "b"))
    assert 2 << 20 <= os.fstat(saved.data).st_size < 3 << 20


def test_attributes_come_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    os.utime(path, ns=(10**18 + 1, 10**18 + 2))
    try:
        os.setxattr(path, "user.hpccr", b"\0value")
        xattrs = True
    except OSError:
        xattrs = False
    path.chmod(0o751)
    with changed(tmp_path):
        path.unlink()
        path.write_text("new")
    assert not xattrs or os.getxattr(path, "user.hpccr") == b"\0value"


def test_a_file_above_the_limit_is_named_and_a_log_above_it_is_only_cut(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678" * 1024)
    with pytest.raises(UnsupportedError, match=f"{path} has 8192 bytes, and files up to 4096 bytes"):
        Saved(wanted(path), limit=4096)
    with pytest.raises(UnsupportedError, match=str(path)):
        Saved(trees=(tmp_path,), limit=4096)
    saved = Saved(wanted(path, append=True), limit=4096)
    assert saved.names == {str(path): False}
    with path.open("ab") as file:
        file.write(b"more")
    assert saved.back() == 1 and path.stat().st_size == 8192
    os.truncate(path, 5)
    with pytest.raises(HpccrError, match=f"{path} has 5 bytes and had 8192"):
        saved.back()
    path.unlink()
    with pytest.raises(HpccrError, match=f"{path} open for appending and it is not there"):
        saved.back()


def test_what_is_only_cut_is_on_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_text("a long log")
    sync, synced = os.fdatasync, []

    def fdatasync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    Saved(wanted(path, append=True))
    assert not synced
    Saved(wanted(path, append=True), limit=5)
    assert synced == [str(path)] * 2

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(HpccrError, match=f"{path} cannot be brought to its disk"):
        Saved(wanted(path, append=True), limit=5)


def test_another_file_at_the_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    known = wanted(path)
    path.rename(tmp_path / "other")
    path.write_text("text")
    with pytest.raises(UnsupportedError, match=f"another file open .* at {path}"):
        Saved(known)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_where_no_file_can_be_made_it_is_written_in_place(tmp_path: Path) -> None:
    directory = tmp_path / "closed"
    directory.mkdir()
    path = directory / "file"
    path.write_bytes(b"old" * 100_000)
    directory.chmod(0o500)
    try:
        saved = Saved(wanted(path))
        inode = path.stat().st_ino
        path.write_bytes(b"new" * 200_000)
        assert saved.back() == 1
        assert path.read_bytes() == b"old" * 100_000 and path.stat().st_ino == inode
    finally:
        directory.chmod(0o700)


def test_a_rollback_that_fails_has_changed_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.write_bytes(os.urandom(1 << 20))
    saved = Saved(wanted(one), wanted(two))
    before = contents(tmp_path)
    for path in (one, two):
        path.write_bytes(b"new")
    between = contents(tmp_path)
    short = os.memfd_create("short")
    os.write(short, os.pread(saved.data, 3 << 19, 0))  # without the end of the second file
    with pytest.raises(CorruptError, match="too short"):
        rollback.roll_back(saved.list, short, 0)
    assert contents(tmp_path) == between
    saved.back()
    assert contents(tmp_path) == before


def test_what_a_killed_rollback_left_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    saved = Saved(wanted(path))
    before = contents(tmp_path)
    path.write_text("new!")
    (tmp_path / f".file.0{snapshot.TEMPORARY}").write_text("half of i")
    saved.back()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_sqlite_does_not_take_later_journals_for_a_crash(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "data.db"
    with sqlite3.connect(path) as database:
        database.execute(f"pragma journal_mode={mode}")
        database.execute("create table numbers (n)")
        database.execute("insert into numbers values (1)")
    database.close()
    saved = Saved(wanted(path))
    assert [name for name in saved.names if name.endswith("-journal")]
    # A process that is killed in the middle of a transaction leaves its journal, and half of the pages.
    pid = os.fork()
    if pid == 0:
        database = sqlite3.connect(path, isolation_level=None)
        database.execute("pragma cache_size=1")
        database.execute("begin")
        for number in range(20_000):
            database.execute("insert into numbers values (?)", (number,))
        os._exit(0)
    os.waitpid(pid, 0)
    assert any((tmp_path / f"data.db-{kind}").exists() for kind in ("journal", "wal"))
    inode = path.stat().st_ino
    saved.back()
    assert [found.name for found in tmp_path.iterdir()] == ["data.db"] and path.stat().st_ino == inode
    with sqlite3.connect(path) as database:
        assert database.execute("select n from numbers").fetchall() == [(1,)]
    database.close()


# --- removed names ----------------------------------------------------------------------------------------------------


def nameless(path: Path, removed: str) -> snapshot.Nameless:
    status = path.stat()
    return snapshot.Nameless(str(path.parent / removed), status.st_dev, status.st_ino, "1 (one)")


def test_a_file_whose_name_was_removed_is_found_by_its_other(tmp_path: Path) -> None:
    """As CRIU has it: linked beside the removed name when it is saved, and when it is restored."""
    other, remap = tmp_path / "other", tmp_path / "link_remap.7"
    other.write_text("text")
    removed = nameless(other, "file")
    remap.hardlink_to(other)
    saved = Saved(nameless=(removed,), remaps=(remap,), trees=(tmp_path,))
    remap.unlink()
    before = contents(tmp_path)
    assert str(remap) not in saved.names and saved.names[str(other)]
    other.unlink()
    other.write_text("another file")
    saved.back()
    remap.write_text("left by a restore that failed")
    rollback.link(saved.list)
    assert remap.samefile(other) and other.read_text() == "text"
    rollback.unlink(saved.list)
    assert contents(tmp_path) == before
    remap.write_text("somebody's")
    rollback.unlink(saved.list)
    assert remap.read_text() == "somebody's"


def test_a_removed_name_without_a_known_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link_remap.12").touch()
    for directory in (tmp_path, tmp_path / "elsewhere"):
        removed = nameless(tmp_path / "elsewhere" / "link_remap.12", "file")
        removed = snapshot.Nameless(str(directory / "file"), removed.device, removed.inode, "1 (one)")
        with pytest.raises(UnsupportedError, match=r"1 \(one\) has .*/file open, a name that was removed") as caught:
            Saved(nameless=(removed,))
        assert "TMPDIR" in caught.value.hint


# --- trees ------------------------------------------------------------------------------------------------------------


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    tree, out, store = tmp_path / "tree", tmp_path / "tree" / "out.txt", tmp_path / "tree" / "sub" / ".hpccr"
    (tree / "sub" / "empty").mkdir(parents=True)
    (tree / "sub" / "file").write_text("text")
    (tree / "link").symlink_to("sub/file")
    os.mkfifo(tree / "fifo", 0o620)
    (tree / os.fsdecode(b"\xff not text")).write_bytes(b"\xff")
    (tree / "locked").mkdir(mode=0o500)
    saved = Saved(trees=(tree,), excluded=(out, store))
    before = contents(tree)
    out.write_text("the job's output, which hpccr cuts by itself")
    store.mkdir()
    (store / "checkpoint").touch()
    (tree / "new").mkdir()
    (tree / "new" / "file").touch()
    (tree / "sub" / "later").touch()
    (tree / "sub" / "empty").rmdir()
    (tree / "sub" / "empty").write_text("a file now")
    (tree / "link").unlink()
    (tree / "link").symlink_to("elsewhere")
    (tree / "fifo").unlink()
    (tree / "sub" / "file").unlink()
    (tree / "locked").rmdir()
    saved.back()
    after = contents(tree)
    assert after.pop(str(out)) and after.pop(str(store)) and after.pop(str(store / "checkpoint"))
    assert after == before
    assert saved.back() == 0


def test_what_this_run_writes_stays(tmp_path: Path) -> None:
    """Its output goes to a new file and to one that was the tree's, its store is in the tree by another name."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("file", "results", "store"):
        (tree / name).write_text("then")
    saved = Saved(trees=(tree,), excluded=(tree / "out.1", tmp_path / "store"))
    (tree / "store").unlink()
    for path in (tree / "store" / "job" / "image", tree / "sub" / "out.2", tree / "out.1"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("now")
    for name in ("file", "results", "later"):
        (tree / name).write_text("now")
    outputs = [tree / "sub" / "out.2", tree / "results"]
    inodes = [path.stat().st_ino for path in outputs]
    assert saved.back(excluded=(tree / "store", *outputs)) == 2
    assert [path.stat().st_ino for path in outputs] == inodes
    found = {str(path.relative_to(tree)): path.read_text() for path in tree.rglob("*") if path.is_file()}
    stays = ("out.1", "sub/out.2", "results", "store/job/image")
    assert found == {"file": "then"} | dict.fromkeys(stays, "now")


def test_an_output_file_that_the_job_had_open_stays_the_same_file(tmp_path: Path) -> None:
    """It has been cut back already, to where hpccr's own lines ended; hpccr goes on writing to it."""
    out = tmp_path / "out"
    out.write_text("hpccr's\nthe job's\n")
    saved = Saved(wanted(out, append=True), trees=(tmp_path,), excluded=(out,))
    with out.open("a") as file:
        os.truncate(out, len("hpccr's\n"))
        saved.back(excluded=(out,))
        file.write("more\n")
    assert out.read_text() == "hpccr's\nthe job's\nmore\n"
    with pytest.raises(UnsupportedError, match="files up to 10 bytes are saved"):
        Saved(wanted(out, append=True), excluded=(out,), limit=10)
    assert not any(Saved(wanted(out, append=True), limit=10).names.values())


def test_what_would_take_the_place_of_this_runs_output_is_refused(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "results").write_text("then")
    saved = Saved(trees=(tree,))
    (tree / "results").unlink()
    (tree / "results").mkdir()
    (tree / "results" / "out").write_text("now")
    before = contents(tmp_path)
    with pytest.raises(HpccrError, match=r"tree/results .* output or store is in it"):
        saved.back(excluded=(tree / "results" / "out",))
    assert contents(tmp_path) == before


def test_a_tree_that_is_gone_comes_back(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_text("text")
    with changed(tmp_path, trees=(tree,)):
        (tree / "sub" / "file").unlink()
        (tree / "sub").rmdir()
        tree.rmdir()


def test_two_files_that_have_become_one(tmp_path: Path) -> None:
    for name, text in (("a", "a's text"), ("b", "b's longer text"), ("c", "a's")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o444)
    with changed(tmp_path):
        for name in "bc":
            (tmp_path / name).unlink()
            (tmp_path / name).hardlink_to(tmp_path / "a")


def test_the_owner_may_not_write_it_now(tmp_path: Path) -> None:
    (tmp_path / "grown").write_text("text")
    (tmp_path / "linked").write_text("text")
    (tmp_path / "link").hardlink_to(tmp_path / "linked")
    with changed(tmp_path):
        (tmp_path / "grown").write_text("text and more")
        (tmp_path / "linked").write_text("other text")
        for path in tmp_path.iterdir():
            path.chmod(0o400)


# --- any history ------------------------------------------------------------------------------------------------------

OPERATIONS = ("write", "append", "truncate", "recreate", "replace", "remove", "link", "chmod", "punch")


def operate(top: Path, operation: str, name: str, dice: random.Random) -> None:
    path = top / name
    data = dice.randbytes(dice.choice((1, 100, 5000, 70_000, 300_000)))
    if operation != "chmod" and path.exists():
        path.chmod(0o644)
    if operation == "remove":
        path.unlink(missing_ok=True)
    elif operation == "replace":
        (top / "temporary").write_bytes(data)
        (top / "temporary").rename(path)
    elif operation == "recreate" or not path.exists():
        path.write_bytes(data)
    elif operation == "link":
        other = top / f"{name}-link"
        other.unlink(missing_ok=True)
        other.hardlink_to(path)
    elif operation == "append":
        with path.open("ab") as file:
            file.write(data)
    elif operation == "truncate":
        os.truncate(path, dice.randrange(1 << 19))
    elif operation == "chmod":
        path.chmod(dice.choice((0o600, 0o640, 0o444, 0o755)))
    else:
        with path.open("r+b") as file:
            file.seek(dice.randrange(1 << (22 if operation == "punch" else 19)))
            file.write(data)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.sampled_from("abc")), max_size=12),
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.sampled_from("abcd")), max_size=12),
    st.integers(0, 1 << 32),
    st.booleans(),
)
def test_whatever_happened_files_come_back(
    first: list[tuple[str, str]], then: list[tuple[str, str]], seed: int, tree: bool
) -> None:
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory) / "tree"
        top.mkdir()
        for operation, name in first:
            operate(top, operation, name, dice)
        files = [path for path in sorted(top.iterdir()) if path.is_file()]
        before = contents(top)
        saved = Saved(*map(wanted, files), trees=(top,) if tree else ())
        for operation, name in then:
            operate(top, operation, name, dice)
        saved.back()
        after = contents(top)
        if not tree:
            after = {name: what for name, what in after.items() if name in before}
        assert without_links(after, tree) == without_links(before, tree)


def without_links(found: dict[str, object], tree: bool) -> dict[str, object]:
    """Without the tree nobody removes a name that a file has got since."""
    if tree:
        return found
    return {name: what[1][0] if what[1] else None for name, what in found.items()}  # type: ignore[index]


# --- copied ahead -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's /tmp may be in memory; nothing here is mapped."""
    monkeypatch.setattr(ahead, "_IN_MEMORY", frozenset())
    monkeypatch.setattr(ahead, "SETTLED", 0.02)


def settle(top: Path) -> None:
    """Until nothing in there counts as just changed."""
    newest = max(path.lstat().st_ctime for path in top.rglob("*"))
    while time.time() - newest < 0.03:
        time.sleep(0.005)


@pytest.mark.usefixtures("on_disk")
def test_what_rests_is_copied_ahead_and_nothing_else_counts(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("rests", "rewritten", "grown", "removed", "moved", "recreated", "mode"):
        (tree / name).write_bytes(f"{name} before ".encode() * 9000)
    (tree / "linked").hardlink_to(tree / "rests")
    settle(tree)
    (tree / "fresh").write_text("fresh")
    os.utime(tree / "fresh", (time.time(), time.time() + 1000))  # it stays fresh however long the copy takes
    request = snapshot.Request((), [str(tree)], [], LIMIT)
    files, data = (os.memfd_create(name) for name in ("list", "data"))
    assert snapshot.copy_ahead(request, files, data, first=True) == 7
    for name in ("rewritten", "recreated"):
        times = (tree / name).stat()
        if name == "recreated":
            (tree / name).unlink()
        (tree / name).write_bytes(f"{name} behind ".encode() * 9000)
        os.utime(tree / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    with (tree / "grown").open("ab") as file:
        file.write(b"more")
    (tree / "removed").unlink()
    (tree / "moved").rename(tree / "there")
    (tree / "mode").chmod(0o640)
    used = os.fstat(data).st_blocks
    snapshot.save(request, files, data)
    before = contents(tree)
    # What did not count has given its room back.
    assert os.fstat(data).st_blocks < 1.3 * used
    for path in tree.iterdir():
        path.unlink()
    rollback.roll_back(files, data, 0)
    assert contents(tree) == before


@pytest.mark.usefixtures("on_disk")
@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.sampled_from("abc")), max_size=12),
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.sampled_from("abcd")), max_size=6),
    st.integers(0, 1 << 32),
)
def test_whatever_happens_after_the_copy_counts(
    first: list[tuple[str, str]], meanwhile: list[tuple[str, str]], seed: int
) -> None:
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory) / "tree"
        top.mkdir()
        for operation, name in first:
            operate(top, operation, name, dice)
        settle(top.parent)
        request = snapshot.Request((), [str(top)], [], LIMIT)
        files, data = (os.memfd_create(name) for name in ("list", "data"))
        snapshot.copy_ahead(request, files, data, first=True)
        for operation, name in meanwhile:
            operate(top, operation, name, dice)
        before = contents(top)
        snapshot.save(request, files, data)
        for path in top.iterdir():
            path.unlink()
        rollback.roll_back(files, data, 0)
        assert contents(top) == before
        os.close(files)
        os.close(data)


def test_two_capsules_put_the_same_tree_back_at_the_same_time(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    for name in ("a/one", "b/two", "three"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(os.urandom(3 << 20))
    saved = Saved(trees=(top,))
    before = contents(top)
    for _ in range(10):
        (top / "a" / "one").write_text("another")
        (top / "b" / "two").unlink()
        (top / "three").rename(top / "later")
        (top / "made since").mkdir()
        (top / "made since" / "file").touch()
        with ProcessPoolExecutor(2) as pool:
            for done in [pool.submit(saved.back, capsule) for capsule in range(2)]:
                done.result()
        assert contents(top) == before


def test_a_rollback_that_fails_leaves_all_as_it_was_found(tmp_path: Path) -> None:
    """Also what stood where directories were, and the directories' modes."""
    top, after = tmp_path / "top", tmp_path / "after"
    (top / "directory").mkdir(parents=True)
    (top / "directory" / "file").write_text("text")
    (top / "other").mkdir(mode=0o700)
    after.write_text("more")
    saved = Saved(wanted(after), trees=(top,))
    (top / "directory" / "file").unlink()
    (top / "directory").rmdir()
    (top / "directory").write_text("a file now")
    (top / "other").chmod(0o500)
    after.write_text("else")
    found = contents(tmp_path)
    with pytest.raises(CorruptError, match="too short"):
        rollback.roll_back(saved.list, os.memfd_create("empty"), 0)
    assert contents(tmp_path) == found
    saved.back()
    assert (top / "directory" / "file").read_text() == "text" and not list(tmp_path.rglob("*hpccr*"))


def test_what_a_later_error_leaves_undone_leaves_nothing_beside(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_text("before")
    saved = Saved(wanted(first), wanted(second))
    for path in (first, second):
        path.write_text("later")
    second.unlink()
    second.mkdir()
    (second / "closed").mkdir()
    (second / "closed" / "file").touch()
    (second / "closed").chmod(0)
    with pytest.raises(HpccrError, match="closed"):
        saved.back()
    assert first.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["first", "second"]
    (second / "closed").chmod(0o700)
    saved.back()
    assert second.read_text() == "before"


def test_extended_attributes_of_files_and_directories_come_back(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    files = {top: 0o755, top / "file": 0o644, top / "read-only": 0o444, top / "replaced": 0o444}
    for path, mode in files.items():
        if path != top:
            path.write_text("text")
        try:
            os.setxattr(path, "user.kept", b"before")
        except OSError:
            return  # a file system without them
        path.chmod(mode)
    saved = Saved(trees=(top,))
    for path, mode in files.items():
        path.chmod(0o700)
        if path.name == "replaced":
            path.unlink()
            path.write_text("other")
        os.setxattr(path, "user.kept", b"later")
        os.setxattr(path, "user.new", b"later")
        path.chmod(mode)
    saved.back()
    for path, mode in files.items():
        assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == {"user.kept": b"before"}, path
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_one_attribute_that_cannot_be_set_keeps_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    try:
        for number in range(10):
            os.setxattr(path, f"user.{number}", b"before")
    except OSError:
        return  # a file system without them
    saved = Saved(wanted(path))
    for number in range(10):
        os.setxattr(path, f"user.{number}", b"later")
    set_one = os.setxattr

    def refuse(where: int | str, name: str, value: bytes) -> None:
        if name == "user.5":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        set_one(where, name, value)

    monkeypatch.setattr(os, "setxattr", refuse)
    saved.back()
    assert [n for n in range(10) if os.getxattr(path, f"user.{n}") == b"later"] == [5]


def test_a_link_that_criu_has_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "other").hardlink_to(tmp_path / "file")
    (tmp_path / "link_remap.3").hardlink_to(tmp_path / "file")
    (tmp_path / "link_remap.4").write_text("the user's own")
    status = (tmp_path / "file").stat()
    (tmp_path / "file").unlink()
    nameless = snapshot.Nameless(str(tmp_path / "file"), status.st_dev, status.st_ino, "1 (one)")
    snapshot.measure(snapshot.Request((), (), (), LIMIT, nameless=[nameless]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link_remap.4", "other"]
