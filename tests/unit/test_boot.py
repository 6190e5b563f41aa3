"""What a boot has done to the job's output, files and checkpoints by the time it comes to nothing.

The capsules are scripted, as those of the final checkpoint.
"""

from __future__ import annotations

import asyncio
import math
import os
from pathlib import Path
from typing import Any, cast

import pytest
from test_final_checkpoint import DEADLINE, Capsule, Silent
from test_store import with_two_checkpoints

from hpccr.config import Config
from hpccr.coordinator import plan
from hpccr.coordinator.plan import Phase
from hpccr.coordinator.requests import Command
from hpccr.coordinator.service import FROZEN_OUTPUT, Boot
from hpccr.coordinator.streams import Positions, Streams
from hpccr.errors import ExitCode, HpccrError
from hpccr.model import Manifest
from hpccr.store.layout import Step
from hpccr.wire import messages as m

PATH = "/home/user/out.txt"


class Output(Silent):
    """cuts: to where the job's output was cut back."""

    paths = (PATH,)

    def __init__(self) -> None:
        self.cuts: list[Positions | None] = []
        self.waiting: list[asyncio.Future[str]] = []
        self.limit = math.inf

    async def cut_back(self, positions: Positions | None) -> None:
        self.cuts.append(positions)

    async def written(self, limit: float = math.inf) -> str:
        self.limit = limit
        self.waiting.append(asyncio.get_running_loop().create_future())
        return await self.waiting[-1]


class Restorable(Capsule):
    """fails: the request that it cannot do. seen: for each request, which checkpoints were abandoned when it came, and
    how often the output had been cut back."""

    def __init__(self, step: Step, output: Output, fails: type[m.Message] | None) -> None:
        super().__init__(0)
        self.output = output
        self._step, self._fails = step, fails
        self.seen: dict[type[m.Message], tuple[list[int], int]] = {}
        self.excluded: tuple[bytes, ...] = ()

    def _answers(self, message: m.Message) -> list[m.Message]:
        marked = [one.sequence for one in self._step.checkpoints() if one.state().abandoned]
        self.seen[type(message)] = marked, len(self.output.cuts)
        if isinstance(message, m.RollBack):
            self.excluded = message.excluded
        if type(message) is self._fails:
            return [m.Failed(ExitCode.FAILED, "cannot")]
        answers: dict[type[m.Message], m.Message] = {
            m.Fetch: m.Fetched(),
            m.RollBack: m.RolledBack(1),
            m.Restore: m.Restored(0.1, 0.1, 10, 1),
            m.Resume: m.Resumed(),
            m.Unhold: m.Unheld(),
        }
        return [answers[type(message)]] if type(message) in answers else super()._answers(message)


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return with_two_checkpoints(tmp_path)


def made_boot(step: Step, capsule: Restorable, source: Manifest | None, events: list[str]) -> Boot:
    made = Boot(
        config=Config(),
        step=step,
        command=Command(("app",), {}, "/"),
        streams=cast(Streams, capsule.output),
        members=(capsule,),
        incarnation=1,
        secret="",
        source=source,
        event=lambda name, **details: events.append(name),
        check=lambda: None,
    )
    capsule.boot = made
    return made


def boot(
    step: Step, source: int, fails: type[m.Message] | None = None
) -> tuple[plan.Finished | plan.BootFailed | plan.StepLost | None, Restorable, list[str]]:
    """The outcome, None if the job runs; its capsule; the events."""
    capsule = Restorable(step, Output(), fails)
    events: list[str] = []
    manifest: Manifest | None = step.checkpoint(source).manifest() if source else None

    async def acts() -> Any:
        made = made_boot(step, capsule, manifest, events)
        made.begin()
        running = asyncio.ensure_future(made.running.wait())
        await asyncio.wait((running, made.outcome), return_when=asyncio.FIRST_COMPLETED)
        running.cancel()
        return made.outcome.result() if made.outcome.done() else None

    return asyncio.run(asyncio.wait_for(acts(), DEADLINE)), capsule, events


def test_newer_checkpoints_are_marked_and_the_output_is_cut_before_any_file_is_touched(step: Step) -> None:
    """So that the next run of the job does not restore them over the files of an older one, should this fail."""
    outcome, capsule, events = boot(step, 1, fails=m.RollBack)
    assert isinstance(outcome, plan.BootFailed) and outcome.phase is Phase.ROLLING_BACK
    assert capsule.seen[m.Fetch] == ([], 0) and capsule.seen[m.RollBack] == ([2], 1)
    assert events.count("abandoned") == 1
    assert capsule.excluded == (os.fsencode(step.path.parent.parent), os.fsencode(PATH))
    outcome, capsule, events = boot(step, 1)
    assert outcome is None and not events.count("abandoned") and len(capsule.output.cuts) == 1


@pytest.mark.parametrize("fails", [m.Create, m.Fetch])
def test_a_checkpoint_that_is_not_fetched_has_cost_nothing(step: Step, fails: type[m.Message]) -> None:
    outcome, capsule, events = boot(step, 1, fails=fails)
    assert isinstance(outcome, plan.BootFailed)
    assert not capsule.output.cuts and "abandoned" not in events


def test_a_start_from_the_beginning_marks_and_cuts_before_it(step: Step) -> None:
    outcome, capsule, _ = boot(step, 0)
    assert outcome is None and capsule.seen[m.Connect] == ([], 0) and capsule.seen[m.Start] == ([2, 1], 1)


@pytest.mark.parametrize(("source", "phase"), [(1, Phase.ROLLING_BACK), (0, Phase.STARTING)])
def test_where_checkpoints_cannot_be_marked_nothing_is_touched(step: Step, source: int, phase: Phase) -> None:
    step.checkpoint(2).path.chmod(0o500)
    outcome, capsule, _ = boot(step, source)
    assert isinstance(outcome, plan.BootFailed) and outcome.phase is phase
    # The checkpoint is not passed over for that.
    assert outcome.failure.code == ExitCode.PEER_LOST and "cannot mark" in outcome.failure.message
    assert not capsule.output.cuts and not {m.RollBack, m.Start} & capsule.seen.keys()


def test_a_dump_waits_until_the_output_is_written(step: Step) -> None:
    """The job may have its own output file open, which is saved with its files then. Where it cannot be written the
    tasks do not stand still for that."""

    async def acts() -> None:
        capsule = Restorable(step, output := Output(), None)
        made = made_boot(step, capsule, None, events := [])
        made.begin()
        for trouble in ("", "No space left on device"):
            making = asyncio.create_task(made.checkpoint(kill=False, reason="command"))
            while not output.waiting:
                await asyncio.sleep(0)
            assert m.Dump not in capsule.seen and output.limit == FROZEN_OUTPUT
            output.waiting.pop().set_result(trouble)
            if trouble:
                with pytest.raises(HpccrError, match="No space"):
                    await making
            else:
                await making
                assert m.Dump in capsule.seen
                capsule.seen.clear()
        assert m.Dump not in capsule.seen and m.Abort in capsule.seen and events.count("checkpoint-failed") == 1

    asyncio.run(asyncio.wait_for(acts(), DEADLINE))
