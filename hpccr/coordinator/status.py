"""What a step is doing, as `hpccr status` shows it: the content of wire.messages.StatusReply.

Filled by the coordinator, read by the command line and by scripts (`hpccr status --json`): fields are only added.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from hpccr.model import StepKey

StepState = Literal["starting", "running", "checkpointing", "restoring", "finished"]


class CheckpointStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The newest checkpoint of the step; complete: every fragment is published in the store."""

    sequence: int
    created: float
    bytes: int
    freeze_seconds: float
    complete: bool


class FlushStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the checkpoint under way that have reached the store, over all capsules."""

    done: int
    total: int


class StepStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A running step. nodes: in capsule order, a node that carries two capsules is there twice.

    phase: finer than state ("dump", "flush", "create" ...; empty when nothing is under way). incarnation: starts and
    restores of the step so far, less one. started: first start of the step. last_error: of the newest checkpoint that
    failed, empty once one has succeeded.
    """

    key: StepKey
    state: StepState
    phase: str = ""
    capsules: int
    nodes: tuple[str, ...]
    incarnation: int = 0
    started: float
    last: CheckpointStatus | None = None
    flush: FlushStatus | None = None
    taken: int = 0
    """Checkpoints that were released, since this coordinator started."""
    failed: int = 0
    skipped: int = 0
    """Checkpoints by interval that were left out because the one before was not in the store yet."""
    waiting: bool = False
    """A checkpoint was asked for and waits for the one before to be in the store."""
    last_error: str = ""
    due: float | None = None
    """When the next checkpoint by the clock begins (by interval, or before the time limit), seconds since the epoch."""


def encode_status(status: StepStatus) -> str:
    """JSON text for StatusReply.status."""
    return msgspec.json.encode(status).decode()


def decode_status(text: str) -> StepStatus:
    """The inverse of encode_status; unknown fields of a newer coordinator are ignored.

    Raises msgspec.MsgspecError if it is none.
    """
    return msgspec.json.decode(text, type=StepStatus)
