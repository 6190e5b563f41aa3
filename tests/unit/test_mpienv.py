"""The environment inside the capsules: every variable for a reason, the user's own kept."""

from __future__ import annotations

import os

import pytest

from hpccr.capsule import link
from hpccr.coordinator import mpienv
from hpccr.coordinator.mpienv import capsule_environment

# What Slurm 24.11 puts into a batch job of two nodes, as far as it matters here.
BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOBID": "77",
    "SLURM_JOB_NODELIST": "node[3,9]",
    "SLURM_NODELIST": "node[3,9]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_CPUS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "0",
    "SLURM_TASK_PID": "4711",
    "SLURMD_NODENAME": "node3",
    "HOSTNAME": "node3",
    "HYDRA_BOOTSTRAP": "slurm",
    "HYDRA_LAUNCHER_EXTRA_ARGS": "--external-launcher",
    "OMPI_MCA_plm_slurm_args": "--external-launcher",
    "PRTE_MCA_plm_slurm_args": "--external-launcher",
    "I_MPI_HYDRA_BOOTSTRAP": "slurm",
    "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS": "--external-launcher",
    "PATH": "/usr/bin",
}


def make(environ: dict[str, str], tasks: tuple[int, ...] = (2, 2), **options: str) -> tuple[dict[str, str], list[str]]:
    options = {"subnet": "10.90.0.0/16", "secret": "5e", "rsh": "/opt/rsh", "python": "/opt/python"} | options
    return capsule_environment(environ, capsules=len(tasks), tasks_per_capsule=tasks, **options)


def test_allocation_is_described_by_capsules() -> None:
    result, warnings = make(BATCH, (2, 2, 1))
    assert warnings == []
    assert result["SLURM_JOB_NODELIST"] == result["SLURM_NODELIST"] == "hpccr-[0-2]"
    assert result["SLURM_JOB_NUM_NODES"] == result["SLURM_NNODES"] == "3"
    assert result["SLURM_TASKS_PER_NODE"] == "2(x2),1"
    assert result["SLURMD_NODENAME"] == result["HOSTNAME"] == "hpccr-0"
    assert result["SLURM_JOB_ID"] == "77" and result["SLURM_NTASKS"] == "4"
    assert not any("node3" in value for value in result.values())


def test_one_capsule_is_a_host_list_too() -> None:
    assert make(BATCH, (4,))[0]["SLURM_NODELIST"] == "hpccr-0"


def test_what_sbatch_chose_for_srun_is_gone() -> None:
    result, _ = make(BATCH)
    assert not any(value in ("slurm", "--external-launcher") for value in result.values())
    assert result["HYDRA_LAUNCHER"] == result["I_MPI_HYDRA_BOOTSTRAP"] == result["OMPI_MCA_plm"] == "rsh"
    assert result["PRTE_MCA_plm"] == "ssh"
    for name in (
        "HYDRA_LAUNCHER_EXEC",
        "PRTE_MCA_plm_ssh_agent",
        "OMPI_MCA_plm_rsh_agent",
        "I_MPI_HYDRA_BOOTSTRAP_EXEC",
    ):
        assert result[name] == "/opt/rsh"


@pytest.mark.parametrize(
    ("given", "private", "expected", "told"),
    [
        ({}, ("/tmp",), {"TMPDIR": "/tmp"}, 0),
        ({"TMPDIR": "/tmp"}, ("/tmp",), {"TMPDIR": "/tmp"}, 0),
        ({"TMPDIR": "/scratch/77", "TMP": "/scratch/77"}, ("/tmp",), {"TMPDIR": "/tmp", "TMP": "/tmp"}, 2),
        ({"TMPDIR": "/var/tmp", "TEMP": "/x"}, ("/tmp", "/var/tmp"), {"TMPDIR": "/var/tmp", "TEMP": "/tmp"}, 1),
        ({"TMPDIR": "/tmp/job-77"}, ("/tmp",), {"TMPDIR": "/tmp"}, 1),
        ({"TMPDIR": "/scratch/77"}, (), {"TMPDIR": "/scratch/77"}, 0),
    ],
)
def test_temporary_files_go_where_they_are_saved(
    given: dict[str, str], private: tuple[str, ...], expected: dict[str, str], told: int
) -> None:
    result, warnings = capsule_environment(
        given, capsules=1, tasks_per_capsule=(1,), subnet="10.90.0.0/16", secret="5e", private=private
    )
    assert {name: result[name] for name in ("TMPDIR", "TMP", "TEMP") if name in result} == expected
    assert len(warnings) == told


def test_without_slurm_there_is_no_allocation() -> None:
    result, warnings = make({"PATH": "/usr/bin", "HOSTNAME": "laptop"}, (2,))
    assert warnings == []
    assert not any(name.startswith("SLURM") for name in result)
    assert result["HOSTNAME"] == "hpccr-0"


def test_an_outer_step_is_forgotten() -> None:
    outer = {
        "PMI_RANK": "0",
        "PMIX_RANK": "0",
        "PMIX_SERVER_URI41": "x",
        "SLURM_STEP_ID": "3",
        "SLURM_STEP_NODELIST": "n",
    }
    kept = {"PMIX_MCA_gds": "hash", "SLURM_STEPMGR": "n", "PMIXY": "1"}
    result, _ = make(BATCH | outer | kept)
    assert not outer.keys() & result.keys()
    assert kept.items() <= result.items()


def test_everything_else_stays_and_nothing_is_added_without_a_reason() -> None:
    result, _ = make({"A": "1", "EMPTY": ""}, (1,))
    assert result["A"] == "1" and result["EMPTY"] == ""
    families = (
        "HYDRA_",
        "I_MPI_",
        "OMPI_MCA_",
        "PRTE_MCA_",
        "PMIX_MCA_",
        "UCX_",
        "FI_",
        "MPIR_CVAR_",
        "HPCCR_",
        "TMPDIR",
    )
    assert all(name.startswith(families) for name in result.keys() - {"A", "EMPTY"})


def test_only_the_capsule_network_is_used() -> None:
    result, _ = make({}, (2,), device="net7")
    names = {name for name, value in result.items() if value == "net7"}
    assert names == {
        "UCX_NET_DEVICES",
        "FI_TCP_IFACE",
        "FI_SOCKETS_IFACE",
        "HYDRA_IFACE",
        "I_MPI_HYDRA_IFACE",
        "OMPI_MCA_btl_tcp_if_include",
        "OMPI_MCA_oob_tcp_if_include",
        "PRTE_MCA_prte_if_include",
        "PMIX_MCA_ptl_tcp_if_include",
    }


def test_the_nodes_own_network_has_no_device_to_choose() -> None:
    result, _ = make({}, (2,), device="")
    assert "UCX_NET_DEVICES" not in result and not any("if_include" in name for name in result)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("UCX_TLS", "tcp,self"),
        ("OMPI_MCA_btl", "self,vader,tcp"),
        ("OMPI_MCA_btl", "^ofi,uct,openib,usnic,ugni,portals4,smcuda"),
        ("OMPI_MCA_btl_tcp_if_include", "10.90.0.0/16"),
        ("FI_PROVIDER", "tcp;ofi_rxm"),
        ("I_MPI_FABRICS", "ofi"),
        ("HYDRA_LAUNCHER", "rsh"),
        ("OMPI_MCA_coll", "^sm"),
        ("OMPI_MCA_orte_tmpdir_base", "/scratch"),
        ("FI_SHM_DISABLE_CMA", "yes"),
        ("I_MPI_SHM_CMA", "0"),
    ],
)
def test_what_the_user_set_is_kept(name: str, value: str) -> None:
    result, warnings = make(BATCH | {name: value})
    assert result[name] == value
    assert warnings == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("UCX_TLS", "rc,sm,self"),
        ("UCX_TLS", "all"),
        ("UCX_TLS", "^tcp"),
        ("UCX_NET_DEVICES", "mlx5_0:1"),
        ("UCX_TCP_KEEPIDLE", "10s"),
        ("OMPI_MCA_pml", "ucx"),
        ("OMPI_MCA_btl", "^openib"),
        ("OMPI_MCA_btl", "tcp,openib,self"),
        ("OMPI_MCA_btl_tcp_if_include", "eth0"),
        ("OMPI_MCA_btl_tcp_if_exclude", "lo"),
        ("FI_PROVIDER", "verbs"),
        ("I_MPI_FABRICS", "shm:dapl"),
        ("HYDRA_LAUNCHER", "pbs"),
        ("HYDRA_BOOTSTRAP", "pbs"),
        ("HYDRA_LAUNCHER_EXEC", "/usr/bin/ssh"),
        ("PRTE_MCA_plm_ssh_agent", "/usr/bin/ssh"),
        ("MPIR_CVAR_CH4_CMA_ENABLE", "1"),
        ("MPIR_CVAR_CH4_XPMEM_ENABLE", "1"),
        ("OMPI_MCA_smsc", "cma"),
        ("I_MPI_SHM_CMA", "1"),
        ("FI_SHM_DISABLE_CMA", "0"),
    ],
)
def test_what_cannot_be_checkpointed_is_kept_with_a_warning(name: str, value: str) -> None:
    result, warnings = make(BATCH | {name: value})
    assert result[name] == value
    assert len(warnings) == 1 and f"{name}={value}" in warnings[0]


def test_exclusion_by_the_user_is_not_joined_by_an_inclusion() -> None:
    result, _ = make({"OMPI_MCA_btl_tcp_if_exclude": "lo"})
    assert "OMPI_MCA_btl_tcp_if_include" not in result  # Open MPI refuses both


def test_one_capsule_needs_no_launcher_so_any_will_do() -> None:
    result, warnings = make({"HYDRA_LAUNCHER": "fork", "PRTE_MCA_plm": "isolated"}, (4,))
    assert warnings == []
    assert result["HYDRA_LAUNCHER"] == "fork"


def test_the_users_environment_is_not_changed() -> None:
    given = dict(BATCH)
    make(given)
    assert given == BATCH


def test_counts_must_fit() -> None:
    with pytest.raises(ValueError, match="1 task counts for 2 capsules"):
        capsule_environment({}, capsules=2, tasks_per_capsule=(1,), subnet="10.90.0.0/16", secret="5e")


def test_agrees_with_the_launch_root() -> None:
    result, _ = capsule_environment({}, capsules=1, tasks_per_capsule=(1,), subnet="10.90.0.0/16", secret="5e")
    assert result[link.SECRET_VARIABLE] == "5e"
    assert result[link.PORT_VARIABLE] == str(link.DEFAULT_PORT) == str(mpienv.RSH_PORT)
    assert os.access(result["HYDRA_LAUNCHER_EXEC"], os.X_OK)


def test_commands_of_slurm_are_found_in_the_capsules_directory_first() -> None:
    assert make(BATCH, shims="/opt/shims")[0]["PATH"] == "/opt/shims:/usr/bin"
    assert "PATH" not in make({})[0]
    assert set(os.listdir(mpienv.SHIMS)) >= {"srun", "sbatch"}


def test_what_is_set_here_is_listed() -> None:
    result, _ = make(BATCH | {"UCX_TLS": "tcp", "HPCCR_STORE_DIR": "/store"})
    own = set(result[mpienv.OWN].split())
    assert {"HYDRA_LAUNCHER", "HYDRA_LAUNCHER_EXEC", mpienv.SECRET_VARIABLE, mpienv.INSIDE, "HOSTNAME"} <= own
    assert own.isdisjoint({"UCX_TLS", "HPCCR_STORE_DIR", "PATH", "SLURM_NODELIST"})


def test_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = make(BATCH)
    assert not mpienv.inside(result)  # taken along to another place
    name = os.uname()
    for index in ("0", "12"):
        here = os.uname_result((name.sysname, f"hpccr-{index}", name.release, name.version, name.machine))
        monkeypatch.setattr(os, "uname", lambda here=here: here)
        assert mpienv.inside(result | {mpienv.INSIDE: index})
        assert mpienv.inside(result)  # as mpirun carries it from capsule 0
        assert not mpienv.inside({})
