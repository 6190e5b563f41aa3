"""JobQuery by pyslurm, where a site has it: no process per question. Imported only when it is about to be used.

pyslurm is compiled against one release of Slurm and shares its memory layouts: matching() says whether it may be
loaded at all. A call blocks the whole process, for as long as Slurm's own timeouts say; so it serves the commands that
people wait for, and the coordinator, which has peers to answer, asks by commands.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from typing import Any

from hpccr.slurm.commands import CommandQuery, check_job, explain, one_line, run_command
from hpccr.slurm.hostlist import expand
from hpccr.slurm.nodes import NodeInfo
from hpccr.slurm.query import Cause, JobInfo, SlurmError, UnknownJobError, cause

_BASE = frozenset({"PENDING", "RUNNING", "SUSPENDED", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL"})
"""States that are the whole truth. Where there is a flag, pyslurm shows that alone (COMPLETING) and hides the state."""
_INVALID_JOB_ID = 2017
"""ESLURM_INVALID_JOB_ID of slurm/slurm_errno.h."""


def matching(*, timeout: float = 10.0) -> str:
    """Why pyslurm cannot be used here; empty if it can. Does not import it."""
    if importlib.util.find_spec("pyslurm") is None:
        return "pyslurm is not installed"
    try:
        built = _release(importlib.metadata.version("pyslurm"))
        running = _release(run_command(["scontrol", "--version"], timeout=timeout).decode())
    except (importlib.metadata.PackageNotFoundError, SlurmError) as error:
        return f"pyslurm's or Slurm's version is not known: {error}"
    return "" if built == running else f"pyslurm is for Slurm {built}, and this is Slurm {running}"


def _release(text: str) -> str:
    """The major release in a version: "slurm-wlm 24.11.5" -> "24.11"."""
    match = re.search(r"(\d+)\.(\d+)", text)
    return f"{int(match[1])}.{int(match[2]):02}" if match else text


class PyslurmQuery:
    """JobQuery over pyslurm. What pyslurm does not tell is asked by commands. timeout: seconds for those."""

    def __init__(self, *, timeout: float = 30.0) -> None:
        import pyslurm

        self._slurm: Any = pyslurm
        self._commands = CommandQuery(timeout=timeout)

    def job(self, job: str) -> JobInfo:
        check_job(job)
        if not job.isdecimal():
            return self._commands.job(job)
        found = self._call(f"job {job}", lambda: self._slurm.Job.load(int(job)))
        # The id of an array brings one of its tasks.
        if found.id != int(job) or found.state not in _BASE:
            return self._commands.job(job)
        return _job(found)

    def jobs(self, user: str) -> list[JobInfo]:
        loaded = self._call(f"jobs of {user}", self._slurm.Jobs.load)
        own = [found for found in loaded.values() if found.user_name == user]
        if any(found.state not in _BASE for found in own):
            return self._commands.jobs(user)
        # squeue's choice: what is not over yet.
        active = [found for found in own if found.state in ("PENDING", "RUNNING", "SUSPENDED")]
        return sorted(map(_job, active), key=lambda info: int(info.job))

    def nodes(self) -> list[NodeInfo]:
        loaded = self._call("its nodes", self._slurm.Nodes.load)
        return [_node(node) for node in loaded.values()]

    def requeue(self, job: str) -> None:
        self._act(job, lambda target: target.requeue())

    def start_now(self, job: str) -> None:
        self._act(job, lambda target: target.modify(self._slurm.JobSubmitDescription(begin_time="now")))

    def set_comment(self, job: str, text: str) -> None:
        self._act(job, lambda target: target.modify(self._slurm.JobSubmitDescription(comment=one_line(text))))

    def extra_text(self, job: str) -> str:
        return self._commands.extra_text(job)

    def set_extra_text(self, job: str, text: str) -> None:
        self._commands.set_extra_text(job, text)

    def cluster(self) -> str:
        return self._commands.cluster()

    def why_signalled(self, job: str, restarts: int) -> Cause:
        return cause(self.job(job), restarts)

    def _act(self, job: str, act: Any) -> None:
        check_job(job)
        if not job.isdecimal():
            job = self.job(job).job
        self._call(f"job {job}", lambda: act(self._slurm.Job(int(job))))

    def _call(self, what: str, ask: Any) -> Any:
        try:
            return ask()
        except self._slurm.RPCError as error:
            text = f"Slurm on {what}: {error}"
            if error.errno == _INVALID_JOB_ID:
                raise UnknownJobError(text, hint=explain("invalid job id")) from None
            raise SlurmError(text, hint=explain(str(error))) from None


def _job(job: Any) -> JobInfo:
    array = f"{job.array_id}_{job.array_task_id}" if job.array_id and job.array_task_id is not None else None
    nodes = job.allocated_nodes or ""
    return JobInfo(
        job=str(job.id),
        array=array,
        cluster=job.cluster or "",
        name=job.name or "",
        user=job.user_name or "",
        uid=int(job.user_id),
        partition=job.partition or "",
        states=frozenset({job.state}),
        reason=job.state_reason or "",
        restarts=int(job.requeue_count or 0),
        requeue=bool(job.is_requeueable),
        batch=True,  # it does not say; who wants to know is the coordinator, which asks by commands
        comment=job.comment or "",
        nodes=tuple(expand(nodes)) if nodes else (),
        batch_node=job.batch_host or "",
        start_time=_time(job.start_time),
        end_time=_time(job.end_time),
        preempt_time=_time(job.preempt_time),
    )


def _node(node: Any) -> NodeInfo:
    return NodeInfo(
        name=node.name,
        states=frozenset(node.state.split("+")),
        partitions=tuple(node.partitions or ()),
        reason=node.reason or "",
        boot_time=_time(node.boot_time),
        reason_time=_time(node.reason_time),
    )


def _time(value: Any) -> float | None:
    return float(value) if value else None
