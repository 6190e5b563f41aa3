"""The state of a Boot in the words of `hpccr status`."""

from __future__ import annotations

from hpccr.coordinator.plan import BOOT, Phase
from hpccr.coordinator.service import Boot
from hpccr.coordinator.status import CheckpointStatus, FlushStatus, StepState, StepStatus
from hpccr.model import StepKey
from hpccr.wire import messages as m


def progress(boot: Boot) -> m.Progress:
    """What is under way, and the bytes of the flush that have reached the store."""
    moved = boot.flushes.progress.values()
    done, total = (sum(part) for part in zip(*moved, strict=True)) if moved else (0, 0)
    if boot.waiting:
        return m.Progress(f"waits for checkpoint {boot.state.flush_sequence}", done, total)
    return m.Progress("flush" if boot.state.flushing else str(boot.state.phase), done, total)


def report(
    key: StepKey, boot: Boot | None, *, nodes: tuple[str, ...], incarnation: int, started: float, due: float | None
) -> StepStatus:
    """boot: None between two lives of the job. nodes: in capsule order. due: the next checkpoint by the clock."""
    if boot is None:
        return StepStatus(
            key=key, state="starting", capsules=len(nodes), nodes=nodes, incarnation=incarnation, started=started
        )
    state, phase = _state_of(boot.state.phase, restoring=boot.state.source is not None)
    flush = None
    if boot.state.flushing:
        phase = phase or "flush"
        now = progress(boot)
        flush = FlushStatus(done=now.done, total=now.total)
    return StepStatus(
        key=key,
        state=state,
        phase=phase,
        capsules=len(nodes),
        nodes=nodes,
        incarnation=incarnation,
        started=started,
        last=_last(boot),
        flush=flush,
        taken=boot.taken,
        failed=boot.failed,
        skipped=boot.skipped,
        waiting=boot.waiting,
        last_error=boot.last_error,
        due=due,
    )


def _last(boot: Boot) -> CheckpointStatus | None:
    if boot.last is not None:
        manifest, size = boot.last.manifest, boot.last.bytes
    elif boot.source is not None:
        manifest, size = boot.source, sum(restored.bytes for restored in boot.state.restored)
    else:
        return None
    return CheckpointStatus(
        sequence=manifest.sequence,
        created=manifest.created,
        bytes=size,
        freeze_seconds=manifest.freeze_seconds,
        complete=not any(sequence == manifest.sequence for sequence, _ in boot.state.flushing),
    )


def _state_of(phase: Phase, *, restoring: bool) -> tuple[StepState, str]:
    if phase is Phase.RUNNING:
        return "running", ""
    if phase in BOOT:
        return "restoring" if restoring else "starting", phase
    if phase is Phase.ENDED:
        return "finished", ""
    return "checkpointing", phase
