"""Asking Slurm about jobs and telling it what to do with them: one interface, whatever is behind it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, Protocol

from hpccr.errors import HpccrError
from hpccr.slurm.nodes import NodeInfo

log = logging.getLogger(__name__)

Cause = Literal["requeue", "preempted", "cancelled", "timeout", "node_fail", "unknown"]


WAITING = "hpccr: waiting to start"
"""The Comment of a job that asked for checkpoints, until `hpccr run` is at work in it (slurm_plugin/submit.c)."""


class SlurmError(HpccrError):
    """Slurm does not answer or refuses what was asked."""


class UnknownJobError(SlurmError):
    """Slurm knows no such job (any more)."""


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """What Slurm says of one job now.

    job: the job id; array: "ARRAYJOB_TASK" for a task of an array. states: e.g. {"PENDING", "COMPLETING"}.
    restarts: how often it has been requeued, this time included. nodes: of the current or last run; empty if pending.
    Times in seconds since the epoch, None where Slurm has none. preempt_time: of the preemption under way.
    requeue: Slurm may requeue it (after a node failure, and at all), if it is a batch job (batch), and not salloc's.
    """

    job: str
    array: str | None
    cluster: str
    name: str
    user: str
    uid: int
    partition: str
    states: frozenset[str]
    reason: str
    restarts: int
    requeue: bool
    batch: bool
    comment: str
    nodes: tuple[str, ...]
    batch_node: str
    start_time: float | None
    end_time: float | None
    preempt_time: float | None

    @property
    def only(self) -> str:
        """What to call it where something is done to it: by the job id of the task of an array that started last, which
        is the array's, Slurm understands all of its tasks."""
        return self.array or self.job

    @property
    def running(self) -> bool:
        return "RUNNING" in self.states and "COMPLETING" not in self.states


class JobQuery(Protocol):
    """Slurm, as far as hpccr needs it.

    Every method blocks until Slurm answers or a timeout is over (see job_query) and raises SlurmError with a hint
    when Slurm does not answer or refuses; UnknownJobError when it knows no such job. What changes a job, or reads its
    Extra, wants JobInfo.only.
    """

    def job(self, job: str) -> JobInfo:
        """One job by its id, or a task of an array as "ARRAYJOB_TASK"."""

    def jobs(self, user: str) -> list[JobInfo]:
        """All pending, running and completing jobs of a user, by job id."""

    def nodes(self) -> list[NodeInfo]:
        """All nodes of the cluster, in Slurm's order."""

    def requeue(self, job: str) -> None:
        """Kill the job and put it back into the queue, to start under the same id. Only owner and administrator may.

        Slurm holds it back for a while (BeginTime) unless start_now() is called once it is pending.
        """

    def start_now(self, job: str) -> None:
        """Make a pending job eligible at once."""

    def set_comment(self, job: str, text: str) -> None:
        """Set the job's Comment (cut to 1024 bytes), which squeue and scontrol show and a requeue keeps."""

    def extra_text(self, job: str) -> str:
        """The job's Extra, a second text that scontrol shows and a requeue keeps."""

    def set_extra_text(self, job: str, text: str) -> None:
        """Set the job's Extra (cut to 1024 bytes)."""

    def cluster(self) -> str:
        """The name of the cluster that answers."""

    def why_signalled(self, job: str, restarts: int) -> Cause:
        """Why the processes of this run of the job got SIGTERM: cause() of what Slurm says now."""


def job_query(*, timeout: float = 30.0) -> JobQuery:
    """The way to talk to the Slurm of this machine: pyslurm where it fits it, else commands.

    timeout: seconds for each command; pyslurm's calls take as long as Slurm's own timeouts let them.
    """
    from hpccr.slurm.commands import CommandQuery
    from hpccr.slurm.library import PyslurmQuery, matching

    if not matching():
        try:
            return PyslurmQuery(timeout=timeout)
        except ImportError as error:
            # Of the right version, but libslurm is elsewhere, or it is for another Python.
            log.info("pyslurm is not used: %s", error)
    return CommandQuery(timeout=timeout)


def cause(info: JobInfo, restarts: int) -> Cause:
    """Why a job that has just got SIGTERM got it.

    restarts: SLURM_RESTART_COUNT of the run that asks (0 if unset). What Slurm shows at that moment was measured with
    24.11, see docs/internals/slurm.md. "unknown": nothing is going on that would end the job.
    """
    if info.states & {"TIMEOUT", "DEADLINE"}:
        return "timeout"
    if info.states & {"NODE_FAIL", "BOOT_FAIL"}:
        return "node_fail"
    if "PREEMPTED" in info.states:
        return "preempted"
    if "CANCELLED" in info.states:
        return "cancelled"
    if info.restarts > restarts or info.states & {"REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}:
        # The job is already on its way to its next run; these processes are what is left of this one. After the loss of
        # a node it looks the same: that a peer is gone is what the coordinator knows itself.
        return "preempted" if info.preempt_time else "requeue"
    if info.preempt_time and info.preempt_time >= (info.start_time or 0):
        # GraceTime: still running, with an end to come.
        return "preempted"
    return "unknown"
