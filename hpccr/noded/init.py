"""Capsule init: pid 1 of a capsule's namespaces. `python -I -m hpccr.noded.init --fd N`, started by hpccrd as root.

It makes the namespaces, then serves hpccrd's requests (control.py) until the socket closes; its end is the end of
everything in the capsule. It is outside the dump and the user cannot signal it. It stays single-threaded and opens no
path that the user controls: what needs that runs in a helper process with the user's ids (child.py).
"""

from __future__ import annotations

import argparse
import array
import asyncio
import os
import socket
import sys
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import msgspec

from hpccr.errors import ExitCode, HpccrError
from hpccr.noded import child, criu, interface, jobfiles, launch, mounts, outside
from hpccr.noded.capsule import Capsule, Streams, set_last_pid
from hpccr.noded.checkpoint import Checkpoint
from hpccr.noded.control import (
    MAX_PACKET,
    Build,
    Built,
    InitPrepare,
    InitReply,
    InitRequest,
    InitRestore,
    InitRollBack,
    Launch,
    Network,
    NetworkReady,
)
from hpccr.noded.hold import Hold, Nft, library
from hpccr.noded.quiesce import Outcome, Ranks, Wishes
from hpccr.noded.reaper import Reaper
from hpccr.noded.restoration import Restoration
from hpccr.wire.messages import (
    Abort,
    Aborted,
    Dump,
    Exited,
    Failed,
    Freeze,
    Message,
    Quiesce,
    Release,
    Resume,
    Resumed,
    RolledBack,
    Signal,
    Started,
    Survey,
    Unheld,
    Unhold,
    Wanted,
)

_MAX_FDS = 253  # SCM_MAX_FD
_NAMESPACES = os.CLONE_NEWNS | os.CLONE_NEWUTS | os.CLONE_NEWNET | os.CLONE_NEWPID


class Control:
    """The socket to hpccrd."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._decoder: msgspec.msgpack.Decoder[InitRequest] = msgspec.msgpack.Decoder(InitRequest)

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> tuple[InitRequest, list[int]] | None:
        """The next request and its descriptors, waiting for it; None at the end. Raises HpccrError for no request."""
        space = socket.CMSG_SPACE(_MAX_FDS * 4)
        data, ancillary, flags, _ = self._socket.recvmsg(MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if not data:
            return None
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise HpccrError("a packet was cut off")
            return self._decoder.decode(data), list(fds)
        except (msgspec.MsgspecError, HpccrError) as error:
            for fd in fds:
                os.close(fd)
            raise HpccrError(f"not a request to capsule init: {error}") from None

    def send(self, reply: InitReply) -> None:
        try:
            self._socket.send(msgspec.msgpack.encode(reply))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)  # hpccrd is gone, and so is the capsule


def failed(error: HpccrError) -> Failed:
    return Failed(code=int(error.code), message=error.message, hint=error.hint)


class Init:
    """Serves the requests of one capsule. Strictly one at a time but for Signal and Abort."""

    def __init__(self, control: Control, capsule: Capsule) -> None:
        self._control = control
        self._capsule = capsule
        self._checkpoint: Checkpoint | None = None
        self._restoration: Restoration | None = None
        self._ranks = Ranks(capsule.identity)
        self._directory: int | None = None
        self._task: asyncio.Task[None] | None = None
        self._abort_reason = ""
        self._aborting: asyncio.Task[None] | None = None
        self._settling = False
        """Whether the request under way is past being cancelled: it lets the tasks go, or undoes what it did."""
        self._silent = False
        """Whether the launch root's end is known to hpccrd: it asked for it."""

    async def serve(self) -> NoReturn:
        loop = asyncio.get_running_loop()
        self._capsule.reaper.start(loop)
        loop.add_reader(self._control.fileno(), self._readable)
        self._wishes = Wishes(lambda: self._control.send(Wanted()))
        await loop.create_future()
        raise AssertionError("never set")

    def _readable(self) -> None:
        try:
            packet = self._control.receive()
        except HpccrError as error:
            self._control.send(failed(error))
            return
        except ConnectionResetError:
            packet = None
        if packet is None:
            # Whatever is going on: the kernel kills everything in the pid namespace with its init.
            os._exit(0)
        request, fds = packet
        if isinstance(request, Signal):
            self._signal(request.signum)
        elif isinstance(request, Abort):
            self._abort_reason = request.reason
            if self._aborting is None:
                self._aborting = asyncio.create_task(self._abort())
        elif self._task is not None or self._aborting is not None:
            self._control.send(failed(HpccrError("capsule init is busy with another request")))
        else:
            self._task = asyncio.create_task(self._serve_one(request, fds))
            return
        for fd in fds:
            os.close(fd)

    async def _serve_one(self, request: InitRequest, fds: list[int]) -> None:
        try:
            reply: Any = await self._handlers()[type(request)](request, fds)
        except HpccrError as error:
            await self._undo()
            reply = failed(error)
        except asyncio.CancelledError:
            reply = Failed(code=int(ExitCode.FAILED), message=f"aborted: {self._abort_reason}")
        except Exception as error:
            await self._undo()
            reply = failed(HpccrError(f"capsule init: {type(error).__name__}: {error}"))
        finally:
            for fd in fds:
                os.close(fd)
            self._task = None
        self._control.send(reply)

    def _handlers(self) -> dict[type[Message], Callable[[Any, list[int]], Coroutine[Any, Any, Message]]]:
        return {
            Network: self._network,
            Launch: self._launch,
            Quiesce: self._quiesce,
            InitPrepare: self._prepare,
            Freeze: self._freeze,
            Survey: self._survey,
            Dump: self._dump,
            Release: self._release,
            InitRollBack: self._roll_back,
            InitRestore: self._restore,
            Resume: self._resume,
            Unhold: self._unhold,
            Build: self._again,
        }

    async def _again(self, request: Build, fds: list[int]) -> Message:
        raise HpccrError("the capsule is built already")

    async def _network(self, request: Network, fds: list[int]) -> Message:
        if request.uplink:
            child.call(lambda: interface.translate(request))
        self._capsule.network = request
        return NetworkReady()

    async def _launch(self, request: Launch, fds: list[int]) -> Message:
        if self._capsule.root:
            raise HpccrError("the capsule has its job already")
        memfd, rest = fds[0], fds[1:]
        environment = msgspec.msgpack.decode(os.pread(memfd, os.fstat(memfd).st_size, 0), type=dict[bytes, bytes])
        streams = Streams.take(rest, stdin=request.stdin, merged=request.merged)
        self._capsule.stdio = streams.inodes()
        self._capsule.root = launch.start(
            request.argv,
            environment,
            request.cwd,
            self._capsule.identity,
            cgroups=self._capsule.cgroups,
            stdio=(streams.stdin, streams.stdout, streams.stderr),
            private=self._capsule.places,
        )
        self._watch_root()
        return Started(pid=self._capsule.root)

    def _watch_root(self) -> None:
        def ended(future: asyncio.Future[int]) -> None:
            if not self._silent:
                self._control.send(Exited(code=future.result()))

        self._capsule.reaper.watch(self._capsule.root).add_done_callback(ended)

    def _signal(self, signum: int) -> None:
        if self._capsule.root:
            try:
                os.kill(self._capsule.root, signum)
            except ProcessLookupError:
                pass  # it has ended: Exited says so

    async def _quiesce(self, request: Quiesce, fds: list[int]) -> Message:
        self._under_way()
        return await self._ranks.stage(request)

    async def _prepare(self, request: InitPrepare, fds: list[int]) -> Message:
        if not self._capsule.root or self._checkpoint is not None:
            raise HpccrError("there is no job to checkpoint" if not self._capsule.root else "a checkpoint is under way")
        self._directory = os.dup(fds[0])
        self._checkpoint = Checkpoint(self._capsule, request, self._directory)
        return await self._checkpoint.prepare()

    def _under_way(self) -> Checkpoint:
        if self._checkpoint is None:
            raise HpccrError("no checkpoint is under way")
        return self._checkpoint

    async def _freeze(self, request: Freeze, fds: list[int]) -> Message:
        return await self._under_way().freeze()

    async def _survey(self, request: Survey, fds: list[int]) -> Message:
        return await self._under_way().survey()

    async def _dump(self, request: Dump, fds: list[int]) -> Message:
        return await self._under_way().dump(request.elsewhere)

    async def _release(self, request: Release, fds: list[int]) -> Message:
        checkpoint = self._under_way()
        self._silent = self._silent or request.kill
        self._settling = True
        try:
            released = await checkpoint.release(kill=request.kill)
        finally:
            self._settling = False
        self._checkpoint = None
        self._close_directory()
        if not request.kill:
            self._ranks.end(Outcome.RESUMED)
        return released

    async def _roll_back(self, request: InitRollBack, fds: list[int]) -> Message:
        if self._capsule.root:
            raise HpccrError("the capsule has its job already")
        if not request.image.files:
            return RolledBack(0)
        return RolledBack(await jobfiles.roll_back(self._capsule, fds[0], request.excluded))

    async def _restore(self, request: InitRestore, fds: list[int]) -> Message:
        if self._capsule.root:
            raise HpccrError("the capsule has its job already")
        self._directory = os.dup(fds[0])
        streams = Streams.take(fds[1:], stdin=request.stdin, merged=request.merged)
        self._restoration = Restoration(self._capsule, request, self._directory, streams)
        restored = await self._restoration.prepare()
        self._watch_root()
        return restored

    async def _resume(self, request: Resume, fds: list[int]) -> Message:
        if self._restoration is None:
            raise HpccrError("nothing was restored")
        await self._restoration.resume()
        self._restoration = None
        self._close_directory()
        # Still under the hold: see outside.end().
        count = outside.end(self._capsule.inside)
        if count:
            print(
                f"hpccr: {count} connections to outside the job were aborted, as after every restart", file=sys.stderr
            )
        return Resumed()

    async def _unhold(self, request: Unhold, fds: list[int]) -> Message:
        self._capsule.hold.off()
        self._ranks.end(Outcome.RESTARTED)
        return Unheld()

    async def _abort(self) -> None:
        if self._task is not None:
            task = self._task
            # After a release the tasks may run again already, or be dead; and who undoes by himself answers by himself.
            if not self._settling:
                task.cancel()
            await asyncio.wait([task])
        await self._undo()
        self._aborting = None
        self._control.send(Aborted())

    async def _undo(self) -> None:
        """Give up the checkpoint or restore that is under way, if any. If that fails the capsule ends: nobody knows
        what state its tasks are in."""
        self._settling = True
        try:
            await self._give_up()
        except Exception:
            traceback.print_exc()
            os._exit(1)
        finally:
            self._settling = False

    async def _give_up(self) -> None:
        if self._checkpoint is not None:
            await self._checkpoint.abort()
            self._checkpoint = None
        if self._restoration is not None:
            self._silent = True
            await self._restoration.abort()
            self._restoration = None
        else:
            self._ranks.end(Outcome.ABANDONED)
        self._close_directory()

    def _close_directory(self) -> None:
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None


def build(control: Control) -> tuple[Build, tuple[int, ...]]:
    """Receive Build, enter the new namespaces and make the mounts. Returns in pid 1 of the capsule only.

    Gives the request and the cgroup.procs descriptors. Exits the process when hpccrd is gone or something fails.
    """
    packet = control.receive()
    if packet is None:
        sys.exit(0)
    request, fds = packet
    if not isinstance(request, Build) or not fds:
        raise HpccrError("the first request must be Build")
    os.setns(fds[0], os.CLONE_NEWNS)
    os.close(fds[0])
    os.unshare(_NAMESPACES)
    # The pid that hpccrd knows init by is the one its parent sees.
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.write(writing, str(pid).encode())
        os._exit(0)
    os.close(writing)
    outside = int(os.read(reading, 20))
    os.close(reading)
    os.setsid()
    os.umask(0o022)
    os.chdir("/")
    mounts.execute(mounts.plan(request))
    socket.sethostname(request.hostname)
    interface.begin()
    set_last_pid(request.first_pid - 1)
    control.send(Built(pid=outside))
    return request, tuple(fds[1:])


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="hpccr.noded.init", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--fd", type=int, required=True, help="SEQPACKET socket to hpccrd")
    sock = socket.socket(fileno=parser.parse_args().fd)
    os.set_inheritable(sock.fileno(), False)
    control = Control(sock)
    try:
        # In the user's mount namespace nothing more may be imported or loaded: it could be another Python's.
        rpc, images = criu.load()
        library()
        request, cgroups = build(control)
        nft = Nft()
    except HpccrError as error:
        control.send(failed(error))
        sys.exit(1)
    except OSError as error:
        control.send(Failed(code=int(ExitCode.FAILED), message=f"cannot make the capsule: {error}"))
        sys.exit(1)
    # hpccrd's protection from the OOM killer is not for what it starts: how much memory that takes the user decides.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")
    capsule = Capsule(
        identity=request.identity,
        cgroups=cgroups,
        places=mounts.places(request.private),
        criu_program=request.criu,
        rpc=rpc,
        images=images,
        reaper=Reaper(),
        hold=Hold(nft),
    )
    asyncio.run(Init(control, capsule).serve())
    raise AssertionError("serve() never returns")


if __name__ == "__main__":
    main()
