"""What the coordinator needs of the place it runs in: a Slurm job, or one machine without Slurm."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from hpccr.errors import HpccrError, UnsupportedError
from hpccr.slurm.env import Allocation
from hpccr.slurm.nodes import USUAL_MTBF, FailureRate, estimate_mtbf
from hpccr.slurm.query import WAITING, JobInfo, JobQuery
from hpccr.slurm.steps import agent_step_command, agent_step_environment

COMMENT = "hpccr: "
"""How a job's Comment begins that is ours."""


class Site:
    """One machine without Slurm. Methods may block; all but step_command are called in a thread."""

    def __init__(self, nodes: tuple[str, ...]) -> None:
        """nodes: where capsules may go; the first is this one."""
        self.nodes = nodes
        self.known_end: float | None = None
        """When the time limit was to end the job when this run began."""

    def step_command(self, nodes: Sequence[str], argv: Sequence[str]) -> list[str]:
        """The command that runs argv once on each of the nodes. Raises HpccrError."""
        raise HpccrError(f"no way to start agents on {', '.join(nodes)}", hint="run inside a Slurm job")

    def step_environment(self) -> dict[str, str]:
        """The environment for that command."""
        return dict(os.environ)

    def why_signalled(self) -> str:
        """Why this job got SIGTERM: a hpccr.slurm.query.Cause. Raises HpccrError."""
        return "unknown"  # nobody ends what does not end by it

    def end_time(self) -> float | None:
        """When the job's time limit ends it, seconds since the epoch; None: never. Raises HpccrError."""
        return None

    def failure_rate(self) -> FailureRate:
        """How often a node like these fails. Raises HpccrError."""
        return FailureRate(USUAL_MTBF, "what is usual for a node")

    def at_work(self) -> None:
        """Tell those who look that the job is being looked after from now on. Raises HpccrError."""

    def show(self, text: str) -> None:
        """Show users a line on the job's state, where they look at jobs. Raises HpccrError."""

    def check_requeue(self) -> None:
        """Raises HpccrError if requeue() could not work."""

    def ensure_requeued(self) -> None:
        """Put the job back into the queue, unless it is on its way there: it will be killed and started again. Raises
        UnsupportedError if Slurm may not do that, another HpccrError if asking again may help."""

    def move(self) -> None:
        """Requeue a job whose allocation is of no use any more. Raises HpccrError."""
        raise UnsupportedError("there are no other nodes to move to")

    def must_stay(self) -> bool:
        """Whether ending now would let a batch script run on after its job was checkpointed to be requeued."""
        return False


class SlurmSite(Site):
    """Inside a Slurm job."""

    def __init__(self, allocation: Allocation, query: JobQuery, here: str, *, quick: JobQuery) -> None:
        """here: this node's name; quick: for a question that has to be answered in seconds. Raises UnsupportedError if
        this node is not one of the allocation."""
        if here not in allocation.nodes:
            raise UnsupportedError(
                f"this process runs on {here}, which is not a node of job {allocation.job}",
                hint="call `hpccr run` in the batch script, or under `srun --pty` in an salloc",
            )
        super().__init__((here, *(node for node in allocation.nodes if node != here)))
        self.known_end = allocation.end_time
        self._allocation = allocation
        self._query = query
        self._quick = quick

    def step_command(self, nodes: Sequence[str], argv: Sequence[str]) -> list[str]:
        return agent_step_command(nodes, argv)

    def step_environment(self) -> dict[str, str]:
        return agent_step_environment(os.environ)

    def why_signalled(self) -> str:
        return self._quick.why_signalled(self._allocation.job, self._allocation.restarts)

    def end_time(self) -> float | None:
        info = self._query.job(self._allocation.job)
        # A job that is cancelled has this moment for its end, and must not be saved from it; one that is no batch job
        # cannot be requeued, so a checkpoint before its end would only take time from it.
        return info.end_time if info.batch and "COMPLETING" not in info.states else None

    def failure_rate(self) -> FailureRate:
        return estimate_mtbf(self._query.nodes(), time.time())

    def at_work(self) -> None:
        info = self._query.job(self._allocation.job)
        if info.comment == WAITING:
            self._query.set_comment(info.only, COMMENT + "no checkpoint yet")

    def show(self, text: str) -> None:
        # Users have a comment of their own: that one stays.
        info = self._query.job(self._allocation.job)
        if not info.comment or info.comment.startswith(COMMENT):
            self._query.set_comment(info.only, COMMENT + text)
            return
        extra = self._query.extra_text(info.only)
        if not extra or extra.startswith(COMMENT):
            self._query.set_extra_text(info.only, COMMENT + text)

    def check_requeue(self) -> None:
        check_requeue(self._query.job(self._allocation.job))

    def ensure_requeued(self) -> None:
        # In a GraceTime Slurm would requeue it later. A batch script that ends before is requeued as well, but counts:
        # the sixth such end holds the job (MaxBatchRequeue). And somebody is waiting for the nodes.
        info = self._query.job(self._allocation.job)
        if info.running and info.restarts == self._allocation.restarts:
            check_requeue(info)
            self._query.requeue(info.only)

    def move(self) -> None:
        self.ensure_requeued()  # unless Slurm has noticed by itself that a node is gone

    def must_stay(self) -> bool:
        # When our parent is Slurm itself we are the batch script: our end is the job's, as a requeue wants it.
        try:
            return not Path(f"/proc/{os.getppid()}/comm").read_text().startswith("slurmstepd")
        except OSError:
            return False


def check_requeue(info: JobInfo) -> None:
    """Raises UnsupportedError if Slurm would not requeue the job."""
    if not info.batch:
        raise UnsupportedError(
            f"job {info.job} is interactive, and Slurm requeues batch jobs only",
            hint="`hpccr checkpoint` saves it; `hpccr restore` goes on from there in another job",
        )
    if not info.requeue:
        raise UnsupportedError(
            f"job {info.job} may not be requeued",
            hint=f"submit it with `#SBATCH --requeue`, or now: scontrol update jobid={info.only} Requeue=1",
        )
