"""What the verbs that take a JOB share: its arguments, finding it in the store, and what its checkpoints are."""

from __future__ import annotations

import argparse
import getpass
import os
import re
import shutil
from dataclasses import dataclass

from hpccr.config import Config
from hpccr.errors import CorruptError, HpccrError, NoCheckpointError, UsageError
from hpccr.slurm.query import JobInfo, SlurmError, UnknownJobError, job_query
from hpccr.store import elsewhere
from hpccr.store.layout import FINISHED, Checkpoint, Job, State, Step, Store


def add_store_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", metavar="DIR", help="store with the checkpoints (default: HPCCR_STORE_DIR, or store.dir of the file)"
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_job_arguments(parser: argparse.ArgumentParser, *, sequence: bool = False) -> None:
    """JOB, --step, --dir and, if asked for, SEQ."""
    parser.add_argument("job", metavar="JOB", help="job id as squeue shows it, or a name as `hpccr list` shows it")
    if sequence:
        parser.add_argument("sequence", metavar="SEQ", nargs="?", type=int, help="number of the checkpoint")
    parser.add_argument("--step", metavar="N", help="which `hpccr run` of the job, from 0 (default: the last one)")
    add_store_argument(parser)


def open_store(args: argparse.Namespace, config: Config) -> Store:
    """The store that the command line or the configuration names."""
    return Store.at(args.dir or config.store.dir)


def find_job(args: argparse.Namespace, config: Config) -> Job:
    """The job that the command line means. Raises HpccrError; for one that is not in the store it says whose it is."""
    store = open_store(args, config)
    name = _job_id(args.job)
    try:
        return store.find(name, cluster=os.environ.get("SLURM_CLUSTER_NAME", ""))
    except PermissionError as error:
        raise HpccrError(
            f"cannot read the store: {error.filename}: {error.strerror}", hint="a store can only be read by its owner"
        ) from None
    except UsageError:
        raise
    except HpccrError as error:
        others = [job for job in elsewhere.jobs(store) if name in (job.job, job.path.name)]
        if len(others) == 1:
            return others[0]
        raise _explain_missing(args.job, store, error) from None


def _job_id(name: str) -> str:
    """The id of the job that is task T of array A, if `name` is "A_T" and Slurm knows it; else `name`."""
    if re.fullmatch(r"[0-9]+_[0-9]+", name):
        try:
            return job_query(timeout=10).job(name).job
        except SlurmError:
            pass  # find() says what there is
    return name


def _explain_missing(name: str, store: Store, error: HpccrError) -> HpccrError:
    """A better error for a job that is not in the store, by asking Slurm, if it can be asked."""
    try:
        info = job_query(timeout=10).job(name)
    except UnknownJobError:
        return HpccrError(f"no job {name}: neither Slurm nor the store {store.root} knows it", hint=error.hint)
    except SlurmError:
        return error
    if info.uid != os.geteuid():
        return HpccrError(
            f"job {name} belongs to {info.user}, not to {_me()}", hint="only its owner can checkpoint or see it"
        )
    if "PENDING" in info.states:
        return HpccrError(f"job {name} has not started yet ({info.reason})")
    return HpccrError(
        f"job {name} runs without hpccr, or with another store than {store.root}",
        hint="submit it with --checkpoint, or call `hpccr run` in its script; --dir or HPCCR_STORE_DIR names a store",
    )


def _me() -> str:
    try:
        return getpass.getuser()
    except OSError:
        return f"uid {os.geteuid()}"


def find_step(args: argparse.Namespace, config: Config) -> Step:
    """The step that the command line means: --step, else the one that runs, else the last. Raises HpccrError."""
    job = find_job(args, config)
    steps = job.steps()
    if not steps:
        raise HpccrError(f"job {args.job} has no step in {job.path}", hint="its `hpccr run` has not got that far")
    if args.step is not None:
        for step in steps:
            if step.key.step == args.step:
                return step
        known = ", ".join(step.key.step for step in steps)
        raise UsageError(f"job {args.job} has no step {args.step}", hint=f"its steps are: {known}")
    running = [step for step in steps if step.endpoint_path.exists()]
    return (running or steps)[-1]


def find_checkpoint(step: Step, sequence: int | None) -> Checkpoint:
    """Checkpoint number `sequence` of a step, or its newest complete one. Raises NoCheckpointError."""
    if sequence is None:
        complete = step.complete()
        if not complete:
            raise NoCheckpointError(f"step {step.key} has no complete checkpoint", hint="`hpccr status` shows why")
        return complete[0]
    checkpoint = step.checkpoint(sequence)
    if not checkpoint.path.is_dir():
        known = ", ".join(str(c.sequence) for c in step.checkpoints()) or "none"
        raise NoCheckpointError(f"step {step.key} has no checkpoint {sequence}", hint=f"there is: {known}")
    return checkpoint


@dataclass(frozen=True)
class Summary:
    """A checkpoint in a line. created, freeze_seconds, reason, capsules: None while its manifest is not there.

    done, total: bytes of the flushes under way. abandoned: in words, that the job has not gone on from it."""

    sequence: int
    state: State
    created: float | None
    bytes: int
    freeze_seconds: float | None
    reason: str | None
    capsules: int | None
    missing: tuple[int, ...]
    problem: str
    path: str
    done: int
    total: int
    abandoned: str


def summarise(checkpoint: Checkpoint) -> Summary:
    """Raises OSError only."""
    state = checkpoint.state()
    try:
        manifest = checkpoint.manifest_if_there()
    except CorruptError:
        manifest = None
    try:
        total = checkpoint.bytes()
    except CorruptError:
        total = 0
    return Summary(
        sequence=checkpoint.sequence,
        state=state.state,
        created=manifest.created if manifest else None,
        bytes=total,
        freeze_seconds=manifest.freeze_seconds if manifest else None,
        reason=manifest.reason if manifest else None,
        capsules=manifest.capsules if manifest else None,
        missing=state.missing,
        problem=state.problem,
        path=str(checkpoint.path),
        done=state.done,
        total=state.total,
        abandoned=state.abandoned,
    )


@dataclass(frozen=True)
class OwnJobs:
    """The caller's jobs that Slurm has not forgotten, by job id, and the cluster that they are of."""

    cluster: str
    jobs: dict[str, JobInfo]


def own_jobs() -> OwnJobs | None:
    """None if there is no Slurm that answers."""
    if shutil.which("squeue") is None:
        return None
    query = job_query(timeout=10)
    try:
        found = query.jobs(_me())
        cluster = next((info.cluster for info in found if info.cluster), "") or query.cluster()
    except SlurmError:
        return None
    return OwnJobs(cluster, {info.job: info for info in found})


def job_of(step: Step) -> JobInfo | None:
    """What Slurm says of a step's job; None if it has forgotten it, or is another cluster's Slurm, or none."""
    if step.key.cluster == "local":
        return None
    try:
        info = job_query(timeout=10).job(step.key.job)
    except SlurmError:
        return None
    return info if info.cluster in ("", step.key.cluster) else None


def seen_state(state: str, info: JobInfo | None) -> str:
    """The state of a step (see step_state) with what Slurm says of its job: queued, suspended, or stopped when the job
    is none of Slurm's any more."""
    if state == FINISHED:
        return state
    if info is None:
        return "stopped"
    if "PENDING" in info.states:
        return "queued"
    return "suspended" if "SUSPENDED" in info.states else state


def step_state(step: Step) -> str:
    """The state in step.json, but "stopped" if it has not finished and no coordinator runs; "corrupt" if unreadable."""
    try:
        record = step.record()
    except CorruptError:
        return "corrupt"
    if record is not None and record.state == FINISHED:
        return FINISHED
    if not step.endpoint_path.exists():
        return "stopped"
    return record.state if record is not None else "starting"
