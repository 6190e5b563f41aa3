"""`hpccr import FILE`: a checkpoint from `hpccr export`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hpccr.cli.jobs import add_store_argument, open_store
from hpccr.cli.output import ProgressLine, size
from hpccr.config import Config
from hpccr.store import archive


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "import",
        help="read a checkpoint that was exported",
        description="Read a checkpoint that `hpccr export` wrote and verify it. `hpccr restore` goes on from it; nodes "
        "with another site key refuse to.",
    )
    parser.add_argument("file", metavar="FILE", help="archive; - is stdin")
    add_store_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """0. Raises HpccrError."""
    store = open_store(args, config)
    done = 0
    with ProgressLine(wanted=True) as line:

        def count(amount: int) -> None:
            nonlocal done
            done += amount
            line.show(f"{size(done)} read")

        if args.file == "-":
            checkpoint = archive.read(sys.stdin.buffer, store, read=count)
        else:
            with open(args.file, "rb") as file:
                checkpoint = archive.read(file, store, read=count)
    key = checkpoint.step.key
    print(f"checkpoint {checkpoint.sequence} of {key} is in {store.root}; its seal is checked when it is restored")
    print(f"`hpccr restore {key.job_directory} --step {key.step}` goes on with it")
    return 0
