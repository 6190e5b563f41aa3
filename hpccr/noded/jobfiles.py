"""The job's files outside its private directories, as capsule init sees to them: what a checkpoint saves, and what a
restore puts back. Init itself opens none of them: helpers with the user's ids do (snapshot.py, rollback.py).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from blake3 import blake3

from hpccr.errors import HpccrError, LockedError, UnsupportedError
from hpccr.model import FILES_DATA, FILES_LIST, FileRules, ReadFile
from hpccr.noded import child, imagefile, rollback, scan, snapshot, syscalls
from hpccr.noded.capsule import Capsule

MAX_SHARED = 4096
"""Files of a capsule of which the others are told; of more than that each capsule saves its own copy."""

_NETWORK_TYPES = frozenset(
    "nfs nfs4 lustre gpfs ceph beegfs cifs smb3 9p afs orangefs panfs wekafs dvs fuse".split()  # noqa: SIM905
)
"""File systems on which other nodes see what this one has written only once it has been written out."""


class Saving:
    """One checkpoint's. Steps in this order: measure, copy_ahead, write_out, survey, start,
    finish; or cancel at any time."""

    def __init__(self, home: Capsule, rules: FileRules, directory: int) -> None:
        """directory: the spool directory of the checkpoint; the caller's."""
        self._capsule = home
        self._directory = directory
        self._limit = rules.snapshot_limit
        self._trees = tuple(tree for tree in map(os.fsdecode, rules.trees) if not scan.below(tree, home.places))
        self._excluded = tuple(map(os.fsdecode, rules.excluded))
        self._files: tuple[scan.OpenFile, ...] = ()
        self._nameless: tuple[scan.NamelessFile, ...] = ()
        self._read: dict[str, os.stat_result] = {}
        self._identities: dict[str, bytes] = {}
        """Of the trees and of the files outside of them."""
        self._elsewhere: frozenset[bytes] = frozenset()
        self._helper: child.Helper | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        return (self._helper.pid,) if self._helper is not None else ()

    async def measure(self, tree: scan.Tree) -> int:
        """While the tasks run: bytes that the files will take. Raises UnsupportedError naming one that cannot be
        saved."""
        self._look(tree)
        while True:
            try:
                return await self._measure(self._request(frozenset()))
            except UnsupportedError:
                # A name that had just been removed, of a file that is closed by now, is nothing to refuse.
                before = self._nameless
                self._look(tree)
                if {file.key for file in before} <= {file.key for file in self._nameless}:
                    raise

    async def _measure(self, request: snapshot.Request) -> int:
        if not request.files and not request.trees and not request.nameless:
            return 0
        return int(await self._work(lambda: snapshot.measure(request)))

    async def copy_ahead(self) -> None:
        """While the tasks run: save what rests in the trees already. After measure(). Raises as that does."""
        if not self._trees:
            return
        request = self._request(frozenset())
        # One capsule saves what is on shared storage (survey): of a tree it is the first that has it.
        network = self._capsule.network
        first = network is None or network.own == 0
        fds = self._open(os.O_TRUNC)
        try:
            await self._work(lambda: snapshot.copy_ahead(request, *fds, first=first), keep=fds)
        finally:
            for fd in fds:
                os.close(fd)

    async def write_out(self, tree: scan.Tree) -> None:
        """Note what there is to save, and bring what was written here to where the other nodes see it. Once while the
        tasks run, which leaves little for when all tasks of this capsule are stopped."""
        # Not beside the dump: CRIU opens its own log and images in the tasks while it looks at them.
        self._look(tree)
        self._identities = {}
        if self._shares and (remote := self._remote()):
            await self._work(lambda: snapshot.refresh(remote, write_out=True))

    async def survey(self, tree: scan.Tree) -> tuple[bytes, ...]:
        """All capsules stand still: identities of what others may have too."""
        if not self._shares:
            return ()
        if remote := self._remote():
            await self._work(lambda: snapshot.refresh(remote, write_out=False))
        # Again: others may have written to them after this capsule stood still.
        self._look(tree)
        if self._trees:
            found = await self._work(lambda: [_tree_identity(tree) for tree in self._trees])
            self._identities.update({tree: known for tree, known in zip(self._trees, found, strict=True) if known})
        for file in self._files:
            if len(self._identities) >= MAX_SHARED:
                break
            if not scan.below(file.path, self._trees):
                self._identities[file.path] = file.identity
        return (*self._identities.values(), *map(_nameless_identity, self._nameless))

    def _look(self, tree: scan.Tree) -> None:
        seen, places = tree.named(), self._capsule.places
        self._files = scan.open_files(seen, places)
        self._nameless = scan.nameless_files(seen, places)
        self._read = scan.read_files(seen, places, (file.path for file in self._files))

    @property
    def _shares(self) -> bool:
        return self._capsule.network is not None and len(self._capsule.network.peers) > 1

    def start(self, elsewhere: frozenset[bytes]) -> None:
        """Begin to save, but for what other capsules save."""
        self._elsewhere = elsewhere
        if not self._nameless:
            self._start(())

    def _start(self, remaps: tuple[str, ...]) -> None:
        request = replace(self._request(self._elsewhere), remaps=remaps)
        if not any((request.files, request.trees, request.elsewhere, request.nameless, request.read)):
            return
        fds = self._open(0 if self._trees else os.O_TRUNC)
        leased = self._descriptors()
        request = replace(request, files=[replace(file, fd=leased.get(file.path, -1)) for file in request.files])
        try:
            self._helper = child.Helper(
                self._capsule.reaper,
                lambda: snapshot.save(request, *fds),
                identity=self._capsule.identity,
                keep=[*fds, *leased.values()],
            )
        finally:
            for fd in (*fds, *leased.values()):
                os.close(fd)

    def _descriptors(self) -> dict[str, int]:
        """Copies of the tasks' own descriptors of files with a lease, as far as they can be read."""
        found = {}
        for file in self._files:
            if file.leased is None:
                continue
            pidfd = os.pidfd_open(file.leased[0])
            try:
                fd = syscalls.pidfd_getfd(pidfd, file.leased[1])
            finally:
                os.close(pidfd)
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                found[file.path] = fd
            else:
                os.close(fd)
        return found

    async def finish(self) -> int:
        """CRIU has written its images: how many names were saved, once all are. Raises UnsupportedError or HpccrError
        naming one that was not."""
        remaps = tuple(path for path in self.remaps() if not scan.below(path, self._capsule.places))
        if self._nameless:
            # CRIU has linked them by now, and only the images say how.
            self._start(remaps)
        elif remaps:
            raise LockedError(
                f"a file that the job has open has lost its name in {os.path.dirname(remaps[0])} during the checkpoint",
                hint="a process outside the job has removed or replaced it: try again",
            )
        helper, self._helper = self._helper, None
        if helper is None:
            return 0
        try:
            return int(await helper.result())
        finally:
            await helper.cancel()

    async def cancel(self) -> None:
        helper, self._helper = self._helper, None
        if helper is not None:
            await helper.cancel()

    def remaps(self) -> tuple[str, ...]:
        """The links that CRIU has made, which it takes away again at the release (images remap-fpath and files)."""
        images = self._capsule.images
        remaps = imagefile.read(self._directory, "remap-fpath.img", images.remap_file_path_pb2.remap_file_path_entry)
        linked = {entry.remap_id for entry in remaps if entry.remap_type == images.remap_file_path_pb2.LINKED}
        if not linked:
            return ()
        files = imagefile.read(self._directory, "files.img", images.fdinfo_pb2.file_entry)
        return tuple(sorted({imagefile.path(entry.reg) for entry in files if entry.id in linked}))

    @property
    def read(self) -> int:
        """How many files the tasks only read."""
        return len(self._read)

    def loosen(self) -> None:
        """After the dump: let CRIU not compare the sizes of what the tasks only read. Files may grow, and be edited, as
        long as a job runs; whether they are the same is looked at by inode (rollback.link)."""

        def edit(entry: Any) -> bool:
            if imagefile.path(entry.reg) not in self._read:
                return False
            entry.reg.ClearField("size")
            return True

        if self._read:
            imagefile.change(self._directory, "files.img", self._capsule.images.fdinfo_pb2.file_entry, edit)

    async def _work[R](self, function: child.Function[R], keep: Iterable[int] = ()) -> R:
        self._helper = child.Helper(self._capsule.reaper, function, identity=self._capsule.identity, keep=keep)
        helper = self._helper
        try:
            result: R = await helper.result()
            return result
        finally:
            await self.cancel()

    def _request(self, elsewhere: frozenset[bytes]) -> snapshot.Request:
        others = {path for path, known in self._identities.items() if known in elsewhere}
        gone = [tree for tree in self._trees if tree in others]
        kept = [tree for tree in self._trees if tree not in others]
        # A tree is saved whole, by one capsule, also what others have open in it.
        mine = [
            file
            for file in self._files
            if file.path not in others and (scan.below(file.path, kept) or not scan.below(file.path, gone))
        ]
        return snapshot.Request(
            files=[
                snapshot.Wanted(f.path, f.status.st_dev, f.status.st_ino, f.append, f.leased is not None) for f in mine
            ],
            trees=kept,
            excluded=self._excluded,
            limit=self._limit,
            elsewhere=sorted(others),
            remote=network_devices(),
            nameless=[
                snapshot.Nameless(
                    path=file.path,
                    device=file.status.st_dev,
                    inode=file.status.st_ino,
                    holder=file.holder,
                    elsewhere=_nameless_identity(file) in elsewhere or scan.below(file.path, gone),
                )
                for file in self._nameless
            ],
            read=[ReadFile(os.fsencode(path), now.st_ino, now.st_size) for path, now in self._read.items()],
        )

    def _remote(self) -> list[str]:
        devices = network_devices()
        return [file.path for file in self._files if file.status.st_dev in devices and file.leased is None]

    def _open(self, truncate: int) -> list[int]:
        """The two files for what is saved; truncate: os.O_TRUNC or 0."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | truncate
        return [os.open(name, flags, 0o600, dir_fd=self._directory) for name in (FILES_LIST, FILES_DATA)]


def _nameless_identity(file: scan.NamelessFile) -> bytes:
    return scan.identity(file.path + scan.DELETED, file.status)


def _tree_identity(tree: str) -> bytes:
    """b"" where there is none: nobody else has it then either, or each has its own. The first byte chooses who saves
    it (the coordinator's saved_elsewhere): 0 is the first capsule, which has copied it ahead."""
    try:
        status = os.stat(tree, follow_symlinks=False)
    except OSError:
        return b""
    if status.st_dev in network_devices():
        # Nodes keep what they know of a directory for a while: times and sizes may differ, and it is the same one.
        return b"\0" + blake3(f"{status.st_ino} ".encode() + os.fsencode(tree)).digest(length=15)
    return b"\0" + scan.identity(tree, status)[1:]


def network_devices(mountinfo: str | None = None) -> frozenset[int]:
    """st_dev of the file systems that are other machines'. mountinfo: of this process, if not given."""
    if mountinfo is None:
        with open("/proc/self/mountinfo", errors="surrogateescape") as file:
            mountinfo = file.read()
    return frozenset(_devices(mountinfo.splitlines()))


def _devices(lines: Iterable[str]) -> Iterable[int]:
    for line in lines:
        before, _, after = line.partition(" - ")
        kind = after.split(" ", 1)[0]
        if kind.split(".")[0] in _NETWORK_TYPES:
            major, _, minor = before.split()[2].partition(":")
            yield os.makedev(int(major), int(minor))


async def link(home: Capsule, directory: int) -> None:
    """All capsules' files are back: see that those are there too which the job only reads, and give CRIU the names by
    which it finds those whose own were removed. Raises HpccrError naming one."""
    await _with_list(home, directory, rollback.link)


async def unlink(home: Capsule, directory: int) -> None:
    """After a restore that was given up: take those names away again."""
    await _with_list(home, directory, rollback.unlink)


async def _with_list(home: Capsule, directory: int, work: Callable[[int], None]) -> None:
    fd = os.open(FILES_LIST, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        await child.work(home.reaper, lambda: work(fd), identity=home.identity, keep=[fd])
    finally:
        os.close(fd)


async def roll_back(home: Capsule, directory: int, excluded: Sequence[bytes]) -> int:
    """Put the files of a fetched fragment back; how many were not as they were. excluded: FileRules.excluded of the run
    that is about to begin. Raises HpccrError naming a file."""
    fds: list[int] = []
    try:
        for name in (FILES_LIST, FILES_DATA):
            fds.append(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory))
        own = home.network.own if home.network is not None else 0
        work = lambda: rollback.roll_back(fds[0], fds[1], own, map(os.fsdecode, excluded))  # noqa: E731
        return int(await child.work(home.reaper, work, identity=home.identity, keep=fds))
    except FileNotFoundError as error:
        raise HpccrError(f"the checkpoint has no {error.filename}: it was made by another version of hpccr") from None
    finally:
        for fd in fds:
            os.close(fd)
