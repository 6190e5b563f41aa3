"""The command that starts one helper process per node inside a running job.

How srun and the helpers fare when the job is signalled, and so how the command must be started, is in
docs/internals/slurm.md (measured).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpccr.slurm.hostlist import compress

# Options of a step come from these variables too (srun(1), "INPUT ENVIRONMENT VARIABLES"): what the user set for his
# own steps, or what sbatch set for the job (tasks, memory, GPUs ...), would contradict the command line below.
_KEEP = frozenset({"SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_CLUSTER_NAME"})


def agent_step_command(nodes: Sequence[str], argv: Sequence[str]) -> list[str]:
    """An srun command that runs `argv` once on each of `nodes`, beside whatever else the job runs there.

    The step takes no CPUs, memory or GPUs from the job, outlives the loss of a node, and one helper's end ends no
    other. Start it with agent_step_environment(), in a session of its own, stdin from /dev/null and its output going
    to a file or a pipe that is read: srun must get no signal, as it kills its step on SIGTERM and SIGHUP.
    """
    return [
        "srun",
        "--quiet",
        "--overlap",
        f"--nodes={len(nodes)}",
        f"--nodelist={compress(nodes)}",
        f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--mem=0",
        "--cpu-bind=none",
        "--mem-bind=none",
        "--gres=none",
        "--mpi=none",
        "--input=none",
        "--export=ALL",
        "--immediate=60",
        "--no-kill",
        "--wait=0",
        "--kill-on-bad-exit=0",
        "--job-name=hpccr-agent",
        *argv,
    ]


def probe_job_command(node: str, partition: str, argv: Sequence[str], *, patience: int) -> list[str]:
    """An srun command that runs `argv` once on `node` in a small job of its own, if that can start in `patience` s."""
    return [
        "srun",
        "--quiet",
        "--job-name=hpccr-doctor",
        "--nodes=1",
        f"--nodelist={node}",
        f"--partition={partition}",
        "--ntasks=1",
        "--cpus-per-task=1",
        "--mem=256M",
        "--time=5",
        f"--immediate={patience}",
        "--mpi=none",
        "--input=none",
        "--export=ALL",
        *argv,
    ]


def agent_step_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for that command: `environ` without the variables that srun takes options from."""
    return {
        name: value
        for name, value in environ.items()
        if name in _KEEP or not name.startswith(("SLURM_", "SRUN_", "SLURMD_", "PMI_", "PMIX_"))
    }
