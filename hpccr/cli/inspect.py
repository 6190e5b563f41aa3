"""`hpccr inspect JOB [SEQ]`: what is in a checkpoint."""

from __future__ import annotations

import argparse
import time
from typing import Any

from hpccr.cli.jobs import add_job_arguments, add_json_argument, find_checkpoint, find_step, summarise
from hpccr.cli.output import duration, print_json, print_table, size
from hpccr.config import Config
from hpccr.errors import CorruptError
from hpccr.store.index import Usage, read_index
from hpccr.store.layout import Checkpoint


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="what is in a checkpoint",
        description="Show a checkpoint's manifest and fragments (default: the newest complete checkpoint).",
    )
    add_job_arguments(parser, sequence=True)
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """0, also for an incomplete checkpoint. Raises HpccrError."""
    checkpoint = find_checkpoint(find_step(args, config), args.sequence)
    manifest = checkpoint.manifest_if_there()
    fragments = [fragment for k in checkpoint.capsules_there() if (fragment := checkpoint.fragment(k)) is not None]
    summary = summarise(checkpoint)
    usage = {fragment.capsule: _usage(checkpoint, fragment.capsule) for fragment in fragments}
    if args.json:
        stored = [{"capsule": k, "own": found.own, "shared": found.shared} for k, found in usage.items() if found]
        print_json({"summary": summary, "manifest": manifest, "fragments": fragments, "stored": stored})
        return 0
    print(f"checkpoint {checkpoint.sequence} of {checkpoint.step.key}: {summary.state}")
    if summary.problem:
        print(f"  problem  {summary.problem}")
    print(f"  path     {checkpoint.path}")
    own, shared = (sum(found[n] for found in usage.values() if found) for n in (0, 1))
    print(f"  size     {size(summary.bytes)}, stored as {size(own)} and {size(shared)} shared with older checkpoints")
    if manifest is not None:
        print(f"  made     {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(manifest.created))} ({manifest.reason})")
        print(f"  frozen   {duration(manifest.freeze_seconds)}")
        for name, stream in (("stdin", manifest.stdin), ("stdout", manifest.stdout), ("stderr", manifest.stderr)):
            print(f"  {name:8} " + ("is not rolled back" if stream.position is None else f"{stream.position} bytes"))
    if fragments:
        print()
        rows = []
        for fragment in fragments:
            image = fragment.image
            version = image.criu_version
            criu = f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else "-"
            rows.append(
                (
                    str(fragment.capsule),
                    fragment.node,
                    str(image.tasks),
                    size(fragment.bytes),
                    size(found.own) if (found := usage[fragment.capsule]) else "-",
                    size(found.shared) if found else "-",
                    str(len(fragment.files)),
                    str(len(image.files)),
                    duration(image.frozen_seconds),
                    criu,
                    image.kernel or "-",
                )
            )
        print_table(
            ("CAPSULE", "NODE", "TASKS", "SIZE", "STORED", "SHARED", "FILES", "OPEN", "FROZEN", "CRIU", "KERNEL"),
            rows,
            right=frozenset({"CAPSULE", "TASKS", "SIZE", "STORED", "SHARED", "FILES", "OPEN", "FROZEN"}),
        )
    if args.verbose:
        for fragment in fragments:
            for file in fragment.image.files:
                mode = "append" if file.append else "write"
                print(f"capsule {fragment.capsule}  {mode:6}  {file.size:>12}  {file.path}")
    return 0


def _usage(checkpoint: Checkpoint, capsule: int) -> Usage | None:
    """None where the index cannot be read, which `verify` explains."""
    try:
        return read_index(checkpoint.capsule_path(capsule)).usage
    except (CorruptError, OSError):
        return None
