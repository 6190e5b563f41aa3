"""`hpccr run CMD...`: run a command, MPI or not, on all nodes of the job so that it can be checkpointed."""

from __future__ import annotations

import argparse
import asyncio
import logging
import logging.handlers
import os
import queue
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import structs

from hpccr.agent.service import node_name
from hpccr.cli.embedded import node_service
from hpccr.config import Config, load
from hpccr.coordinator.mpienv import SECRET_VARIABLE, capsule_environment, inside
from hpccr.coordinator.requests import Command
from hpccr.coordinator.run import Coordinator
from hpccr.coordinator.schedule import parse_interval
from hpccr.coordinator.script import keep_script
from hpccr.coordinator.site import Site, SlurmSite
from hpccr.errors import HpccrError, SupersededError, UnsupportedError, UsageError
from hpccr.model import StepKey
from hpccr.slurm.commands import CommandQuery
from hpccr.slurm.env import Allocation
from hpccr.slurm.query import SlurmError
from hpccr.store import elsewhere
from hpccr.store.layout import FINISHED, Step, Store
from hpccr.store.publish import FILE_MODE, make_directory
from hpccr.store.steps import anothers, claim_step, last_run

log = logging.getLogger(__name__)

QUICK = 5.0
"""Seconds for the one question to Slurm that a SIGKILL follows within KillWait, 30 s by default."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run",
        help="run a command so that it can be checkpointed",
        description="Run a command, e.g. `hpccr run mpirun ./app`, in capsules on all nodes of the Slurm job (or on "
        "this machine, as root and without Slurm). In a requeued job it goes on from the newest complete checkpoint.",
    )
    parser.add_argument("--dir", metavar="DIR", help="store for checkpoints, on shared storage (default: store.dir)")
    parser.add_argument(
        "--interval", metavar="TIME", help='time between checkpoints: 30m, 2h, HH:MM:SS, minutes, "auto" or "none"'
    )
    parser.add_argument("--keep", type=int, metavar="N", help="complete checkpoints to keep (default: store.keep)")
    parser.add_argument(
        "--files",
        action="append",
        metavar="DIR",
        help="a directory whose files are part of the job's state: saved with each checkpoint, put back as they were "
        "at a restart, and what was made since is removed (may be given several times; default: files.trees)",
    )
    parser.add_argument(
        "--quiesce",
        metavar="MODE",
        choices=("prefer", "require", "off"),
        help="whether MPI ranks that call safe points are checkpointed there (default: quiesce.mode)",
    )
    parser.add_argument(
        "--batch", action="store_true", help="the command is the whole batch script: SIGUSR1 asks for a checkpoint"
    )
    parser.add_argument("--fresh", action="store_true", help="start from the beginning even if there is a checkpoint")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD ...", help="the command and its arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, config: Config) -> int:
    """Run the command; its exit code. Raises HpccrError."""
    argv = tuple(args.command[1:] if args.command[:1] == ["--"] else args.command)
    if not argv:
        raise UsageError("no command", hint="hpccr run mpirun ./app")
    if inside(os.environ):
        # The whole batch script is in a capsule already: the command is part of the job as it is.
        os.execvp(argv[0], argv)  # noqa: S606 - what the user asked to run
    config = _with_options(config, args)
    store = Store.at(args.dir or config.store.dir)
    allocation = own_allocation()
    if allocation is None:
        _check_trees(config)
        key = StepKey("local", f"{time.strftime('%Y%m%d')}_{secrets.token_hex(3)}", "0")
        step = store.step(key)
        make_directory(step.path)
        _tell_usual_store(args, store, step)
        if os.isatty(2):
            print(
                f"hpccr: this is {key.job_directory}; checkpoint it with: hpccr checkpoint {key.job}", file=sys.stderr
            )
        return start(config, step, argv, allocation=None, resume=False, batch=args.batch, verbose=args.verbose)
    job = store.job(allocation.cluster, allocation.job)
    step = claim_step(store, job.cluster, job.job, allocation.restarts, began=allocation.start_time)
    if not allocation.restarts and anothers(job.step("0")):
        print(
            f"hpccr: warning: {job.path} has checkpoints of another job {job.job}, from before Slurm's numbers "
            f"began anew; they are kept, and this is step {step.key.step}",
            file=sys.stderr,
        )
    _tell_usual_store(args, store, step)
    record = step.record()
    if record is not None and record.state == FINISHED and record.exit_code is not None and not args.fresh:
        if args.batch or record.exit_code:
            what, again = argv[0], "hpccr run --fresh"
            if args.batch:
                what, again = "the script", f"hpccr rm --force {allocation.job}; scontrol requeue {allocation.job}"
            print(
                f"hpccr: {what} ended with exit code {record.exit_code} before the requeue: it is not run again\n"
                f"hint: to start from the beginning: {again}",
                file=sys.stderr,
            )
        return record.exit_code
    resume = record is not None and not args.fresh
    if record is None and allocation.restarts and step.key.step == "0":
        print(
            f"hpccr: warning: job {allocation.job} has run before, but {store.root} has nothing of it: it starts anew",
            file=sys.stderr,
        )
    if not resume:
        _check_trees(config)
    if args.batch:
        argv = (keep_script(step, argv[0], resume=resume), *argv[1:])
    return start(
        config,
        step,
        argv,
        allocation=allocation,
        resume=resume,
        batch=args.batch,
        verbose=args.verbose,
    )


def own_allocation() -> Allocation | None:
    """The allocation this process runs in, None outside of a job. Raises UsageError, UnsupportedError."""
    allocation = Allocation.from_environ(os.environ)
    if allocation is None or not allocation.restarts:
        return allocation
    # Slurm sets SLURM_RESTART_COUNT from the first requeue on. Before, it may be of the job that submitted this one.
    try:
        restarts = CommandQuery().job(allocation.job).restarts
    except SlurmError:
        return allocation
    # Slurm's is one more when the job is being requeued at this moment.
    return replace(allocation, restarts=min(restarts, allocation.restarts))


def _tell_usual_store(args: argparse.Namespace, store: Store, step: Step) -> None:
    """Let `hpccr list` and the other commands find the job without being told of its store."""
    directory = load(args.config).store.dir
    try:
        if (usual := Store.at(directory)) != store:
            elsewhere.remember(usual, store.job(step.key.cluster, step.key.job))
    except (OSError, HpccrError) as error:
        log.warning("%s cannot say where the job's checkpoints are: %s", directory, error)


def _check_trees(config: Config) -> None:
    """At the first start only: what has gone since comes back."""
    for tree in config.files.trees:
        if not os.path.isdir(tree):
            raise UsageError(
                f"--files: there is no directory {tree}", hint="make it before the job, or correct the name"
            )


def _with_options(config: Config, args: argparse.Namespace) -> Config:
    if args.interval is not None:
        config = structs.replace(config, checkpoint=structs.replace(config.checkpoint, interval=args.interval))
    if args.quiesce is not None:
        config = structs.replace(config, quiesce=structs.replace(config.quiesce, mode=args.quiesce))
    if args.keep is not None:
        if args.keep < 1:
            raise UsageError("--keep needs at least 1")
        config = structs.replace(config, store=structs.replace(config.store, keep=args.keep))
    trees = tuple(os.path.realpath(os.path.expanduser(tree)) for tree in args.files or config.files.trees)
    home = os.path.realpath(os.path.expanduser("~"))
    for tree in trees:
        if home == tree or home.startswith(tree.rstrip("/") + "/"):
            raise UsageError(
                f"--files {tree} would put your whole home directory back at a restart, other jobs' results included",
                hint="name the job's own directories",
            )
    config = structs.replace(config, files=structs.replace(config.files, trees=trees))
    parse_interval(config.checkpoint.interval)  # a mistake is told before anything is started
    return config


def start(
    config: Config,
    step: Step,
    argv: tuple[str, ...],
    *,
    allocation: Allocation | None,
    resume: bool,
    asked: bool = False,
    sequence: int | None = None,
    batch: bool = False,
    verbose: int = 0,
) -> int:
    """Run or restore a step to its end; the exit code of its command. Raises HpccrError."""
    _check_store(step)
    here = node_name()
    query, quick = CommandQuery(), CommandQuery(timeout=QUICK)
    site = SlurmSite(allocation, query, here, quick=quick) if allocation else Site((here,))
    record = step.record()
    with ExitStack() as stack:
        _log_to(step.path / "hpccr.log", logging.DEBUG if verbose else logging.INFO, stack)
        if allocation is None:
            socket_path = _node_socket(config, stack)
        elif resume:
            socket_path = config.node.socket  # where it is missing the job is moved to other nodes
        else:
            socket_path = _required_socket(config)
        coordinator = Coordinator(
            config=config,
            step=step,
            site=site,
            socket_path=socket_path,
            agent_command=_agent_command(step),
            incarnation=record.incarnation if record else -1,
            resume=resume,
            asked=asked,
            sequence=sequence,
            batch=batch,
            # Who goes on with a job by hand is no run of it, and takes the place of the last one.
            run=last_run(step) if asked else allocation.restarts if allocation else 0,
        )
        command = _command(argv, config, allocation, told=resume)
        try:
            return asyncio.run(coordinator.run(command, len(site.nodes)))
        except SupersededError as error:
            log.error("%s", error.message)
            if asked:
                raise
            # Told in the log only: the job's output files have lines of the later run by now.
            return int(error.code)


def _required_socket(config: Config) -> str:
    if not os.path.exists(config.node.socket):
        raise UnsupportedError(
            f"no hpccrd on {node_name()}: {config.node.socket} is not there",
            hint="the administrator starts it with `systemctl start hpccrd`; `hpccr doctor` checks every node",
        )
    return config.node.socket


def _node_socket(config: Config, stack: ExitStack) -> str:
    if os.path.exists(config.node.socket):
        return config.node.socket
    if os.geteuid() != 0:
        raise UnsupportedError(
            "without Slurm and hpccrd, `hpccr run` must be root: it makes namespaces and drives CRIU itself",
            hint="run it with sudo, or have hpccrd started on this machine",
        )
    return stack.enter_context(node_service(config))


def _agent_command(step: Step) -> Callable[[dict[str, int]], list[str]]:
    def command(counts: dict[str, int]) -> list[str]:
        several = [f"--count={node}={count}" for node, count in counts.items() if count > 1]
        # -I: neither a queue.py beside the batch script is the library's, nor one on the user's PYTHONPATH.
        return [sys.executable, "-I", "-m", "hpccr", "agent", f"--endpoint={step.endpoint_path}", *several]

    return command


def _command(
    argv: tuple[str, ...], config: Config, allocation: Allocation | None, *, told: bool
) -> Callable[[str], Command]:
    """What makes the command once the step's secret is known. told: the user has had the warnings before."""
    environment, warnings = capsule_environment(
        os.environ,
        capsules=len(allocation.nodes) if allocation else 1,
        tasks_per_capsule=allocation.tasks if allocation else (os.cpu_count() or 1,),
        subnet=config.network.subnet,
        secret="",
        private=config.capsule.private,
    )
    for warning in warnings:
        log.warning("%s", warning)
        if not told:
            print(f"hpccr: warning: {warning}", file=sys.stderr)

    def command(secret: str) -> Command:
        return Command(argv, environment | {SECRET_VARIABLE: secret}, str(Path.cwd()))

    return command


class _LogFile(logging.Handler):
    """Writes to a descriptor, which it owns. What cannot be written is lost: the place for complaints would be the
    job's stderr, which belongs to the job."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(self._fd, self.format(record).encode(errors="backslashreplace") + b"\n")
        except OSError:
            pass

    def close(self) -> None:
        os.close(self._fd)
        super().close()


def _log_to(path: Path, level: int, stack: ExitStack) -> None:
    """Send the package's log to a file, by a thread: storage that hangs must not make the coordinator fall silent."""
    file = _LogFile(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    stack.callback(file.close)
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(lines, file)
    listener.start()
    stack.callback(listener.stop)
    handler = logging.handlers.QueueHandler(lines)
    # What asyncio has to say would otherwise be in the job's output.
    for name in ("hpccr", "asyncio"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
    logging.getLogger("hpccr").setLevel(level)


def _check_store(step: Step) -> None:
    """Raises UsageError if the step's directory is not the caller's alone: images are memory, and so are secrets."""
    found = step.path.stat()
    if found.st_uid != os.geteuid():
        raise UsageError(f"{step.path} belongs to another user", hint="name a directory of your own with --dir")
    if found.st_mode & 0o077:
        raise UsageError(f"others may enter {step.path}", hint=f"chmod 700 {step.path}")
