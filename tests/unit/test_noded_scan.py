"""Looking at tasks: this process and its children stand for a capsule's."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from hpccr.errors import CorruptError, HpccrError, UnsupportedError
from hpccr.noded import scan
from hpccr.noded.control import Identity


def task(pid: int, parent: int, **changes: object) -> scan.Task:
    fields: dict[str, object] = {
        "pid": pid,
        "parent": parent,
        "name": f"task{pid}",
        "state": "S",
        "uids": (1001,) * 4,
        "gids": (1001,) * 4,
        "groups": (),
        "capabilities": 0,
    }
    return scan.Task(**(fields | changes))  # type: ignore[arg-type]


def own_tree() -> scan.Tree:
    own = scan.read_task(os.getpid())
    assert own is not None
    return scan.Tree(own.pid, [own])


def own_files() -> list[scan.Named]:
    return own_tree().named()


def test_a_task_is_read_as_the_kernel_tells_it() -> None:
    (own,) = own_tree().tasks
    assert own.pid == os.getpid() and own.parent == os.getppid()
    assert own.uids[:3] == os.getresuid() and own.gids[:3] == os.getresgid()
    assert set(own.groups) == set(os.getgroups())


def test_a_process_that_is_gone_is_none() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert scan.read_task(pid) is None


def test_a_whole_tree_passes() -> None:
    zombie = task(12, 10, state="Z", uids=(0, 0, 0, 0))
    scan.check_whole(scan.Tree(10, [task(10, 1), task(11, 10), zombie]), 1001)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([task(10, 1), task(11, 1)], r"11 \(task11\) has left the job's process tree"),
        ([task(10, 1), task(11, 10, uids=(1001, 0, 1001, 1001))], r"11 \(task11\) runs with the user ids"),
        ([task(10, 1, capabilities=1 << 21)], r"10 \(task10\) has capabilities"),
    ],
)
def test_who_does_not_belong_is_named(tasks: list[scan.Task], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        scan.check_whole(scan.Tree(10, tasks), 1001)


@pytest.mark.parametrize("tasks", [[], [task(10, 1, state="Z")]])
def test_a_job_that_has_ended_says_so(tasks: list[scan.Task]) -> None:
    with pytest.raises(HpccrError, match="the job has ended"):
        scan.check_whole(scan.Tree(10, tasks), 1001)


@pytest.mark.parametrize(
    "changes",
    [
        {"uids": (1001, 0, 1001, 1001)},
        {"gids": (0,) * 4},
        {"groups": (4, 0)},
        {"capabilities": 1},
        {"may_gain": True},
    ],
)
def test_a_restored_task_may_only_be_the_users(changes: dict[str, object]) -> None:
    identity = Identity(uid=1001, gid=1001, groups=(4,), umask=0, rlimits=(), cpus=(), nice=0)
    scan.check_restored(scan.Tree(10, [task(10, 1, groups=(4,))]), identity)
    with pytest.raises(CorruptError, match=r"10 \(task10\)"):
        scan.check_restored(scan.Tree(10, [task(10, 1, **changes)]), identity)


def test_helpers_and_what_they_started_are_no_tasks() -> None:
    child = os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 60 & wait"], {"PATH": "/usr/bin:/bin"})
    try:
        with_it = {found.pid for found in scan.tree(os.getpid()).tasks}
        without = scan.tree(os.getpid(), helpers=[child]).tasks
        assert child in with_it
        assert not [found for found in without if child in (found.pid, found.parent)]
        assert os.getpid() in {found.pid for found in without}
    finally:
        for found in scan.processes():
            if found.parent == child:
                os.kill(found.pid, 9)
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_files_that_can_be_written_are_found_with_size_and_mode(tmp_path: Path) -> None:
    appended, inplace, read = (tmp_path / name for name in ("appended", "inplace", "read"))
    for path in (appended, inplace, read):
        path.write_bytes(b"12345")
    with appended.open("ab"), inplace.open("r+b") as file, read.open("rb"):
        found = {file.path: file for file in scan.open_files(own_files(), [])}
        assert found[str(appended)].append and not found[str(inplace)].append
        assert os.path.samestat(found[str(inplace)].status, os.fstat(file.fileno()))
        assert str(read) not in found
        assert scan.open_files(own_files(), [str(tmp_path)]) == tuple(
            file for path, file in found.items() if not path.startswith(str(tmp_path))
        )


def test_files_that_are_only_read_are_found_but_no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("read", "written", "private", "executable")
    for name in names:
        (tmp_path / name).write_bytes(bytes(4096))
    with ExitStack() as stack:
        files = [stack.enter_context((tmp_path / name).open("rb")) for name in names]
        stack.enter_context((tmp_path / "written").open("ab"))
        program = mmap.mmap(files[3].fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
        maps = Path("/proc/self/maps").read_text().splitlines()
        programs = [line for line in maps if line.split()[1][2] == "x"]
        monkeypatch.setattr(scan.Tree, "maps", lambda tree, task: programs)  # only root can look at what is mapped
        seen = own_files()
        written = [file.path for file in scan.open_files(seen, [])]
        found = scan.read_files(seen, [str(tmp_path / "private")], written)
        assert {path for path in found if path.startswith(str(tmp_path))} == {str(tmp_path / "read")}
        assert os.path.samestat(found[str(tmp_path / "read")], os.fstat(files[0].fileno())) and program


def test_only_what_has_a_name_is_looked_at_closely(tmp_path: Path) -> None:
    one, other = socket.socketpair()
    with one, other, (tmp_path / "file").open("wb") as file:
        links = dict(own_tree().links(own_tree().tasks[0]))
        assert links[str(one.fileno())].startswith("socket:[") and links[str(file.fileno())] == str(tmp_path / "file")
        seen = {name.link.rsplit("/", 1)[1] for name in own_files()}
        assert str(file.fileno()) in seen and not {str(one.fileno()), str(other.fileno())} & seen


def test_of_stopped_tasks_only_names_are_looked_at_again(tmp_path: Path) -> None:
    tree = replace(own_tree(), stopped=True)
    reading, writing = os.pipe()
    with (tmp_path / "file").open("wb") as file:
        before = dict(tree.links(tree.tasks[0]))
        os.close(reading)
        (tmp_path / "file").rename(tmp_path / "moved")
        after = dict(tree.links(tree.tasks[0]))
        now = dict(own_tree().links(tree.tasks[0]))
        os.close(writing)
        assert before[str(reading)] == after[str(reading)] != now.get(str(reading))
        assert (before[str(file.fileno())], after[str(file.fileno())]) == (file.name, str(tmp_path / "moved"))


def test_files_that_are_mapped_are_found_once_each() -> None:
    maps = """\
55d4c0a00000-55d4c0a02000 r--p 00000000 fe:00 1201 /usr/bin/cat
55d4c0a02000-55d4c0a07000 r-xp 00002000 fe:00 1201 /usr/bin/cat
55d4c0b00000-55d4c0b21000 rw-p 00000000 00:00 0 [heap]
00400000-00401000 r--p 00000000 fe:00 77 /data/with a name (deleted)
00401000-00402000 rw-s 00001000 fe:00 77 /data/with a name (deleted)
00402000-00403000 r--p 00000000 fe:00 78 /data/with a name (deleted)
7f0000000000-7f0000001000 rw-p 00000000 fe:00 79 /data/private
7f0000001000-7f0000002000 rw-p 00000000 00:00 0
""".splitlines()
    assert scan.mappings(maps) == [
        scan.Mapping("55d4c0a00000-55d4c0a02000", "/usr/bin/cat", program=True),
        scan.Mapping("400000-401000", "/data/with a name (deleted)", written=True),
        scan.Mapping("402000-403000", "/data/with a name (deleted)"),
        scan.Mapping("7f0000000000-7f0000001000", "/data/private"),
    ]


def test_of_stopped_tasks_programs_are_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[1][2] == "x"]
    monkeypatch.setattr(scan.Tree, "maps", lambda tree, task: maps)  # only root can look at what else is mapped
    tree = replace(own_tree(), stopped=True)
    renamed, removed = tmp_path / "renamed", tmp_path / "removed"
    with renamed.open("wb"), removed.open("wb"):
        before = tree.named()
        renamed.rename(tmp_path / "moved")
        removed.unlink()
        after = tree.named()
    programs = {one.name for one in before if one.program}
    assert os.path.realpath(sys.executable) in programs
    now = {str(renamed): str(tmp_path / "moved"), str(removed): f"{removed} (deleted)"}
    assert [one.name for one in after] == [now.get(o.name, o.name) for o in before if o.name not in programs]
    assert {str(tmp_path / "moved"), f"{removed} (deleted)"} <= {one.name for one in after}


def test_one_writer_without_append_makes_the_file_not_append_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("ab"), path.open("r+b"):
        (found,) = [file for file in scan.open_files(own_files(), []) if file.path == str(path)]
    assert not found.append


def test_deleted_files_are_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb"):
        path.unlink()
        assert not [file for file in scan.open_files(own_files(), []) if str(path) in file.path]


def test_a_removed_name_of_a_living_file_is_found(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    with path.open("ab"):
        other.hardlink_to(path)
        path.unlink()
        path.touch()
        (found,) = [one for one in scan.nameless_files(own_files(), []) if str(tmp_path) in one.path]
        assert found.path == str(path) and os.path.samestat(found.status, other.stat())
        assert str(own_tree().tasks[0]) == found.holder
        assert not [one for one in scan.nameless_files(own_files(), [str(tmp_path)]) if str(tmp_path) in one.path]
        other.unlink()
        assert not [one for one in scan.nameless_files(own_files(), []) if str(tmp_path) in one.path]


@pytest.mark.parametrize(
    ("path", "expected"), [("/tmp", True), ("/tmp/x", True), ("/tmpx", False), ("/", False), ("", False)]
)
def test_below(path: str, expected: bool) -> None:
    assert scan.below(path, ["/tmp/"[:-1], "/var/tmp"]) is expected


def test_the_estimate_counts_memory_and_deleted_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_segments", lambda root: 0)  # needs root
    before = scan.estimate(own_tree(), [], 1 << 30)
    memory = bytearray(b"x" * (32 << 20))
    with (tmp_path / "gone").open("wb") as file:
        file.write(b"x" * (8 << 20))
        file.flush()
        (tmp_path / "gone").unlink()
        after = scan.estimate(own_tree(), [], 1 << 30)
    assert 36 << 20 < after - before < 60 << 20 and memory


def test_the_highest_id_covers_group_and_session() -> None:
    assert scan.highest_id(own_tree()) >= max(os.getpid(), os.getpgrp(), os.getsid(0))


def test_threads_are_looked_at_one_by_one() -> None:
    code = "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); print('up', flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        whole = scan.Tree(process.pid, [found for found in scan.processes() if found.pid == process.pid])
        assert len(scan.with_threads(whole).tasks) == 2
        assert all(thread.uids == whole.tasks[0].uids for thread in scan.with_threads(whole).tasks)
        process.kill()


def test_memory_that_is_taken_later_is_seen() -> None:
    whole = scan.Tree(os.getpid(), [found for found in scan.processes() if found.pid == os.getpid()])
    before = scan.occupied(whole, [])
    held = b"x" * (64 << 20)
    assert scan.occupied(whole, []) - before > 60 << 20
    del held
