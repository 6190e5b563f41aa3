"""`hpccr gc [JOB]`: remove checkpoints that are not needed any more."""

from __future__ import annotations

import argparse
from typing import Any

from hpccr.cli.jobs import add_json_argument, add_store_argument, find_job, open_store
from hpccr.cli.output import print_json, size
from hpccr.config import Config
from hpccr.errors import UsageError
from hpccr.store.gc import Collected, collect, sweep
from hpccr.store.layout import Step


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "gc",
        help="remove checkpoints that are not needed any more",
        description="Remove, for each step of a job or of all jobs, all complete checkpoints but the newest ones, and "
        "what failed or damaged ones have left, but for the last. The newest complete checkpoint always stays.",
    )
    parser.add_argument("job", metavar="JOB", nargs="?", help="job id (default: all jobs in the store)")
    parser.add_argument(
        "--keep", metavar="N", type=int, help="complete checkpoints to keep per step (default: store.keep)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    add_store_argument(parser)
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """0. Raises HpccrError."""
    keep = config.store.keep if args.keep is None else args.keep
    if keep < 1:
        raise UsageError(f"--keep {keep}: at least one must stay", hint="remove the job's directory to remove all")
    store = open_store(args, config)
    jobs = [find_job(args, config)] if args.job else store.jobs()
    if not args.job and not args.dry_run and store.root.is_dir():
        sweep(store.root)
    done: list[tuple[Step, Collected]] = []
    for job in jobs:
        for step in job.steps():
            done.append((step, collect(step, keep=keep, dry=args.dry_run)))
    if args.json:
        print_json(
            [
                {"job": step.key.job, "step": step.key.step, "removed": found.removed, "bytes": found.freed}
                for step, found in done
            ]
        )
        return 0
    verb = "would remove" if args.dry_run else "removed"
    for step, found in done:
        if found.removed:
            numbers = ", ".join(map(str, found.removed))
            print(f"{step.key}: {verb} {numbers} ({size(found.freed)})")
    print(f"{verb} {sum(len(f.removed) for _, f in done)} checkpoints, {size(sum(f.freed for _, f in done))}")
    return 0
