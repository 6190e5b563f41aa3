"""`hpccr inspect JOB [SEQ]`: what is in a checkpoint."""

from __future__ import annotations

import argparse
import time
from typing import Any

from hpccr.cli import contents, saved
from hpccr.cli.contents import Contents
from hpccr.cli.jobs import add_job_arguments, add_json_argument, find_checkpoint, find_step, summarise
from hpccr.cli.output import duration, print_json, print_table, size
from hpccr.config import Config
from hpccr.errors import CorruptError, HpccrError, encodable
from hpccr.model import Fragment, SavedFiles
from hpccr.store.index import Usage, read_index
from hpccr.store.layout import Checkpoint


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="what is in a checkpoint",
        description="Show a checkpoint (default: the newest complete one): when and where it was made, what it takes, "
        "and per capsule its processes, ranks, memory, open files and sockets, as the images have them. "
        "-v shows every file and socket.",
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
    inside, problem = _inside(checkpoint, [fragment.capsule for fragment in fragments])
    files, unread = _saved(checkpoint, fragments)
    if args.json:
        stored = [{"capsule": k, "own": found.own, "shared": found.shared} for k, found in usage.items() if found]
        print_json(
            {
                "summary": summary,
                "manifest": manifest,
                "fragments": fragments,
                "stored": stored,
                "contents": inside,
                "problem": problem,
                "files": None if unread else saved.listed(files),
                "trees": [encodable(tree) for tree in saved.trees(files)],
            }
        )
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
                    str(image.files),
                    duration(image.frozen_seconds),
                    criu,
                    image.kernel or "-",
                )
            )
        print_table(
            ("CAPSULE", "NODE", "TASKS", "SIZE", "STORED", "SHARED", "FILES", "SAVED", "FROZEN", "CRIU", "KERNEL"),
            rows,
            right=frozenset({"CAPSULE", "TASKS", "SIZE", "STORED", "SHARED", "FILES", "SAVED", "FROZEN"}),
        )
    if inside:
        _print_inside(inside, verbose=args.verbose)
    elif problem:
        print(f"\n{problem}")
    if unread:
        print(f"\n{unread}")
    else:
        saved.show(files, everything=bool(args.verbose))
    return 0


def _saved(checkpoint: Checkpoint, fragments: list[Fragment]) -> tuple[dict[int, SavedFiles], str]:
    """What was saved of the job's files, and why not if that cannot be told."""
    try:
        return {fragment.capsule: saved.read(checkpoint, fragment) for fragment in fragments}, ""
    except (CorruptError, OSError) as error:
        return {}, f"what was saved of the job's files cannot be read: {error}"


def _inside(checkpoint: Checkpoint, capsules: list[int]) -> tuple[list[Contents], str]:
    """What is in the images, and why not if that cannot be told."""
    try:
        return [contents.read(checkpoint.capsule_path(capsule), capsule) for capsule in capsules], ""
    except HpccrError as error:
        return [], error.message + (f" ({error.hint})" if error.hint else "")
    except OSError as error:
        return [], str(error)


def _print_inside(inside: list[Contents], *, verbose: bool) -> None:
    print()
    print_table(
        ("CAPSULE", "RANKS", "PROCESSES", "MEMORY", "FILES", "SOCKETS"),
        [
            (
                str(one.capsule),
                str(one.ranks),
                str(len(one.processes)),
                size(one.memory),
                str(len(one.files)),
                str(len(one.sockets)),
            )
            for one in inside
        ],
        right=frozenset({"CAPSULE", "RANKS", "PROCESSES", "MEMORY", "FILES", "SOCKETS"}),
    )
    print()
    rows = [
        (
            str(one.capsule),
            str(process.pid),
            "-" if process.rank is None else str(process.rank),
            str(process.threads),
            size(process.memory),
            str(process.files),
            str(process.sockets),
            process.command if verbose else (process.command or process.name)[:60],
        )
        for one in inside
        for process in one.processes
    ]
    columns = ("CAPSULE", "PID", "RANK", "THREADS", "MEMORY", "FILES", "SOCKETS", "COMMAND")
    print_table(columns, rows, right=frozenset(columns[:-1]))
    if not verbose:
        return
    print()
    files = [
        (str(one.capsule), file.access, str(file.position), _pids(file.pids), file.path)
        for one in inside
        for file in one.files
    ]
    print_table(("CAPSULE", "ACCESS", "POSITION", "PIDS", "FILE"), files, right=frozenset({"CAPSULE", "POSITION"}))
    print()
    sockets = [
        (str(one.capsule), found.kind, found.state, found.local, found.peer, _pids(found.pids))
        for one in inside
        for found in one.sockets
    ]
    print_table(("CAPSULE", "SOCKET", "STATE", "LOCAL", "PEER", "PIDS"), sockets, right=frozenset({"CAPSULE"}))


def _pids(pids: tuple[int, ...]) -> str:
    return ",".join(map(str, pids))


def _usage(checkpoint: Checkpoint, capsule: int) -> Usage | None:
    """None where the index cannot be read, which `verify` explains."""
    try:
        return read_index(checkpoint.capsule_path(capsule)).usage
    except (CorruptError, OSError):
        return None
