"""`hpccr export JOB [SEQ]`: a checkpoint as one file."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from hpccr.cli.jobs import add_job_arguments, find_checkpoint, find_step
from hpccr.cli.output import ProgressLine, size
from hpccr.config import Config
from hpccr.errors import UsageError
from hpccr.store import archive, publish


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint to one file",
        description="Write a checkpoint (default: the newest complete one) to a tar archive that `hpccr import` reads, "
        "here or on a cluster with the same site key. The job's own files are not in it.",
    )
    add_job_arguments(parser, sequence=True)
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="file to write; - is stdout (default: JOB-STEP-SEQ.hpccr)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """0. Raises HpccrError."""
    step = find_step(args, config)
    checkpoint = find_checkpoint(step, args.sequence)
    if args.output == "-":
        if os.isatty(1):
            raise UsageError("an archive is nothing for a terminal", hint="redirect stdout, or name a file with -o")
        archive.write(checkpoint, sys.stdout.buffer)
        return 0
    path = Path(args.output or f"{step.key.job_directory}-{step.key.step}-{checkpoint.sequence}.hpccr").absolute()
    written = 0
    with ProgressLine(wanted=True) as line, publish.PendingFile(path) as pending:

        def count(amount: int) -> None:
            nonlocal written
            written += amount
            line.show(f"{size(written)} written")

        archive.write(checkpoint, pending, wrote=count)
        pending.commit()
    print(f"{path}: checkpoint {checkpoint.sequence} of {step.key}, {size(written)}")
    return 0
