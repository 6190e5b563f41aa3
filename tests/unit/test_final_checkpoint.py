"""The last checkpoint of a job: what it waits for, what it does not, and that nobody is left dead in an allocation.

The capsules are scripted: each answers requests as a node does, but for those that a test holds back or lets fail.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hpccr.config import Config
from hpccr.coordinator import checkpoints, departure, flushes, plan
from hpccr.coordinator.checkpoints import Checkpoints
from hpccr.coordinator.departure import Departure
from hpccr.coordinator.plan import Phase
from hpccr.coordinator.requests import Command
from hpccr.coordinator.server import Member
from hpccr.coordinator.service import Boot
from hpccr.coordinator.site import Site
from hpccr.coordinator.streams import Positions, Streams
from hpccr.errors import HpccrError, LockedError, UnsupportedError
from hpccr.model import StepKey, Stream
from hpccr.store.layout import Step, Store
from hpccr.store.publish import make_directory
from hpccr.wire import messages as m

DEADLINE = 20
NO_ROOM = os.strerror(errno.ENOSPC)


class Silent:
    """Of a job without input and output."""

    stdin, merged, paths, trouble = "null", True, (), ""

    def begin(self, positions: Positions | None) -> None:
        pass

    async def cut_back(self, positions: Positions | None) -> None:
        pass

    async def written(self, limit: float = 0.0) -> str:
        return ""

    def running(self) -> None:
        pass

    async def positions(self, consumed: int) -> Positions:
        return Positions(Stream(0), Stream(0), Stream(0))


class Capsule(Member):
    """held: requests, or "Flushed", that are not answered; refusals: how many flushes fail."""

    def __init__(self, index: int) -> None:
        super().__init__(m.Join(f"node{index}", 0, 1), cast(Any, None), index)
        self.boot: Boot | None = None
        self.held: set[str] = set()
        self.refusals = 0
        self.got: Counter[str] = Counter()

    def post(self, message: m.Message) -> None:
        name = type(message).__name__
        self.got[name] += 1
        if name in self.held:
            return
        loop = asyncio.get_running_loop()
        for answer in self._answers(message):
            assert self.boot is not None
            loop.call_soon(self.boot.message, self, answer)

    def _answers(self, message: m.Message) -> list[m.Message]:
        match message:
            case m.Create():
                return [m.Created(m.Endpoint(self.capsule, "192.0.2.1", self.capsule + 1, ""), self.join.node, ())]
            case m.Flush(directory):
                sequence = int(Path(directory).parent.name.removeprefix("ckpt-"))
                if self.refusals:
                    self.refusals -= 1
                    return [m.FlushStarted(), m.FlushFailed(sequence, f"capsule: {NO_ROOM}", "make room")]
                return [m.FlushStarted(), *([] if "Flushed" in self.held else [m.Flushed(sequence, 10, 0.1)])]
        answers: dict[type[m.Message], m.Message] = {
            m.Connect: m.Connected(),
            m.Start: m.Started(300),
            m.Quiesce: m.Quiesced(()),
            m.Prepare: m.Prepared(1),
            m.Freeze: m.Frozen(0),
            m.Survey: m.Surveyed(()),
            m.Dump: m.Dumped(10),
            m.Release: m.Released(0.1),
            m.Abort: m.Aborted(),
        }
        return [answers[type(message)]] if type(message) in answers else []


class Queue(Site):
    """Slurm. why: its answers to why the job is ended, the last one again and again; refusals: to requeue the job."""

    def __init__(self) -> None:
        super().__init__(("node0",))
        self.why: list[str | HpccrError] = ["requeue"]
        self.refusals: list[HpccrError] = []
        self.requeues = 0

    def why_signalled(self) -> str:
        answer = self.why.pop(0) if len(self.why) > 1 else self.why[0]
        if isinstance(answer, HpccrError):
            raise answer
        return answer

    def ensure_requeued(self) -> None:
        self.requeues += 1
        if self.refusals:
            raise self.refusals.pop(0)


class Scene:
    """A job that runs in two capsules."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.site = Queue()
        self.capsules = Capsule(0), Capsule(1)
        self.events: Counter[str] = Counter()
        self.told: list[str] = []
        self.left = self.stopped = 0
        self.checkpoints = Checkpoints(step=step, site=self.site, keep=2, left=self._leave, warn=self.told.append)
        self.boot = Boot(
            config=Config(),
            step=step,
            command=Command(("app",), {}, "/"),
            streams=cast(Streams, Silent()),
            members=self.capsules,
            incarnation=0,
            secret="",
            source=None,
            event=lambda name, **details: self.events.update((name,)),
            check=self.checkpoints.check,
        )
        for capsule in self.capsules:
            capsule.boot = self.boot
        self.departure = Departure(
            site=self.site,
            checkpoints=self.checkpoints,
            boot=lambda: self.boot,
            event=lambda name, **details: self.events.update((name,)),
            warn=self.told.append,
            left=self._leave,
            stop=self._stop,
        )

    def _leave(self) -> None:
        self.left += 1

    def _stop(self) -> None:
        self.stopped += 1

    async def run(self) -> None:
        self.boot.begin()
        await self.boot.running.wait()

    async def until(self, phase: Phase) -> None:
        while self.boot.state.phase is not phase:
            await asyncio.sleep(0)


@pytest.fixture
def step(tmp_path: Path) -> Step:
    step = Store.at(tmp_path).step(StepKey("tb", "17", "0"))
    make_directory(step.path)
    return step


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flushes, "pauses", lambda: itertools.repeat(0.0))
    monkeypatch.setattr(checkpoints, "PAUSES", (0.0, 0.001))
    monkeypatch.setattr(departure, "ASK_AGAIN", 0.0)
    monkeypatch.setattr(departure, "RETRY", 0.001)


def play(acts: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(acts, DEADLINE))


# --- what it does not wait for ----------------------------------------------------------------------------------------


def test_it_overtakes_a_slow_flush_and_who_waits_for_that(step: Step) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.capsules[1].held.add("Flushed")
        await scene.checkpoints.make(scene.boot, "first", wait=True)
        waiting = asyncio.create_task(scene.checkpoints.make(scene.boot, "second", wait=True))
        while not scene.boot.waiting:
            await asyncio.sleep(0)
        scene.capsules[1].held.clear()
        await scene.checkpoints.final(scene.boot, "requeue")
        with pytest.raises(LockedError, match="final checkpoint"):
            await waiting
        assert scene.left == 1 and scene.events["released"] == 2

    play(acts())


def test_it_ends_a_checkpoint_that_is_being_prepared(step: Step) -> None:
    """Which may take as long as a dump where files are copied."""

    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.capsules[1].held.add("Prepare")
        preparing = asyncio.create_task(scene.checkpoints.make(scene.boot, "first", wait=True))
        await scene.until(Phase.PREPARING)
        scene.capsules[1].held.clear()
        await scene.checkpoints.final(scene.boot, "requeue")
        with pytest.raises(HpccrError, match="about to end"):
            await preparing
        assert scene.left == 1

    play(acts())


def test_it_overtakes_the_first_of_the_two_that_a_requeue_makes(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """That one may take minutes to become durable, and the job runs on meanwhile."""
    monkeypatch.setattr(checkpoints, "FRESH", -1.0)

    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.capsules[1].held.add("Flushed")
        asked = asyncio.create_task(scene.checkpoints.leave(scene.boot, "requeue"))
        while not scene.boot.flushes.pending(1):
            await asyncio.sleep(0)
        with pytest.raises(LockedError, match="already"):
            await scene.checkpoints.leave(scene.boot, "requeue")
        departing = asyncio.create_task(scene.departure.signalled(own=True))
        await scene.until(Phase.KILLED)
        for sequence in (1, 2):
            scene.boot.message(scene.capsules[1], m.Flushed(sequence, 10, 0.1))
        await departing
        assert scene.left == 1 and scene.site.requeues == 1
        with pytest.raises(LockedError, match="already"):
            await asked

    play(acts())


def test_none_begins_in_a_job_that_is_about_to_be_stopped(step: Step) -> None:
    """Also not one that was asked for before that, and had to wait."""

    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.capsules[1].held.add("Prepare")
        first, second = (
            asyncio.create_task(scene.checkpoints.make(scene.boot, name, wait=True)) for name in ("first", "second")
        )
        await scene.until(Phase.PREPARING)
        scene.checkpoints.suspended = True
        scene.boot.cancel("the job is being suspended")
        with pytest.raises(HpccrError, match="being suspended"):
            await first
        with pytest.raises(LockedError, match="is suspended"):
            await second
        assert scene.capsules[1].got["Prepare"] == 1

    play(acts())


def test_time_in_which_the_job_was_suspended_is_not_what_one_takes(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.capsules[1].held.add("Flushed")
        clock = SimpleNamespace(monotonic=lambda: now, time=time.time, strftime=time.strftime, localtime=time.localtime)
        monkeypatch.setattr(checkpoints, "time", clock)
        shown: list[str] = []
        monkeypatch.setattr(scene.site, "show", shown.append)
        taken = []
        for sequence in (1, 2):
            now = 1000.0 * sequence
            await scene.checkpoints.make(scene.boot, "first", wait=True)
            now += 100.0
            scene.checkpoints.suspensions += 2 - sequence
            scene.boot.message(scene.capsules[1], m.Flushed(sequence, 10, 0.1))
            while len(shown) < sequence:
                await asyncio.sleep(0)
            taken.append(scene.checkpoints.costs.whole)
        assert taken == [0.0, 100.0]

    play(acts())


# --- nobody is left dead ----------------------------------------------------------------------------------------------


def test_nobody_is_killed_while_the_manifest_cannot_be_written(step: Step) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        step.path.chmod(0o500)
        with pytest.raises(HpccrError, match=r"cannot write .*checkpoint\.json: Permission denied"):
            await scene.checkpoints.leave(scene.boot, "requeue")
        step.path.chmod(0o700)
        assert scene.boot.state.phase is Phase.RUNNING and scene.checkpoints.staying.is_set()
        assert not scene.capsules[0].got["Release"] and not scene.left

    play(acts())


def test_what_is_left_is_flushed_until_there_is_room(step: Step) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.capsules[1].refusals = 3
        await scene.checkpoints.leave(scene.boot, "requeue")
        assert scene.left == 1 and scene.events["flush-failed"] == 3 and scene.events["durable"] == 1
        assert (scene.capsules[0].got["Flush"], scene.capsules[1].got["Flush"]) == (1, 4)

    play(acts())


def test_slurm_is_asked_until_it_takes_the_job_back(step: Step) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.site.refusals = [HpccrError("slurmctld is starting")] * 5
        await scene.checkpoints.leave(scene.boot, "requeue")
        assert scene.left == 1 and scene.site.requeues == 6 and len(scene.told) == 1

    play(acts())


def test_a_job_that_slurm_does_not_take_back_is_restored_in_place(step: Step) -> None:
    async def acts() -> None:
        for leave in (False, True):
            scene = Scene(step)
            await scene.run()
            scene.site.refusals = [UnsupportedError("it is interactive")]
            with pytest.raises(UnsupportedError):
                if leave:
                    await scene.checkpoints.leave(scene.boot, "requeue")
                else:
                    await scene.checkpoints.final(scene.boot, "preempted")
            assert isinstance(scene.boot.outcome.result(), plan.StepLost)
            assert not scene.left and scene.checkpoints.staying.is_set()

    play(acts())


# --- SIGTERM ----------------------------------------------------------------------------------------------------------


def test_a_command_that_is_told_to_end_is_not_at_its_end(step: Step) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.checkpoints.suspended = True  # so that there can be none
        await scene.departure.signalled(own=True)
        assert scene.capsules[0].got["Signal"] == 1
        assert scene.departure.why == "requeue" and scene.boot.returns

    play(acts())


@pytest.mark.parametrize("why", ["cancelled", "unknown"])
def test_a_signal_that_is_no_requeue_is_the_commands(step: Step, why: str) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.site.why = [why]
        await scene.departure.signalled(own=False)
        assert not scene.capsules[0].got["Signal"]  # if it is to end, its own will come
        await scene.departure.signalled(own=True)
        assert scene.capsules[0].got["Signal"] == 1 and not scene.events["checkpoint"]
        assert not scene.departure.why and not scene.boot.returns

    play(acts())


def test_in_a_grace_time_it_is_tried_again(step: Step) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.site.why = ["preempted"]
        scene.checkpoints.suspended = True
        departing = asyncio.create_task(scene.departure.signalled(own=False))
        while len(scene.told) < 3:
            await asyncio.sleep(0)
        scene.checkpoints.suspended = False
        await departing
        assert scene.left == 1 and not scene.capsules[0].got["Signal"]

    play(acts())


def test_at_the_end_of_a_grace_time_the_command_is_told(step: Step) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.site.why = ["preempted"]
        scene.checkpoints.suspended = True
        departing = asyncio.create_task(scene.departure.signalled(own=False))
        while not scene.told:
            await asyncio.sleep(0)
        await scene.departure.signalled(own=True)
        await departing
        assert scene.capsules[0].got["Signal"] == 1 and scene.departure.why == "preempted"

    play(acts())


def test_a_mere_guess_kills_nobody(step: Step) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.site.why = [HpccrError("timed out")] * 3 + ["cancelled"]
        await scene.departure.signalled(own=True)
        assert scene.events["released"] == 1 and scene.boot.state.phase is Phase.RUNNING
        assert scene.capsules[0].got["Signal"] == 1 and not scene.left

    play(acts())


def test_before_the_job_runs_there_is_nothing_to_save(step: Step) -> None:
    async def acts() -> None:
        for why, outcome in (("requeue", (1, 0, 1)), ("cancelled", (0, 1, 0))):
            scene = Scene(step)
            scene.site.why = [why]
            await scene.departure.signalled(own=True)
            assert (scene.left, scene.stopped, scene.site.requeues) == outcome

    play(acts())


@pytest.mark.parametrize("why", ["timeout", "cancelled"])
def test_a_job_that_has_been_told_to_end_is_not_saved_any_more(step: Step, why: str) -> None:
    """What is saved then would be a job in the middle of its end."""

    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.site.why = [why]
        scene.capsules[1].held.add("Dump")
        under_way = asyncio.create_task(scene.checkpoints.make(scene.boot, "interval", wait=True))
        await scene.until(Phase.DUMPING)
        await scene.departure.signalled(own=True)
        with pytest.raises(HpccrError, match="told to end"):
            await under_way
        with pytest.raises(LockedError, match="told to end"):
            await scene.checkpoints.make(scene.boot, "interval", wait=True)
        assert scene.capsules[0].got["Signal"] == 1 and scene.boot.state.phase is Phase.RUNNING

    play(acts())


def test_a_signal_that_comes_while_a_requeue_fails_is_acted_on(step: Step) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.capsules[1].held.add("Prepare")
        asked = asyncio.create_task(scene.checkpoints.leave(scene.boot, "requeue"))
        await scene.until(Phase.PREPARING)
        departing = asyncio.create_task(scene.departure.signalled(own=True))
        await asyncio.sleep(0.01)
        assert not departing.done() and not scene.events["terminate"]
        scene.capsules[1].held.clear()
        scene.boot.cancel("no room")
        with pytest.raises(HpccrError, match="no room"):
            await asked
        await departing
        assert scene.left == 1 and scene.events["terminate"] == 1

    play(acts())


def test_a_signal_after_the_end_means_nothing(step: Step) -> None:
    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.site.why = ["timeout"]
        scene.departure.finished = True
        await scene.departure.signalled(own=True)
        assert not scene.departure.why and not scene.stopped and not scene.capsules[0].got["Signal"]

    play(acts())


@pytest.mark.parametrize(("signum", "asked"), [(signal.SIGCONT, 1), (signal.SIGUSR2, 1), (signal.SIGTERM, 0)])
def test_the_end_counts_at_once_only_where_it_was_asked_for(step: Step, signum: int, asked: int) -> None:
    """Else every node is asked whether it is there: mpirun may be the first to see that one is not."""

    async def acts() -> None:
        scene = Scene(step)
        await scene.run()
        scene.boot.signal(signum)
        scene.boot.message(scene.capsules[0], m.Exited(0))
        await asyncio.sleep(0)
        assert scene.capsules[1].got["Call"] == asked
        assert scene.boot.outcome.done() is not bool(asked)

    play(acts())
