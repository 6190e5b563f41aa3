"""What keeps a job alive while nobody looks: checkpoints by the clock go on whatever goes wrong with one of them."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from hpccr.config import CheckpointConfig
from hpccr.coordinator import schedule, timekeeper
from hpccr.coordinator.schedule import Costs, Interval
from hpccr.coordinator.timekeeper import Timekeeper, failure_rate
from hpccr.errors import HpccrError
from hpccr.slurm.nodes import USUAL_MTBF, FailureRate
from hpccr.slurm.query import SlurmError

DEADLINE = 20
PROMPT = 0.02
"""Seconds that the loop may be late without being said to have stood still."""
KNOWN = Costs(frozen=0.01, whole=0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timekeeper, "RETRY", 0.02)
    monkeypatch.setattr(timekeeper, "ANSWER", (0.05, 0.05))
    monkeypatch.setattr(schedule, "SHORTEST", 0.01)
    monkeypatch.setattr(schedule, "MARGIN", 0.2)


def full() -> OSError:
    return OSError(errno.EDQUOT, "Disk quota exceeded")


class Job:
    """What a Timekeeper was made to do: the acts, with the time of each."""

    def __init__(self) -> None:
        self.acts: list[tuple[str, float]] = []
        self.planned: list[float | None] = []
        self.costs = KNOWN
        self.fails: dict[str, int] = {}
        """How often an act fails before it works."""
        self.late = 0.0
        """For how many seconds this process has stood still since, which moves what is expected by a clock."""
        self._looked = time.time()
        self.checkpointing = asyncio.Event()
        self.checkpointing.set()

    async def _act(self, what: str) -> None:
        self.acts.append((what, time.time()))
        if self.fails.get(what, 0):
            self.fails[what] -= 1
            raise full() if self.fails[what] % 2 else HpccrError("refused")

    async def checkpoint(self, reason: str) -> None:
        await self._act(reason)
        self.costs = KNOWN
        await self.checkpointing.wait()

    async def leave(self, end: float) -> None:
        await self._act("leave")

    def plan(self, moment: float | None) -> None:
        self.planned.append(moment)
        raise full()

    def times(self, what: str) -> list[float]:
        return [moment for act, moment in self.acts if act == what]

    def _look(self) -> None:
        now = time.time()
        self.late += max(0.0, now - self._looked - PROMPT)
        self._looked = now

    async def kept(
        self,
        *,
        interval: float | None = None,
        end: float | None = None,
        ask: Callable[[], float | None] | None = None,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run a Timekeeper until the job has left, or until that is true."""
        keeper = Timekeeper(
            interval=None if interval is None else Interval(interval),
            rate=FailureRate(1e6, "test"),
            nodes=1,
            costs=lambda: self.costs,
            end=end,
            end_time=ask,
            checkpoint=self.checkpoint,
            leave=self.leave,
            log_choice=lambda text: None,
            planned=self.plan,
        )
        running = asyncio.create_task(keeper.run())
        async with asyncio.timeout(DEADLINE):
            while True:
                self._look()
                if running.done() or until():
                    break
                await asyncio.sleep(0.001)
        if not running.done():
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        else:
            await running


def silent() -> float | None:
    raise SlurmError("Slurm does not answer")


def test_checkpoints_that_fail_and_a_full_store_end_nothing() -> None:
    async def run() -> None:
        job = Job()
        job.fails["interval"] = 4
        await job.kept(interval=0.01, until=lambda: len(job.acts) >= 6)
        assert len(job.planned) > 4

    asyncio.run(run())


def test_a_job_leaves_before_its_limit_though_slurm_does_not_answer() -> None:
    """By what its environment said at the start. And a first failure is tried again."""

    async def run(ask: Callable[[], float | None]) -> None:
        job = Job()
        job.fails["leave"] = 2
        end = time.time() + 0.6
        await job.kept(end=end, ask=ask)
        first, *_, last = job.times("leave")
        assert len(job.times("leave")) == 3
        assert end - 0.25 < first < last < end + job.late

    def unreachable() -> float | None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    asyncio.run(run(silent))
    asyncio.run(run(unreachable))


def test_a_question_without_an_answer_does_not_hold_the_last_checkpoint_up() -> None:
    answer = threading.Event()

    async def run() -> None:
        job = Job()
        end = time.time() + 0.5
        try:
            await job.kept(end=end, ask=lambda: answer.wait(DEADLINE) and None)
        finally:
            answer.set()
        assert job.times("leave")[0] < end + job.late

    asyncio.run(run())


def test_the_limit_is_asked_for_again_soon_after_a_failure() -> None:
    async def run() -> None:
        job = Job()
        answers: list[Any] = [SlurmError("busy"), SlurmError("busy"), time.time() + 0.3]

        def ask() -> float | None:
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(answer, Exception):
                raise answer
            assert isinstance(answer, float)
            return answer

        await job.kept(ask=ask)
        assert job.times("leave")[0] < answers[0] + job.late

    asyncio.run(run())


def test_a_limit_that_was_moved_is_heeded_when_it_comes() -> None:
    async def run() -> None:
        job = Job()
        end = time.time() + 0.6
        await job.kept(end=end - 0.3, ask=lambda: end)
        assert job.times("leave")[0] > end - 0.25

    asyncio.run(run())


def test_a_checkpoint_that_hangs_does_not_hide_the_limit() -> None:
    async def run() -> None:
        job = Job()
        job.checkpointing.clear()
        end = time.time() + 0.5
        await job.kept(interval=0.01, end=end, ask=lambda: end)
        assert len(job.times("interval")) == 1 and job.times("leave")[0] < end + job.late

    asyncio.run(run())


def test_what_a_checkpoint_takes_is_learned_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none by interval, or not soon; a trial that fails is repeated, one that worked is not."""
    # The limit is so far away that no stall of this machine brings it before the trials.
    monkeypatch.setattr(schedule, "TRIALS", 100)

    async def run() -> None:
        job = Job()
        job.costs = Costs()
        job.fails["trial"] = 1
        start = time.time()
        end = start + 10.0

        def later() -> bool:
            """A third would have come."""
            return job.costs == KNOWN and time.time() > job.times("trial")[-1] + 0.2

        await job.kept(interval=100, end=end, ask=lambda: end, until=later)
        first, second = job.times("trial")
        assert 0.09 < first - start < 0.3 + job.late and second - start > 0.19
        assert not job.times("leave")

    asyncio.run(run())


def test_none_is_made_where_the_limit_is_not_served() -> None:
    async def run() -> None:
        job = Job()
        job.costs = Costs()
        end = time.time() + 0.1
        await job.kept(end=end, until=lambda: time.time() > end + 0.1)
        assert not job.acts

    asyncio.run(run())


def test_how_often_nodes_fail() -> None:
    """As the administrator says, else as Slurm's records do, else what is usual; for "auto" only."""
    found = FailureRate(5e6, "Slurm's records")

    def rate(config: CheckpointConfig, ask: Callable[[], FailureRate] = lambda: found) -> FailureRate:
        return asyncio.run(failure_rate(config, ask))

    def refuse() -> FailureRate:
        raise SlurmError("Slurm does not answer")

    assert rate(CheckpointConfig(interval="auto")) == found
    assert rate(CheckpointConfig(interval="auto", node_mtbf=1000.0)) == FailureRate(1000.0, "checkpoint.node_mtbf")
    assert rate(CheckpointConfig(interval="auto"), refuse).mtbf == USUAL_MTBF
    assert rate(CheckpointConfig(interval="30m"), refuse).mtbf == USUAL_MTBF
