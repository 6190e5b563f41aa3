"""`hpccr doctor`: whether jobs can be checkpointed here, on this machine or on all nodes of the cluster."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

import hpccr
from hpccr.cli.jobs import add_json_argument, add_store_argument, open_store
from hpccr.cli.nodecheck import NodeReport, check_plugin, compare, examine
from hpccr.cli.output import ProgressLine, print_json, print_table
from hpccr.config import Config
from hpccr.errors import ExitCode, HpccrError, UsageError
from hpccr.slurm.env import Allocation
from hpccr.slurm.hostlist import expand
from hpccr.slurm.nodes import NodeInfo
from hpccr.slurm.query import job_query
from hpccr.slurm.steps import agent_step_command, agent_step_environment, probe_job_command
from hpccr.store import publish
from hpccr.wire.messages import Check

AT_ONCE = 16
"""Nodes that are asked at the same time."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check every node, with a remedy for what is wrong",
        description="Check that jobs can be checkpointed: hpccrd, CRIU, kernel and store on every node, and that "
        "the nodes are alike. In a job the job's nodes are checked; on a login node all usable nodes of the cluster, "
        "with a short job on each; without Slurm this machine.",
    )
    parser.add_argument("--local", action="store_true", help="only this machine")
    parser.add_argument("--nodes", metavar="LIST", help='these nodes, like "node[1-4]"')
    parser.add_argument(
        "--deadline", metavar="SECONDS", type=int, default=120, help="for all nodes to answer (default: 120)"
    )
    parser.add_argument("--token", default="", help=argparse.SUPPRESS)
    add_store_argument(parser)
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """0 if everything is well, 1 if not. Raises HpccrError if it cannot look."""
    store = open_store(args, config).root
    slurm = shutil.which("scontrol") is not None
    if args.nodes and (args.local or not slurm):
        raise UsageError("--nodes needs Slurm, and not --local")
    if args.local or not slurm:
        embedded = not slurm and os.geteuid() == 0
        report = examine(config, store, token=args.token, embedded=embedded)
        if args.json:
            print_json(report)
        else:
            _print([report], [], verbose=True)
        return int(ExitCode.OK if report.ok else ExitCode.FAILED)
    reports = _cluster(args, store)
    checks = compare(reports, _asking())
    ok = all(report.ok for report in reports) and all(check.ok for check in checks)
    if args.json:
        print_json({"ok": ok, "nodes": reports, "cluster": checks})
    else:
        _print(reports, checks, verbose=bool(args.verbose))
    return int(ExitCode.OK if ok else ExitCode.FAILED)


def _asking() -> NodeReport | None:
    """What of this login node must be as on the compute nodes; None in a job, on one of them."""
    if Allocation.from_environ(os.environ) is not None:
        return None
    plugin = check_plugin()
    return NodeReport(socket.gethostname(), hpccr.__version__, (plugin,)) if plugin else None


@dataclass(frozen=True)
class Call:
    """A node to ask and the srun command that does it."""

    node: str
    command: list[str]


def _cluster(args: argparse.Namespace, store: Path) -> list[NodeReport]:
    with _token(store) as token:
        # -I: what lies in the working directory or on the user's PYTHONPATH is no module of ours.
        argv = [sys.executable, "-I", "-m", "hpccr", "doctor", "--local", "--json"]
        argv += [f"--dir={store}", f"--token={token}"]
        if args.config:
            argv.append(f"--config={os.path.abspath(args.config)}")
        allocation = Allocation.from_environ(os.environ)
        wanted = expand(args.nodes) if args.nodes else None
        if allocation is not None:
            calls, reports = _in_job(allocation, wanted, argv)
        else:
            calls, reports = _in_jobs_of_its_own(job_query().nodes(), wanted, argv, args.deadline)
        with ProgressLine(wanted=not args.json) as line:
            reports += asyncio.run(_ask_all(calls, args.deadline, line))
    order = {report.node: index for index, report in enumerate(sorted(reports, key=lambda r: _natural(r.node)))}
    return sorted(reports, key=lambda report: order[report.node])


def _natural(name: str) -> tuple[str, int]:
    digits = len(name) - len(name.rstrip("0123456789"))
    return (name[:-digits], int(name[-digits:])) if digits else (name, -1)


@contextlib.contextmanager
def _token(store: Path) -> Iterator[str]:
    """A file in the store by which the nodes can see that it is the same directory for them."""
    token = f".doctor-{secrets.token_hex(8)}"
    try:
        publish.make_directory(store)
        publish.publish_bytes(store / token, b"")
    except OSError as error:
        raise HpccrError(
            f"cannot write the store {store}: {error.strerror}",
            hint="name a directory that you may write, on shared storage, with --dir or HPCCR_STORE_DIR",
        ) from None
    try:
        yield token
    finally:
        publish.remove(store / token)


def _in_job(
    allocation: Allocation, wanted: Sequence[str] | None, argv: Sequence[str]
) -> tuple[list[Call], list[NodeReport]]:
    strange = set(wanted or ()) - set(allocation.nodes)
    if strange:
        raise UsageError(
            f"{', '.join(sorted(strange))}: not in this job", hint="outside of a job any node can be checked"
        )
    chosen = wanted or allocation.nodes
    return [Call(node, agent_step_command([node], argv)) for node in chosen], []


def _in_jobs_of_its_own(
    known: Sequence[NodeInfo], wanted: Sequence[str] | None, argv: Sequence[str], deadline: int
) -> tuple[list[Call], list[NodeReport]]:
    by_name = {info.name: info for info in known}
    strange = [name for name in wanted or () if name not in by_name]
    if strange:
        raise UsageError(f"{', '.join(strange)}: Slurm has no such node", hint="sinfo shows the nodes")
    chosen = [by_name[name] for name in wanted] if wanted else [info for info in known if info.present]
    calls, reports = [], []
    for info in chosen:
        if info.usable:
            calls.append(Call(info.name, probe_job_command(info.name, info.partitions[0], argv, patience=deadline)))
        else:
            detail = "+".join(sorted(info.states)) + (f": {info.reason}" if info.reason else "")
            hint = f"once it is repaired: scontrol update nodename={info.name} state=resume"
            reports.append(NodeReport(info.name, "", (Check("slurm", False, detail, hint),)))
    return calls, reports


async def _ask_all(calls: Sequence[Call], deadline: int, line: ProgressLine) -> list[NodeReport]:
    limit = asyncio.Semaphore(AT_ONCE)
    end = time.monotonic() + deadline
    answered = 0

    async def ask(call: Call) -> NodeReport:
        nonlocal answered
        async with limit:
            report = await _ask(call, max(1.0, end - time.monotonic()))
        answered += 1
        line.show(f"{answered} of {len(calls)} nodes have answered")
        return report

    line.show(f"asking {len(calls)} nodes")
    return list(await asyncio.gather(*map(ask, calls)))


async def _ask(call: Call, timeout: float) -> NodeReport:
    try:
        process = await asyncio.create_subprocess_exec(
            *call.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=agent_step_environment(os.environ),
            start_new_session=True,
        )
    except OSError as error:
        return _failed(call.node, f"cannot start srun: {error.strerror}", "install Slurm's client commands")
    try:
        output, complaint = await asyncio.wait_for(process.communicate(), timeout)
    except TimeoutError:
        return _failed(
            call.node,
            f"no answer within {timeout:.0f} s",
            "is the node busy or the partition closed to you? --deadline waits longer, --nodes names other nodes",
        )
    finally:
        if process.returncode is None:
            process.terminate()  # srun ends its job with it
            await process.wait()
    try:
        # The name is Slurm's for the node, whatever the node calls itself.
        return msgspec.structs.replace(msgspec.json.decode(output, type=NodeReport), node=call.node)
    except msgspec.MsgspecError:
        last = "; ".join(complaint.decode(errors="replace").strip().splitlines()[-3:])
        return _failed(
            call.node,
            last or f"exit code {process.returncode} and no report",
            f"hpccr must be installed there too, and {sys.executable} run it; try: "
            f"srun -w {call.node} {sys.executable} -I -m hpccr doctor --local",
        )


def _failed(node: str, detail: str, hint: str) -> NodeReport:
    return NodeReport(node, "", (Check("reachable", False, detail, hint),))


def _print(reports: Sequence[NodeReport], cluster: Sequence[Check], *, verbose: bool) -> None:
    rows = []
    hints: dict[str, None] = {}
    for node, checks in [(report.node, report.checks) for report in reports] + [("all nodes", tuple(cluster))]:
        bad = [check for check in checks if not check.ok]
        if not verbose and not bad and checks:
            rows.append((node, "ok", f"{len(checks)} checks", ""))
        for check in checks if verbose else bad:
            rows.append((node, "ok" if check.ok else "FAIL", check.name, " ".join(check.detail.split())))
            if not check.ok and check.hint:
                hints[f"{check.name}: {check.hint}"] = None
    print_table(("NODE", "", "CHECK", "FOUND"), rows)
    for hint in hints:
        print(f"hint: {hint}")
