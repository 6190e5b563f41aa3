"""Numbering the steps of a job: the n-th `hpccr run` after a requeue is the n-th one before it."""

from __future__ import annotations

import math
import os

from hpccr.errors import CorruptError
from hpccr.model import StepKey
from hpccr.store import publish
from hpccr.store.layout import Step, Store

SKEW = 600.0
"""Seconds by which clocks of a cluster may differ: MUNGE lets Slurm's by five minutes at the most."""
_ANOTHERS = "another-job"


def claim_step(store: Store, cluster: str, job: str, incarnation: int, *, began: float | None = None) -> Step:
    """The step that this call of `hpccr run` is: "0" for the first within an incarnation of the job, then "1" ...

    incarnation: SLURM_RESTART_COUNT; 0 for a job without Slurm. Each call claims the lowest number that its
    incarnation has not used, by making run-<incarnation> in the step's directory, which only one caller can (no lock:
    a node that dies while holding one would keep the requeued job from starting). Makes the directories.
    began: when this run of the job began, seconds since the epoch, if that is known. In the first one a step that is
    older is of another job: of one with the same number, from before Slurm's began anew. It is marked as that, and this
    job's steps are the numbers that come after.
    Whether the step has run, or has finished, is in its record. Raises OSError, HpccrError.
    """
    number = 0
    while True:
        step = store.step(StepKey(cluster=cluster, job=job, step=str(number)))
        publish.make_directory(step.path)
        if incarnation == 0 and began is not None and _started(step) < began - SKEW:
            publish.claim(step.path / _ANOTHERS)
        if not anothers(step) and publish.claim(step.path / f"run-{incarnation}"):
            return step
        number += 1


def anothers(step: Step) -> bool:
    """Whether the step is of an earlier job of the same number."""
    return (step.path / _ANOTHERS).exists()


def _started(step: Step) -> float:
    try:
        record = step.record()
    except CorruptError:
        record = None
    return record.started if record else math.inf


def last_run(step: Step) -> int:
    """The highest incarnation that has claimed the step; -1 if none has. Raises OSError."""
    runs = [name.removeprefix("run-") for name in os.listdir(step.path) if name.startswith("run-")]
    return max((int(run) for run in runs if run.isdecimal()), default=-1)
