"""The site's configuration of Slurm and of Open MPI, for N nodes that share one small machine."""

from __future__ import annotations

from plugin_layer import PLUGSTACK

# More than this machine has (slurmd is told to believe it), so that a job of 8 ranks starts anywhere.
CPUS = 8
MEMORY_MB = 16000


def files(cluster: str, compute: list[str]) -> dict[str, str]:
    """Path below /etc -> content."""
    return {
        "slurm/slurm.conf": _slurm_conf(cluster, compute),
        "slurm/cgroup.conf": _CGROUP_CONF,
        "slurm/plugstack.conf": "include /etc/slurm/plugstack.conf.d/*.conf\n",
        "slurm/plugstack.conf.d/hpccr.conf": PLUGSTACK,
        "openmpi/openmpi-mca-params.conf": _OPENMPI_CONF,
        "openmpi/prte-mca-params.conf": _PRTE_CONF,
    }


def _slurm_conf(cluster: str, compute: list[str]) -> str:
    nodes = f"node[1-{len(compute)}]" if len(compute) > 1 else compute[0]
    return f"""\
ClusterName={cluster}
SlurmctldHost=ctl
SlurmUser=slurm
AuthType=auth/munge
# A requeued job waits for its old credential to expire: 24.11 sets its begin time to now + cred_expire + 1, and
# takes nothing below 5 (src/interfaces/cred.c, src/slurmctld/job_mgr.c).
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
# Whole nodes, as most sites that run MPI give them: -N2 -n8 is 4 + 4. Several jobs may still share one (OverSubscribe).
SelectType=select/linear
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=30
Epilog=/src/hpccr/noded/dist/epilog
MailProg=/src/tests/testbed/mail
InactiveLimit=0
# Long tests look at jobs that ended long before.
MinJobAge=7200
# Node failures are to be noticed while a test waits for them.
SlurmdTimeout=10
MessageTimeout=5
SlurmctldTimeout=30
SchedulerType=sched/backfill
# Jobs of `urgent`, which take whole nodes, preempt those of `low` and, after a notice of 20 s, those of `grace`.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,bf_continue
PriorityType=priority/basic
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=/var/log/slurm/jobcomp.log
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
NodeName={nodes} CPUs={CPUS} RealMemory={MEMORY_MB} State=UNKNOWN
PartitionName=DEFAULT Nodes={nodes} MaxTime=INFINITE State=UP
PartitionName=main Default=YES OverSubscribe=FORCE:64 PriorityTier=2 PreemptMode=OFF
PartitionName=low OverSubscribe=FORCE:64 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace OverSubscribe=FORCE:64 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent OverSubscribe=EXCLUSIVE PriorityTier=3 PreemptMode=OFF
"""


_CGROUP_CONF = """\
# Version 2 refuses a machine where only version 1 has controllers.
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainCores=no
ConstrainDevices=no
ConstrainRAMSpace=no
ConstrainSwapSpace=no
"""

_OPENMPI_CONF = """\
# More ranks than processors: one that waits sleeps for a moment. sched_yield(), which Open MPI does by itself, is not
# enough: kernels without the changes of early 2026 to EEVDF ("sched/fair: Fix zero_vruntime tracking") may give nobody
# else a processor for a minute while some tasks do nothing but yield.
mpi_yield_when_idle = 1
threads_pthreads_yield_strategy = nanosleep
"""

_PRTE_CONF = """\
# Slurm is told of more CPUs than there are, and PRRTE refuses to bind to those.
hwloc_default_binding_policy = none
"""
