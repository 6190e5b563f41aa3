"""Which of the job's files a checkpoint has, for `hpccr inspect`."""

from __future__ import annotations

import os

import msgspec

from hpccr.cli.output import print_table, size
from hpccr.errors import CorruptError, encodable
from hpccr.model import FILES_LIST, Fragment, SavedFiles
from hpccr.store.blocks import Reader
from hpccr.store.index import read_index
from hpccr.store.layout import Checkpoint


def show(saved: dict[int, SavedFiles], *, everything: bool) -> None:
    """What a restart puts back, and what it does not."""
    whole = trees(saved)
    inside = tuple(tree + "/" for tree in whole)
    rows = []
    for capsule, files in sorted(saved.items()):
        for file in files.files:
            path = os.fsdecode(file.path)
            if file.mode and (everything or not (path in whole or path.startswith(inside))):
                what = "cut back to its size" if file.extents is None else "put back"
                rows.append((str(capsule), what, size(file.size), encodable(path)))
    print()
    print("A restart puts back, besides what lies in private directories:")
    for tree in whole:
        print(f"  everything in {encodable(tree)}")
    if rows:
        print_table(("CAPSULE", "FILE", "SIZE", "PATH"), rows, right=frozenset({"CAPSULE", "SIZE"}))
    if not rows and not whole:
        print("  nothing: the job had no file open for writing")
    print("Other files stay as they are then. `hpccr run --files=DIR` makes directories part of the job's state.")


def read(checkpoint: Checkpoint, fragment: Fragment) -> SavedFiles:
    """Raises CorruptError, OSError."""
    if not fragment.image.files:
        return SavedFiles()
    directory = checkpoint.capsule_path(fragment.capsule)
    with Reader(directory, read_index(directory)) as reader:
        text = b"".join(reader.stream(FILES_LIST))
    try:
        return msgspec.msgpack.decode(text, type=SavedFiles)
    except msgspec.MsgspecError as error:
        raise CorruptError(f"{FILES_LIST} in {directory} cannot be read: {error}") from None


def listed(saved: dict[int, SavedFiles]) -> list[dict[str, object]]:
    return [
        {
            "capsule": capsule,
            "path": encodable(os.fsdecode(file.path)),
            "mode": file.mode,
            "size": file.size,
            "content": file.extents is not None,
        }
        for capsule, files in sorted(saved.items())
        for file in files.files
    ]


def trees(saved: dict[int, SavedFiles]) -> list[str]:
    """Directories that are put back as a whole."""
    return sorted({os.fsdecode(tree) for files in saved.values() for tree in files.trees})
