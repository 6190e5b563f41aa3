"""The requests that the phases of a boot and of a checkpoint send to each capsule."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpccr.config import Config
from hpccr.coordinator import plan
from hpccr.coordinator.plan import Phase
from hpccr.model import FileRules, Manifest
from hpccr.store.layout import Step
from hpccr.wire import messages as m


@dataclass(frozen=True)
class Command:
    """What the job is: capsule 0's command and what every launch root gets."""

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Of one Boot. stdin, merged: as coordinator.streams finds them; source: what is restored, if anything is."""

    step: Step
    command: Command
    stdin: str
    merged: bool
    incarnation: int
    secret: str
    source: Manifest | None
    files: FileRules

    def message(
        self, phase: Phase, capsule: int, state: plan.State, patience: float, elsewhere: tuple[bytes, ...]
    ) -> m.Message:
        """The request of `phase` to a capsule. patience: seconds for ranks to come to a safe point; elsewhere: files
        (identities) that another capsule saves."""
        match phase:
            case Phase.CREATING:
                return m.Create(m.PROTOCOL, self.step.key, capsule, state.capsules, self.incarnation, self.secret)
            case Phase.CONNECTING:
                return m.Connect(tuple(created.endpoint for created in state.created))
            case Phase.STARTING:
                own = capsule == 0
                return m.Start(
                    argv=tuple(map(os.fsencode, self.command.argv)) if own else (),
                    env={os.fsencode(name): os.fsencode(value) for name, value in self.command.env.items()},
                    cwd=os.fsencode(self.command.cwd),
                    stdin=self.stdin if own else "null",
                    merged=self.merged if own else True,
                )
            case Phase.FETCHING:
                assert self.source is not None  # noqa: S101 - this phase exists only with a source
                return m.Fetch(
                    directory=str(self.step.checkpoint(self.source.sequence).capsule_path(capsule)),
                    sequence=self.source.sequence,
                    checkpoint=self.source.checkpoint,
                )
            case Phase.ROLLING_BACK:
                return m.RollBack(self.files.excluded)
            case Phase.RESTORING:
                own = capsule == 0
                return m.Restore(
                    stdin=self.stdin if own else "null",
                    merged=self.merged if own else True,
                )
            case Phase.RESUMING:
                return m.Resume()
            case Phase.UNHOLDING:
                return m.Unhold()
            case Phase.ABORTING:
                assert state.failure is not None  # noqa: S101 - set by plan._abort
                return m.Abort(state.failure.message)
        attempt = state.attempt
        assert attempt is not None  # noqa: S101 - the phases left are those of a checkpoint
        milliseconds = round(patience * 1000)
        match phase:
            case Phase.ASKING:
                return m.Quiesce("ask", 0)
            case Phase.ARRIVING:
                return m.Quiesce("arrive", milliseconds, state.targets)
            case Phase.FINISHING:
                return m.Quiesce("finish", milliseconds, state.targets)
            case Phase.PREPARING:
                return m.Prepare(attempt.sequence, attempt.checkpoint, self.files)
            case Phase.FREEZING:
                return m.Freeze()
            case Phase.SURVEYING:
                return m.Survey()
            case Phase.DUMPING:
                return m.Dump(elsewhere)
            case Phase.RELEASING:
                return m.Release(attempt.kill)
        raise AssertionError(f"no request belongs to {phase}")


def file_rules(config: Config, step: Step, outputs: Sequence[str]) -> FileRules:
    """What a checkpoint saves of the job's files, and a restore puts back; neither its checkpoints nor the files
    (`outputs`) that hpccr itself or the script writes."""
    return FileRules(
        trees=tuple(map(os.fsencode, config.files.trees)),
        excluded=tuple(map(os.fsencode, (os.path.realpath(step.path.parent.parent), *outputs))),
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
