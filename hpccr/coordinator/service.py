"""The coordinator of a step: I/O around plan.step. It boots the job, makes checkpoints, answers clients.

One Boot is one life of the job's processes: from a start or a restore to their end. Coordinator.run() goes through as
many as it takes; what comes after a Boot (an older checkpoint, the same one again, the end) is decided there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from hpccr.config import Config
from hpccr.coordinator import plan
from hpccr.coordinator.deadlines import SLOW, timeout
from hpccr.coordinator.flushes import Flushes
from hpccr.coordinator.plan import Phase
from hpccr.coordinator.requests import Command, Requests, file_rules, saved_elsewhere
from hpccr.coordinator.server import Member
from hpccr.coordinator.streams import Positions, Streams
from hpccr.errors import ExitCode, HpccrError, LockedError, PeerLostError, error_for
from hpccr.model import FORMAT, Manifest
from hpccr.store import abandoned
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
ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
"""Signals that a command is expected to end by."""
FROZEN_OUTPUT = 5.0
"""Seconds that a frozen job waits for its output to be written, which takes as long only where storage hangs."""
EXIT_GRACE = 2.0
"""Seconds after a command's failure in which the loss of a capsule on a node that is there explains it: the job then
goes on from a checkpoint."""


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
        check: Callable[[], None],
    ) -> None:
        """members: one per capsule, in capsule order, all joined. event: records a line in events.jsonl. check: raises
        LockedError while no checkpoint may begin."""
        self._config = config
        self._step = step
        self._streams = streams
        self._members = members
        self._requests = Requests(
            step=step,
            command=command,
            stdin=streams.stdin,
            merged=streams.merged,
            incarnation=incarnation,
            secret=secret,
            source=source,
            files=file_rules(config, step, streams.paths),
        )
        self.source = source
        self._then = Positions(source.stdin, source.stdout, source.stderr) if source else None
        self._event = event
        self._check = check
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
        self.returns = False
        """Slurm starts the job again: its end here is not the step's, and what its nodes have kept of it stays."""
        self.began = 0.0
        """When it began to run, by the monotonic clock."""
        self._deadline: asyncio.TimerHandle | None = None
        self._reminder: asyncio.TimerHandle | None = None
        self._turn = asyncio.Lock()
        self._hurried = asyncio.Event()
        """The job is about to be killed, and only its final checkpoint counts."""
        self._reason = ""
        self._patience = config.quiesce.timeout
        self._asked = 0.0
        self._freezing = 0.0
        self._released: asyncio.Future[Snapshot] | None = None
        self.flushes = Flushes(
            step=step,
            config=config.store,
            post=lambda capsule, request: members[capsule].post(request),
            done=lambda capsule, message: self.feed(plan.Reply(capsule, message)),
        )
        self._recording: asyncio.Task[None] | None = None
        self._manifest: Manifest | None = None
        """Of the checkpoint that is being released and kills."""
        self._positions: asyncio.Task[Positions] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._elsewhere: dict[int, tuple[bytes, ...]] = {}
        """By capsule: identities of files that another capsule saves."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Node of each capsule, in capsule order."""
        return tuple(member.join.node for member in self._members)

    # --- events in ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Rewind stdin and create the capsules. Raises HpccrError if it cannot be rewound."""
        self._streams.begin(self._then)
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
                    self.flushes.progress[member.capsule] = (done, total)
            case m.Here():
                member.here.set()
            case m.Exited() if not self._signalled and self.state.capsules > 1:
                self._spawn(self._ended(member, message))
            case m.Flushed(sequence, size, _) if sequence == self.state.flush_sequence:
                self.flushes.progress[member.capsule] = (size, size)
                self.feed(plan.Reply(member.capsule, message))
            case _:
                self.feed(plan.Reply(member.capsule, message))

    async def _ended(self, member: Member, exited: m.Exited) -> None:
        """A command has ended. When a part of the job is gone mpirun ends, with whatever exit code, and may be faster
        than the news of it: the end counts when every node has been heard from since. One that has not is lost."""
        for other in self._members:
            other.post(m.Call())
        reminder = self._loop.call_later(SLOW, self._remind_end, exited.code)
        try:
            for other in self._members:
                await other.here.wait()
        finally:
            reminder.cancel()
        if exited.code:
            await asyncio.sleep(EXIT_GRACE)
        self.feed(plan.Reply(member.capsule, exited))

    def lost(self, member: Member, reason: str) -> None:
        self.feed(plan.Lost(member.capsule, f"{reason} (node {member.join.node})"))

    def feed(self, event: plan.Event) -> None:
        before = self.state.phase
        self.state, actions = plan.step(self.state, event)
        if self.state.phase is not before:
            self._disarm()
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
            case plan.Record(attempt):
                self._arm(Phase.RECORDING)
                self._recording = self._spawn(self._record(attempt))
            case plan.CheckpointReleased(attempt, replies):
                self._spawn(self._publish(attempt, replies))
            case plan.CheckpointFailed(attempt, failure):
                self._checkpoint_failed(attempt, failure)
            case plan.Durable(sequence):
                self._event("durable", sequence=sequence)
                self.last_error = ""
                self.flushes.settle(sequence, None)
            case plan.FlushAgain(sequence, capsule, failure):
                self._flush_failed(sequence, failure)
                self._spawn(self.flushes.again(sequence, capsule, failure))
            case plan.NotDurable(sequence, failure):
                where = self._flush_failed(sequence, failure)
                log.error("checkpoint %d is not durable", sequence)
                self.flushes.settle(sequence, error_for(failure.code, where + failure.message, failure.hint))
            case plan.Finished() | plan.BootFailed() | plan.StepLost():
                self._end(action)

    def _request(self, phase: Phase, capsules: tuple[int, ...]) -> None:
        log.log(logging.INFO if phase in plan.BOOT else logging.DEBUG, "%s: %d capsules", phase, len(capsules))
        if phase is Phase.FETCHING:
            self._event("restoring", sequence=self.source.sequence if self.source else 0)
        if phase is Phase.FREEZING:
            self._freezing = time.monotonic()
        self._arm(phase)
        if phase in (Phase.ROLLING_BACK, Phase.STARTING):
            self._spawn(self._go_on(phase, capsules))
        elif phase is Phase.DUMPING:
            self._spawn(self._dump(capsules))
        else:
            self._ask(phase, capsules)

    def _ask(self, phase: Phase, capsules: tuple[int, ...]) -> None:
        for capsule in capsules:
            elsewhere = self._elsewhere.get(capsule, ())
            self._members[capsule].post(self._requests.message(phase, capsule, self.state, self._patience, elsewhere))

    async def _go_on(self, phase: Phase, capsules: tuple[int, ...]) -> None:
        """The job's output and files become those of its source: from here on it is another history than that of the
        checkpoints after it, which may still be flushed. Nothing is touched before they say so: else the next run of
        the job would restore one of them over what this boot has left, should it come to nothing."""
        source = self.source.sequence if self.source else 0
        try:
            for sequence in await asyncio.to_thread(abandoned.go_on, self._step, source):
                self._event("abandoned", sequence=sequence, source=source)
        except OSError as error:
            if self.state.phase is phase:
                why = f"cannot mark the checkpoints after {source} in {self._step.path}: {error.strerror or error}"
                hint = "is shared storage mounted, and is there room?"
                self.feed(plan.Reply(0, m.Failed(ExitCode.PEER_LOST, why, hint)))
            return
        if self.state.phase is phase:
            # Done before the files are put back: an output file that the job itself had open is one of these.
            await self._streams.cut_back(self._then)
        if self.state.phase is phase:
            self._ask(phase, capsules)

    async def _dump(self, capsules: tuple[int, ...]) -> None:
        """What the job had written by the freeze is written first: it may have its own output file open, and that is
        saved with its files."""
        attempt = self.state.attempt
        # The job stands still meanwhile. Nothing but its last checkpoint is worth that for long.
        final = attempt is not None and attempt.kill
        trouble = await self._streams.written(math.inf if final else FROZEN_OUTPUT)
        if self.state.phase is Phase.DUMPING and self.state.attempt is attempt:
            if trouble:
                self.feed(plan.Cancel(f"the job's output cannot be written: {trouble}"))
            else:
                self._ask(Phase.DUMPING, capsules)

    def _arm(self, phase: Phase) -> None:
        """Set the phase's deadline. Time in which this process did not run (`scontrol suspend`) does not count."""
        due = self._loop.time() + timeout(phase, self._config, self._patience)

        def late() -> None:
            if self._loop.time() - due > STOPPED:
                self._arm(phase)
            else:
                self.feed(plan.Deadline(phase))

        self._disarm()
        self._deadline = self._loop.call_at(due, late)
        self._reminder = self._loop.call_later(SLOW, self._remind, phase)

    def _disarm(self) -> None:
        for timer in (self._deadline, self._reminder):
            if timer is not None:
                timer.cancel()
        self._deadline = self._reminder = None

    def _remind(self, phase: Phase) -> None:
        waiting = sorted({self._members[capsule].join.node for capsule in self.state.waiting})
        log.info("%s takes more than %.0f s; waiting for %s", phase, SLOW, ", ".join(waiting) or "the store")
        self._event("slow", phase=phase, nodes=waiting)

    def _remind_end(self, code: int) -> None:
        silent = ", ".join(sorted({other.join.node for other in self._members if not other.here.is_set()}))
        log.warning("the command %s, but %s does not answer; waiting for it", plan.how_it_ended(code), silent)

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
        self.began = time.monotonic()
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

    def _flush_failed(self, sequence: int, failure: m.Failed) -> str:
        """Tell of it; how a message on it begins."""
        where = f"{failure.node}: " if failure.node else ""
        self.last_error = where + failure.message
        self._event("flush-failed", sequence=sequence, message=failure.message, node=failure.node)
        log.error("a flush of checkpoint %d failed: %s%s", sequence, where, failure.message)
        return where

    def _end(self, outcome: plan.Finished | plan.BootFailed | plan.StepLost) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)
        error = HpccrError("the job has ended") if isinstance(outcome, plan.Finished) else failure_of(outcome)
        if self._released and not self._released.done():
            self._released.set_exception(error)
        self.flushes.give_up(error)

    async def _write(self, attempt: plan.Attempt, frozen: float) -> Manifest | m.Failed:
        """Put the manifest of what has been dumped into the store: from then on it completes without us, once it is
        flushed. frozen: for how long the tasks stood still."""
        assert self._positions is not None  # noqa: S101 - every checkpoint that comes here was frozen
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
                freeze_seconds=frozen,
                reason=self._reason,
            )
            await asyncio.to_thread(_write_manifest, checkpoint, manifest)
        except (OSError, HpccrError) as error:
            return m.Failed(
                ExitCode.FAILED,
                f"cannot write {checkpoint.manifest_path}: {getattr(error, 'strerror', None) or error}",
                "make room on the shared storage, or name another directory with --checkpoint-dir",
            )
        return manifest

    async def _record(self, attempt: plan.Attempt) -> None:
        """The manifest of a checkpoint that kills; how long the tasks stand still is not known to the end yet."""
        found = await self._write(attempt, time.monotonic() - self._freezing)
        self._manifest = found if isinstance(found, Manifest) else None
        self.feed(plan.Recorded(found if isinstance(found, m.Failed) else None))

    async def _publish(self, attempt: plan.Attempt, replies: tuple[tuple[int, m.Message], ...]) -> None:
        """The manifest, if it is not there yet, then the flushes: from here on the checkpoint completes without us."""
        released = [reply for _, reply in replies if isinstance(reply, m.Released)]
        total = time.monotonic() - self._asked
        frozen = max(r.frozen_seconds for r in released)
        manifest = self._manifest if attempt.kill else await self._write(attempt, frozen)
        if not isinstance(manifest, Manifest):
            assert manifest is not None  # noqa: S101 - one that kills is released when its manifest is there
            self.failed += 1
            for capsule in range(self.state.capsules):
                self.feed(plan.Reply(capsule, m.FlushFailed(attempt.sequence, manifest.message, manifest.hint)))
            if self._released and not self._released.done():
                self._released.set_exception(error_for(manifest.code, manifest.message, manifest.hint))
            return
        self.taken += 1
        self.last_error = ""
        size = sum(reply.bytes for reply in self.state.dumped)
        self.last = Snapshot(manifest, size, total)
        self._event(
            "released", sequence=attempt.sequence, reason=self._reason, nodes=self.nodes, bytes=size,
            freeze_seconds=frozen, criu_freeze_seconds=max(r.criu_freeze_seconds for r in released),
            total_seconds=total, kill=attempt.kill,
        )  # fmt: skip
        self.flushes.begin(manifest, [reply.bytes for reply in self.state.dumped])
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
            self._hurried.set()
            if self.state.phase in plan.UNFROZEN:
                self.feed(plan.Cancel("Slurm is about to end the job"))  # ranks or files may be waited for for longer
        try:
            async with self._turn:
                self._check_turn(hurry)
                self._patience = min(self._config.quiesce.timeout, HURRY) if hurry else self._config.quiesce.timeout
                self._asked = time.monotonic()
                return await self._made(kill=kill, reason=reason, wait=wait, quiesce=quiesce)
        except OSError as error:
            raise HpccrError(
                f"cannot use the step's directory {self._step.path}: {error.strerror or error}",
                hint="is shared storage mounted, and is there room?",
            ) from error
        finally:
            if hurry and self.state.phase is not Phase.KILLED:
                self._hurried.clear()

    async def _made(self, *, kill: bool, reason: str, wait: bool, quiesce: str) -> Snapshot:
        await self._until(self.running.wait())
        pending = self.flushes.pending(self.state.flush_sequence)
        if pending is not None and not kill:
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
                self._check_allowed(kill=kill)
                # A connection was neither closed nor established at the freeze, which CRIU cannot dump, or new tasks
                # came faster than it stops them. The job has gone on, and nothing tells us when that is over.
                log.info("trying again in %g s: %s", pause, error.message)
                await asyncio.sleep(pause)
        return await self._attempt(kill, quiesce)

    def _check_allowed(self, *, kill: bool) -> None:
        self._check()
        self._check_turn(hurry=kill)

    def _check_turn(self, hurry: bool) -> None:
        if self._hurried.is_set() and not hurry:
            raise LockedError("the final checkpoint of the job is being made")

    async def _backlog(self, pending: asyncio.Future[None], reason: str, *, wait: bool) -> None:
        """The checkpoint before is not durable yet: leave this one out (LockedError), or wait until it is."""
        if not wait:
            self._skip(reason)
        self._event("waiting", reason=reason, pending=self.state.flush_sequence)
        self.waiting = True
        try:
            hurried = self._loop.create_task(self._hurried.wait())
            try:
                await self._until(asyncio.wait((pending, hurried), return_when=asyncio.FIRST_COMPLETED))
            finally:
                hurried.cancel()
        finally:
            self.waiting = False
        self._check_turn(hurry=False)

    def _skip(self, reason: str) -> NoReturn:
        before = self.state.flush_sequence
        self.skipped += 1
        self._event("skipped", reason=reason, pending=before)
        raise LockedError(
            f"checkpoint {before} is still being written to the store",
            hint="longer intervals, or faster storage; checkpoint.backlog says what to do",
        )

    async def _attempt(self, kill: bool, quiesce: str) -> Snapshot:
        if self._streams.trouble:
            # How far it has got can be said when it is written, and what is not would be lost with this process.
            raise HpccrError(
                f"the job's output cannot be written: {self._streams.trouble}",
                hint="make room where the job's output goes; the job waits for that",
            )
        # Without it numbers would begin anew, on whatever is below a mount point.
        if not await asyncio.to_thread(self._step.path.is_dir):
            raise HpccrError(
                f"the step's directory {self._step.path} is gone", hint="is shared storage mounted on every node?"
            )
        if self._recording is not None:
            await asyncio.wait((self._recording,))  # where storage hung it may still take this number
        sequence = await asyncio.to_thread(self._step.next_sequence)
        if self.state.phase is not Phase.RUNNING:
            raise HpccrError(f"no checkpoint is possible now: the job is {self.state.phase}")
        # Whoever gives up what is under way (cancel) finds it so only from here on, where nothing is awaited.
        self._check_allowed(kill=kill)
        self._released = self._loop.create_future()
        self.flushes.expect(sequence)
        self._event("checkpoint", sequence=sequence, reason=self._reason)
        try:
            self.feed(plan.Ask(plan.Attempt(sequence, uuid.uuid4().hex, kill, quiesce)))
            return await self._released
        except HpccrError:
            self.flushes.settle(sequence, PeerLostError(f"checkpoint {sequence} was given up"))
            raise

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
        # Then its end is what was asked for, and has to be told before Slurm loses its patience.
        self._signalled = self._signalled or signum in ENDING
        self._members[0].post(m.Signal(signum))

    def output_taken(self, count: int) -> None:
        self._members[0].post(m.OutputTaken(count))

    def close_output(self, stream: int) -> None:
        """Nobody reads the job's stdout (1) or stderr (2) any more: the job gets EPIPE or SIGPIPE."""
        self._members[0].post(m.CloseOutput(stream))

    def feed_input(self, data: bytes) -> None:
        self._members[0].post(m.Input(data))

    async def destroy(self) -> None:
        """Take all capsules down and let the agents go; nothing of the job runs when this returns."""
        self._disarm()
        finished = self.outcome.done() and isinstance(self.outcome.result(), plan.Finished)
        over = finished and not self.returns
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

    def _spawn(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the coordinator failed", exc_info=error)


def failure_of(outcome: plan.BootFailed | plan.StepLost) -> HpccrError:
    """The error of an outcome, naming the node."""
    failure = outcome.failure
    where = f"{failure.node}: " if failure.node else ""
    return error_for(failure.code, where + failure.message, failure.hint)


def _write_manifest(checkpoint: Checkpoint, manifest: Manifest) -> None:
    make_directory(checkpoint.path)
    publish(checkpoint.manifest_path, manifest)
