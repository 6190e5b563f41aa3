"""`hpccr list`: all your jobs in the store."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from hpccr.cli.jobs import (
    OwnJobs,
    Summary,
    add_json_argument,
    add_store_argument,
    open_store,
    own_jobs,
    seen_state,
    step_state,
    summarise,
)
from hpccr.cli.output import age, duration, print_json, print_table, size
from hpccr.config import Config
from hpccr.errors import CorruptError
from hpccr.model import StepRecord
from hpccr.slurm.query import WAITING, JobInfo
from hpccr.store import elsewhere
from hpccr.store.layout import FINISHED, State, Step

UNPROTECTED = "unprotected"
TO_START = 60.0
"""Seconds that `hpccr run` may take to show that it is at work in a job."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("list", help="your jobs, their newest complete checkpoints and when the next is due")
    parser.add_argument("--all", action="store_true", help="finished ones too")
    add_store_argument(parser)
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """0, also for an empty store."""
    store = open_store(args, config)
    known = own_jobs()
    steps = [(step, step_state(step)) for job in (*store.jobs(), *elsewhere.jobs(store)) for step in job.steps()]
    found = [_row(step, state, known) for step, state in steps if state != FINISHED or args.all]
    if known is not None:
        listed = {step.key.job for step, _ in steps if step.key.cluster == known.cluster}
        found += [_not_begun(info) for info in known.jobs.values() if _waits(info) and info.job not in listed]
    if args.json:
        print_json(found)
        return 0
    print_table(
        ("JOB", "STEP", "STATE", "LAST", "AGE", "SIZE", "FROZEN", "NEXT"),
        [_cells(row) for row in found],
        right=frozenset({"LAST", "AGE", "SIZE", "FROZEN", "NEXT"}),
    )
    for row in found:
        if row["state"] == UNPROTECTED and known is not None:
            print(
                f"hpccr: job {row['job']} asked for checkpoints and runs without hpccr\n"
                f"hint: has {row['node']} the plugin? `hpccr doctor` compares the nodes; "
                f"scontrol requeue {known.jobs[row['job']].only} starts it again",
                file=sys.stderr,
            )
    return 0


def _row(step: Step, state: str, known: OwnJobs | None) -> dict[str, Any]:
    record = _record(step)
    if known is not None and step.key.cluster == known.cluster:
        state = seen_state(state, known.jobs.get(step.key.job))
    return {
        "job": step.key.job,
        "cluster": step.key.cluster,
        "step": step.key.step,
        "name": step.key.job_directory,
        "state": state,
        "last": _newest(step),
        "due": record.due if record and state == "running" else None,
        "path": str(step.path),
    }


def _record(step: Step) -> StepRecord | None:
    try:
        return step.record()
    except CorruptError:
        return None


def _waits(info: JobInfo) -> bool:
    """A job that was submitted with --checkpoint and has not begun to run under hpccr; it may just be starting."""
    if info.comment != WAITING:
        return False
    return "PENDING" in info.states or (info.running and time.time() - (info.start_time or 0) > TO_START)


def _not_begun(info: JobInfo) -> dict[str, Any]:
    """One that runs without: nobody on its node has taken notice of what was asked for."""
    return {
        "job": info.job,
        "cluster": info.cluster,
        "step": None,
        "name": f"{info.cluster}-{info.job}",
        "state": UNPROTECTED if info.running else "queued",
        "last": None,
        "due": None,
        "path": None,
        "node": info.batch_node,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    newest: Summary | None = row["last"]
    last = ("-", "-", "-", "-")
    if newest is not None and newest.created is not None and newest.freeze_seconds is not None:
        last = (str(newest.sequence), age(newest.created), size(newest.bytes), duration(newest.freeze_seconds))
    due = "-" if row["due"] is None else f"in {duration(max(0.0, row['due'] - time.time()))}"
    return (row["name"], row["step"] or "-", row["state"], *last, due)


def _newest(step: Step) -> Summary | None:
    for checkpoint in step.checkpoints():
        summary = summarise(checkpoint)
        if summary.state is State.COMPLETE and not summary.abandoned:
            return summary
    return None
