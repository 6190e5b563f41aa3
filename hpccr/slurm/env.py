"""What a job's environment says about its allocation (sbatch(1), "OUTPUT ENVIRONMENT VARIABLES")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hpccr.errors import UnsupportedError, UsageError
from hpccr.slurm.hostlist import expand, expand_tasks


@dataclass(frozen=True)
class Allocation:
    """The allocation this process runs in.

    job: the job id, unique also for a task of an array. restarts: how often Slurm has requeued it (0 the first time);
    the first time it may be that of a requeued job which this one was submitted in.
    nodes: in Slurm's order; the batch script runs on the first. tasks: ranks per node (CPUs, where no number of tasks
    was asked for). start_time, end_time: of this run of the job, and when the time limit ends it, seconds since the
    epoch; None if Slurm did not say.
    this_node: the Slurm name of this node; None outside of the allocated nodes (salloc's shell on a login node).
    """

    cluster: str
    job: str
    restarts: int
    nodes: tuple[str, ...]
    tasks: tuple[int, ...]
    start_time: float | None
    end_time: float | None
    this_node: str | None
    user: str
    uid: int | None
    array: str | None
    """How squeue shows it, if it is a task of an array: "ARRAYJOB_TASK"."""

    @property
    def this_index(self) -> int | None:
        """Index of this node in `nodes`."""
        return self.nodes.index(self.this_node) if self.this_node in self.nodes else None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Allocation | None:
        """The allocation that the variables name; None outside of a job.

        Raises UsageError for variables that are not Slurm's, UnsupportedError for a heterogeneous job.
        """
        job = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID")
        node_list = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
        if not job or not node_list:
            return None
        if not job.isdecimal():
            raise UsageError(f"SLURM_JOB_ID={job!r} is not a job id")
        if int(environ.get("SLURM_HET_SIZE") or 1) > 1:
            raise UnsupportedError(
                f"job {job} is heterogeneous, which hpccr cannot checkpoint",
                hint="submit it without ':' and '#SBATCH hetjob' components",
            )
        nodes = expand(node_list)
        tasks = expand_tasks(environ.get("SLURM_TASKS_PER_NODE") or environ.get("SLURM_JOB_CPUS_PER_NODE") or "1")
        if len(tasks) < len(nodes):
            # Slurm sets the count of a single step's nodes in some contexts; the last one then stands for the rest.
            tasks += [tasks[-1]] * (len(nodes) - len(tasks))
        array = None
        if environ.get("SLURM_ARRAY_JOB_ID") and environ.get("SLURM_ARRAY_TASK_ID"):
            array = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
        return cls(
            cluster=environ.get("SLURM_CLUSTER_NAME") or "cluster",
            job=job,
            restarts=_number(environ, "SLURM_RESTART_COUNT") or 0,
            nodes=tuple(nodes),
            tasks=tuple(tasks[: len(nodes)]),
            start_time=_number(environ, "SLURM_JOB_START_TIME"),
            end_time=_number(environ, "SLURM_JOB_END_TIME"),
            this_node=environ.get("SLURMD_NODENAME") or None,
            user=environ.get("SLURM_JOB_USER", ""),
            uid=_number(environ, "SLURM_JOB_UID"),
            array=array,
        )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise UsageError(f"{name}={text!r} is not a number")
    return int(text)
