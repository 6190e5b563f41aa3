"""A lease: one capsule of one user, from Create until nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

import hpccr
from hpccr.errors import HpccrError, PeerLostError, UsageError
from hpccr.noded import addresses, compatible, control, leftovers, lifecycle, network, peer, probe
from hpccr.noded.admission import check_command, check_create, check_excluded, check_stdio
from hpccr.noded.channel import Descriptors
from hpccr.noded.images import Dumping, Images
from hpccr.noded.initlink import Init
from hpccr.noded.lifecycle import State
from hpccr.noded.network import Plan
from hpccr.noded.node import Node, node_hosts, remove
from hpccr.noded.patience import SHORT, Patience
from hpccr.noded.spawned import memory_file
from hpccr.noded.spool import Directory
from hpccr.noded.transfer import Finished
from hpccr.wire import messages as m

log = logging.getLogger(__name__)

LAUNCH_PORT = 8474
"""Where launch roots listen, inside capsule networks."""
ABORT_TIMEOUT = 660.0
"""Seconds a capsule has to undo a checkpoint: more than init gives CRIU to come to a point where it can be stopped.
A capsule that does not manage is killed."""
MARGIN = 15.0
"""Seconds added to the deadlines of phases: the capsule's own come first and say more."""
LOOK_AT_SPOOL = 0.5
"""Seconds between two looks at the room in the spool during a dump."""
SPOOL_FULL = "the spool is full but for node.spool_reserve"
RELEASE = 300.0
"""Seconds for a release: the end of killed tasks may wait for their memory to be given back, or for a file server."""


def present[T](part: T | None) -> T:
    """A part that a capsule in the right state has; PeerLostError if the capsule was ended under the request."""
    if part is None:
        raise PeerLostError("the capsule is gone")
    return part


class Lease:
    """Requests on one capsule. perform() is called for one request at a time; abort(), signal() and end() at any."""

    def __init__(
        self, node: Node, who: peer.Credentials, examine: Callable[[], peer.Requester], emit: Callable[[m.Message], int]
    ) -> None:
        """examine(): the requester, checked (peer.examine). emit(message): send it if the peer is still there; gives
        the number of bytes the peer has not read yet."""
        self.name = secrets.token_hex(4)
        self.state = State.NEW
        self.lost = asyncio.Event()
        """Set when the capsule died without having been asked to."""
        self._node, self._who, self._examine, self._emit = node, who, examine, emit
        self._create: m.Create | None = None
        self._identity: control.Identity | None = None
        self._init: Init | None = None
        self._runtime: Directory | None = None
        self._namespace = -1
        self._making: asyncio.Future[Plan] | None = None
        self._plan: Plan | None = None
        self._images = Images(node, self.name, emit)
        self._fetched: tuple[Finished, Directory] | None = None
        """What Fetch brought, until the restored tasks run; the directory is that of the images."""
        self._dumping: Dumping | None = None
        self._aborted: str | None = None
        self._giving_up: asyncio.Task[None] | None = None
        self._releasing = False
        self._ending: asyncio.Task[None] | None = None
        self._patience = Patience(node.config.checkpoint, self._give_up_quietly)

    # --- requests -----------------------------------------------------------------------------------------------

    async def perform(self, request: m.Message, descriptors: Descriptors) -> m.Message:
        """The reply to a request. Raises HpccrError; what is left of the capsule then, see lifecycle."""
        then = lifecycle.after(self.state, request)
        self._patience.end()
        try:
            reply = await self._dispatch(request, descriptors)
        except (HpccrError, OSError) as error:
            if isinstance(request, lifecycle.FATAL):
                await self.end()
            elif isinstance(request, lifecycle.CHECKPOINT):
                await self._give_up(str(error))
            if isinstance(error, OSError):
                raise HpccrError(f"{type(request).__name__} failed: {error}") from error
            raise
        # The job may have ended meanwhile, and then that is the state.
        if self.state not in (State.ENDED, State.GONE):
            self.state = then
            self._patience.begin(then)
        return reply

    async def _dispatch(self, request: m.Message, descriptors: Descriptors) -> m.Message:
        match request:
            case m.Create():
                return await self._do_create(request)
            case m.Connect():
                return await self._do_connect(request)
            case m.Start():
                return await self._do_start(request, descriptors)
            case m.Fetch():
                return await self._do_fetch(request)
            case m.RollBack():
                return await self._do_roll_back(request)
            case m.Restore():
                return await self._do_restore(request, descriptors)
            case m.Resume():
                return await self._the_init.request(request, m.Resumed, timeout=SHORT)
            case m.Unhold():
                reply = await self._the_init.request(request, m.Unheld, timeout=SHORT)
                self._fetched = None
                await self._images.drop_fetched()
                return reply
            case m.Quiesce():
                return await self._checkpointing(request, m.Quiesced, request.timeout_ms / 1000 + MARGIN)
            case m.Prepare():
                return await self._do_prepare(request)
            case m.Freeze():
                timeout = self._node.config.checkpoint.freeze_timeout + MARGIN
                return await self._checkpointing(request, m.Frozen, timeout)
            case m.Survey():
                timeout = self._node.config.checkpoint.freeze_timeout + MARGIN
                return await self._checkpointing(request, m.Surveyed, timeout)
            case m.Dump():
                return await self._do_dump(request)
            case m.Release():
                return await self._do_release(request)
            case m.Flush():
                return self._do_flush(request)
        raise UsageError(f"{type(request).__name__} is not a request on a capsule")

    @property
    def _the_init(self) -> Init:
        return present(self._init)

    async def _do_create(self, request: m.Create) -> m.Created:
        node, config = self._node, self._node.config
        check_create(request, node.name)
        subnet = addresses.subnet(config.network.subnet)
        hosts = addresses.hosts(subnet, request.capsules, node_hosts())
        await node.criu_ready.wait()
        requester = self._examine()
        try:
            self._create, self._identity = request, requester.identity
            self._runtime = node.runtime.create(self.name)
            self._init = Init(self.name, exited=self._on_exit, wanted=self._on_wanted, ended=self._on_loss)
            built = await self._init.request(
                control.Build(
                    hostname=addresses.hostname(request.capsule),
                    boot_id=addresses.boot_id(request.key, self._who.uid, request.capsule),
                    hosts=hosts,
                    private=config.capsule.private,
                    first_pid=config.capsule.first_pid,
                    criu=config.node.criu,
                    identity=requester.identity,
                ),
                control.Built,
                timeout=config.checkpoint.create_timeout,
                descriptors=requester.descriptors,
            )
        finally:
            requester.close()
        self._init.adopt(built.pid)
        leftovers.record_init(self._runtime, built.pid)
        self._namespace = os.open(f"/proc/{built.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._plan = plan = await self._make_network(request.capsule)
        node.vnis.add(plan.vni)
        for line in plan.describe():
            log.debug("capsule %s: %s", self.name, line)
        address, vni, key = plan.underlay.address, plan.vni, request.key
        ticket = node.key.ticket(capsule=request.capsule, address=address, vni=vni, key=key, uid=self._who.uid)
        log.info("capsule %s: %s of %s (uid %d), vni %d", self.name, request.capsule, key, self._who.uid, vni)
        return m.Created(
            endpoint=m.Endpoint(capsule=request.capsule, address=address, vni=vni, ticket=ticket),
            node=node.name,
            cpu_flags=node.cpu_flags,
        )

    async def _make_network(self, capsule: int) -> Plan:
        plumber = self._node.plumber
        self._making = asyncio.get_running_loop().run_in_executor(
            plumber.executor,
            lambda: plumber.make(
                name=self.name, capsule=capsule, namespace=self._namespace, choose=self._node.choose_vni
            ),
        )
        return await asyncio.shield(self._making)

    async def _do_connect(self, request: m.Connect) -> m.Connected:
        create, plan, config = present(self._create), present(self._plan), self._node.config
        endpoints = {endpoint.capsule: endpoint for endpoint in request.peers}
        if len(request.peers) != create.capsules or set(endpoints) != set(range(create.capsules)):
            raise UsageError(f"Connect names {len(endpoints)} capsules, the step has {create.capsules}")
        for endpoint in request.peers:
            if not self._node.key.admits(endpoint, create.key, self._who.uid):
                raise UsageError(
                    f"the ticket of capsule {endpoint.capsule} is not valid for {create.key} of uid {self._who.uid}",
                    hint="do all nodes have the same site key? `hpccr doctor` compares",
                )
        subnet = addresses.subnet(config.network.subnet)
        uplink = plan.uplink
        wanted = control.Network(
            device=network.DEVICE,
            mac=addresses.mac(create.capsule),
            address=addresses.address(subnet, create.capsule),
            prefix=subnet.prefixlen,
            mtu=plan.mtu,
            own=create.capsule,
            peers=tuple(
                control.Peer(
                    capsule=k,
                    mac=addresses.mac(k),
                    address=addresses.address(subnet, k),
                    underlay=endpoints[k].address,
                    vni=endpoints[k].vni,
                )
                for k in sorted(endpoints)
            ),
            uplink=network.UPLINK if uplink else "",
            uplink_address=str(uplink[2]) if uplink else "",
            uplink_prefix=uplink.prefixlen if uplink else 0,
            uplink_gateway=str(uplink[1]) if uplink else "",
            outside_source=addresses.OUTSIDE_SOURCE if uplink else "",
        )
        plumber, namespace = self._node.plumber, self._namespace
        await asyncio.get_running_loop().run_in_executor(plumber.executor, plumber.configure, wanted, namespace)
        await self._the_init.request(wanted, control.NetworkReady, timeout=config.checkpoint.create_timeout)
        return m.Connected()

    async def _do_start(self, request: m.Start, descriptors: Descriptors) -> m.Started:
        create, config = present(self._create), self._node.config
        check_command(request)
        check_stdio(request.stdin, request.merged, descriptors)
        address = addresses.address(addresses.subnet(config.network.subnet), create.capsule)
        launch = Path(hpccr.__file__).parent / "capsule" / "launch.py"
        argv = [sys.executable, "-I", "-S", str(launch), "--index", str(create.capsule)]
        argv += ["--address", address, "--port", str(LAUNCH_PORT), "--"]
        command = (*map(os.fsencode, argv), *request.argv)
        secret = {b"HPCCR_STEP_SECRET": create.secret.encode()}
        environment = memory_file(msgspec.msgpack.encode(request.env | secret))
        try:
            return await self._the_init.request(
                control.Launch(argv=command, cwd=request.cwd, stdin=request.stdin, merged=request.merged),
                m.Started,
                timeout=config.checkpoint.create_timeout,
                descriptors=[environment, *descriptors.numbers],
            )
        finally:
            os.close(environment)

    async def _do_fetch(self, request: m.Fetch) -> m.Fetched:
        finished, directory = await self._images.fetch(request, present(self._create), present(self._identity))
        node = self._node
        criu = await asyncio.to_thread(probe.criu_version, node.config.node.criu)
        compatible.check(present(finished.image), node=node.name, cpu_flags=node.cpu_flags, criu=criu)
        self._fetched = finished, directory
        return m.Fetched()

    async def _do_roll_back(self, request: m.RollBack) -> m.RolledBack:
        check_excluded(request.excluded)
        finished, fetched = present(self._fetched)
        directory = fetched.open()
        try:
            return await self._the_init.request(
                control.InitRollBack(image=present(finished.image), excluded=request.excluded),
                m.RolledBack,
                timeout=self._node.config.checkpoint.restore_timeout + MARGIN,
                descriptors=[directory],
            )
        finally:
            os.close(directory)

    async def _do_restore(self, request: m.Restore, descriptors: Descriptors) -> m.Restored:
        config = self._node.config.checkpoint
        check_stdio(request.stdin, request.merged, descriptors)
        finished, fetched = present(self._fetched)
        directory = fetched.open()
        try:
            restored = await self._the_init.request(
                control.InitRestore(
                    image=present(finished.image),
                    stdin=request.stdin,
                    merged=request.merged,
                    ghost_limit=config.ghost_limit,
                ),
                m.Restored,
                timeout=config.restore_timeout + MARGIN,
                descriptors=[directory, *descriptors.numbers],
            )
        finally:
            os.close(directory)
        return msgspec.structs.replace(
            restored, fetch_seconds=finished.seconds, bytes=finished.bytes, local=finished.local
        )

    # --- checkpoints --------------------------------------------------------------------------------------------

    async def _do_prepare(self, request: m.Prepare) -> m.Prepared:
        config = self._node.config.checkpoint
        self._aborted = None
        # By uid and job Slurm's epilog knows what it waits for (dist/epilog); the name is fresh though a failed
        # checkpoint of the same number may still be on its way out.
        whose = f"{self._who.uid}-{present(self._create).key.job}"
        fresh = f"{self.name}-{request.sequence}-{secrets.token_hex(2)}"
        directory = self._node.spool.create(f"{whose}-{fresh}")
        self._dumping = Dumping(request.sequence, request.checkpoint, directory)
        await self._images.supersede()
        room = await asyncio.to_thread(self._node.room, self.name)
        self._check_wanted()  # if it was given up meanwhile, the directory is gone
        fd = directory.open()
        try:
            prepared = await self._checkpointing(
                control.InitPrepare(
                    freeze_timeout=config.freeze_timeout,
                    ghost_limit=config.ghost_limit,
                    outside=config.outside,
                    room=room,
                    files=request.files,
                    private_limit=self._node.config.capsule.private_limit,
                ),
                m.Prepared,
                # Files are written out and trees copied, which takes the time that a dump may take.
                config.prepare_timeout + config.dump_timeout + MARGIN,
                descriptors=(fd,),
            )
        finally:
            os.close(fd)
        await self._node.claim(self.name, prepared.estimate)
        self._check_wanted()
        return prepared

    async def _checkpointing[R: m.Message](
        self, request: m.Message, reply: type[R], timeout: float, descriptors: tuple[int, ...] = ()
    ) -> R:
        self._check_wanted()
        answer = await self._the_init.request(request, reply, timeout=timeout, descriptors=descriptors)
        self._check_wanted()
        return answer

    def _check_wanted(self) -> None:
        if self._aborted is not None:
            raise HpccrError(f"the checkpoint was given up: {self._aborted}")

    async def _do_dump(self, request: m.Dump) -> m.Dumped:
        dumping = present(self._dumping)
        timeout = self._node.config.checkpoint.dump_timeout + MARGIN
        # A small job may be dumped, or CRIU find the disk full, before the watch comes to its first look.
        if await asyncio.to_thread(self._node.spool.is_short):
            await self.abort(SPOOL_FULL)
        watch = asyncio.create_task(self._until_spool_is_short())
        answering = asyncio.create_task(self._checkpointing(request, control.InitDumped, timeout))
        try:
            await asyncio.wait({watch, answering}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                await self.abort(SPOOL_FULL)
            answer = await answering
        finally:
            watch.cancel()
            answering.cancel()
        self._node.claims.pop(self.name, None)
        dumping.image, dumping.created = answer.image, time.time()
        try:
            size = await asyncio.to_thread(dumping.directory.bytes)
        finally:
            self._check_wanted()  # if it was given up meanwhile, the directory is gone
        return m.Dumped(bytes=size)

    async def _until_spool_is_short(self) -> None:
        await asyncio.sleep(LOOK_AT_SPOOL)
        while not await asyncio.to_thread(self._node.spool.is_short):
            await asyncio.sleep(LOOK_AT_SPOOL)

    async def _do_release(self, request: m.Release) -> m.Released:
        dumping = present(self._dumping)
        self._releasing = True
        try:
            released = await self._checkpointing(request, m.Released, RELEASE)
        finally:
            self._releasing = False
        dumping.frozen_seconds = released.frozen_seconds
        self._dumping = None
        await self._images.release(dumping)
        return released

    async def abort(self, reason: str) -> None:
        """Give the checkpoint under way up, if there is one; a request under way then fails. Raises HpccrError.

        A release that is under way is past giving up.
        """
        if self._dumping is None or self._releasing:
            return
        self._aborted = reason
        await self._give_up(reason)

    async def _give_up_quietly(self, reason: str) -> None:
        log.warning("capsule %s is %s: %s", self.name, self.state.value, reason)
        with contextlib.suppress(HpccrError):
            await self.abort(reason)

    async def _give_up(self, reason: str) -> None:
        """Undo the checkpoint under way, if any. All who want that at once wait for the same; whoever of them is
        cancelled, it goes on, and end() waits for it."""
        if self._giving_up is None:
            self._giving_up = asyncio.create_task(self._undo_checkpoint(reason))
            self._giving_up.add_done_callback(self._given_up)
        await asyncio.shield(self._giving_up)

    def _given_up(self, task: asyncio.Task[None]) -> None:
        self._giving_up = None
        if not task.cancelled():
            task.exception()  # perhaps nobody is left to hear of it

    async def _undo_checkpoint(self, reason: str) -> None:
        self._node.claims.pop(self.name, None)
        dumping = self._dumping
        if dumping is None:
            return
        try:
            await self._the_init.abort(reason, timeout=ABORT_TIMEOUT)
        except HpccrError as error:
            # CRIU may still write into the directory: it goes when the capsule is gone.
            if self.state is not State.GONE:
                # Nobody knows what runs in there and what does not.
                log.error("capsule %s: cannot undo a checkpoint, ending the capsule: %s", self.name, error)
                self.lost.set()
            raise
        self._dumping = None
        await remove(dumping.directory)
        if self.state in (State.PREPARED, State.FROZEN, State.DUMPED):
            self.state = State.RUNNING

    def _do_flush(self, request: m.Flush) -> m.FlushStarted:
        # After a release that kills nobody's job waits for the processor, but the requeue waits for the flush.
        last = self.state is State.ENDED
        nice = 0 if last else self._node.config.node.flush_nice
        self._images.flush(request, present(self._create), present(self._identity), nice=nice, last=last)
        return m.FlushStarted()

    # --- life and death -----------------------------------------------------------------------------------------

    def signal(self, signum: int) -> None:
        if self._init is not None and self.state not in (State.NEW, State.CREATED, State.CONNECTED, State.GONE):
            self._init.signal(signum)

    def _on_exit(self, code: int) -> None:
        # After a release that kills, init is silent.
        if self.state in (State.ENDED, State.GONE):
            return
        self.state = State.ENDED
        self._emit(m.Exited(code))

    def _on_wanted(self) -> None:
        if self.state not in (State.ENDED, State.GONE):
            self._emit(m.Wanted())

    def _on_loss(self) -> None:
        log.error("capsule %s: its init ended unexpectedly", self.name)
        self.lost.set()

    async def forget(self) -> None:
        """The step is over: what is kept of it in the spool is of no use."""
        if self._create is not None and self._identity is not None:
            await self._images.forget(self._create, self._identity.uid)

    async def end(self) -> None:
        """Undo everything; returns when nothing is left but flushes under way. Safe to repeat and to cancel."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._undo())
            self._node.endings.add(self._ending)
            self._ending.add_done_callback(self._node.endings.discard)
        await asyncio.shield(self._ending)

    async def _undo(self) -> None:
        self.state = State.GONE
        self._patience.end()
        self._node.claims.pop(self.name, None)
        for step in (
            self._end_init,
            self._settle,
            self._unmake_network,
            self._images.end,
            self._drop_dump,
            self._drop_runtime,
        ):
            try:
                await step()
            except Exception:
                log.exception("capsule %s: something of it may be left", self.name)
        log.info("capsule %s: gone", self.name)

    async def _end_init(self) -> None:
        init, self._init = self._init, None
        if init is not None:
            await init.close()

    async def _settle(self) -> None:
        if self._giving_up is not None:
            await asyncio.wait({self._giving_up})

    async def _unmake_network(self) -> None:
        if self._making is not None:
            try:
                self._plan = await self._making
            except HpccrError:
                pass  # make() has left nothing, and Create has told why
        try:
            if self._plan is not None:
                plumber, plan, namespace = self._node.plumber, self._plan, self._namespace
                await asyncio.get_running_loop().run_in_executor(
                    plumber.executor, lambda: plumber.unmake(plan, namespace)
                )
                self._node.vnis.discard(plan.vni)
        finally:
            namespace, self._namespace = self._namespace, -1
            if namespace >= 0:
                os.close(namespace)

    async def _drop_dump(self) -> None:
        dumping, self._dumping = self._dumping, None
        if dumping is not None:
            await remove(dumping.directory)

    async def _drop_runtime(self) -> None:
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            await remove(runtime)
