"""`hpccr requeue JOB`: checkpoint a running job, then put it back into the queue; nothing of its work is lost."""

from __future__ import annotations

import argparse
import time
from typing import Any

from hpccr.cli.checkpoint import add_quiesce_argument, add_timeout_argument, as_json, describe, request
from hpccr.cli.connect import LeftError
from hpccr.cli.jobs import add_job_arguments, add_json_argument, find_step, job_of
from hpccr.cli.output import print_json
from hpccr.config import Config
from hpccr.errors import HpccrError, PeerLostError, UsageError, error_for
from hpccr.slurm.query import JobInfo, JobQuery, job_query
from hpccr.store.layout import Job, Step
from hpccr.wire import messages as m

POLL = 1.0
PENDING_TIMEOUT = 180.0
"""Seconds for Slurm to end a requeued job: KillWait and the nodes' epilogs, then some."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "requeue",
        help="checkpoint a running job and put it back into the queue",
        description="Checkpoint a running job without a deadline, end it and put it back into Slurm's queue under the "
        "same job id. When it starts again, on whichever nodes, it goes on from that checkpoint. If the checkpoint "
        "fails, the job goes on and is not requeued. Other steps of the job that are running are checkpointed first.",
    )
    add_job_arguments(parser)
    parser.add_argument(
        "--now", action="store_true", help="make it eligible at once: Slurm holds a requeued job back for a while"
    )
    add_quiesce_argument(parser)
    add_timeout_argument(parser)
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """0 when the job is checkpointed and back in the queue. Raises HpccrError."""
    step = find_step(args, config)
    if args.now and step.key.cluster == "local":
        raise UsageError("--now is for Slurm's queue, and this job is not in one")
    before = job_of(step)
    others = _save_others(step, args)
    left: LeftError | None = None
    try:
        reply = request(
            step, m.CheckpointRequest(requeue=True, wait=True, reason="requeue", quiesce=args.quiesce), args
        )
    except LeftError as error:
        # Slurm kills the coordinator at once where the batch script does not outlive its SIGTERM.
        left, reply = error, error.reply
    after = job_of(step)
    if before is not None and after is not None and after.restarts == before.restarts:
        # It was cancelled, or its time was over, before Slurm was asked.
        raise left or HpccrError(
            f"{describe(step, reply)}, but the job is {'+'.join(sorted(after.states))} and not requeued",
            hint=f"to go on from that checkpoint: scontrol requeue {after.only}",
        )
    if left is not None and (before is None or after is None):
        raise left
    if args.now:
        start_now(job_query(), step.key.job)
    if args.json:
        saved = [as_json(other, made) for other, made in others]
        print_json(as_json(step, reply) | {"requeued": True, "others": saved})
    else:
        for other, made in others:
            print(describe(other, made))
        print(describe(step, reply) + "; the job is requeued")
    return 0


def _save_others(step: Step, args: argparse.Namespace) -> list[tuple[Step, m.CheckpointReply]]:
    """Checkpoint what else of the job is running: the requeue ends that too. Raises HpccrError."""
    saved = []
    for other in Job(step.root, step.key.cluster, step.key.job).steps():
        if other == step or not other.endpoint_path.exists():
            continue
        message = m.CheckpointRequest(requeue=False, wait=True, reason="requeue", quiesce=args.quiesce)
        try:
            saved.append((other, request(other, message, args)))
        except HpccrError as error:
            if not other.endpoint_path.exists():
                continue  # it has ended meanwhile
            gone = f"if it does not run any more, remove {other.endpoint_path}"
            raise error_for(
                error.code,
                f"the job is not requeued, as step {other.key} would lose its work: {error.message}",
                gone if isinstance(error, PeerLostError) else error.hint,
            ) from None
    return saved


def start_now(query: JobQuery, job: str) -> None:
    """Make a job eligible at once that is being requeued. Raises HpccrError if Slurm has not ended it in time."""
    deadline = time.monotonic() + PENDING_TIMEOUT
    while not _queued(info := query.job(job)):
        if time.monotonic() > deadline:
            raise HpccrError(
                f"job {job} is requeued but still {'+'.join(sorted(info.states))}",
                hint=f"once it is pending: scontrol update jobid={info.only} StartTime=now",
            )
        # Slurm has no event to wait for.
        time.sleep(POLL)
    if "PENDING" in info.states:
        query.start_now(info.only)


def _queued(info: JobInfo) -> bool:
    return "COMPLETING" not in info.states
