"""CRIU over RPC: one `criu swrk` process per dump or restore, its notifications used as barriers.

Protocol (criu/images/rpc.proto): packets on a SEQPACKET socket pair; a notification waits until it is answered,
anything else is the final answer, end of file is failure. Answering false, or closing our end, makes CRIU undo what it
did; killing CRIU does not, and can leave tasks broken, so that is done only when there is no other way.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hpccr.errors import HpccrError, UnsupportedError
from hpccr.noded import child, syscalls
from hpccr.noded.control import Identity
from hpccr.noded.reaper import Reaper
from hpccr.noded.said import printable

CPU_FPU = 1
CPU_INS = 8
"""Bits of criu_opts.cpu_cap (criu/include/cr_options.h): floating point state and instruction set are compared."""

CACHE = "/run/criu.kdat"
"""Where CRIU keeps what it found out about the kernel."""

MAX_LOGGED = 40
"""Lines of one failure in hpccrd's log."""

GROWING = "processes or threads are started faster than CRIU can stop them"
"""Its own words for what CRIU gives up at without any."""

_MAX_PACKET = 64 << 10
_CONSEQUENCE = re.compile(r"\d+ exited|(?:Restoring|Dumping) FAILED|rlimit")
_GONE = re.compile(r"No such (?:process|file or directory)")
_GROWING = re.compile(r"Collected \(-1 attempts, [1-9]\d* in_progress\)")
_ERROR_LINE = re.compile(r"^\([^)]*\)\s*(?:\d+:\s*)?(Error \(.*)$")

log = logging.getLogger(__name__)


def load() -> tuple[ModuleType, ModuleType]:
    """pycriu's message classes (rpc_pb2) and image reader. Raises UnsupportedError if pycriu is not installed."""
    try:
        import pycriu.images
        import pycriu.rpc_pb2
    except ImportError as error:
        raise UnsupportedError(
            f"cannot import pycriu: {error}",
            hint="install the python3-pycriu package and make its directory visible to hpccr's Python",
        ) from None
    return pycriu.rpc_pb2, pycriu.images


@dataclass(frozen=True)
class Notification:
    """CRIU waits at the point `name` until answer()."""

    name: str
    pid: int


@dataclass(frozen=True)
class Final:
    """CRIU's last word. pid: of the restored root."""

    success: bool
    pid: int = 0


class Criu:
    """One run of CRIU. start() it, then next() and answer() in turn until next() gives a Final."""

    def __init__(self, rpc: ModuleType, reaper: Reaper, *, program: str, identity: Identity, directory: int) -> None:
        """directory: the images directory, a descriptor of this process that stays open while CRIU runs."""
        self._rpc = rpc
        self._reaper = reaper
        self._program = program
        self._identity = identity
        self._directory = directory
        self._socket: socket.socket | None = None
        self._word: asyncio.Task[bytes] | None = None
        """CRIU's next word is waited for, or has come and nobody has taken it yet."""
        self._exited: asyncio.Future[int] | None = None
        self.pid = 0
        self.at = ""
        """The notification that waits for an answer; empty if none does."""
        self.final: Final | None = None
        self.on_killed: Callable[[], None] | None = None
        """Called at once when CRIU dies of a signal: it will not have cleaned up after itself."""
        self.log = ""

    @property
    def running(self) -> bool:
        return self._exited is not None and not self._exited.done()

    def dump(self, pid: int, options: Mapping[str, Any]) -> None:
        """Start the dump of the tree below `pid`. options: of criu_opts."""
        self.log = "dump.log"
        self._start()
        self._send(self._request(self._rpc.DUMP, {**options, "pid": pid}))

    def restore(self, options: Mapping[str, Any], inherit: Mapping[str, int], before_exec: Callable[[], None]) -> None:
        """Start a restore. inherit: key of the image's file -> descriptor of this process to put in its place.

        before_exec is called in the process that becomes CRIU, still as root: what it changes the tasks inherit.
        """
        self.log = "restore.log"
        self._start(keep=list(inherit.values()), before_exec=before_exec)
        request = self._request(self._rpc.RESTORE, options)
        for key, fd in inherit.items():
            request.opts.inherit_fd.add(key=key, fd=fd)
        self._send(request)

    async def version(self) -> int:
        """major * 10000 + minor * 100 + sublevel."""
        self._start()
        try:
            self._send(self._rpc.criu_req(type=self._rpc.VERSION))
            data = await self._receive()
        finally:
            await self._dismiss()
        answer = self._rpc.criu_resp.FromString(data) if data else None
        if answer is None or not answer.success:
            raise HpccrError(f"{self._program} does not tell its version", hint="is it CRIU 4.2 or newer?")
        version = answer.version
        return int(version.major_number * 10000 + version.minor_number * 100 + version.sublevel)

    async def probe(self) -> None:
        """Let CRIU find out about this kernel and keep it, unless it has (CACHE).

        It talks TCP over lo, so not under a hold, and to nftables, which wants real and effective ids to be equal.
        """
        if os.path.exists(CACHE):
            return
        self._start(root=True)
        features = self._rpc.criu_features(mem_track=True)
        try:
            self._send(self._rpc.criu_req(type=self._rpc.FEATURE_CHECK, features=features))
            await self._receive()
        finally:
            await self._dismiss()

    async def next(self) -> Notification | Final:
        """The next notification or, when CRIU has exited, the Final."""
        if self.final is not None:
            return self.final
        data = await self._receive()
        if not data:
            return await self._finish(Final(False))
        answer = self._rpc.criu_resp.FromString(data)
        if answer.type == self._rpc.NOTIFY:
            self.at = answer.notify.script
            return Notification(self.at, answer.notify.pid)
        return await self._finish(Final(answer.success, answer.restore.pid if answer.HasField("restore") else 0))

    def answer(self, success: bool) -> None:
        """Let CRIU go on from the notification it waits at, or make it undo everything."""
        self.at = ""
        self._send(self._rpc.criu_req(type=self._rpc.NOTIFY, notify_success=success))

    async def until(self, *names: str) -> Notification | Final:
        """Answer true to all notifications up to the first of `names` (left waiting) or the Final."""
        while True:
            word = await self.next()
            if isinstance(word, Final) or word.name in names:
                return word
            self.answer(True)

    async def give_up(self) -> None:
        """Answer false now and at every notification to come, until CRIU has exited."""
        if self._socket is None:
            # It has said its last, and may not be gone yet.
            if self.running:
                await self._finish(Final(False))
            return
        if self.at:
            self.answer(False)
        while not isinstance(await self.next(), Final):
            self.answer(False)

    async def kill(self) -> None:
        """The last resort: tasks it worked on may be left damaged (their TCP sockets can be repaired)."""
        if self.running:
            os.kill(self.pid, signal.SIGKILL)
        await self._finish(Final(False))

    def reason(self) -> str:
        """The errors in CRIU's log, for a message; many of them go to hpccrd's log, as CRIU's ends with the images."""
        try:
            fd = os.open(self.log, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._directory)
        except OSError as error:
            return f"CRIU failed and left no log ({error.strerror})"
        with os.fdopen(fd, errors="replace") as file:
            found = errors(file.read())
        for line in found[:MAX_LOGGED]:
            log.warning("CRIU of user %d: %s", self._identity.uid, line)
        return "; ".join(message(found)) or "CRIU failed and its log names no error"

    def _request(self, kind: int, options: Mapping[str, Any]) -> Any:
        return self._rpc.criu_req(
            type=kind,
            opts=self._rpc.criu_opts(
                images_dir_fd=self._directory,
                log_level=4,
                log_file=self.log,
                notify_scripts=True,
                tcp_established=True,
                ext_unix_sk=True,
                file_locks=True,
                link_remap=True,
                # The hold is ours (hold.py): CRIU's own would be lifted capsule by capsule.
                network_lock=self._rpc.SKIP,
                # Slurm put the job's processes where they belong and will do so again.
                manage_cgroups_mode=self._rpc.IGNORE,
                cpu_cap=CPU_FPU | CPU_INS,
                # Whether the user may have a file is checked by trying (accesses.py), not by its mode then.
                skip_file_rwx_check=True,
                **options,
            ),
        )

    def _start(
        self, *, keep: Sequence[int] = (), before_exec: Callable[[], None] | None = None, root: bool = False
    ) -> None:
        # CRIU resolves images_dir_fd through the pid of the socket pair's maker: this process.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Its number must not collide with one that a restored descriptor comes in at.
        end = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD, 3)
        pid = os.fork()
        if pid == 0:
            try:
                if before_exec is not None:
                    before_exec()
                child.reset_signals()
                child.redirect(None, None, None)
                syscalls.join_new_session_keyring()
                syscalls.close_all_but([end, *keep])
                for fd in keep:
                    os.set_inheritable(fd, True)
                # prlimit compares the caller's real ids with the task's: without CAP_SYS_RESOURCE (as in many
                # containers) CRIU could not read limits otherwise. Only then, for the user may signal and reschedule
                # what has his real ids.
                if not root and not syscalls.has_capability(syscalls.CAP_SYS_RESOURCE):
                    os.setresgid(self._identity.gid, 0, 0)
                    os.setresuid(self._identity.uid, 0, 0)
                argv = [self._program, "--no-default-config", "swrk", str(end)]
                os.execvpe(self._program, argv, child.ENVIRONMENT)  # noqa: S606 - there is no shell to want
            finally:
                os._exit(127)
        os.close(end)
        theirs.close()
        ours.setblocking(False)
        self.pid = pid
        self._socket = ours
        self._exited = self._reaper.watch(pid)
        self._exited.add_done_callback(self._ended)

    def _ended(self, exited: asyncio.Future[int]) -> None:
        if exited.result() < 0 and self.on_killed is not None:
            self.on_killed()

    def _send(self, request: Any) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(request.SerializeToString())
        except (BrokenPipeError, ConnectionResetError):
            pass  # CRIU is gone: the next receive finds the end of file

    async def _receive(self) -> bytes:
        if self._socket is None:
            return b""
        if self._word is None:
            self._word = asyncio.create_task(self._listen(self._socket))
        # An abort may cancel whoever waits here at the very moment at which the word comes. It must not be lost: CRIU
        # waits for the answer to it.
        word = await asyncio.shield(self._word)
        self._word = None
        return word

    @staticmethod
    async def _listen(sock: socket.socket) -> bytes:
        try:
            return await asyncio.get_running_loop().sock_recv(sock, _MAX_PACKET)
        except ConnectionResetError:
            return b""

    async def _dismiss(self) -> None:
        """_finish(), at whatever moment an abort cancels us: a CRIU that is still there would look like a task of the
        job."""
        try:
            await self._finish()
        except asyncio.CancelledError:
            await self._finish()
            raise

    async def _finish(self, final: Final | None = None) -> Final:
        """CRIU has said its last: close our end and wait for it to exit."""
        sock, self._socket = self._socket, None
        word, self._word = self._word, None
        if word is not None:
            word.cancel()
        if sock is not None:
            # Not when the cancelled word comes to it: the descriptor's number may be another's by then.
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        # An abort may cancel whoever waits here, and the future is others' too.
        code = await asyncio.shield(self._exited) if self._exited is not None else 0
        if code == 127:
            raise HpccrError(f"cannot execute {self._program}", hint="install CRIU 4.2 or newer, or set node.criu")
        self.at = ""
        self.final = final or Final(code == 0)
        return self.final


def errors(text: str) -> list[str]:
    """The lines of a CRIU log that report an error, without time and pid; what is only a consequence, as that a task
    exited, if there is nothing else. Names of the job's files are in them: no control character is left.

    When CRIU has looked for new tasks as often as it does (seize.c, collect_loop), it says so among what is no error.
    Then the cause is that they are too many, unless there are errors that are not of tasks that ended meanwhile."""
    found = [match[1] for line in text.splitlines() if (match := _ERROR_LINE.match(line))]
    causes = [line for line in found if not _CONSEQUENCE.search(line)]
    if _GROWING.search(text):
        # It has met each of them in each of its attempts.
        causes = [*dict.fromkeys(line for line in causes if not _GONE.search(line))]
        if not causes:
            return [GROWING]
    return [printable(line, len(line)) for line in causes or found]


def message(found: list[str]) -> list[str]:
    """Of the errors those to tell: with several tasks the first is the cause as a rule, and the last says how far it
    went."""
    return found if len(found) <= 3 else [*found[:2], found[-1]]
