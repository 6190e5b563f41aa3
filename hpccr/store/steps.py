"""Numbering the steps of a job: the n-th `hpccr run` after a requeue is the n-th one before it."""

from __future__ import annotations

import os

from hpccr.model import StepKey
from hpccr.store import publish
from hpccr.store.layout import Step, Store


def claim_step(store: Store, cluster: str, job: str, incarnation: int) -> Step:
    """The step that this call of `hpccr run` is: "0" for the first within an incarnation of the job, then "1" ...

    incarnation: SLURM_RESTART_COUNT; 0 for a job without Slurm. Each call claims the lowest number that its
    incarnation has not used, by making run-<incarnation> in the step's directory, which only one caller can (no lock:
    a node that dies while holding one would keep the requeued job from starting). Makes the directories.
    Whether the step has run, or has finished, is in its record. Raises OSError, HpccrError.
    """
    number = 0
    while True:
        step = store.step(StepKey(cluster=cluster, job=job, step=str(number)))
        publish.make_directory(step.path)
        if publish.claim(step.path / f"run-{incarnation}"):
            return step
        number += 1


def last_run(step: Step) -> int:
    """The highest incarnation that has claimed the step; -1 if none has. Raises OSError."""
    runs = [name.removeprefix("run-") for name in os.listdir(step.path) if name.startswith("run-")]
    return max((int(run) for run in runs if run.isdecimal()), default=-1)
