"""What tasks have open, opened again by whoever may."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpccr.errors import CorruptError
from hpccr.noded import accesses


def test_they_are_checked_by_opening(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    status = path.stat()
    wanted = [accesses.Access(str(path), os.O_WRONLY, status.st_dev, status.st_ino, "1 (one)")]
    accesses.check(wanted)
    path.rename(tmp_path / "away")
    path.write_text("another")
    with pytest.raises(CorruptError, match="another file"):
        accesses.check(wanted)
    path.unlink()
    with pytest.raises(CorruptError, match=f"{path} open, which the user cannot open"):
        accesses.check(wanted)


def test_a_file_whose_name_was_removed_is_checked_by_its_handle(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    handle = os.open(path, os.O_PATH)
    path.rename(tmp_path / "other")
    status = os.fstat(handle)
    access = accesses.Access(f"{path} (deleted)", os.O_RDWR, status.st_dev, status.st_ino, "1 (one)", handle=handle)
    accesses.check([access])
    (tmp_path / "other").chmod(0o400)
    with pytest.raises(CorruptError, match="cannot open"):
        accesses.check([access])
    os.close(handle)
