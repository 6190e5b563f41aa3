"""One checkpoint of a capsule, step by step: prepare, freeze, dump, release, or abort at any point before release."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial

import msgspec

from hpccr.errors import HpccrError, LockedError, UnsupportedError
from hpccr.model import CapsuleImage
from hpccr.noded import (
    accesses,
    capsule,
    child,
    imagefile,
    interrupted,
    jobfiles,
    outside,
    private,
    refusals,
    scan,
    services,
    syscalls,
    terminals,
)
from hpccr.noded.capsule import Capsule
from hpccr.noded.control import InitDumped, InitPrepare
from hpccr.noded.criu import GROWING, Final
from hpccr.wire.messages import Frozen, Prepared, Released, Surveyed

ABORT_SECONDS = 600.0
"""How long CRIU may take to come to its next barrier after an abort; then it is killed and its damage repaired."""

LOOK_SECONDS = 1.0
"""For a look at who waits in poll(2): it goes to processors on which tasks run."""

LOOK_AGAIN = (0.05, 0.2)
"""Seconds before another look at what would be refused. The tasks run: one that has just been forked is not among those
that were seen, and its end of a socket is then nobody's of the job. What is there to stay is seen again."""

FREEZE_SHARE = 2 / 3
"""Of checkpoint.freeze_timeout: what CRIU has to stop all tasks. The rest is for what comes then."""

PASSING = re.compile(
    r"In-flight connection|Name resolved on unconnected socket|Unknown state [23]\b|in-flight socket"
    r"|netlink: The socket has data to read"
)
"""Errors of CRIU's sk-inet.c and sk-unix.c for connections that are neither closed nor established or not accepted yet,
and of its sk-netlink.c for a question to the kernel (mpirun's for the network interfaces) whose answer is not read yet:
a matter of milliseconds."""

_TCP_REPAIR = 19
_TCP_REPAIR_OFF = 0


class Checkpoint:
    """Each step is called once, in order; the first that raises HpccrError has to be followed by abort()."""

    def __init__(self, home: Capsule, request: InitPrepare, directory: int) -> None:
        """directory: the spool directory of this checkpoint; owned by the caller."""
        self._capsule = home
        self._request = request
        self._directory = directory
        self._criu = home.criu(directory)
        self._saving = private.Saving(home, directory)
        self._criu_version = 0
        self._needed = self._occupied = 0
        self._stopped_at = 0.0
        self._files = jobfiles.Saving(home, request.files, directory)
        self._scanned = scan.Tree(home.root)
        self._polls: list[interrupted.Poll] = []
        self._waited: dict[int, interrupted.Poll] = {}
        self._interrupted: list[int] = []
        self._hung_up: tuple[int, ...] = ()

    def _tree(self, *, stopped: bool = False) -> scan.Tree:
        helpers = (self._criu.pid, *self._saving.pids, *self._files.pids)
        return scan.tree(self._capsule.root, helpers=helpers, stopped=stopped)

    async def _look(self) -> scan.Tree:
        """The tasks, once there is nothing about them to refuse. Raises UnsupportedError, HpccrError."""
        for pause in LOOK_AGAIN:
            try:
                return self._looked_through()
            except UnsupportedError as error:
                print(f"hpccr: looking again: {error.message}", file=sys.stderr)
                await asyncio.sleep(pause)
        return self._looked_through()

    def _looked_through(self) -> scan.Tree:
        tree = self._tree()
        refusals.check_namespaces(tree)
        refusals.check_traced(tree)
        refusals.check_open(tree, self._capsule.places)
        refusals.check_ghosts(tree, self._request.ghost_limit)
        scan.check_whole(tree, self._capsule.identity.uid)
        refusals.check_sessions(tree)
        private.check(self._capsule, self._request.private_limit)
        services.check(tree)
        if self._request.outside == "refuse":
            outside.refuse(tree, self._capsule.inside)
        return tree

    async def prepare(self) -> Prepared:
        """Check everything that can be checked while the tasks run, and bring CRIU to the point before the freeze."""
        tree = await self._look()
        self._occupied = scan.occupied(tree, self._capsule.places)
        self._needed = scan.estimate(tree, self._capsule.places, self._request.ghost_limit)
        self._needed += await self._files.measure(tree)
        self._check_room(self._needed)
        await self._check_reachable(tree)
        await self._files.copy_ahead()
        # The most of it, so that little is left when everything stands still.
        await self._files.write_out(tree)
        await self._capsule.criu(self._directory).probe()
        self._criu_version = await self._capsule.criu(self._directory).version()
        self._criu.on_killed = lambda: repair_sockets(self._tree())
        self._criu.dump(
            self._capsule.root,
            {
                "leave_running": True,
                "ghost_limit": min(self._request.ghost_limit, 0xFFFFFFFF),
                # Well before the coordinator's: CRIU knows which task does not stop, and why.
                "timeout": max(1, math.floor(self._request.freeze_timeout * FREEZE_SHARE)),
            },
        )
        await self._reach("pre-dump", "start")
        self._polls = await self._waiting()
        return Prepared(estimate=self._needed)

    def _check_room(self, needed: int) -> None:
        if needed > self._request.room:
            raise HpccrError(
                f"the dump may take {needed} bytes and the spool has {self._request.room} free",
                hint="free space below node.spool, put it on a larger disk, or lower node.spool_reserve",
            )

    async def _waiting(self) -> list[interrupted.Poll]:
        """Not worth to fail for, nor to wait long for a processor."""
        tree = self._tree()
        work = child.work(self._capsule.reaper, lambda: msgspec.to_builtins(interrupted.look(tree)), identity=None)
        try:
            return msgspec.convert(await asyncio.wait_for(work, LOOK_SECONDS), list[interrupted.Poll])
        except (TimeoutError, HpccrError) as error:
            print(f"hpccr: cannot see who waits in poll(2): {error!r}", file=sys.stderr)
            return []

    async def _check_reachable(self, tree: scan.Tree) -> None:
        """CRIU, as root, finds what the tasks have by name, and so has the user to."""
        reaper, identity = self._capsule.reaper, self._capsule.identity
        found = accesses.collect(tree)
        handles = [access.handle for access in found if access.handle >= 0]
        places = (*self._capsule.places, "/proc", "/sys")
        named = [access for access in found if access.handle < 0 and not scan.below(access.path, places)]
        try:
            await child.work(reaper, lambda: accesses.refuse_unreachable(named), identity=None)
            await child.work(reaper, lambda: accesses.refuse_unopenable(named), identity=identity)
        finally:
            for handle in handles:
                os.close(handle)

    async def freeze(self) -> Frozen:
        """Stop all tasks, hold the network, and check again what may have changed since prepare()."""
        self._stopped_at = time.monotonic()
        self._criu.answer(True)
        await self._reach("query-ext-files", "freeze the job")
        self._capsule.hold.on()
        self._waited = interrupted.still(self._polls)
        self._scanned = self._tree(stopped=True)
        self._interrupted = interrupted.waiting(self._scanned)
        scan.check_whole(self._scanned, self._capsule.identity.uid)
        refusals.check_open(self._scanned, self._capsule.places)
        # Other checkpoints of the node count on the room that this one was given.
        grown = scan.occupied(self._scanned, self._capsule.places) - self._occupied
        self._check_room(self._needed + max(0, grown))
        await services.cut(services.check(self._scanned))
        self._hung_up = terminals.save(self._capsule, self._scanned, self._directory)
        await self._files.write_out(self._scanned)
        return Frozen()

    async def survey(self) -> Surveyed:
        """What there is to save of files that other capsules may have too, now that they all stand still."""
        return Surveyed(await self._files.survey(self._scanned))

    async def dump(self, elsewhere: tuple[bytes, ...]) -> InitDumped:
        """Write everything into the spool directory: CRIU's images, private directories, the job's files."""
        self._criu.answer(True)  # first: to start the others takes time, in which CRIU is at work already
        self._files.start(frozenset(elsewhere))
        self._saving.start()
        image = CapsuleImage(
            root_pid=self._capsule.root,
            max_pid=scan.highest_id(self._scanned),
            tasks=len(self._scanned.tasks),
            stdio=self._capsule.stdio,
            private=self._saving.trees,
            hung_up=self._hung_up,
            criu_version=self._criu_version,
            kernel=os.uname().release,
            cpu_flags=scan.cpu_flags(),
        )
        await self._reach("post-dump", "dump the job")
        await self._saving.finish(self._files.remaps())
        saved = await self._files.finish()
        return InitDumped(image=msgspec.structs.replace(image, files=saved, read=self._files.read))

    async def release(self, *, kill: bool) -> Released:
        """Let the tasks run on, or kill them where they stand. The checkpoint is made in either case."""
        if kill:
            # CRIU has them stopped, and SIGKILL ends a stopped task without another instruction of its own; CRIU then
            # finds nobody to resume. The hold stays, so that no peer hears of their end.
            ended = capsule.kill(task.pid for task in self._scanned.tasks)
            self._criu.answer(True)
            await self._criu.until()
            await capsule.wait_ended(ended)
        else:
            self._let_wait()
            self._criu.answer(True)
            await self._criu.until()
            self._capsule.hold.off()
        frozen = time.monotonic() - self._stopped_at
        self._repair_images()
        return Released(frozen_seconds=frozen, criu_freeze_seconds=self._criu_seconds())

    def _let_wait(self) -> None:
        """Who waited in a call before the dump does so after it. Not worth to fail for: CRIU alone does not do it."""
        if self._interrupted:
            try:
                interrupted.mend(self._criu.pid, self._interrupted, self._waited, self._stopped_at)
            except (OSError, HpccrError) as error:
                print(f"hpccr: waiting calls of the job end with EINTR: {error!r}", file=sys.stderr)

    def _repair_images(self) -> None:
        """See interrupted.py and jobfiles.py. The tasks run, or are dead, and nobody has read the images yet."""
        core = self._capsule.images.core_pb2.core_entry
        for name in os.listdir(self._directory):
            if name.startswith("core-") and name.endswith(".img"):
                poll = self._waited.get(int(name.removeprefix("core-").removesuffix(".img")))
                repair = partial(interrupted.repair, poll=poll, stopped=self._stopped_at)
                imagefile.change(self._directory, name, core, repair)
        self._files.loosen()

    def _criu_seconds(self) -> float:
        """CRIU's own measure of how long the tasks were stopped; 0 where it did not write its statistics."""
        try:
            fd = os.open("stats-dump", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._directory)
        except FileNotFoundError:
            return 0.0
        with os.fdopen(fd, "rb") as file:
            (entry,) = self._capsule.images.load(file)["entries"]
        return float(int(entry["dump"]["freezing_time"]) + int(entry["dump"]["frozen_time"])) / 1e6

    async def abort(self) -> None:
        """Give up wherever it stands: the tasks run on as if nothing had been. May be called more than once."""
        if self._criu.at == "post-dump":
            self._let_wait()
        # First of all the tasks: a helper that storage keeps from dying must not keep them.
        try:
            await asyncio.wait_for(self._criu.give_up(), ABORT_SECONDS)
        except TimeoutError:
            print(f"hpccr: CRIU does not give up after {ABORT_SECONDS:.0f} s, killing it", file=sys.stderr)
            await self._criu.kill()
        self._capsule.hold.off()
        await self._files.cancel()
        await self._saving.cancel()

    async def _reach(self, barrier: str, what: str) -> None:
        word = await self._criu.until(barrier)
        if isinstance(word, Final):
            reason = self._criu.reason()
            if PASSING.search(reason):
                raise LockedError(
                    f"CRIU could not {what}: a connection was just being made, or the kernel asked ({reason})",
                    hint="try again: this passes as soon as the connection is accepted or the answer read",
                )
            if reason == GROWING:
                raise LockedError(
                    f"CRIU could not {what}: {reason}",
                    hint="try again when the program starts fewer of them",
                )
            raise HpccrError(
                f"CRIU could not {what}: {reason}",
                hint="`hpccr doctor` checks what CRIU needs on a node",
            )


def repair_sockets(tree: scan.Tree) -> None:
    """Take all TCP sockets out of the repair mode that a CRIU which was killed left them in."""
    for task in tree.tasks:
        with suppress(ProcessLookupError, FileNotFoundError):
            pidfd = os.pidfd_open(task.pid)
            try:
                for fd in os.listdir(f"/proc/{task.pid}/fd"):
                    if os.readlink(f"/proc/{task.pid}/fd/{fd}").startswith("socket:"):
                        _repair(syscalls.pidfd_getfd(pidfd, int(fd)))
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            finally:
                os.close(pidfd)


def _repair(fd: int) -> None:
    with socket.socket(fileno=fd) as copy:
        tcp = copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM
        # One that listens is never in repair, and the kernel refuses to talk about it.
        if tcp and copy.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR):
            copy.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _TCP_REPAIR_OFF)
