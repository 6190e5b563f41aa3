"""`hpccr verify JOB [SEQ]`: whether a checkpoint in the store is whole and undamaged."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hpccr.cli.jobs import add_job_arguments, add_json_argument, find_checkpoint, find_step
from hpccr.cli.output import ProgressLine, print_json, size
from hpccr.config import Config
from hpccr.errors import ExitCode, NoCheckpointError
from hpccr.store import damage
from hpccr.store.layout import Checkpoint
from hpccr.store.verify import Finding, verify


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="whether a checkpoint is whole and undamaged",
        description="Read all of a checkpoint (default: the newest complete one), compare sizes and digests. One that "
        "is damaged is marked, and neither restored nor referred to any more; one that is whole after all loses the "
        "mark. Whether it was sealed by this site is checked by hpccrd, at every restore.",
    )
    add_job_arguments(parser, sequence=True)
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """0 if the checkpoint is whole, 12 if not. Raises HpccrError."""
    checkpoint = find_checkpoint(find_step(args, config), args.sequence)
    read = 0
    with ProgressLine(wanted=not args.json) as line:

        def count(amount: int) -> None:
            nonlocal read
            read += amount
            line.show(f"{size(read)} read")

        findings = verify(checkpoint, read=count)
    if findings and not checkpoint.path.exists():
        raise NoCheckpointError(
            f"checkpoint {checkpoint.sequence} of {checkpoint.step.key} was removed while it was read",
            hint="newer ones have taken its place (store.keep): `hpccr status` shows them",
        )
    try:
        _note(checkpoint, findings)
    except OSError as error:
        print(f"hpccr: the checkpoint could not be marked: {error}", file=sys.stderr)
    if args.json:
        print_json(
            {"sequence": checkpoint.sequence, "path": str(checkpoint.path), "ok": not findings, "findings": findings}
        )
    elif findings:
        for finding in findings:
            print(f"{finding.path}: {finding.problem}")
        print(f"checkpoint {checkpoint.sequence} of {checkpoint.step.key} cannot be restored")
    else:
        print(f"checkpoint {checkpoint.sequence} of {checkpoint.step.key} is whole: {size(read)} read")
    return int(ExitCode.CORRUPT) if findings else 0


def _note(checkpoint: Checkpoint, findings: list[Finding]) -> None:
    """Mark what is damaged as such; what is whole is not. Raises OSError."""
    damaged = [finding for finding in findings if finding.damage]
    if damaged:
        damage.mark(checkpoint.path, f"{damaged[0].path}: {damaged[0].problem}")
    elif not findings:
        damage.unmark(checkpoint.path)
