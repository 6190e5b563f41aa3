"""`hpccr restore JOB`: go on with a checkpointed command on this machine, without Slurm."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from typing import Any
from urllib.parse import unquote_to_bytes

from msgspec import structs

from hpccr.cli.jobs import find_job
from hpccr.cli.run import own_allocation, start
from hpccr.config import Config
from hpccr.coordinator.candidates import Candidates
from hpccr.errors import LockedError, NoCheckpointError, UsageError

log = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "restore",
        help="go on from a checkpoint, outside Slurm's requeue",
        description="Restore a step from its newest complete checkpoint and run it to its end. In a Slurm job "
        "`hpccr run` does this by itself after a requeue.",
    )
    parser.add_argument("job", help="job id, as `hpccr list` shows it")
    parser.add_argument("sequence", nargs="?", type=int, help="number of the checkpoint (default: the newest complete)")
    parser.add_argument("--step", default="0", help="which `hpccr run` of the job (default: 0)")
    parser.add_argument("--dir", metavar="DIR", help="store with the checkpoints (default: store.dir)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """Restore and run to the end; the exit code of the job's command. Raises HpccrError."""
    step = find_job(args, config).step(args.step)
    record = step.record()
    if record is None:
        raise UsageError(f"job {args.job} has no step {args.step}", hint="`hpccr list --all` shows the steps")
    if step.endpoint() is not None:
        raise LockedError(
            f"step {step.key} is running, or its coordinator was killed",
            hint=f"if it does not run any more, remove {step.endpoint_path}",
        )
    if args.sequence is None and asyncio.run(Candidates(step, log.info).newest()) is None:
        raise NoCheckpointError(
            f"step {step.key} has no complete checkpoint", hint=f"`hpccr status {args.job}` shows what there is"
        )
    if record.trees:
        # Not config's: what belongs to the job's state was said when it was started.
        trees = tuple(os.fsdecode(unquote_to_bytes(tree)) for tree in record.trees)
        config = structs.replace(config, files=structs.replace(config.files, trees=trees))
    return start(
        config,
        step,
        record.argv,
        allocation=own_allocation(),
        resume=True,
        asked=True,
        sequence=args.sequence,
        batch=record.batch,
        verbose=args.verbose,
    )
