"""`hpccr rm JOB [SEQ]`: remove a checkpoint, or all there is of a job."""

from __future__ import annotations

import argparse
from typing import Any

from hpccr.cli.jobs import add_job_arguments, find_checkpoint, find_job, find_step
from hpccr.config import Config
from hpccr.errors import LockedError, UsageError
from hpccr.store import publish
from hpccr.store.layout import FINISHED, Checkpoint, State, Step


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "rm",
        help="remove a checkpoint, or all there is of a job",
        description="Remove one checkpoint of a job, or with no SEQ all that the store has of the job. Refused for a "
        "job that runs, for a checkpoint that is being written, and, without --force, for what a job that has not "
        "finished would be restored from.",
    )
    add_job_arguments(parser, sequence=True)
    parser.add_argument("--force", action="store_true", help="also what the job would be restored from")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """0. Raises HpccrError."""
    if args.sequence is not None:
        step = find_step(args, config)
        checkpoint = find_checkpoint(step, args.sequence)
        _check(step, checkpoint, force=args.force)
        publish.remove_tree(checkpoint.path)
        print(f"removed checkpoint {checkpoint.sequence} of {step.key}")
        return 0
    if args.step is not None:
        raise UsageError("--step says which step's checkpoint to remove, and none is named", hint="give its number too")
    job = find_job(args, config)
    for step in job.steps():
        if step.endpoint_path.exists():
            raise LockedError(
                f"step {step.key} is running, or its coordinator was killed",
                hint=f"if it does not run any more, remove {step.endpoint_path}",
            )
        for checkpoint in step.checkpoints():
            _check(step, checkpoint, force=args.force)
    publish.remove_tree(job.path)
    print(f"removed {job.path}")
    return 0


def _check(step: Step, checkpoint: Checkpoint, *, force: bool) -> None:
    """Raises LockedError if the checkpoint is not to be removed now."""
    state = checkpoint.state().state
    if state is State.FLUSHING:
        raise LockedError(f"checkpoint {checkpoint.sequence} of {step.key} is being written")
    record = step.record()
    if force or state is not State.COMPLETE or (record is not None and record.state == FINISHED):
        return
    if [checkpoint] == step.complete()[:1]:
        raise LockedError(
            f"checkpoint {checkpoint.sequence} is what step {step.key} would be restored from",
            hint="--force removes it all the same",
        )
