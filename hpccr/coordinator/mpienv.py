"""The environment of the job inside its capsules: how MPI starts its ranks there and what they talk over.

Three things are settled here for MPICH (Hydra; UCX and libfabric), Open MPI 5 (PRRTE) and 4 (ORTE) and Intel MPI:
- launcher: hpccr-rsh instead of srun or ssh, since what runs outside the capsules would not be part of a checkpoint;
- nodes: Slurm's node list in the names of the capsules, so that a bare `mpirun ./app` starts the same tasks as ever;
- transport: TCP on the capsule network and shared memory. Everything else holds state in hardware or (CMA: permission
  by PR_SET_PTRACER) in the kernel that cannot be restored.

What the user has set stays; where it cannot be checkpointed, or keeps the ranks from starting, there is a warning.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpccr.slurm.hostlist import compress, compress_tasks

DEVICE = "hpc0"
"""The capsule network's device in every capsule. MPI must not use the uplink: its addresses change with the node."""
RSH = str(Path(__file__).resolve().parents[1] / "capsule" / "hpccr-rsh")
RSH_PORT = 8474
"""Port of the launch roots on the capsule network (capsule.link.DEFAULT_PORT)."""

SHIMS = str(Path(__file__).resolve().parents[1] / "capsule" / "bin")
"""Commands of Slurm's that are something else inside a capsule."""

INSIDE = "HPCCR_CAPSULE"
"""Variable with the index of the capsule whose launch root a process was started by; see inside()."""
OWN = "HPCCR_OWN"
"""Variable with the names of those that are set here: void for a job that is submitted from inside a capsule."""

SECRET_VARIABLE = "HPCCR_STEP_SECRET"  # noqa: S105 - the name of a variable

UCX_TRANSPORTS = frozenset({"tcp", "posix", "sysv", "self", "mm"})
"""Not `sm` and `shm`: CMA is among them."""
OMPI_TRANSPORTS = frozenset({"tcp", "sm", "vader", "self"})
OMPI_EXCLUDED = ("openib", "uct", "ofi", "usnic", "ugni", "portals4")
TCP_PROVIDERS = frozenset({"tcp", "sockets", "ofi_rxm", "shm"})
BY_SLURM = "slurm"
"""What sbatch itself sets the launchers to; nobody's wish, since srun cannot reach into a capsule."""

Verdict = Callable[[str], bool]


@dataclass(frozen=True)
class Setting:
    """A variable we set unless the user has set it (or one of `aliases`, which mean the same).

    fits: whether a value of the user's will do; None: any will, it is a matter of taste. why: ends the warning.
    replaced: values that are Slurm's doing.
    """

    name: str
    value: str
    fits: Verdict | None = None
    why: str = ""
    aliases: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


REMOVED = (
    "HYDRA_BOOTSTRAP",
    "HYDRA_BOOTSTRAP_EXEC",
    "HYDRA_LAUNCHER_EXTRA_ARGS",
    "HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS",
    "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS",
    "OMPI_MCA_plm_slurm_args",
    "PRTE_MCA_plm_slurm_args",
)
"""Arguments and choices for starting by srun, set by sbatch and salloc; void with another launcher."""

OF_OUTER_STEP = re.compile(r"^(PMI_|PMI2_|PMIX_(?!MCA_)|SLURM_STEP_|SLURM_STEPID$|SLURM_TASK_PID$|SLURM_SRUN_)")
"""What an srun around `hpccr run` says to its own task: a rank inside would take itself for that task."""

TEMPORARY = ("TMPDIR", "TMP", "TEMP")
"""Where programs put temporary files; only the first is set where it was not."""

HOST_NAMES = ("SLURMD_NODENAME", "SLURM_TOPOLOGY_ADDR", "HOSTNAME", "HOST")


def capsule_environment(
    environ: Mapping[str, str],
    *,
    capsules: int,
    tasks_per_capsule: Sequence[int],
    subnet: str,
    secret: str,
    device: str = DEVICE,
    rsh: str = RSH,
    rsh_port: int = RSH_PORT,
    python: str = sys.executable,
    shims: str = SHIMS,
    private: Sequence[str] = ("/tmp",),  # noqa: S108 - private to the capsule
) -> tuple[dict[str, str], list[str]]:
    """The environment of the user's command in capsule 0, made from the one `hpccr run` was given, and warnings.

    tasks_per_capsule: as Slurm granted them, in capsule order. subnet: of the capsule network, in CIDR notation.
    device: its device; "": the capsule uses the node's own network, and no interface is chosen. rsh: absolute path of
    hpccr-rsh, rsh_port: where the launch roots listen; python: the interpreter that runs it. secret: of the step.
    shims: directory that comes first on the PATH. private: directories that each capsule has for itself (config).
    Raises ValueError if tasks_per_capsule does not fit capsules.
    """
    if len(tasks_per_capsule) != capsules:
        raise ValueError(f"{len(tasks_per_capsule)} task counts for {capsules} capsules")
    result = {name: value for name, value in environ.items() if not OF_OUTER_STEP.match(name)}
    warnings: list[str] = []
    _rename_nodes(result, tasks_per_capsule)
    _move_temporary(result, private, warnings)
    launchers = _launchers(rsh, several=capsules > 1)
    for setting in [*launchers, *_transports(), *(_interfaces(device, subnet) if device else [])]:
        _apply(setting, result, warnings)
    for name in REMOVED:
        if name in result and (name.endswith(("ARGS", "args")) or result[name] == BY_SLURM):
            del result[name]
    result[SECRET_VARIABLE] = secret
    result["HPCCR_PYTHON"] = python
    result["HPCCR_RSH_PORT"] = str(rsh_port)
    result[INSIDE] = "0"
    changed = (name for name, value in result.items() if environ.get(name) != value)
    result[OWN] = " ".join(sorted(name for name in changed if not name.startswith("SLURM")))
    if "PATH" in result:
        result["PATH"] = f"{shims}:{result['PATH']}"
    return result, warnings


def inside(environ: Mapping[str, str]) -> bool:
    """Whether this process is in a capsule.

    The variable alone does not tell: sbatch takes it along into other jobs. Nor does its value, which mpirun carries
    from its own capsule to the ranks in all of them.
    """
    return bool(environ.get(INSIDE)) and re.fullmatch(r"hpccr-[0-9]+", os.uname().nodename) is not None


def _apply(setting: Setting, result: dict[str, str], warnings: list[str]) -> None:
    for name in (setting.name, *setting.aliases):
        value = result.get(name, "")
        if not value or value in setting.replaced:
            continue
        if setting.fits is not None and not setting.fits(value):
            warnings.append(f"{name}={value} is kept as you set it, but {setting.why} (hpccr: {setting.value})")
        return
    result[setting.name] = setting.value


def _rename_nodes(result: dict[str, str], tasks: Sequence[int]) -> None:
    """Slurm's description of the allocation in terms of capsules; only where there is one."""
    for name in HOST_NAMES:
        if name in result:
            result[name] = "hpccr-0"
    if "SLURM_JOB_ID" not in result and "SLURM_JOBID" not in result:
        return
    nodes = compress(f"hpccr-{index}" for index in range(len(tasks)))
    result |= {
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_NODELIST": nodes,
        "SLURM_JOB_NUM_NODES": str(len(tasks)),
        "SLURM_NNODES": str(len(tasks)),
        "SLURM_TASKS_PER_NODE": compress_tasks(tasks),
        "SLURM_NODEID": "0",
    }


def _move_temporary(result: dict[str, str], private: Sequence[str], warnings: list[str]) -> None:
    """Temporary files go where a checkpoint saves them. What a site or sbatch's caller has set is another node's after
    a restart, and a directory in a private place is not there at first."""
    if not private:
        return
    for name in TEMPORARY:
        value = result.get(name, "")
        if value in private or (not value and name != "TMPDIR"):
            continue
        if value:
            warnings.append(
                f"{name}={value} becomes {private[0]}, saved with each checkpoint (set it in the script to keep it)"
            )
        result[name] = private[0]


def _launchers(rsh: str, *, several: bool) -> list[Setting]:
    lost = "the ranks it starts would be outside the capsules and not be checkpointed"
    # With one capsule nothing is launched; and ssh and rsh are in there, beside srun.
    fits: Verdict = lambda value: not several or value in (rsh, "ssh", "rsh")  # noqa: E731
    return [
        Setting("HYDRA_LAUNCHER", "rsh", _among({"ssh", "rsh"}, several), lost, ("HYDRA_BOOTSTRAP",), (BY_SLURM,)),
        Setting("HYDRA_LAUNCHER_EXEC", rsh, fits, lost, ("HYDRA_BOOTSTRAP_EXEC",)),
        Setting("PRTE_MCA_plm", "ssh", _among({"ssh", "rsh"}, several), lost, (), (BY_SLURM,)),
        Setting("PRTE_MCA_plm_ssh_agent", rsh, fits, lost),
        Setting("OMPI_MCA_plm", "rsh", _among({"ssh", "rsh"}, several), lost, (), (BY_SLURM,)),
        Setting("OMPI_MCA_plm_rsh_agent", rsh, fits, lost),
        Setting("I_MPI_HYDRA_BOOTSTRAP", "rsh", _among({"ssh", "rsh"}, several), lost, (), (BY_SLURM,)),
        Setting("I_MPI_HYDRA_BOOTSTRAP_EXEC", rsh, fits, lost),
    ]


def _transports() -> list[Setting]:
    hardware = "a job that uses such a device cannot be checkpointed"
    attached = "the permission for reading another process's memory this way is lost at a restart"
    short = "connections would be given up during a longer checkpoint"
    return [
        # UCX (MPICH ch4:ucx, Open MPI's pml ucx); its keepalive alone gives up after 28 s
        Setting("UCX_TLS", "tcp,posix,sysv,self", _selection(UCX_TRANSPORTS, ()), hardware),
        Setting("UCX_TCP_KEEPIDLE", "inf", _among({"inf"}, True), short),
        Setting("UCX_KEEPALIVE_INTERVAL", "inf", _among({"inf"}, True), short),
        # PRRTE's and ORTE's daemons: 300 s idle and 9 probes of 20 s unless turned off
        Setting("PRTE_MCA_oob_tcp_keepalive_time", "0", _among({"0"}, True), short),
        Setting("OMPI_MCA_oob_tcp_keepalive_time", "0", _among({"0"}, True), short),
        # libfabric (MPICH ch4:ofi, Intel MPI, Open MPI's mtl ofi)
        Setting("FI_PROVIDER", "tcp", _selection(TCP_PROVIDERS, ()), hardware),
        Setting("FI_SHM_DISABLE_CMA", "1", _among({"1", "y", "yes", "true"}, True), attached),
        Setting("I_MPI_FABRICS", "shm:ofi", _among({"shm", "ofi", "shm:ofi"}, True), hardware),
        Setting("I_MPI_OFI_PROVIDER", "tcp", _selection(TCP_PROVIDERS, ()), hardware),
        Setting("MPIR_CVAR_CH4_XPMEM_ENABLE", "0", _among({"0", "no", "false"}, True), attached),
        Setting("MPIR_CVAR_CH4_CMA_ENABLE", "0", _among({"0", "no", "false"}, True), attached),
        # Intel MPI; by its inner name, since it complains of I_MPI_ variables that a release does not know
        Setting(
            "MPIR_CVAR_INTEL_SHM_CMA", "0", _among({"0", "no", "off", "disable"}, True), attached, ("I_MPI_SHM_CMA",)
        ),
        # Open MPI: exclusions, because the name of the shared-memory component differs between 4 (vader) and 5 (sm)
        Setting("OMPI_MCA_pml", "ob1", _among({"ob1"}, True), hardware),
        Setting("OMPI_MCA_btl", "^" + ",".join(OMPI_EXCLUDED), _selection(OMPI_TRANSPORTS, OMPI_EXCLUDED), hardware),
        Setting("OMPI_MCA_osc", "^ucx,portals4", _selection(frozenset({"sm", "rdma", "pt2pt"}), ("ucx",)), hardware),
        Setting("OMPI_MCA_coll", "^hcoll,ucc", None),
        Setting("OMPI_MCA_smsc", "^cma,knem,xpmem", _selection(frozenset(), ("cma", "knem", "xpmem")), attached),
        Setting("OMPI_MCA_btl_vader_single_copy_mechanism", "none", _among({"none"}, True), attached),
        # The daemons' session directories hold mapped files, which must be in a directory that is saved.
        Setting("PRTE_MCA_prte_tmpdir_base", "/tmp"),  # noqa: S108 - private to the capsule
        Setting("OMPI_MCA_orte_tmpdir_base", "/tmp"),  # noqa: S108
    ]


def _interfaces(device: str, subnet: str) -> list[Setting]:
    stays = "only the capsule network has the same addresses after a restart"
    own = _among({device, subnet}, True)
    return [
        Setting("UCX_NET_DEVICES", device, own, stays),
        Setting("FI_TCP_IFACE", device, own, stays),
        Setting("FI_SOCKETS_IFACE", device, own, stays),
        Setting("HYDRA_IFACE", device, own, stays),
        Setting("I_MPI_HYDRA_IFACE", device, own, stays),
        Setting("OMPI_MCA_btl_tcp_if_include", device, own, stays, ("OMPI_MCA_btl_tcp_if_exclude",)),
        Setting("OMPI_MCA_oob_tcp_if_include", device, own, stays, ("OMPI_MCA_oob_tcp_if_exclude",)),
        Setting("PRTE_MCA_prte_if_include", device, own, stays, ("PRTE_MCA_prte_if_exclude",)),
        Setting("PMIX_MCA_ptl_tcp_if_include", device, own, stays, ("PMIX_MCA_ptl_tcp_if_exclude",)),
    ]


def _among(values: set[str], matters: bool) -> Verdict:
    return lambda value: not matters or value.lower() in values


def _selection(allowed: frozenset[str], excluded: Sequence[str]) -> Verdict:
    """For comma-separated lists, `^` in front meaning "all but": only allowed words, or all of `excluded` left out."""

    def fits(value: str) -> bool:
        words = {word.strip() for word in re.split(r"[,;]", value.lstrip("^"))}
        if value.startswith("^"):
            return bool(excluded) and words >= set(excluded)
        return words <= allowed

    return fits
