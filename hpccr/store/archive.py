"""One checkpoint as one file: a tar archive with what its directory holds and the step's record, for another store.

Every capsule's directory is complete by itself (store.lineage), so nothing has to be gathered. Members are named as in
a store, <cluster>-<job>/<step>/ckpt-N/...; the names cannot be changed on the way: the sealed fragments have them.
The last member has the BLAKE3 digests and the names of all others, as b3sum prints them.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
import stat
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol, cast

import msgspec
from blake3 import blake3

from hpccr.errors import CorruptError, HpccrError, LockedError, NoCheckpointError
from hpccr.model import FRAGMENT_NAME, MANIFEST_NAME, StepKey, parse_job_directory
from hpccr.store import index, publish
from hpccr.store.index import INDEX_NAME
from hpccr.store.layout import STEP_NAME, Checkpoint, Store
from hpccr.store.verify import verify

SCRIPT_NAME = "slurm_script"
"""The copy of the batch script that a restored shell opens again."""
DIGESTS_NAME = "digests"
IMPORTED = "imported"
"""StepRecord.state of a step that came from another store."""
DAMAGED = "`hpccr verify` tells all that is wrong with it; export another one"
CHUNK = 1 << 20
TOUCH = 10.0
"""Seconds between two signs of life of an import."""

_MEMBER = re.compile(
    r"(?P<job>[^/]+)/(?P<step>0|[1-9]\d{0,8})/"
    rf"(?:{re.escape(STEP_NAME)}|{SCRIPT_NAME}|{DIGESTS_NAME}|ckpt-(?P<sequence>\d{{6}})/(?:{re.escape(MANIFEST_NAME)}"
    rf"|capsule-(?:0|[1-9]\d{{0,4}})/(?:{re.escape(FRAGMENT_NAME)}|{re.escape(INDEX_NAME)}|[0-9a-f]{{16}}\.pack)))"
)


class Sink(Protocol):
    """What an archive is written to."""

    def write(self, data: bytes, /) -> object: ...


def write(checkpoint: Checkpoint, out: Sink, *, wrote: Callable[[int], None] = lambda count: None) -> None:
    """Write the archive of a complete checkpoint. wrote: called with numbers of bytes.

    Raises NoCheckpointError for an incomplete one, CorruptError for one that is damaged, OSError.
    """
    state = checkpoint.state()
    if not checkpoint.complete:
        raise NoCheckpointError(f"checkpoint {checkpoint.sequence} of {checkpoint.step.key} is {state.state}")
    root = checkpoint.step.path.parent.parent
    digests = []
    with tarfile.open(fileobj=cast(IO[bytes], out), mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as archive:
        for path, digest in _files(checkpoint):
            with open(path, "rb", opener=_no_link) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise CorruptError(f"{path} is not a regular file")
                member = tarfile.TarInfo(str(path.relative_to(root)))
                member.size, member.mtime, member.mode = status.st_size, int(status.st_mtime), publish.FILE_MODE
                hashing = _Hashing(file)
                archive.addfile(member, cast(IO[bytes], hashing))
                if digest not in ("", found := hashing.hasher.hexdigest()):
                    raise CorruptError(
                        f"{path} has been changed: its BLAKE3 digest is not the recorded one", hint=DAMAGED
                    )
                digests.append(f"{found}  {member.name}\n")
                wrote(status.st_size)
        text = "".join(digests).encode()
        member = tarfile.TarInfo(str((checkpoint.step.path / DIGESTS_NAME).relative_to(root)))
        member.size, member.mode = len(text), publish.FILE_MODE
        archive.addfile(member, io.BytesIO(text))


class _Hashing:
    """A file being read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hasher = blake3()

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self.hasher.update(data)
        return data


def _files(checkpoint: Checkpoint) -> Iterator[tuple[Path, str]]:
    """With the digest that a file must have, "" where it was compared already or is of no other file's knowledge."""
    for name in (STEP_NAME, SCRIPT_NAME):
        if (checkpoint.step.path / name).exists():
            yield checkpoint.step.path / name, ""
    yield checkpoint.manifest_path, ""
    for capsule in range(checkpoint.manifest().capsules):
        directory = checkpoint.capsule_path(capsule)
        header = index.read_index(directory).header
        for pack in header.packs:
            yield directory / pack.name, pack.digest
        yield directory / INDEX_NAME, ""
        yield directory / FRAGMENT_NAME, header.fragment


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def read(source: IO[bytes], store: Store, *, read: Callable[[int], None] = lambda count: None) -> Checkpoint:
    """Bring an archive's checkpoint into a store, verified; it appears at once when all of it is durable.

    Raises CorruptError for anything that is not a whole archive of one checkpoint, LockedError if the store has a
    checkpoint of that number in that step, OSError. Seals are checked at the restore: only hpccrd can.
    """
    publish.make_directory(store.root)
    work = store.root / f"{publish.TEMPORARY}import.{secrets.token_hex(4)}"
    publish.make_directory(work)
    touched = time.monotonic()

    def alive(count: int) -> None:
        # What has not changed for long is taken for left behind (gc.sweep), and only the directory itself is looked at.
        nonlocal touched
        if time.monotonic() - touched >= TOUCH:
            touched = time.monotonic()
            os.utime(work)

    def extracted(count: int) -> None:
        alive(count)
        read(count)

    try:
        checkpoint = _extract(source, Store(work), extracted)
        findings = verify(checkpoint, read=alive)
        if findings:
            raise CorruptError(
                f"the archive is damaged: {findings[0].path.removeprefix(f'{work}/')}: {findings[0].problem}"
            )
        return _publish(checkpoint, store)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _extract(source: IO[bytes], store: Store, read: Callable[[int], None]) -> Checkpoint:
    digests: list[str] = []
    found: set[tuple[str, str]] = set()
    sequences: set[int] = set()
    try:
        with tarfile.open(fileobj=source, mode="r|", bufsize=CHUNK) as archive:
            for member in archive:
                match = _MEMBER.fullmatch(member.name)
                content = archive.extractfile(member) if member.isreg() else None
                # The name of a job's directory is part of a path, and must not lead out of here.
                if match is None or content is None or parse_job_directory(match["job"]) is None:
                    raise CorruptError(f"the archive has {member.name!r}, which is not a part of a checkpoint")
                found.add((match["job"], match["step"]))
                sequences |= {int(match["sequence"])} if match["sequence"] else set()
                path = store.root / member.name
                publish.make_directory(path.parent)
                hasher = blake3()
                with publish.PendingFile(path) as pending:
                    while data := content.read(CHUNK):
                        pending.write(data)
                        hasher.update(data)
                        read(len(data))
                    pending.commit()
                if path.name != DIGESTS_NAME:
                    digests.append(f"{hasher.hexdigest()}  {member.name}\n")
    except (tarfile.TarError, EOFError) as error:
        raise CorruptError(f"this is not an archive of `hpccr export`, or it is cut off: {error}") from None
    if len(found) != 1 or len(sequences) != 1:
        raise CorruptError("the archive does not hold exactly one checkpoint")
    ((directory, step),) = found
    listed = store.root / directory / step / DIGESTS_NAME
    if not listed.exists() or listed.read_bytes() != "".join(digests).encode():
        raise CorruptError("the archive is damaged: its digests are not those of what is in it")
    cluster, job = parse_job_directory(directory) or ("", "")
    return store.step(StepKey(cluster=cluster, job=job, step=step)).checkpoint(sequences.pop())


def _publish(checkpoint: Checkpoint, store: Store) -> Checkpoint:
    target = store.step(checkpoint.step.key).checkpoint(checkpoint.sequence)
    record = checkpoint.step.record()
    publish.make_directory(target.step.path)
    if target.path.exists():
        raise LockedError(
            f"{target.path} is there already", hint="remove it first, with `hpccr rm`, if this one is to take its place"
        )
    script = checkpoint.step.path / SCRIPT_NAME
    if script.exists() and not (target.step.path / SCRIPT_NAME).exists():
        publish.publish_bytes(target.step.path / SCRIPT_NAME, script.read_bytes())
        (target.step.path / SCRIPT_NAME).chmod(0o700)
    if record is not None and target.step.record() is None:
        publish.publish(target.step.record_path, msgspec.structs.replace(record, state=IMPORTED, exit_code=None))
    try:
        publish.rename(checkpoint.path, target.path)
    except OSError as error:
        raise HpccrError(f"cannot give the checkpoint its name {target.path}: {error.strerror}") from None
    return target
