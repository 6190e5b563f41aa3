"""Images as CRIU writes them, made with pycriu."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pycriu.images
import pytest

from hpccr.errors import CorruptError
from hpccr.noded import imagefile

KIND = pycriu.images.fdinfo_pb2.file_entry


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """files.img with two regular files."""
    owner = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}
    facts = {"flags": 0, "pos": 0, "fown": owner, "size": 5, "mode": 1}
    entries = [
        {"type": "REG", "id": number, "reg": {"id": number, "name": name, **facts}}
        for number, name in enumerate(("home/one", "/home/two"))
    ]
    data = io.BytesIO()
    pycriu.images.dump({"magic": "FILES", "entries": entries}, data)
    path = tmp_path / "files.img"
    path.write_bytes(data.getvalue())
    return path


def test_what_is_changed_is_what_pycriu_reads(image: Path) -> None:
    directory = os.open(image.parent, os.O_RDONLY)

    def edit(entry: Any) -> bool:
        if imagefile.path(entry.reg) != "/home/two":
            return False
        entry.reg.ClearField("size")
        return True

    before = image.read_bytes()
    try:
        imagefile.change(directory, image.name, KIND, lambda entry: False)
        assert image.read_bytes() == before
        imagefile.change(directory, image.name, KIND, edit)
        assert [imagefile.path(entry.reg) for entry in imagefile.read(directory, image.name, KIND)] == [
            "/home/one",
            "/home/two",
        ]
        assert imagefile.read(directory, "remap-fpath.img", KIND) == []
    finally:
        os.close(directory)
    with image.open("rb") as file:
        found = pycriu.images.load(file)["entries"]
    assert [entry["reg"].get("size") for entry in found] == [5, None] and found[1]["reg"]["mode"] == 1


def test_what_is_no_image_is_corrupt_and_other_names_of_a_file_keep_it(image: Path) -> None:
    directory = os.open(image.parent, os.O_RDONLY)
    kept = image.with_name("kept")
    kept.hardlink_to(image)
    before = kept.read_bytes()

    def edit(entry: Any) -> bool:
        entry.reg.ClearField("size")
        return True

    try:
        assert imagefile.path(imagefile.first(directory, image.name, KIND).reg) == "/home/one"
        imagefile.change(directory, image.name, KIND, edit)
        assert kept.read_bytes() == before != image.read_bytes()
        with pytest.raises(CorruptError, match=r"lack none\.img"):
            imagefile.first(directory, "none.img", KIND)
        image.write_bytes(before[:-3])
        with pytest.raises(CorruptError, match="no image"):
            imagefile.read(directory, image.name, KIND)
        image.write_bytes(before[:9])
        for look in (imagefile.read, imagefile.first):
            with pytest.raises(CorruptError, match="no image"):
                look(directory, image.name, KIND)
    finally:
        os.close(directory)
