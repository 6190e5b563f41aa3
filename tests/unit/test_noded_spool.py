"""Directories whose owner is known by a lock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpccr.errors import UsageError
from hpccr.noded.spool import Area, Limits, Spool


@pytest.fixture
def area(tmp_path: Path) -> Area:
    made = Area(str(tmp_path / "area"))
    made.prepare()
    return made


def test_a_directory_in_use_is_no_leftover(area: Area) -> None:
    directory = area.create("one")
    assert os.stat(directory.path).st_mode & 0o777 == 0o700
    assert area.leftovers() == []
    directory.release()
    (found,) = area.leftovers()
    assert found.name == "one"
    assert area.leftovers() == []
    found.remove()
    found.remove()
    assert os.listdir(area.root) == []


def test_a_process_that_inherited_the_lock_holds_it(area: Area) -> None:
    directory = area.create("one")
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=[directory.fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        directory.release()
        assert area.leftovers() == []
        child.kill()
    (found,) = area.leftovers()
    found.remove()


def test_a_descriptor_that_was_given_away_does_not_hold_it(area: Area) -> None:
    directory = area.create("one")
    given = directory.open()
    directory.release()
    (found,) = area.leftovers()
    found.release()
    os.close(given)


def test_what_is_no_directory_is_left_alone(area: Area) -> None:
    Path(area.root, "file").write_text("x")
    Path(area.root, "link").symlink_to("/")
    assert area.leftovers() == []
    assert sorted(os.listdir(area.root)) == ["file", "link"]


def test_names_are_taken_once(area: Area) -> None:
    directory = area.create("one")
    with pytest.raises(FileExistsError):
        area.create("one")
    directory.remove()
    area.create("one").remove()


def test_sizes(area: Area) -> None:
    directory = area.create("one")
    Path(directory.path, "a").write_bytes(bytes(1000))
    Path(directory.path, "b").write_bytes(bytes(24))
    assert directory.bytes() == 1024
    directory.remove()


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701])
def test_an_area_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "area").mkdir()
    (tmp_path / "area").chmod(mode)
    with pytest.raises(UsageError, match="0700"):
        Area(str(tmp_path / "area")).prepare()


def test_an_area_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o700)
    (tmp_path / "area").symlink_to(tmp_path / "there")
    with pytest.raises(UsageError, match="0700"):
        Area(str(tmp_path / "area")).prepare()


def test_room_leaves_the_reserve(tmp_path: Path) -> None:
    assert Spool(Limits(str(tmp_path), 1 << 60)).room() == 0
    assert Spool(Limits(str(tmp_path))).room() > 0
