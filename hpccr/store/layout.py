"""Where things are in a store, and reading them. Nothing here writes (see publish, steps, events, gc).

    STORE/<cluster>-<job>/<step>/ step.json  endpoint.json  events.jsonl  run-<incarnation>
        ckpt-000007/ checkpoint.json  [damaged.json]  [abandoned.json]
            capsule-0/{fragment.json, flush.json, files...}  capsule-1/...

There is no central commit: a checkpoint is complete when checkpoint.json and the fragment of every capsule it counts
are there and belong together, and nobody has found it damaged. fragment.json is the last file of its capsule to appear.
"""

from __future__ import annotations

import enum
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hpccr.errors import CorruptError, HpccrError, NoCheckpointError, UsageError, encodable
from hpccr.model import (
    FRAGMENT_NAME,
    MANIFEST_NAME,
    EndpointRecord,
    FlushProgress,
    Fragment,
    Manifest,
    SealedFragment,
    StepKey,
    StepRecord,
    parse_job_directory,
)
from hpccr.store import abandoned, damage
from hpccr.store.publish import read_if_there

STEP_NAME = "step.json"
ENDPOINT_NAME = "endpoint.json"
EVENTS_NAME = "events.jsonl"
FLUSH_NAME = "flush.json"

FLUSH_STALE = 30.0
"""Seconds after which a flush.json that is not rewritten says that its writer is dead (it rewrites at least every 2 s;
the rest is for slow storage and clocks that differ between nodes)."""

FINISHED = "finished"
"""StepRecord.state of a step whose command has ended: it is not run again."""

_CHECKPOINT_DIR = re.compile(r"^ckpt-(\d{6})$")
_CAPSULE_DIR = re.compile(r"^capsule-(0|[1-9]\d{0,4})$")
_STEP_DIR = re.compile(r"^(0|[1-9]\d*)$")


class State(enum.StrEnum):
    """complete: can be restored. flushing: is being written right now. incomplete: something is missing."""

    COMPLETE = "complete"
    FLUSHING = "flushing"
    INCOMPLETE = "incomplete"


@dataclass(frozen=True)
class CheckpointState:
    """missing: capsules without a fragment (all that are known of when the manifest is missing too).

    problem: why it is incomplete, in words; empty otherwise. done/total: bytes of the flushes under way.
    abandoned: in words, that the job has not gone on from it (store.abandoned); empty otherwise.
    """

    state: State
    missing: tuple[int, ...] = ()
    problem: str = ""
    done: int = 0
    total: int = 0
    abandoned: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint directory of a step; it may be in any state, or vanish under a gc."""

    step: Step
    sequence: int

    @property
    def path(self) -> Path:
        return self.step.path / f"ckpt-{self.sequence:06d}"

    @property
    def manifest_path(self) -> Path:
        return self.path / MANIFEST_NAME

    def capsule_path(self, capsule: int) -> Path:
        """The capsule's directory: what wire.messages.Flush and Restore carry."""
        return self.path / f"capsule-{capsule}"

    def manifest(self) -> Manifest:
        """Raises NoCheckpointError if it is not there, CorruptError, OSError."""
        found = self.manifest_if_there()
        if found is None:
            raise NoCheckpointError(
                f"{self.path} has no {MANIFEST_NAME}", hint="the checkpoint was never finished; use another one"
            )
        return found

    def manifest_if_there(self) -> Manifest | None:
        """Raises CorruptError, OSError."""
        return read_if_there(self.manifest_path, Manifest)

    def sealed(self, capsule: int) -> SealedFragment | None:
        """fragment.json of a capsule; None if it is not published. Raises CorruptError, OSError."""
        return read_if_there(self.capsule_path(capsule) / FRAGMENT_NAME, SealedFragment)

    def fragment(self, capsule: int) -> Fragment | None:
        """The fragment of a capsule, its seal unchecked (only hpccrd can); None if not published.

        Raises CorruptError, OSError.
        """
        sealed = self.sealed(capsule)
        if sealed is None:
            return None
        try:
            return msgspec.json.decode(sealed.body, type=Fragment)
        except (msgspec.MsgspecError, RecursionError) as error:
            path = self.capsule_path(capsule) / FRAGMENT_NAME
            raise CorruptError(f"{path}: its body is not a fragment of this version of hpccr: {error}") from None

    def capsules_there(self) -> list[int]:
        """Capsules that have a directory, whatever is in it."""
        return sorted(int(match[1]) for match in map(_CAPSULE_DIR.match, _entries(self.path)) if match)

    def flushes(self, *, now: float | None = None) -> list[FlushProgress]:
        """Progress of the flushes whose writer is alive."""
        now = time.time() if now is None else now
        found = []
        for capsule in self.capsules_there():
            try:
                progress = read_if_there(self.capsule_path(capsule) / FLUSH_NAME, FlushProgress)
            except CorruptError:
                continue
            if progress is not None and abs(now - progress.updated) <= FLUSH_STALE:
                found.append(progress)
        return found

    def state(self, *, now: float | None = None) -> CheckpointState:
        """What can be said of it without reading the images (verify does). Raises OSError."""
        missing, problem = self._missing()
        left = abandoned.found(self.path)
        if not missing and not problem:
            return CheckpointState(State.COMPLETE, abandoned=left)
        if flushes := self.flushes(now=now):
            done, total = sum(f.done for f in flushes), sum(f.total for f in flushes)
            return CheckpointState(State.FLUSHING, missing, problem, done, total, left)
        return CheckpointState(State.INCOMPLETE, missing, problem, abandoned=left)

    def _missing(self) -> tuple[tuple[int, ...], str]:
        try:
            manifest = self.manifest_if_there()
            count = manifest.capsules if manifest else max(self.capsules_there(), default=-1) + 1
            missing = []
            for capsule in range(count):
                fragment = self.fragment(capsule)
                if fragment is None:
                    missing.append(capsule)
                elif manifest is not None:
                    check_belongs(fragment, manifest, capsule, self.capsule_path(capsule) / FRAGMENT_NAME)
            if manifest is not None:
                check_place(manifest, self)
            if found := damage.found(self.path):
                return (), found
        except CorruptError as error:
            return (), error.message
        problem = "" if manifest else f"no {MANIFEST_NAME}"
        if missing:
            problem = (problem and problem + ", ") + "no fragment of capsule " + ", ".join(map(str, missing))
        return tuple(missing), problem

    @property
    def complete(self) -> bool:
        """Raises OSError."""
        return self.state().state is State.COMPLETE

    def bytes(self) -> int:
        """Size of the published fragments. Raises CorruptError, OSError."""
        return sum(fragment.bytes for capsule in self.capsules_there() if (fragment := self.fragment(capsule)))


def check_belongs(fragment: Fragment, manifest: Manifest, capsule: int, path: Path) -> None:
    """Raises CorruptError, naming `path`, unless the fragment is capsule's part of the manifest's checkpoint."""
    expected = (manifest.format, manifest.key, manifest.checkpoint, manifest.sequence, manifest.capsules, capsule)
    found = (
        fragment.format,
        fragment.key,
        fragment.checkpoint,
        fragment.sequence,
        fragment.capsules,
        fragment.capsule,
    )
    names = ("format", "key", "checkpoint", "sequence", "capsules", "capsule")
    for name, want, have in zip(names, expected, found, strict=True):
        if want != have:
            raise CorruptError(f"{path} does not belong to its checkpoint: {name} is {have}, not {want}")


def check_place(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raises CorruptError unless the manifest lies where its own key and sequence say."""
    if manifest.key != checkpoint.step.key or manifest.sequence != checkpoint.sequence:
        raise CorruptError(
            f"{checkpoint.manifest_path} is of {manifest.key} checkpoint {manifest.sequence}",
            hint="checkpoint directories cannot be copied to another job, step or number",
        )


@dataclass(frozen=True)
class Step:
    """One step's directory; it may not exist yet."""

    root: Path
    key: StepKey

    @property
    def path(self) -> Path:
        return self.root / self.key.job_directory / self.key.step

    @property
    def record_path(self) -> Path:
        return self.path / STEP_NAME

    @property
    def endpoint_path(self) -> Path:
        return self.path / ENDPOINT_NAME

    @property
    def events_path(self) -> Path:
        return self.path / EVENTS_NAME

    def record(self) -> StepRecord | None:
        """step.json; None before the first start. Raises CorruptError, OSError."""
        return read_if_there(self.record_path, StepRecord)

    def endpoint(self) -> EndpointRecord | None:
        """endpoint.json; None while no coordinator runs. Raises CorruptError, OSError."""
        return read_if_there(self.endpoint_path, EndpointRecord)

    def checkpoint(self, sequence: int) -> Checkpoint:
        """A handle, whether or not there is such a checkpoint."""
        return Checkpoint(self, sequence)

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoint directories, newest first, in whatever state. Raises OSError."""
        numbers = [int(match[1]) for match in map(_CHECKPOINT_DIR.match, _entries(self.path)) if match]
        return [Checkpoint(self, number) for number in sorted(numbers, reverse=True) if number > 0]

    def complete(self) -> list[Checkpoint]:
        """The complete checkpoints but for abandoned ones, newest first: the order in which a restore tries them.

        Raises OSError."""
        found = ((checkpoint, checkpoint.state()) for checkpoint in self.checkpoints())
        return [checkpoint for checkpoint, s in found if s.state is State.COMPLETE and not s.abandoned]

    def next_sequence(self) -> int:
        """The number for the next checkpoint: above every one that has a directory, in whatever state.

        gc never removes the directory with the highest number; after `hpccr rm` it may be used again. Raises OSError.
        """
        there = self.checkpoints()
        return there[0].sequence + 1 if there else 1


@dataclass(frozen=True)
class Job:
    """One job's directory in a store."""

    root: Path
    cluster: str
    job: str

    @property
    def path(self) -> Path:
        return self.root / f"{self.cluster}-{self.job}"

    def step(self, name: str) -> Step:
        return Step(self.root, StepKey(cluster=self.cluster, job=self.job, step=name))

    def steps(self) -> list[Step]:
        """The steps that have a directory, in their order. Raises OSError."""
        names = [name for name in _entries(self.path) if _STEP_DIR.match(name)]
        return [self.step(name) for name in sorted(names, key=int)]


@dataclass(frozen=True)
class Store:
    """A store by its absolute root directory, which may not exist yet."""

    root: Path

    @classmethod
    def at(cls, directory: str | os.PathLike[str]) -> Store:
        """The store in a directory as configured: ~ is the user's home, a relative path starts here.

        Raises UsageError if there is no home to start from, or if the path is not UTF-8: it is part of messages and
        records.
        """
        try:
            path = Path(directory).expanduser()
        except RuntimeError:
            raise UsageError(f"{directory}: this user has no home directory", hint="set store.dir or --dir") from None
        path = path.absolute()
        if encodable(str(path)) != str(path):
            raise UsageError(
                f"the path of the store {path} has bytes that are not UTF-8",
                hint="name another directory with --dir, --checkpoint-dir or HPCCR_STORE_DIR",
            )
        return cls(path)

    def jobs(self) -> list[Job]:
        """All jobs that have a directory, by cluster and job (numbers by value). Raises OSError."""
        found = [parsed for parsed in map(parse_job_directory, _entries(self.root)) if parsed]
        return [Job(self.root, cluster, job) for cluster, job in sorted(found, key=_job_order)]

    def job(self, cluster: str, job: str) -> Job:
        return Job(self.root, cluster, job)

    def step(self, key: StepKey) -> Step:
        return Step(self.root, key)

    def find(self, name: str, *, cluster: str = "") -> Job:
        """The job a user means: a job id, or a job's directory name ("cluster-id", "local-id").

        `cluster` settles an id that several clusters have. Raises HpccrError if there is none, UsageError if several.
        """
        jobs = self.jobs()
        found = [job for job in jobs if job.path.name == name] or [job for job in jobs if job.job == name]
        if len(found) > 1 and cluster:
            found = [job for job in found if job.cluster == cluster]
        if not found:
            raise HpccrError(
                f"no job {name} in the store {self.root}",
                hint="`hpccr list --all` shows the jobs there are; --dir or HPCCR_STORE_DIR names another store",
            )
        if len(found) > 1:
            raise UsageError(f"job {name} is one of " + ", ".join(job.path.name for job in found), hint="say which")
        return found[0]


def _job_order(parsed: tuple[str, str]) -> tuple[str, int, str]:
    cluster, job = parsed
    return cluster, int(job) if job.isdecimal() else -1, job


def _entries(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
