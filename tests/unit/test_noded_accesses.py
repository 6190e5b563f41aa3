"""What tasks have open, opened again by whoever may."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpccr.errors import CorruptError, UnsupportedError
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
    # The user's own, which a program may have made read-only while it writes to it.
    (tmp_path / "other").chmod(0o400)
    accesses.check([access])
    os.close(handle)


def test_what_the_user_could_not_open_again_is_refused_by_name(tmp_path: Path) -> None:
    own, other = tmp_path / "own", Path("/etc/passwd")
    own.write_text("text")
    own.chmod(0)
    accesses.refuse_unopenable([access(own), access(other, os.O_RDONLY), access(tmp_path / "gone", like=own)])
    with pytest.raises(UnsupportedError, match=f"process 1 .* {other} open, which the user cannot open again"):
        accesses.refuse_unopenable([access(own), access(other)])


def test_what_cannot_be_reached_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "closed" / "file"
    path.parent.mkdir()
    path.touch()
    wanted = [access(path)]
    accesses.refuse_unreachable(wanted)
    path.parent.chmod(0)
    with pytest.raises(UnsupportedError, match=f"{path} open, and root on this node cannot get there") as caught:
        accesses.refuse_unreachable(wanted)
    assert "root_squash" in caught.value.hint
    path.parent.chmod(0o700)


def access(path: Path, flags: int = os.O_RDWR, *, like: Path | None = None) -> accesses.Access:
    status = (like or path).stat()
    return accesses.Access(str(path), flags, status.st_dev, status.st_ino, "1 (one)")
