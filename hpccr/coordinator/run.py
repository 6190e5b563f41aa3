"""One `hpccr run`: boots the job, from a checkpoint if there is one, until its command has ended.

When a part of the job is lost, what is left is taken down and the newest complete checkpoint restored in place, as
long as there is one newer than the last time; a checkpoint that does not restore is passed over for the one before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from hpccr.agent.service import connect
from hpccr.capsule.root import NOT_PASSED
from hpccr.capsule.spawn import shell_code
from hpccr.config import Config
from hpccr.coordinator import plan
from hpccr.coordinator.agents import LOST_STEP_TIMEOUT, STEP_END_TIMEOUT, Agents, place
from hpccr.coordinator.candidates import Candidates
from hpccr.coordinator.checkpoints import Checkpoints, requeued
from hpccr.coordinator.departure import Departure
from hpccr.coordinator.plan import Phase
from hpccr.coordinator.recovery import Next, after, past
from hpccr.coordinator.report import report
from hpccr.coordinator.requests import Command
from hpccr.coordinator.schedule import costs_so_far, parse_interval
from hpccr.coordinator.server import Member, Server
from hpccr.coordinator.service import ENDING, Boot, failure_of
from hpccr.coordinator.site import Site
from hpccr.coordinator.status import StepStatus, encode_status
from hpccr.coordinator.streams import Streams
from hpccr.coordinator.succession import Succession
from hpccr.coordinator.timekeeper import Timekeeper, failure_rate
from hpccr.errors import CorruptError, ExitCode, HpccrError, SupersededError, UnsupportedError, encodable, error_for
from hpccr.model import FORMAT, EndpointRecord, Manifest, StepRecord
from hpccr.store import events
from hpccr.store.layout import FINISHED, Job, Step
from hpccr.store.publish import publish, remove
from hpccr.wire import messages as m
from hpccr.wire.handshake import new_secret

log = logging.getLogger(__name__)

LAST = 10.0
"""Seconds before the time limit ends the job at which it is requeued at the latest: Slurm must hear of it before."""
OURS = {signal.SIGTERM, signal.SIGTSTP, signal.SIGCONT}
"""Signals that say something to us; the others that the launch root passes on are the job's business."""
STILL = 10.0
"""Seconds after SIGTSTP at which whoever still runs is not being suspended: Slurm stops everything after 2."""


@dataclass(frozen=True)
class Requeued:
    """The job was checkpointed, its tasks are dead, and it is to be started again elsewhere."""


async def _answers(endpoint: EndpointRecord) -> bool:
    """Whether that coordinator is alive."""
    try:
        _, writer = await connect(endpoint)
    except HpccrError:
        return False
    writer.close()
    return True


class Coordinator:
    """One step from the first start, or a restore, to the end of its command."""

    def __init__(
        self,
        *,
        config: Config,
        step: Step,
        site: Site,
        socket_path: str,
        agent_command: Callable[[dict[str, int]], list[str]],
        incarnation: int,
        resume: bool,
        asked: bool = False,
        sequence: int | None = None,
        batch: bool = False,
        run: int = 0,
    ) -> None:
        """incarnation: of the step's last boot, -1 if it has had none. run: the mark of this run, above
        which every other is of a later one (see succession).

        resume: start from the newest complete checkpoint if there is one; sequence: exactly from this one.
        asked: by a person, who may try as often as it takes.
        batch: the command is the whole batch script, and SIGUSR1 asks for a checkpoint instead of being the command's.
        """
        self._config = config
        self._step = step
        self._site = site
        self._socket_path = socket_path
        self._agent_command = agent_command
        self._incarnation = incarnation
        self._resume = resume
        self._asked = asked
        self._sequence = sequence
        self._batch = batch
        self._succession = Succession(step, run)
        self._secret = new_secret()
        self._boot: Boot | None = None
        self._joined: list[Member] = []
        self._join_failure: m.Failed | None = None
        self._all_joined = asyncio.Event()
        self._placement: tuple[str, ...] = ()
        self._ended: asyncio.Future[Requeued] | None = None
        record = step.record()
        self._started = record.started if record else time.time()
        self._io = ThreadPoolExecutor(1, "events")
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = False
        self._checkpoints = Checkpoints(
            step=step, site=site, keep=config.store.keep, left=self._finish_requeued, warn=self._loud
        )
        self._departure = Departure(
            site=site,
            checkpoints=self._checkpoints,
            boot=lambda: self._boot,
            event=self._event,
            warn=self._loud,
            left=self._finish_requeued,
            stop=self._stop,
        )
        self._streams: Streams | None = None
        self._due: float | None = None
        self._main: asyncio.Task[Any] | None = None
        self._wish: asyncio.Task[None] | None = None
        self._still: asyncio.TimerHandle | None = None

    def _event(self, name: str, **details: Any) -> None:
        """Record an event; order is kept, and the event loop does not wait for the shared storage."""

        def write() -> None:
            try:
                events.append(self._step.events_path, name, **details)
            except OSError as error:
                log.warning("cannot record the event %s: %s", name, error)

        self._io.submit(write)

    async def run(self, command: Callable[[str], Command], capsules: int) -> int:
        """The exit code of the job's command, -n if signal n ended it. Raises HpccrError.

        command: given the step's secret, what to start; capsules: how many a fresh start has.
        """
        loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        self._ended = loop.create_future()
        record = self._step.record()
        self._streams = Streams(
            journal=self._step.path / "output",
            began=(record.stdout_base, record.stderr_base) if record else None,
            taken=self._output_taken,
            feed=self._feed_input,
            warn=self._loud,
            broken=self._output_broken,
        )
        server = Server(
            secret=self._secret,
            silence=self._config.checkpoint.silence_timeout,
            on_join=self._on_join,
            on_message=self._on_message,
            on_lost=self._on_lost,
            on_client=self._on_client,
        )
        port = await server.start()
        endpoint = self._endpoint(port)
        try:
            publish(self._step.endpoint_path, endpoint)
            self._install_signals(loop)
            self._spawn(self._look_for_others())
            code = await self._boots(command, capsules, endpoint)
            await self._streams.close()
            if code is None:
                return await self._requeued()
            if self._departure.why:
                # It has not come to its end: a later run of the job goes on from its last checkpoint.
                self._record("ended")
                self._event("ended", why=self._departure.why, exit_code=shell_code(code))
                return code
            self._record(FINISHED, exit_code=shell_code(code))
            self._event("finished", exit_code=shell_code(code))
        except asyncio.CancelledError:
            # SIGTERM before the job ran: nothing to checkpoint, everything has been taken down on the way here.
            self._record("cancelled")
            return -signal.SIGTERM
        except HpccrError as error:
            self._succession.check()  # what a ghost has to tell is of no interest
            self._event("failed", message=error.message, code=error.code)
            self._record("failed")
            raise
        finally:
            await server.close()
            # A signal may have come at the very end: nobody is left who could do anything about it.
            self._over = True
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._io.submit(self._remove_endpoint)
            await asyncio.to_thread(self._io.shutdown)
        return code

    def _remove_endpoint(self) -> None:
        try:
            if (there := self._step.endpoint()) is None or there.secret == self._secret:
                remove(self._step.endpoint_path)
        except (OSError, HpccrError) as error:
            log.warning("cannot remove %s: %s", self._step.endpoint_path, error)

    def _endpoint(self, port: int) -> EndpointRecord:
        host = socket.gethostname()
        hosts = dict.fromkeys((self._site.nodes[0], host, "127.0.0.1"))
        return EndpointRecord(FORMAT, self._step.key, tuple(hosts), port, self._secret, os.getpid(), host)

    def _record(self, state: str, *, exit_code: int | None = None, argv: tuple[str, ...] | None = None) -> None:
        """Write step.json, in order with the events and like them: a store that is full or slow stops no job."""
        began = self._streams.began if self._streams else (None, None)
        now = time.time()
        placement, incarnation = self._placement, max(0, self._incarnation)
        due = self._due if state == "running" else None

        def write() -> None:
            try:
                old = self._step.record()
            except (OSError, CorruptError):
                old = None
            record = StepRecord(
                format=FORMAT,
                key=self._step.key,
                argv=tuple(map(encodable, argv)) if argv is not None else old.argv if old else (),
                state=state,
                started=old.started if old else now,
                capsules=len(placement) or (old.capsules if old else 1),
                nodes=placement or (old.nodes if old else ()),
                incarnation=incarnation,
                exit_code=exit_code,
                updated=now,
                due=due,
                trees=tuple(quote(os.fsencode(tree)) for tree in self._config.files.trees),
                batch=self._batch,
                stdout_base=began[0],
                stderr_base=began[1],
            )
            try:
                self._succession.check()
                publish(self._step.record_path, record)
            except SupersededError:
                return  # it is the later run's to write
            except OSError as error:
                log.warning("cannot write %s: %s", self._step.record_path, error)

        self._io.submit(write)

    # --- one boot after the other -------------------------------------------------------------------------------

    async def _boots(self, command: Callable[[str], Command], capsules: int, endpoint: EndpointRecord) -> int | None:
        """The command's exit code, or None when the job was checkpointed to be started again."""
        what = command(self._secret)
        self._record("starting", argv=what.argv)
        happened = [] if self._asked else await asyncio.to_thread(events.read, self._step.events_path)
        self._checkpoints.costs = costs_so_far(happened)
        before = past(happened)
        candidates = Candidates(
            self._step, self._loud, afresh=self._afresh(), again=self._again(), fruitless=before.fruitless
        )
        source = await self._first_source(candidates)
        restarts = last_restart = 0
        while True:
            outcome = await self._one_boot(what, source.capsules if source else capsules, source, endpoint)
            match outcome:
                case plan.Finished(code):
                    return code
                case Requeued():
                    return None
            error = failure_of(outcome)
            if isinstance(outcome, plan.StepLost) or error.code == ExitCode.PEER_LOST:
                self._event("lost", message=error.message, node=outcome.failure.node)
            if isinstance(outcome, plan.StepLost):
                source = await candidates.newest()
            if source is not None:
                restarts = restarts + 1 if source.sequence <= last_restart else 1
                last_restart = source.sequence
            target = source.sequence if source is not None else None
            decision, otherwise = after(outcome, target=target, before=before, restarts=restarts)
            if decision is Next.MOVE:
                if await self._moved(error):
                    return None
                decision = otherwise
            if source is not None and decision is Next.REFUSE:
                candidates.refuse(source.sequence, error)
                self._loud(f"checkpoint {source.sequence} cannot be restored: {error.message}")
                if self._sequence is not None or (source := await candidates.newest()) is None:
                    raise error
                self._loud(f"trying checkpoint {source.sequence}, the one before")
            elif source is not None and decision is Next.AGAIN:
                self._loud(f"{error.message}; restoring checkpoint {source.sequence} in place")
            elif source is not None:
                hint = f"{error.hint}; " if error.hint else ""
                raise error_for(
                    error.code,
                    f"{error.message}; checkpoint {source.sequence} is there to go on from",
                    f"{hint}once the cause is gone: {self._again()}",
                )
            else:
                raise error

    def _again(self) -> str:
        return f"{'hpccr restore' if self._step.key.cluster == 'local' else 'scontrol requeue'} {self._step.key.job}"

    def _afresh(self) -> str:
        job = self._step.key.job
        if self._batch:
            return f"to start from the beginning: hpccr rm --force {job}; scontrol requeue {job} (or sbatch a new job)"
        return "`hpccr run --fresh` starts from the beginning"

    async def _moved(self, error: HpccrError) -> bool:
        """Something is wrong with a node of the allocation: have Slurm find others, if it will."""

        def move() -> None:
            self._succession.check()  # on a node that is cut off nobody answers, and the job is elsewhere by now
            self._site.move()

        self._checkpoints.staying.clear()  # the SIGTERM that follows is no news
        try:
            await requeued(move, self._loud)
        except UnsupportedError as refused:
            self._checkpoints.staying.set()
            log.warning("the job cannot be requeued: %s", refused.message)
            return False
        self._loud(f"{error.message}; the job is requeued")
        return True

    async def _look_for_others(self) -> None:
        """Say so where another step of the job runs at the same time."""
        job = Job(self._step.root, self._step.key.cluster, self._step.key.job)
        for step in await asyncio.to_thread(job.steps):
            endpoint = await asyncio.to_thread(step.endpoint) if step != self._step else None
            if endpoint is not None and await _answers(endpoint):
                self._loud(
                    f"step {step.key.step} of the job runs at the same time: when one of them requeues the job, the "
                    "other loses what it has done since its last checkpoint; one `hpccr run` of both saves both"
                )

    async def _first_source(self, candidates: Candidates) -> Manifest | None:
        if self._sequence is not None:
            return await candidates.exactly(self._sequence)
        return await candidates.newest() if self._resume else None

    def _loud(self, text: str) -> None:
        log.warning("%s", text)
        self._event("warning", text=text)

    async def _one_boot(
        self, command: Command, capsules: int, source: Manifest | None, endpoint: EndpointRecord
    ) -> plan.Finished | plan.BootFailed | plan.StepLost | Requeued:
        assert self._streams is not None and self._ended is not None  # noqa: S101 - set first thing in run()
        self._succession.check()
        self._incarnation += 1
        self._placement = place(capsules, self._site.nodes)
        self._record("restoring" if source else "starting")
        self._event("boot", sequence=source.sequence if source else 0, nodes=self._placement)
        self._joined, self._join_failure = [], None
        self._all_joined.clear()
        agents = Agents(
            placement=self._placement,
            endpoint=endpoint,
            socket_path=self._socket_path,
            silence=self._config.checkpoint.silence_timeout,
            step_command=self._site.step_command,
            agent_command=self._agent_command,
            log_path=self._step.path / "agents.log",
            environ=self._site.step_environment(),
        )
        try:
            await agents.start()
            if (failure := await self._wait_joined(agents)) is not None:
                return plan.BootFailed(Phase.CREATING, failure)
            if self._ended.done():
                return self._ended.result()
            members = sorted(self._joined, key=lambda member: member.capsule)
            boot = Boot(
                config=self._config,
                step=self._step,
                command=command,
                streams=self._streams,
                members=members,
                incarnation=self._incarnation,
                secret=self._secret,
                source=source,
                event=self._event,
                check=self._checkpoints.check,
            )
            self._boot = boot
            boot.begin()
            watch = asyncio.create_task(self._watch_running(boot))
            succeeded = asyncio.create_task(self._succession.superseded())
            try:
                await asyncio.wait((boot.outcome, self._ended, succeeded), return_when=asyncio.FIRST_COMPLETED)
                if succeeded.done():
                    raise succeeded.result()
                outcome = boot.outcome.result() if boot.outcome.done() else self._ended.result()
                self._departure.finished = isinstance(outcome, plan.Finished)
                return outcome
            finally:
                self._streams.pause()
                for task in (watch, succeeded):
                    task.cancel()
                await asyncio.gather(watch, succeeded, return_exceptions=True)
                await boot.destroy()
        finally:
            self._boot = None
            for member in self._joined:
                await member.channel.close()
            # The helper of a node that is gone never ends.
            gone = len(self._joined) < len(self._placement) or any(member.lost for member in self._joined)
            await agents.stop(LOST_STEP_TIMEOUT if gone else STEP_END_TIMEOUT)

    async def _watch_running(self, boot: Boot) -> None:
        """Once the job runs: say so, and make checkpoints by the clock. Whatever else happens to that is told."""
        try:
            await self._look_after(boot)
        except Exception as error:
            log.exception("no checkpoints by the clock any more")
            self._loud(f"no checkpoints by the clock any more: {error}")

    async def _look_after(self, boot: Boot) -> None:
        await boot.running.wait()
        self._record("running")
        try:
            await asyncio.to_thread(self._site.at_work)
        except HpccrError as error:
            log.warning("cannot set the job's comment: %s", error.message)
        config = self._config.checkpoint
        await Timekeeper(
            interval=parse_interval(config.interval),
            rate=await failure_rate(config, self._site.failure_rate),
            nodes=len(set(self._placement)),
            costs=lambda: self._checkpoints.costs,
            end=self._site.known_end,
            end_time=self._site.end_time if config.at_limit == "requeue" else None,
            checkpoint=lambda reason: self._checkpoints.make(boot, reason, wait=config.backlog == "wait"),
            leave=lambda end: self._checkpoints.leave(boot, "time limit", hurry=True, by=end - LAST),
            log_choice=self._note,
            planned=self._planned,
        ).run()

    def _note(self, text: str) -> None:
        log.info("%s", text)
        self._event("interval", text=text)

    def _planned(self, due: float | None) -> None:
        self._due = due
        self._record("running")

    async def _wait_joined(self, agents: Agents) -> m.Failed | None:
        timeout = self._config.checkpoint.agent_timeout
        joined = asyncio.create_task(self._all_joined.wait())
        assert self._ended is not None  # noqa: S101 - set first thing in run()
        waits: list[asyncio.Future[Any]] = [joined, self._ended, *([agents.step_ended] if agents.step_ended else [])]
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            joined.cancel()
        if self._join_failure is not None or self._all_joined.is_set() or self._ended.done():
            return self._join_failure
        missing = set(self._placement) - {member.join.node for member in self._joined}
        what = f"no agent joined from {', '.join(sorted(missing)) or 'this node'}"
        ended = agents.step_ended is not None and agents.step_ended.done()
        why = f"the helper step ended: {agents.log_tail()}" if ended else f"within {timeout:.0f} s {agents.log_tail()}"
        return m.Failed(ExitCode.PEER_LOST, f"{what}; {why}", "`hpccr doctor` checks every node")

    # --- server callbacks ---------------------------------------------------------------------------------------

    def _on_join(self, member: Member) -> bool:
        taken = {other.capsule for other in self._joined}
        free = [k for k, node in enumerate(self._placement) if node == member.join.node and k not in taken]
        if not free or self._boot is not None:
            log.warning("an agent on %s that nobody waits for was sent away", member.join.node)
            return False
        member.capsule = free[0]
        member.post(m.Assign(member.capsule))
        self._joined.append(member)
        if len(self._joined) == len(self._placement):
            self._all_joined.set()
        return True

    def _on_message(self, member: Member, message: m.Message) -> None:
        if self._boot is not None and member in self._joined:
            if isinstance(message, m.Signalled):
                self._terminate(own=False)
            elif isinstance(message, m.Wanted):
                self._wanted(self._boot)
            else:
                self._boot.message(member, message)
        elif isinstance(message, m.Failed):
            self._join_failure = message
            self._all_joined.set()

    def _on_lost(self, member: Member, reason: str) -> None:
        if self._boot is not None and member in self._joined:
            self._boot.lost(member, reason)
        elif member in self._joined and self._join_failure is None:
            self._join_failure = m.Failed(ExitCode.PEER_LOST, reason, "", member.join.node)
            self._all_joined.set()

    def _output_taken(self, count: int) -> None:
        if self._boot is not None:
            self._boot.output_taken(count)

    def _output_broken(self, stream: int) -> None:
        if self._boot is not None:
            self._boot.close_output(stream)

    def _feed_input(self, data: bytes) -> None:
        if self._boot is not None:
            self._boot.feed_input(data)

    async def _on_client(self, request: m.ClientMessage, post: Callable[[m.Message], None]) -> m.Message:
        match request:
            case m.StatusRequest():
                return m.StatusReply(encode_status(self.status()))
            case m.CheckpointRequest():
                if self._boot is None:
                    raise HpccrError("the job is not running yet", hint="try again once `hpccr status` says running")
                return await self._checkpoints.answer(self._boot, request, post)

    def _finish_requeued(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(Requeued())

    async def _requeued(self) -> int:
        """Nothing of the job runs; wait for Slurm to end this batch script where ending now would let it run on."""
        self._record("requeued")
        self._event("requeued")
        if self._site.must_stay():
            await asyncio.Event().wait()
        return ExitCode.OK

    # --- signals ------------------------------------------------------------------------------------------------

    def _install_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in signal.valid_signals() - NOT_PASSED - OURS:
            loop.add_signal_handler(number, self._pass_on, number)
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGTSTP, self._suspend, True)
        loop.add_signal_handler(signal.SIGCONT, self._suspend, False)

    def _suspend(self, suspended: bool) -> None:
        """`scontrol suspend` sends SIGTSTP 2 s before the job is frozen, and `scontrol resume` SIGCONT (as does every
        requeue). A checkpoint that was caught half-way would wait, with the tasks of some nodes in CRIU's hands."""
        self._checkpoints.suspended = suspended
        if self._still is not None:
            self._still.cancel()
        if suspended:
            self._checkpoints.suspensions += 1
            self._event("suspended")
            # Where it was only somebody's ^Z no SIGCONT needs to follow.
            self._still = asyncio.get_running_loop().call_later(STILL, self._not_suspended)
        if self._boot is None:
            return
        if suspended:
            self._boot.cancel("the job is being suspended")
        else:
            self._boot.signal(signal.SIGCONT)

    def _not_suspended(self) -> None:
        self._checkpoints.suspended = False

    def _pass_on(self, number: int) -> None:
        if number == signal.SIGUSR1 and self._batch:
            self._spawn(self._on_usr1())
        elif number in ENDING and (self._boot is None or self._boot.state.phase in plan.BOOT):
            self._stop()  # a job that does not run yet
        elif self._boot is not None:
            self._boot.signal(number)

    def _stop(self) -> None:
        if self._main is not None and not self._departure.finished:
            self._main.cancel()

    async def _on_usr1(self) -> None:
        try:
            if self._boot is None:
                raise HpccrError("the job is not running yet")
            await self._checkpoints.make(self._boot, "signal", wait=True)
        except HpccrError as error:
            self._loud(f"no checkpoint on SIGUSR1: {error.message}")

    def _wanted(self, boot: Boot) -> None:
        """A process of the job asks for a checkpoint; while one that was asked for is waited for, it is that one."""
        if self._wish is None or self._wish.done():
            self._wish = asyncio.get_running_loop().create_task(self._grant(boot))

    async def _grant(self, boot: Boot) -> None:
        try:
            await self._checkpoints.make(boot, "program", wait=True)
        except HpccrError as error:
            self._loud(f"no checkpoint though the program asked for one: {error.message}")

    def _terminate(self, *, own: bool = True) -> None:
        self._spawn(self._departure.signalled(own=own))

    def _spawn(self, job: Coroutine[Any, Any, None]) -> None:
        if self._over:
            job.close()
            return
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the coordinator failed", exc_info=error)

    def status(self) -> StepStatus:
        """What the step is doing now."""
        return report(
            self._step.key,
            self._boot,
            nodes=self._placement,
            incarnation=self._incarnation,
            started=self._started,
            due=self._due,
        )
