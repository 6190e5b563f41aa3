"""Restoring a capsule's tasks from images that hpccrd has verified, step by step: prepare, resume, unhold.

The images are as trusted as the site key: CRIU as root does what they say. But the paths in them lead where the user
likes: they are gone over first (recorded.py), no symbolic link is followed meanwhile (mounts.links), and afterwards it
is checked that the result is the user's and nothing more.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import replace

from hpccr.errors import CorruptError, HpccrError
from hpccr.noded import (
    accesses,
    child,
    jobfiles,
    launch,
    mounts,
    private,
    recorded,
    scan,
    segments,
    subreaper,
    terminals,
)
from hpccr.noded.capsule import Capsule, Streams, kill, set_last_pid, wait_ended
from hpccr.noded.control import InitRestore
from hpccr.noded.criu import Final
from hpccr.wire.messages import Restored

_LOW_PIDS = 1
"""ns_last_pid while tools work beside a restore: they must not take a pid that an image has, and no task ever had one
below capsule.first_pid (a pid namespace that wraps around starts again at 300)."""


class Restoration:
    """Each step is called once, in order; after one that raises HpccrError only abort() may follow."""

    def __init__(self, capsule: Capsule, request: InitRestore, directory: int, streams: Streams) -> None:
        """directory: the spool directory with the images; it and the streams are the caller's."""
        self._capsule = capsule
        self._request = request
        self._directory = directory
        old = request.image.stdio
        # Where both went into one pipe they still do, also if whoever restores has two places for them.
        self._streams = replace(streams, stderr=streams.stdout) if old.stdout == old.stderr else streams
        self._criu = capsule.criu(directory)
        self._times: private.Times = {}
        self._links = True
        """Whether symbolic links are followed."""

    async def prepare(self) -> Restored:
        """Bring the tasks back, stopped before their first instruction, and check them. The network is held."""
        image = self._request.image
        started = time.monotonic()
        unknown = [tree.path for tree in image.private if tree.path not in self._capsule.places]
        if unknown:
            raise HpccrError(
                f"the checkpoint has the private directories {', '.join(unknown)}, which this node does not make",
                hint="capsule.private must be the same as when the checkpoint was made",
            )
        reaps = check_images(self._capsule, self._directory, image.root_pid) and subreaper.SUPPORTED
        await self._capsule.criu(self._directory).probe()
        self._capsule.hold.on()
        segments.shorten(self._capsule.devices)
        set_last_pid(_LOW_PIDS)
        if image.files or image.read:
            await jobfiles.link(self._capsule, self._directory)
        self._times = await private.restore(self._capsule, image.private, self._directory)
        named = await self._look_at_paths()
        self._criu.restore(
            # As CRIU's sibling the root is init's child from the start, but CRIU traces it, and nobody else can.
            {"rst_sibling": not reaps, "ghost_limit": min(self._request.ghost_limit, 0xFFFFFFFF)},
            self._inherit(),
            self._join_job,
        )
        # The root waits for CRIU, alone: the other tasks are forked after this, and no path was gone yet.
        await self._reach("setup-namespaces")
        mounts.links(follow=False)
        self._links = False
        if reaps:
            await subreaper.make(image.root_pid)
        self._criu.answer(True)
        await self._reach("post-restore")
        segments.lengthen(self._capsule.devices)
        tree = self._tree()
        found = accesses.collect(tree)
        handles = [access.handle for access in found if access.handle >= 0]
        wanted = [access for access in found if not self._need_not_be_opened(access, named)]
        try:
            child.call(lambda: accesses.check(wanted), identity=self._capsule.identity, keep=handles)
        finally:
            for handle in handles:
                os.close(handle)
        terminals.restore(self._capsule, image.hung_up, self._directory)
        self._capsule.root = image.root_pid
        self._capsule.stdio = self._streams.inodes()
        return Restored(fetch_seconds=0.0, restore_seconds=time.monotonic() - started, bytes=0, tasks=image.tasks)

    async def _look_at_paths(self) -> recorded.Recorded:
        """See recorded.py."""
        images, reaper, identity = self._capsule.images, self._capsule.reaper, self._capsule.identity
        named = recorded.read(images, self._directory, identity.uid)
        sockets = named.sockets
        moved = await child.work(reaper, lambda: recorded.real_places(sockets), identity=identity) if sockets else []
        if moved:
            recorded.rename_sockets(images, self._directory, dict(moved))
            named = recorded.read(images, self._directory, identity.uid)
        await child.work(reaper, lambda: recorded.check(named), identity=identity)
        return named

    def _need_not_be_opened(self, access: accesses.Access, named: recorded.Recorded) -> bool:
        """Until they run, tasks still have descriptors of CRIU's own: its images and log, and directories of /proc. And
        what /proc has of the tasks cannot be opened as the user yet: it is what the images name, as no link was
        followed."""
        if access.device == os.stat("/proc").st_dev and access.path.startswith("/proc"):
            return stat.S_ISDIR(access.mode) or os.fsencode(access.path) in named.of_processes
        own = [os.fstat(self._directory), os.stat(self._criu.log, dir_fd=self._directory, follow_symlinks=False)]
        return any((access.device, access.inode) == (status.st_dev, status.st_ino) for status in own)

    def _inherit(self) -> dict[str, int]:
        """Which descriptor takes the place of which pipe of the images (criu(8), --inherit-fd)."""
        old = self._request.image.stdio
        pairs = (
            (old.stdin, self._streams.stdin),
            (old.stdout, self._streams.stdout),
            (old.stderr, self._streams.stderr),
        )
        return {f"pipe:[{inode}]": fd for inode, fd in pairs if inode and fd is not None}

    def _join_job(self) -> None:
        """In the process that becomes CRIU: the tasks inherit cgroups and affinity from it, images have neither."""
        launch.enter_cgroups(self._capsule.cgroups)
        if self._capsule.identity.cpus:
            os.sched_setaffinity(0, self._capsule.identity.cpus)

    def _follow_links(self) -> None:
        if not self._links:
            mounts.links(follow=True)
            self._links = True

    def _tree(self) -> scan.Tree:
        # With rst_sibling the restored root is init's child, not CRIU's.
        return scan.tree(self._request.image.root_pid, helpers=(self._criu.pid,))

    async def resume(self) -> None:
        """Let the tasks run. Raises HpccrError, with all tasks dead, if one would run as anybody but the user."""
        self._criu.answer(True)
        await self._reach("pre-resume")
        # CRIU takes root's identity off the tasks only after post-restore: here they have their own and still stand.
        tree, identity = self._tree(), self._capsule.identity
        scan.check_restored(scan.with_threads(tree), identity)
        pids = [task.pid for task in tree.tasks if task.state != "Z"]
        child.call(lambda: launch.lower(pids, identity), identity=identity)
        # CRIU goes no path any more, and the tasks want theirs.
        self._follow_links()
        private.set_directory_times(self._capsule, self._times)
        self._criu.answer(True)
        final = await self._criu.until()
        if not (isinstance(final, Final) and final.success):
            raise self._failure()
        set_last_pid(self._request.image.max_pid)

    async def _reach(self, barrier: str) -> None:
        if isinstance(await self._criu.until(barrier), Final):
            raise self._failure()

    def _failure(self) -> HpccrError:
        return HpccrError(
            f"CRIU could not restore the job: {self._criu.reason()}",
            hint="the nodes must have the same programs and libraries as those of the checkpoint, and CPU features",
        )

    async def abort(self) -> None:
        """Undo: no task of the images is left. The hold stays: such a capsule is of no use any more."""
        # CRIU ignores answers after post-restore, and a task it left behind would hang for ever.
        ended = kill(task.pid for task in self._tree().tasks)
        await self._criu.give_up()
        await wait_ended(ended)
        await wait_ended(kill(task.pid for task in self._tree().tasks))
        self._follow_links()
        if self._request.image.files:
            await jobfiles.unlink(self._capsule, self._directory)


def check_images(capsule: Capsule, directory: int, root: int) -> bool:
    """Every thread in the images has the user's ids and no capability. Raises CorruptError naming the image.

    Gives whether the root is a child subreaper. A seal already says that one of our nodes made them; this catches the
    checkpoint of another user.
    """
    identity = capsule.identity
    groups = {identity.gid, *identity.groups}
    reaps = False
    for name in os.listdir(directory):
        if not (name.startswith("core-") and name.endswith(".img")):
            continue
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        with os.fdopen(fd, "rb") as file:
            try:
                entries = capsule.images.load(file)["entries"]
            except Exception as error:  # whatever protobuf and pycriu raise for bytes that are no image
                raise CorruptError(f"{name} is no image of CRIU's: {error}") from None
        for entry in entries:
            if name == f"core-{root}.img":
                reaps = bool(entry.get("tc", {}).get("child_subreaper"))
            creds = entry.get("thread_core", {}).get("creds")
            if creds is None:
                continue  # a zombie has none
            if {creds[key] for key in ("uid", "euid", "suid", "fsuid")} != {identity.uid}:
                raise CorruptError(f"{name} holds a task of uid {creds['euid']}, not of uid {identity.uid}")
            has = {creds[key] for key in ("gid", "egid", "sgid", "fsgid")} | set(creds.get("groups", ()))
            if not has <= groups:
                raise CorruptError(
                    f"{name} holds a task with the groups {sorted(has - groups)}, the user is not in them"
                )
            if any(any(creds.get(key, ())) for key in ("cap_inh", "cap_prm", "cap_eff", "cap_amb")):
                raise CorruptError(f"{name} holds a task with capabilities")
    return reaps
