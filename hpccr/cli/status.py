"""`hpccr status JOB`: what a job is doing, and its checkpoints. Live from its coordinator, else from the store."""

from __future__ import annotations

import argparse
import time
from typing import Any

import msgspec

from hpccr.cli.connect import NotRunningError, ask
from hpccr.cli.jobs import Summary, add_job_arguments, add_json_argument, find_step, step_state, summarise
from hpccr.cli.output import age, duration, print_json, print_table, size
from hpccr.config import Config
from hpccr.coordinator.status import StepStatus, decode_status
from hpccr.errors import CorruptError, HpccrError, PeerLostError
from hpccr.slurm.hostlist import compress
from hpccr.store import events
from hpccr.store.layout import State, Step
from hpccr.wire import messages as m

EVENTS = 10
"""Events shown, the newest."""
TIMEOUT = 20.0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("status", help="what a job is doing, and its checkpoints")
    add_job_arguments(parser)
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """0, also for a job that is not running. Raises HpccrError."""
    step = find_step(args, config)
    status, problem = _live(step)
    checkpoints = [summarise(checkpoint) for checkpoint in step.checkpoints()]
    try:
        record = step.record()
        happened = events.read(step.events_path)[-EVENTS:]
    except CorruptError as error:
        record, happened, problem = None, [], problem or error.message
    if args.json:
        print_json(
            {
                "job": step.key.job,
                "cluster": step.key.cluster,
                "step": step.key.step,
                "live": status is not None,
                "problem": problem,
                "status": status,
                "record": record,
                "checkpoints": checkpoints,
                "events": happened,
            }
        )
        return 0
    print(f"step {step.key}")
    if status is not None:
        _print_live(status, started=record.started if record else status.started)
    else:
        code = record.exit_code if record else None
        print(f"  state       {step_state(step)}" + (f", exit code {code}" if code is not None else ""))
        if record is not None:
            print(f"  started     {_moment(record.started)}")
            print(f"  nodes       {compress(record.nodes)}")
    if problem:
        print(f"  problem     {problem}")
    if checkpoints:
        print()
        print_checkpoints(checkpoints)
    if happened and (status is None or args.verbose):
        print()
        for event in happened:
            details = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "event"))
            print(f"  {_moment(event['time'])}  {event['event']}  {details}".rstrip())
    return 0


def _live(step: Step) -> tuple[StepStatus | None, str]:
    """The coordinator's word, or None and why it could not be had (empty if the step simply does not run)."""
    try:
        return decode_status(ask(step, m.StatusRequest(), m.StatusReply, timeout=TIMEOUT).status), ""
    except NotRunningError:
        return None, ""
    except PeerLostError as error:
        return None, error.message
    except msgspec.MsgspecError as error:
        raise HpccrError(f"cannot understand the coordinator: {error}", hint="is it of another version?") from None


def _print_live(status: StepStatus, *, started: float) -> None:
    phase = f" ({status.phase})" if status.phase else ""
    print(f"  state       {status.state}{phase}")
    print(f"  started     {_moment(started)}")
    print(f"  nodes       {compress(status.nodes)}, {status.capsules} capsules")
    print(f"  incarnation {status.incarnation}")
    skipped = f", {status.skipped} left out: the one before was not in the store yet" if status.skipped else ""
    print(f"  checkpoints {status.taken} taken, {status.failed} failed in this incarnation{skipped}")
    if status.due is not None:
        print(f"  next due    {_moment(status.due)}")
    if status.flush is not None:
        waiting = ", and the next one waits for it" if status.waiting else ""
        print(f"  flush       {size(status.flush.done)} of {size(status.flush.total)} in the store{waiting}")
    if status.last_error:
        print(f"  last error  {status.last_error}")


def print_checkpoints(checkpoints: list[Summary]) -> None:
    rows = []
    for found in checkpoints:
        note = found.problem if found.state is not State.COMPLETE else found.reason or ""
        if found.abandoned:
            note = f"{note}; abandoned: {found.abandoned}".removeprefix("; ")
        if found.state is State.FLUSHING:
            note = f"{size(found.done)} of {size(found.total)} taken over; {note}"
        rows.append(
            (
                str(found.sequence),
                str(found.state),
                age(found.created) if found.created else "-",
                size(found.bytes),
                duration(found.freeze_seconds) if found.freeze_seconds is not None else "-",
                note,
            )
        )
    print_table(
        ("SEQ", "STATE", "AGE", "SIZE", "FROZEN", "WHY"), rows, right=frozenset({"SEQ", "AGE", "SIZE", "FROZEN"})
    )


def _moment(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
