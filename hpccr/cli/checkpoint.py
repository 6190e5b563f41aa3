"""`hpccr checkpoint JOB`: checkpoint a running job now and let it go on."""

from __future__ import annotations

import argparse
from typing import Any

from hpccr.cli.connect import ask
from hpccr.cli.jobs import add_job_arguments, add_json_argument, find_step
from hpccr.cli.output import ProgressBar, duration, print_json, size
from hpccr.config import Config
from hpccr.store.layout import Step
from hpccr.wire import messages as m

QUIESCE = ("prefer", "require", "off")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "checkpoint",
        help="checkpoint a running job now; it goes on",
        description="Checkpoint a running job now. It is frozen for a moment and goes on; the checkpoint is copied to "
        "the store in the background, and the command waits for that unless told not to.",
    )
    add_job_arguments(parser)
    parser.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="until it is in the store (default)"
    )
    add_quiesce_argument(parser)
    add_timeout_argument(parser)
    add_json_argument(parser)
    parser.set_defaults(run=run)


def add_quiesce_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quiesce",
        metavar="MODE",
        choices=QUIESCE,
        default="",
        help="MPI ranks that call safe points: checkpoint them there if they come in time (prefer), only there "
        "(require, or without =MODE), or where they are (off); default: quiesce.mode of the job",
    )


def add_timeout_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, help="give up waiting after that long; the checkpoint goes on"
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError
    return value


def run(args: argparse.Namespace, config: Config) -> int:
    """0 when the checkpoint was made (and is durable, with --wait). Raises HpccrError."""
    step = find_step(args, config)
    reply = request(
        step, m.CheckpointRequest(requeue=False, wait=args.wait, reason="command", quiesce=args.quiesce), args
    )
    if args.json:
        print_json(as_json(step, reply))
    else:
        print(describe(step, reply))
    return 0


def request(step: Step, message: m.CheckpointRequest, args: argparse.Namespace) -> m.CheckpointReply:
    """Ask for a checkpoint and show the progress on a terminal. Raises HpccrError."""
    with ProgressBar(wanted=not args.json) as bar:

        def show(progress: m.Progress) -> None:
            bar.show(f"{step.key}: {progress.phase}", progress.done, progress.total)

        return ask(step, message, m.CheckpointReply, timeout=args.timeout, progress=show)


def as_json(step: Step, reply: m.CheckpointReply) -> dict[str, Any]:
    return {
        "job": step.key.job,
        "cluster": step.key.cluster,
        "step": step.key.step,
        "sequence": reply.sequence,
        "bytes": reply.bytes,
        "freeze_seconds": reply.freeze_seconds,
        "total_seconds": reply.total_seconds,
        "durable": reply.durable,
        "path": str(step.checkpoint(reply.sequence).path),
    }


def describe(step: Step, reply: m.CheckpointReply) -> str:
    state = "is in the store" if reply.durable else "is on its way to the store"
    return (
        f"checkpoint {reply.sequence} of {step.key} {state}: {size(reply.bytes)}, "
        f"frozen for {duration(reply.freeze_seconds)}"
    )
