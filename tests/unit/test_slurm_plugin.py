"""The SPANK plugin compiles without a warning, passes its own test, meets nobody else's names in Slurm's processes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "slurm_plugin"
FOR_SLURM = {"plugin_name", "plugin_type", "plugin_version", "spank_plugin_version"}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("slurm_plugin")
    shutil.copytree(SOURCES, place, dirs_exist_ok=True)
    done = subprocess.run(
        ["make", "CFLAGS=-O2 -Werror"], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return place / "build" / "spank_hpccr.so"


def symbols(path: Path, *options: str) -> set[str]:
    found = subprocess.run(["nm", "--dynamic", *options, path], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1] for line in found.splitlines()}


def test_only_what_slurm_looks_up_is_exported(plugin: Path) -> None:
    names = symbols(plugin, "--defined-only")
    assert names >= FOR_SLURM
    entries = names - FOR_SLURM
    assert entries == {"slurm_spank_init", "slurm_spank_init_post_opt", "slurm_spank_task_init"}


def test_it_needs_only_slurm_and_libc(plugin: Path) -> None:
    needed = {name for name in symbols(plugin, "--undefined-only") if "@" not in name}
    own = {name for name in needed if not name.startswith(("_", "spank_", "slurm_"))}
    assert own == set()
