"""Rolling files back, as the user does it before a restore."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpccr.errors import HpccrError
from hpccr.model import OpenFile
from hpccr.noded.restoration import roll_back


def record(path: Path, size: int) -> OpenFile:
    return OpenFile(path=str(path), size=size, mode=path.stat().st_mode, append=True)


def test_what_was_written_since_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before|after")
    roll_back([record(path, 7)])
    assert path.read_text() == "before|"
    roll_back([record(path, 7)])
    assert path.read_text() == "before|"


def test_what_is_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("short")
    known = record(path, 100)
    with pytest.raises(HpccrError, match=f"{path} has 5 bytes and had 100"):
        roll_back([known])
    path.unlink()
    with pytest.raises(HpccrError, match=f"{path} open for writing and it cannot be found"):
        roll_back([known])


def test_a_changed_mode_is_named_with_the_way_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    path.chmod(0o640)
    known = record(path, 4)
    path.chmod(0o600)
    with pytest.raises(HpccrError, match="-rw-------, at the checkpoint -rw-r-----") as caught:
        roll_back([known])
    assert caught.value.hint == f"give it back: chmod 640 {path}"


def test_another_kind_of_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    known = record(path, 0)
    path.rename(tmp_path / "target")
    path.mkdir()
    with pytest.raises(HpccrError, match="has mode d"):
        roll_back([known])
    assert (tmp_path / "target").read_text() == "text"
