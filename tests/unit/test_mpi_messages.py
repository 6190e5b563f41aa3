"""libhpccr_mpi in front of MPI: what is counted at both ends, at one, by several threads; and unchanged programs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MPIRUN = {
    "mpich": ("mpiexec.hydra",),
    "openmpi": ("mpirun.openmpi", "--oversubscribe", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo"),
}
"""Over TCP: sends are complete before they are gone."""


@pytest.mark.parametrize("mpi", MPIRUN)
def test_messages(tmp_path: Path, mpi: str) -> None:
    source = Path(__file__).parent / "mpi" / "messages.c"
    library = [str(ROOT / "mpi" / f"{part}.c") for part in ("pmpi", "traffic")]
    program = str(tmp_path / "messages")
    flags = ("-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/mpi")
    subprocess.run([f"mpicc.{mpi}", *flags, "-o", program, source, *library, "-lpthread"], check=True, timeout=100)
    environment = os.environ | {"UCX_TLS": "tcp,self", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*MPIRUN[mpi], "-n", "2", program], capture_output=True, text=True, timeout=200, env=environment
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "are left out from now on" in done.stderr


PATIENT = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_threads_pthreads_yield_strategy": "nanosleep",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",
    "OMPI_MCA_btl_tcp_if_include": "lo",
}
"""There are more ranks than processors: one that waits sleeps."""
PRELOADED = {
    "openmpi-debian": ("mpicc.openmpi", "mpirun.openmpi --oversubscribe -x LD_PRELOAD={}", "debian", "libmpi.so.40"),
    "mpich-debian": ("mpicc.mpich", "mpirun.mpich -genv LD_PRELOAD {}", "debian", "libmpich.so.12"),
    "mpich-pypi": ("/opt/mpi/mpich/bin/mpicc", "/opt/mpi/mpich/bin/mpirun -genv LD_PRELOAD {}", "mpich", ""),
}


@pytest.mark.parametrize("key", PRELOADED)
def test_preloaded_into_a_program_that_never_calls_it(tmp_path: Path, key: str) -> None:
    """All features of MPI, threads among them: the program prints what it does without the library."""
    compiler, mpirun, home, library = PRELOADED[key]
    settings = (f"MPICC={compiler}", f"OUT={tmp_path}", "CFLAGS=-O2 -Werror")
    subprocess.run(["make", "-s", "-C", ROOT / "mpi", *settings, "all"], check=True, timeout=100)
    environment = os.environ | PATIENT | {"TMPDIR": str(tmp_path)}
    if library:
        environment["MPI4PY_LIBMPI"] = library
    features = ROOT / "tests" / "cluster" / "programs" / "features.py"
    program = [f"/opt/mpi/{home}/bin/python3", str(features), "--rounds", "1", "--size", "65000"]

    def said(preload: str) -> str:
        words = [*mpirun.format(preload).split(), "-n", "4", *program]
        done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "finalized" in done.stdout
        return done.stdout

    assert said(str(tmp_path / "libhpccr_mpi.so")) == said(str(tmp_path / "none.so"))
