"""JobQuery by Slurm's own commands and their JSON output (tested with 24.11; its older shapes are understood)."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from hpccr.slurm.hostlist import expand
from hpccr.slurm.nodes import NodeInfo
from hpccr.slurm.query import Cause, JobInfo, SlurmError, UnknownJobError, cause

COMMENT_LIMIT = 1024
"""Bytes of a comment: what fits into Slurm's tables and a line of squeue; longer ones are cut."""

_JOB = re.compile(r"[0-9]{1,10}(_[0-9]{1,10})?", re.ASCII)

_HINTS = (
    ("invalid job id", "`squeue --me` lists your jobs; Slurm forgets a finished one after a few minutes (MinJobAge)"),
    ("access/permission denied", "only the job's owner or an administrator may do that"),
    ("unable to contact slurm controller", "is slurmctld running, and slurm.conf the same on this node?"),
    ("socket timed out", "slurmctld is busy or down: try again"),
    ("munge", "is munged running on this node with the cluster's key?"),
    ("requeue", "the job must be a batch job that was submitted with --requeue, or JobRequeue=1 in slurm.conf"),
)


class CommandQuery:
    """JobQuery over scontrol and squeue. timeout: seconds for each command."""

    def __init__(self, *, timeout: float = 30.0, environ: Mapping[str, str] | None = None) -> None:
        self._timeout = timeout
        self._environ = environ

    def job(self, job: str) -> JobInfo:
        check_job(job)
        deadline = time.monotonic() + self._timeout
        found = _jobs(self._run(["scontrol", "show", "job", job, "--json"]), f"job {job}")
        if not found:
            # With --json an unknown job and a slurmctld out of reach look the same: exit code 0, no message, no jobs.
            left = max(1.0, deadline - time.monotonic())
            run_command(["scontrol", "show", "job", job], timeout=left, environ=self._environ)
            raise SlurmError(f"Slurm has not told of job {job}", hint="try again")
        # Tasks of an array that are still pending share one record, which has no task id.
        matching = [info for info in found if job in (info.job, info.array)] or ("_" in job and found)
        if not matching:
            raise UnknownJobError(f"Slurm knows no job {job}", hint=_HINTS[0][1])
        return matching[0]

    def jobs(self, user: str) -> list[JobInfo]:
        found = _jobs(self._run(["squeue", "--json", f"--user={user}"]), f"jobs of {user}")
        return sorted(found, key=lambda info: int(info.job))

    def nodes(self) -> list[NodeInfo]:
        output = self._run(["scontrol", "show", "nodes", "--json"])
        try:
            return [_node(node) for node in msgspec.json.decode(output, type=dict[str, Any])["nodes"]]
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise SlurmError(f"cannot understand what Slurm says of its nodes: {what}") from None

    def requeue(self, job: str) -> None:
        check_job(job)
        self._run(["scontrol", "requeue", job])

    def start_now(self, job: str) -> None:
        check_job(job)
        self._run(["scontrol", "update", f"JobId={job}", "StartTime=now"])

    def set_comment(self, job: str, text: str) -> None:
        check_job(job)
        self._run(["scontrol", "update", f"JobId={job}", f"Comment={one_line(text)}"])

    def extra_text(self, job: str) -> str:
        check_job(job)
        data = _decoded(self._run(["scontrol", "show", "job", job, "--json"]), f"job {job}")
        found = data.get("jobs")
        return _text(found[0].get("extra")) if found else ""

    def set_extra_text(self, job: str, text: str) -> None:
        check_job(job)
        self._run(["scontrol", "update", f"JobId={job}", f"Extra={one_line(text)}"])

    def cluster(self) -> str:
        return _cluster(_decoded(self._run(["scontrol", "ping", "--json"]), "its cluster"))

    def why_signalled(self, job: str, restarts: int) -> Cause:
        return cause(self.job(job), restarts)

    def _run(self, command: Sequence[str]) -> bytes:
        return run_command(command, timeout=self._timeout, environ=self._environ)


def run_command(command: Sequence[str], *, timeout: float, environ: Mapping[str, str] | None = None) -> bytes:
    """stdout of one of Slurm's commands. Raises UnknownJobError, SlurmError with what it complained of and a hint."""
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=_clean(os.environ if environ is None else environ),
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on the PATH", hint="install Slurm's client commands") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"`{shown}` did not end within {timeout:.0f} s", hint=explain("timed out")) from None
    except OSError as error:
        raise SlurmError(f"cannot run `{shown}`: {error.strerror}") from None
    complaint = done.stderr.decode(errors="replace").strip()
    if "Invalid job id" in complaint:
        raise UnknownJobError(f"`{shown}`: {complaint.splitlines()[-1]}", hint=explain(complaint))
    if done.returncode:
        last = (complaint or done.stdout.decode(errors="replace").strip()).splitlines()[-1:]
        what = last[0] if last else "no message"
        raise SlurmError(f"`{shown}` failed with exit code {done.returncode}: {what}", hint=explain(complaint))
    return done.stdout


def has_plugin(*, timeout: float = 30.0) -> bool:
    """Whether this machine's Slurm has loaded spank_hpccr: whether it knows its options. Raises SlurmError."""
    return b"--hpccr-checkpoint" in run_command(["sbatch", "--help"], timeout=timeout)


def check_job(job: str) -> None:
    """Raises SlurmError unless `job` looks like a job id or "ARRAYJOB_TASK": anything else scontrol reads as a list."""
    if not _JOB.fullmatch(job):
        raise SlurmError(f"{job!r} is not the id of a Slurm job", hint="`squeue --me` lists your jobs")


def one_line(text: str) -> str:
    """A text as a comment may be: one line, cut to COMMENT_LIMIT."""
    return " ".join(text.split()).encode()[:COMMENT_LIMIT].decode(errors="ignore")


def explain(complaint: str) -> str:
    """What to do about something that Slurm complains of; may be empty."""
    lower = complaint.lower()
    return next((hint for word, hint in _HINTS if word in lower), "")


def _clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Without the variables that change what the commands show or whom they ask (squeue(1), scontrol(1))."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(("SQUEUE_", "SCONTROL_")) and name not in ("SLURM_CLUSTERS", "SLURM_DEBUG")
    }


def _decoded(output: bytes, what: str) -> dict[str, Any]:
    try:
        # Slurm passes on what is not UTF-8 in the names of a job's script, directory and files.
        return msgspec.json.decode(output.decode(errors="replace"), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise _not_understood(what, error) from None


def _not_understood(what: str, error: Exception) -> SlurmError:
    return SlurmError(
        f"cannot understand what Slurm says of {what}: {type(error).__name__}: {error}",
        hint="is Slurm's JSON plugin (serializer/json) installed? `scontrol show job --json` must print JSON",
    )


def _jobs(output: bytes, what: str) -> list[JobInfo]:
    data = _decoded(output, what)
    try:
        jobs = data["jobs"]
        if not jobs and data.get("errors"):
            first = data["errors"][0]
            raise SlurmError(f"Slurm on {what}: {first.get('description') or first.get('error') or first}")
        return [_job(job, _cluster(data)) for job in jobs]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_understood(what, error) from None


def _job(job: dict[str, Any], cluster: str) -> JobInfo:
    array_job, array_task = _number(job.get("array_job_id")), _number(job.get("array_task_id"))
    nodes = job.get("nodes") or ""
    return JobInfo(
        job=str(job["job_id"]),
        array=f"{array_job:.0f}_{array_task:.0f}" if array_job and array_task is not None else None,
        cluster=job.get("cluster") or cluster,
        name=job.get("name") or "",
        user=job.get("user_name") or "",
        uid=int(job["user_id"]),
        partition=job.get("partition") or "",
        states=_words(job["job_state"]),
        reason=_text(job.get("state_reason")),
        restarts=int(_number(job.get("restart_cnt")) or 0),
        requeue=bool(_number(job.get("requeue"))),
        batch=bool(_number(job.get("batch_flag"))),
        comment=_text(job.get("comment")),
        nodes=tuple(expand(nodes)) if nodes else (),
        batch_node=job.get("batch_host") or "",
        start_time=_number(job.get("start_time")) or None,
        end_time=_number(job.get("end_time")) or None,
        preempt_time=_number(job.get("preempt_time")) or None,
    )


def _node(node: dict[str, Any]) -> NodeInfo:
    return NodeInfo(
        name=node["name"],
        states=_words(node["state"]),
        partitions=tuple(node.get("partitions") or ()),
        reason=node.get("reason") or "",
        boot_time=_number(node.get("boot_time")) or None,
        reason_time=_number(node.get("reason_changed_at")) or None,
    )


def _number(value: Any) -> float | None:
    """A number in any of the shapes Slurm's JSON has had: plain, or {"set", "infinite", "number"}."""
    if isinstance(value, dict):
        return float(value["number"]) if value.get("set") and not value.get("infinite") else None
    return None if value is None else float(value)


def _words(value: Any) -> frozenset[str]:
    """Flags: a list of words since 23.11, one word before."""
    return frozenset([value] if isinstance(value, str) else map(str, value))


def _text(value: Any) -> str:
    """A text; 23.02 wraps comments into {"job": ...}."""
    if isinstance(value, dict):
        value = value.get("job")
    return str(value or "")


def _cluster(data: dict[str, Any]) -> str:
    slurm = data.get("meta", {}).get("slurm") or data.get("meta", {}).get("Slurm") or {}
    return str(slurm.get("cluster") or "")
