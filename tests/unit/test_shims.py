"""The commands of Slurm's that are something else inside a capsule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpccr.coordinator.mpienv import SHIMS


def call(command: str, environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-c", f'{command} "$@"', "sh", *arguments], env=environ, capture_output=True, text=True, check=False
    )


def test_srun_is_ours() -> None:
    """What it does is tested in test_srun.py."""
    environ = {"PATH": f"{SHIMS}:{os.environ['PATH']}", "HPCCR_PYTHON": sys.executable}
    done = call("srun", environ, "-n4", "./app")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("hpccr: error: srun: HPCCR_STEP_SECRET is not set")


@pytest.mark.parametrize("path", ["{shims}:{real}", "{real}/none:{shims}:{real}", "{shims}:{shims}:{real}:{shims}"])
def test_sbatch_takes_nothing_of_ours_along(tmp_path: Path, path: str) -> None:
    real = tmp_path / "with space"
    real.mkdir()
    (real / "sbatch").write_text('#!/bin/sh\n/usr/bin/env\nfor word; do echo "argument $word"; done\nexit 3\n')
    (real / "sbatch").chmod(0o755)
    environ = {
        "PATH": path.format(shims=SHIMS, real=real),
        "HPCCR_OWN": "HYDRA_LAUNCHER HPCCR_STEP_SECRET",
        "HYDRA_LAUNCHER": "rsh",
        "HPCCR_STEP_SECRET": "5e",
        "SLURM_RESTART_COUNT": "2",
        "MINE": "kept",
    }
    done = call("sbatch", environ, "--wrap", "a b")
    assert done.returncode == 3
    lines = done.stdout.splitlines()
    assert {"MINE=kept", "argument --wrap", "argument a b"} <= set(lines)
    assert not [line for line in lines if line.startswith(("HYDRA_LAUNCHER", "HPCCR_", "SLURM_RESTART_COUNT"))]
    (found,) = (line for line in lines if line.startswith("PATH="))
    assert SHIMS not in found and str(real) in found


@pytest.mark.parametrize("name", ["ssh", "rsh"])
def test_ssh_to_another_node_of_the_job_is_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('#!/bin/sh\necho real "$PATH" "$@"\nexit 4\n')
    (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{SHIMS}:{tmp_path}:{os.environ['PATH']}", "HPCCR_PYTHON": sys.executable}
    for words in (["hpccr-1", "true"], ["-n", "-x", "me@hpccr-12", "true"]):
        done = call(name, environ, *words)
        assert done.returncode == 255 and "HPCCR_STEP_SECRET is not set" in done.stderr, done
    for words in (["login", "ls hpccr-1"], ["hpccr-1.site", "true"], ["hpccr-", "true"]):
        done = call(name, environ, *words)
        assert (done.returncode, done.stdout) == (4, f"real {environ['PATH']} {' '.join(words)}\n")
    assert call(name, environ | {"PATH": SHIMS}, "login").returncode == 255


def test_sbatch_that_is_not_there() -> None:
    assert call("sbatch", {"PATH": SHIMS}).returncode == 127
