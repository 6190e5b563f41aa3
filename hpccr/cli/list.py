"""`hpccr list`: all your jobs in the store."""

from __future__ import annotations

import argparse
from typing import Any

from hpccr.cli.jobs import Summary, add_json_argument, add_store_argument, open_store, step_state, summarise
from hpccr.cli.output import age, duration, print_json, print_table, size
from hpccr.config import Config
from hpccr.store.layout import FINISHED, State, Step


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("list", help="your jobs in the store and their newest complete checkpoints")
    parser.add_argument("--all", action="store_true", help="finished ones too")
    add_store_argument(parser)
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """0, also for an empty store."""
    store = open_store(args, config)
    found = [
        (step, state, _newest(step))
        for job in store.jobs()
        for step in job.steps()
        if (state := step_state(step)) != FINISHED or args.all
    ]
    if args.json:
        print_json(
            [
                {
                    "job": step.key.job,
                    "cluster": step.key.cluster,
                    "step": step.key.step,
                    "name": step.key.job_directory,
                    "state": state,
                    "last": newest,
                    "path": str(step.path),
                }
                for step, state, newest in found
            ]
        )
        return 0
    rows = []
    for step, state, newest in found:
        last = ("-", "-", "-", "-")
        if newest is not None and newest.created is not None and newest.freeze_seconds is not None:
            last = (str(newest.sequence), age(newest.created), size(newest.bytes), duration(newest.freeze_seconds))
        rows.append((step.key.job_directory, step.key.step, state, *last))
    print_table(
        ("JOB", "STEP", "STATE", "LAST", "AGE", "SIZE", "FROZEN"),
        rows,
        right=frozenset({"LAST", "AGE", "SIZE", "FROZEN"}),
    )
    return 0


def _newest(step: Step) -> Summary | None:
    for checkpoint in step.checkpoints():
        summary = summarise(checkpoint)
        if summary.state is State.COMPLETE:
            return summary
    return None
