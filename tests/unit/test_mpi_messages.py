"""The books of messages of libhpccr_mpi: what is counted at both ends, at one, and by several threads at once."""

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
