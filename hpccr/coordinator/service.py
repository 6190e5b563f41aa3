"""The coordinator of a step: I/O around plan.step. It boots the job, makes checkpoints, answers clients.

One Boot is one life of the job's processes: from a start or a restore to their end. Coordinator.run() goes through as
many as it takes; what comes after a Boot (an older checkpoint, the same one again, the end) is decided there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from hpccr.config import Config
from hpccr.coordinator import plan
from hpccr.coordinator.plan import Phase
from hpccr.coordinator.server import Member
from hpccr.coordinator.streams import Positions, Streams
from hpccr.errors import ExitCode, HpccrError, LockedError, PeerLostError, error_for
from hpccr.model import FORMAT, FileRules, Manifest
from hpccr.store.layout import Checkpoint, Step
from hpccr.store.publish import make_directory, publish
from hpccr.wire import messages as m

log = logging.getLogger(__name__)

DESTROY_TIMEOUT = 30.0
"""Seconds hpccrd has to take a capsule down; its agent's connection is closed after that, which does the same."""
PAUSES = (0.1, 0.3, 1.0, 3.0)
"""Seconds before each further attempt when a checkpoint met a connection that was just being made."""
STOPPED = 5.0
"""Seconds after which a timer that comes too late says that this process was stopped, and not just slow."""
HURRY = 5.0
"""Seconds for ranks to come to a safe point when Slurm is about to kill the job."""
EXIT_GRACE = 2.0
"""Seconds after a command's failure in which a capsule's loss explains it: the job then goes on from a checkpoint."""
BARRIER_TIMEOUT = 60.0
"""Seconds for the phases that only let go: resume, unhold, release, abort."""


@dataclass(frozen=True)
class Command:
    """What the job is: capsule 0's command and what every launch root gets."""

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that was released in this Boot."""

    manifest: Manifest
    bytes: int
    total_seconds: float


class Boot:
    """One life of the job: members joined, plan running. Events go in by feed(); `outcome` is what ended it."""

    def __init__(
        self,
        *,
        config: Config,
        step: Step,
        command: Command,
        streams: Streams,
        members: Sequence[Member],
        incarnation: int,
        secret: str,
        source: Manifest | None,
        event: Callable[..., None],
    ) -> None:
        """members: one per capsule, in capsule order, all joined. event: records a line in events.jsonl."""
        self._config = config
        self._step = step
        self._command = command
        self._streams = streams
        self._members = members
        self._incarnation = incarnation
        self._secret = secret
        self.source = source
        self._event = event
        self._loop = asyncio.get_running_loop()
        from_checkpoint = plan.Source(source.sequence, source.checkpoint) if source else None
        self.state = plan.State(len(members), from_checkpoint)
        self.outcome: asyncio.Future[plan.Finished | plan.BootFailed | plan.StepLost] = self._loop.create_future()
        self.running = asyncio.Event()
        self.last: Snapshot | None = None
        self.last_error = ""
        self.failed = 0
        self._signalled = False
        self.taken = 0
        self.skipped = 0
        self.waiting = False
        """A checkpoint was asked for and waits for the one before to be durable."""
        self.flushed: dict[int, tuple[int, int]] = {}
        self._deadline: asyncio.TimerHandle | None = None
        self._turn = asyncio.Lock()
        self._reason = ""
        self._patience = config.quiesce.timeout
        self._asked = 0.0
        self._released: asyncio.Future[Snapshot] | None = None
        self._durable: dict[int, asyncio.Future[None]] = {}
        self._positions: asyncio.Task[Positions] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._elsewhere: dict[int, tuple[bytes, ...]] = {}
        """By capsule: identities of files that another capsule saves."""
        self._files = file_rules(config, step, streams)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Node of each capsule, in capsule order."""
        return tuple(member.join.node for member in self._members)

    # --- events in ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Put the streams back and create the capsules. Raises HpccrError if stdin cannot be rewound."""
        source = self.source
        positions = Positions(source.stdin, source.stdout, source.stderr) if source else None
        for warning in self._streams.begin(positions):
            log.warning("%s", warning)
            self._event("warning", text=warning)
        self.feed(plan.Boot())

    def message(self, member: Member, message: m.Message) -> None:
        """A message of one of the members."""
        match message:
            case m.Output(stream, data):
                self._streams.output(stream, data)
            case m.InputTaken(count):
                self._streams.input_taken(count)
            case m.Log(level, text):
                log.log(logging.getLevelNamesMapping().get(level.upper(), logging.INFO), "%s", text)
            case m.Destroyed():
                member.destroyed.set()
            case m.Flushing(sequence, done, total):
                if sequence == self.state.flush_sequence:
                    self.flushed[member.capsule] = (done, total)
            case m.Exited(code) if code and not self._signalled and self.state.capsules > 1:
                # mpirun fails when a part of the job is gone, and may be faster than the news of what it was.
                self._loop.call_later(EXIT_GRACE, self.feed, plan.Reply(member.capsule, message))
            case m.Flushed(sequence, size, _) if sequence == self.state.flush_sequence:
                self.flushed[member.capsule] = (size, size)
                self.feed(plan.Reply(member.capsule, message))
            case _:
                self.feed(plan.Reply(member.capsule, message))

    def lost(self, member: Member, reason: str) -> None:
        self.feed(plan.Lost(member.capsule, f"{reason} (node {member.join.node})"))

    def feed(self, event: plan.Event) -> None:
        before = self.state.phase
        self.state, actions = plan.step(self.state, event)
        if self.state.phase is not before and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        for action in actions:
            self._do(action)

    # --- actions out --------------------------------------------------------------------------------------------

    def _do(self, action: plan.Action) -> None:
        match action:
            case plan.Request(phase, capsules):
                self._request(phase, capsules)
            case plan.Running(restored):
                self._running(restored)
            case plan.AllQuiesced(ranks, uncounted):
                if uncounted:
                    log.info("messages of %d ranks are not counted: libhpccr_mpi is not loaded", uncounted)
                self._event("quiesced", ranks=ranks, uncounted=uncounted, seconds=time.monotonic() - self._asked)
            case plan.NotQuiesced(why):
                log.warning("checkpointing the job where it is: %s", why)
                self._event("not-quiesced", why=why)
            case plan.AllFrozen(replies):
                self._frozen(replies)
            case plan.AllSurveyed(replies):
                self._elsewhere = saved_elsewhere({k: r.files for k, r in replies if isinstance(r, m.Surveyed)})
            case plan.CheckpointReleased(attempt, replies):
                self._spawn(self._publish(attempt, replies))
            case plan.CheckpointFailed(attempt, failure):
                self._checkpoint_failed(attempt, failure)
            case plan.Durable(sequence):
                self._event("durable", sequence=sequence)
                self._settle(sequence, None)
            case plan.NotDurable(sequence, failure):
                self.last_error = failure.message
                self._event("flush-failed", sequence=sequence, message=failure.message, node=failure.node)
                log.error("checkpoint %d is not durable: %s", sequence, failure.message)
                self._settle(sequence, error_for(failure.code, failure.message, failure.hint))
            case plan.Finished() | plan.BootFailed() | plan.StepLost():
                self._end(action)

    def _request(self, phase: Phase, capsules: tuple[int, ...]) -> None:
        log.debug("%s: %d capsules", phase, len(capsules))
        self._arm(phase)
        for capsule in capsules:
            self._members[capsule].post(self._message_for(phase, capsule))

    def _arm(self, phase: Phase) -> None:
        """Set the phase's deadline. Time in which this process did not run (`scontrol suspend`) does not count."""
        due = self._loop.time() + self._timeout(phase)

        def late() -> None:
            if self._loop.time() - due > STOPPED:
                self._arm(phase)
            else:
                self.feed(plan.Deadline(phase))

        self._deadline = self._loop.call_at(due, late)

    def _timeout(self, phase: Phase) -> float:
        limits = self._config.checkpoint
        match phase:
            case Phase.CREATING | Phase.CONNECTING | Phase.STARTING:
                return limits.create_timeout
            case Phase.FETCHING | Phase.ROLLING_BACK | Phase.RESTORING:
                return limits.restore_timeout
            case Phase.ASKING:
                return limits.prepare_timeout
            case Phase.PREPARING:
                # Trees are copied as far as they can be, which takes the time that a dump may take.
                return limits.prepare_timeout + (limits.dump_timeout if self._config.files.trees else 0)
            case Phase.ARRIVING | Phase.FINISHING:
                return self._patience + limits.prepare_timeout
            case Phase.FREEZING | Phase.SURVEYING:
                return limits.freeze_timeout
            case Phase.DUMPING:
                return limits.dump_timeout
            case _:
                return BARRIER_TIMEOUT

    def _message_for(self, phase: Phase, capsule: int) -> m.Message:
        match phase:
            case Phase.CREATING:
                return m.Create(
                    m.PROTOCOL, self._step.key, capsule, self.state.capsules, self._incarnation, self._secret
                )
            case Phase.CONNECTING:
                return m.Connect(tuple(created.endpoint for created in self.state.created))
            case Phase.STARTING:
                own = capsule == 0
                return m.Start(
                    argv=self._command.argv if own else (),
                    env=self._command.env,
                    cwd=self._command.cwd,
                    stdin=self._streams.stdin if own else "null",
                    merged=self._streams.merged if own else True,
                )
            case Phase.FETCHING:
                assert self.source is not None  # noqa: S101 - this phase exists only with a source
                return m.Fetch(
                    directory=str(self._step.checkpoint(self.source.sequence).capsule_path(capsule)),
                    sequence=self.source.sequence,
                    checkpoint=self.source.checkpoint,
                )
            case Phase.ROLLING_BACK:
                return m.RollBack()
            case Phase.RESTORING:
                own = capsule == 0
                return m.Restore(
                    stdin=self._streams.stdin if own else "null",
                    merged=self._streams.merged if own else True,
                )
            case Phase.RESUMING:
                return m.Resume()
            case Phase.UNHOLDING:
                return m.Unhold()
            case Phase.ABORTING:
                assert self.state.failure is not None  # noqa: S101 - set by plan._abort
                return m.Abort(self.state.failure.message)
        attempt = self.state.attempt
        assert attempt is not None  # noqa: S101 - the phases left are those of a checkpoint
        patience = round(self._patience * 1000)
        match phase:
            case Phase.ASKING:
                return m.Quiesce("ask", 0)
            case Phase.ARRIVING:
                return m.Quiesce("arrive", patience, self.state.targets)
            case Phase.FINISHING:
                return m.Quiesce("finish", patience, self.state.targets)
            case Phase.PREPARING:
                return m.Prepare(attempt.sequence, attempt.checkpoint, self._files)
            case Phase.FREEZING:
                return m.Freeze()
            case Phase.SURVEYING:
                return m.Survey()
            case Phase.DUMPING:
                return m.Dump(self._elsewhere.get(capsule, ()))
            case Phase.RELEASING:
                return m.Release(attempt.kill)
        raise AssertionError(f"no request belongs to {phase}")

    def _running(self, restored: tuple[m.Restored, ...]) -> None:
        if restored:
            assert self.source is not None  # noqa: S101 - only restores answer Restored
            self._event(
                "restored",
                sequence=self.source.sequence,
                nodes=self.nodes,
                fetch_seconds=[r.fetch_seconds for r in restored],
                restore_seconds=[r.restore_seconds for r in restored],
                bytes=sum(r.bytes for r in restored),
                local=[r.local for r in restored],
            )
        else:
            self._event("started", nodes=self.nodes)
        self._streams.running()
        self.running.set()

    def _frozen(self, replies: tuple[tuple[int, m.Message], ...]) -> None:
        consumed = next((r.stdin_consumed for k, r in replies if k == 0 and isinstance(r, m.Frozen)), 0)
        # The marks are queued now, before any byte that the job writes after its release.
        self._positions = self._loop.create_task(self._streams.positions(consumed))

    def _checkpoint_failed(self, attempt: plan.Attempt, failure: m.Failed) -> None:
        self.failed += 1
        where = f"{failure.node}: " if failure.node else ""
        self.last_error = where + failure.message
        self._event(
            "checkpoint-failed", sequence=attempt.sequence, message=failure.message, node=failure.node,
            code=failure.code,
        )  # fmt: skip
        if self._released and not self._released.done():
            self._released.set_exception(error_for(failure.code, where + failure.message, failure.hint))

    def _settle(self, sequence: int, error: HpccrError | None) -> None:
        future = self._durable.get(sequence)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
            future.exception()  # seen: whoever waits gets it, and nobody may be waiting

    def _end(self, outcome: plan.Finished | plan.BootFailed | plan.StepLost) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)
        error = HpccrError("the job has ended") if isinstance(outcome, plan.Finished) else failure_of(outcome)
        if self._released and not self._released.done():
            self._released.set_exception(error)
        for sequence in self._durable:
            self._settle(sequence, error)

    async def _publish(self, attempt: plan.Attempt, replies: tuple[tuple[int, m.Message], ...]) -> None:
        """The manifest, then the flushes: from here on the checkpoint completes without us."""
        released = [reply for _, reply in replies if isinstance(reply, m.Released)]
        total = time.monotonic() - self._asked
        assert self._positions is not None  # noqa: S101 - every released checkpoint was frozen
        checkpoint = self._step.checkpoint(attempt.sequence)
        try:
            positions = await self._positions
            manifest = Manifest(
                format=FORMAT,
                key=self._step.key,
                checkpoint=attempt.checkpoint,
                sequence=attempt.sequence,
                capsules=self.state.capsules,
                created=time.time(),
                stdin=positions.stdin,
                stdout=positions.stdout,
                stderr=positions.stderr,
                freeze_seconds=max(r.frozen_seconds for r in released),
                reason=self._reason,
            )
            await asyncio.to_thread(_write_manifest, checkpoint, manifest)
        except OSError as error:
            failure = m.Failed(
                ExitCode.FAILED,
                f"cannot write {checkpoint.manifest_path}: {error.strerror}",
                "make room on the shared storage, or name another directory with --checkpoint-dir",
            )
            self.failed += 1
            for capsule in range(self.state.capsules):
                self.feed(plan.Reply(capsule, m.FlushFailed(attempt.sequence, failure.message, failure.hint)))
            if self._released and not self._released.done():
                self._released.set_exception(error_for(failure.code, failure.message, failure.hint))
            return
        self.taken += 1
        self.last_error = ""
        size = sum(reply.bytes for reply in self.state.dumped)
        self.last = Snapshot(manifest, size, total)
        self._event(
            "released", sequence=attempt.sequence, reason=self._reason, nodes=self.nodes, bytes=size,
            freeze_seconds=manifest.freeze_seconds, criu_freeze_seconds=max(r.criu_freeze_seconds for r in released),
            total_seconds=total, kill=attempt.kill,
        )  # fmt: skip
        self.flushed = {k: (0, reply.bytes) for k, reply in enumerate(self.state.dumped)}
        store = self._config.store
        for capsule in range(self.state.capsules):
            directory = str(checkpoint.capsule_path(capsule))
            self._members[capsule].post(m.Flush(directory, store.level, store.share))
        if self._released and not self._released.done():
            self._released.set_result(self.last)

    # --- what others ask ----------------------------------------------------------------------------------------

    async def checkpoint(
        self, *, kill: bool, reason: str, wait: bool = True, quiesce: str = "", hurry: bool = False
    ) -> Snapshot:
        """Make a checkpoint of the running job; returns when its tasks are released (or killed).

        One at a time: waits for the one before to be durable (wait=False: raises LockedError instead), so that spool
        and store hold no more than one unfinished checkpoint per capsule; only the final one (kill) does not wait.
        quiesce: prefer, require, off, or "" for what is configured; hurry: Slurm will not wait for ranks that are late.
        Raises the error that made it fail; the job then runs as before.
        """
        if self._turn.locked() and not wait and not kill:
            self._skip(reason)  # another one is being made, or waits
        quiesce = quiesce or self._config.quiesce.mode
        if hurry and quiesce == "require":
            quiesce = "prefer"  # what would be lost otherwise is worth more
        if hurry:
            self._patience = min(self._config.quiesce.timeout, HURRY)  # also of the one that is being prepared
            if self.state.phase in plan.QUIESCE:
                self.feed(plan.Cancel("Slurm is about to end the job"))  # its ranks may be waited for longer than that
        async with self._turn:
            self._patience = min(self._config.quiesce.timeout, HURRY) if hurry else self._config.quiesce.timeout
            self._asked = time.monotonic()
            await self._until(self.running.wait())
            pending = self._durable.get(self.state.flush_sequence)
            if pending is not None and not pending.done() and not kill:
                await self._backlog(pending, reason, wait=wait)
            if self.outcome.done():
                raise HpccrError("the job has ended")
            if self.state.phase is not Phase.RUNNING:
                raise LockedError(f"no checkpoint is possible now: the job is {self.state.phase}")
            self._reason = reason
            for pause in PAUSES:
                try:
                    return await self._attempt(kill, quiesce)
                except LockedError as error:
                    # A connection was neither closed nor established at the freeze, which CRIU cannot dump. The job
                    # has gone on and the connection with it; nothing tells us when it is made.
                    log.info("trying again in %g s: %s", pause, error.message)
                    await asyncio.sleep(pause)
            return await self._attempt(kill, quiesce)

    async def _backlog(self, pending: asyncio.Future[None], reason: str, *, wait: bool) -> None:
        """The checkpoint before is not durable yet: leave this one out (LockedError), or wait until it is."""
        if not wait:
            self._skip(reason)
        self._event("waiting", reason=reason, pending=self.state.flush_sequence)
        self.waiting = True
        try:
            await self._until(asyncio.wait((pending,)))
        finally:
            self.waiting = False

    def _skip(self, reason: str) -> NoReturn:
        before = self.state.flush_sequence
        self.skipped += 1
        self._event("skipped", reason=reason, pending=before)
        raise LockedError(
            f"checkpoint {before} is still being written to the store",
            hint="longer intervals, or faster storage; checkpoint.backlog says what to do",
        )

    async def _attempt(self, kill: bool, quiesce: str) -> Snapshot:
        # Without it numbers would begin anew, on whatever is below a mount point.
        if not await asyncio.to_thread(self._step.path.is_dir):
            raise HpccrError(
                f"the step's directory {self._step.path} is gone", hint="is shared storage mounted on every node?"
            )
        sequence = await asyncio.to_thread(self._step.next_sequence)
        if self.state.phase is not Phase.RUNNING:
            raise HpccrError(f"no checkpoint is possible now: the job is {self.state.phase}")
        self._released = self._loop.create_future()
        self._durable[sequence] = self._loop.create_future()
        self._event("checkpoint", sequence=sequence, reason=self._reason)
        try:
            self.feed(plan.Ask(plan.Attempt(sequence, uuid.uuid4().hex, kill, quiesce)))
            return await self._released
        except HpccrError:
            self._settle(sequence, PeerLostError(f"checkpoint {sequence} was given up"))
            raise

    async def durable(self, sequence: int) -> None:
        """Wait until a released checkpoint is in the store whole. Raises the error that kept it from that."""
        await asyncio.shield(self._durable[sequence])

    async def _until(self, waiting: Coroutine[Any, Any, object]) -> None:
        """Wait for something that may never come if the Boot ends."""
        task = self._loop.create_task(waiting)
        await asyncio.wait((task, self.outcome), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            raise HpccrError("the job has ended")

    def cancel(self, reason: str) -> None:
        """Give the checkpoint under way up, if there is one and it still can be."""
        self.feed(plan.Cancel(reason))

    def signal(self, signum: int) -> None:
        """Pass a signal to the job's command."""
        self._signalled = True
        self._members[0].post(m.Signal(signum))

    def output_taken(self, count: int) -> None:
        self._members[0].post(m.OutputTaken(count))

    def feed_input(self, data: bytes) -> None:
        self._members[0].post(m.Input(data))

    async def destroy(self) -> None:
        """Take all capsules down and let the agents go; nothing of the job runs when this returns."""
        if self._deadline is not None:
            self._deadline.cancel()
        over = self.outcome.done() and isinstance(self.outcome.result(), plan.Finished)
        for member in self._members:
            if not member.lost:
                member.post(m.Destroy(over))
        try:
            async with asyncio.timeout(DESTROY_TIMEOUT):
                for member in self._members:
                    await member.destroyed.wait()
        except TimeoutError:
            slow = [member.join.node for member in self._members if not member.destroyed.is_set()]
            log.warning("no word from %s that its capsule is gone", ", ".join(slow))
        for member in self._members:
            await member.channel.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._positions is not None:
            self._positions.cancel()

    def _spawn(self, job: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def file_rules(config: Config, step: Step, streams: Streams) -> FileRules:
    """What a checkpoint saves of the job's files; neither its checkpoints nor its output, which hpccr itself cuts."""
    return FileRules(
        trees=config.files.trees,
        excluded=(os.path.realpath(step.path.parent.parent), *streams.paths) if config.files.trees else (),
        snapshot_limit=config.files.snapshot_limit,
    )


def saved_elsewhere(found: Mapping[int, tuple[bytes, ...]]) -> dict[int, tuple[bytes, ...]]:
    """Which of its files (identities, by capsule) a capsule leaves to another: each is saved by one that has it, and
    not all by the same."""
    owners: dict[bytes, list[int]] = {}
    for capsule in sorted(found):
        for identity in found[capsule]:
            owners.setdefault(identity, []).append(capsule)
    elsewhere: dict[int, list[bytes]] = {}
    for identity, capsules in owners.items():
        owner = capsules[identity[0] % len(capsules)]
        for capsule in capsules:
            if capsule != owner:
                elsewhere.setdefault(capsule, []).append(identity)
    return {capsule: tuple(identities) for capsule, identities in elsewhere.items()}


def failure_of(outcome: plan.BootFailed | plan.StepLost) -> HpccrError:
    """The error of an outcome, naming the node."""
    failure = outcome.failure
    where = f"{failure.node}: " if failure.node else ""
    return error_for(failure.code, where + failure.message, failure.hint)


def _write_manifest(checkpoint: Checkpoint, manifest: Manifest) -> None:
    make_directory(checkpoint.path)
    publish(checkpoint.manifest_path, manifest)
