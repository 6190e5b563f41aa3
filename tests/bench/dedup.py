"""How many bytes the store takes for ten checkpoints of real programs, beside borg and restic on the same images.

LAMMPS and the mpi4py stencil, 4 ranks on two nodes. After each checkpoint the images, as CRIU wrote them, are copied
from the nodes' spools; at the end borg and restic back those directories up one after the other, all capsules of a
checkpoint at once. Both have to be installed on this machine (apt-get install borgbackup restic).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from jobs import Job, Jobs
from nodes import Cluster
from waiting import wait_for
from workloads import OPEN_MPI, SOURCES

CHECKPOINTS = 10
PAUSE = 200
"""Lines of output between two checkpoints."""


def measure(cluster: Cluster, repetitions: int) -> None:
    """Print a table per program."""
    del repetitions
    mpirun = OPEN_MPI.format(each=2, ranks=4)
    programs = {
        "LAMMPS (Lennard-Jones melt, 32000 atoms)": f"{mpirun} lmp -in {SOURCES}/melt.in -var size 20 "
        "-var steps 10000000 -var every 1 -log none",
        "mpi4py stencil (1000 x 1000)": f"{mpirun} python3 {SOURCES}/stencil.py --size 1000 --steps 10000000",
    }
    for title, command in programs.items():
        with tempfile.TemporaryDirectory(prefix="dedup-", dir="/var/tmp") as work:
            report(title, *program(cluster, command, Path(work)), Path(work))


def program(cluster: Cluster, command: str, work: Path) -> tuple[list[int], list[int]]:
    """Bytes of the images and bytes stored, of each checkpoint; the images are then in work/1, work/2 ..."""
    jobs = Jobs(cluster, "bench")
    sizes, stored = [], []
    try:
        job = jobs.submit(command, environment={"HPCCR_STORE_KEEP": str(CHECKPOINTS + 1)})
        job.wait_event("started")
        for number in range(1, CHECKPOINTS + 1):
            lines = count(job)
            wait_for("work between two checkpoints", lambda: count(job) >= lines + PAUSE, within=300)  # noqa: B023
            job.checkpoint()
            found = json.loads(job.hpccr_ok("inspect", "--json"))
            stored.append(sum(one["own"] for one in found["stored"]))
            images = work / str(number)
            for node in job.slurm().nodes:
                (kept,) = cluster.kept(node)
                shutil.copytree(kept, images / node, ignore=shutil.ignore_patterns("kept.json"))
            sizes.append(sum(path.stat().st_size for path in images.rglob("*") if path.is_file()))
    finally:
        jobs.clear()
    return sizes, stored


def count(job: Job) -> int:
    return job.output.read_bytes().count(b"\n") if job.output.exists() else 0


def report(title: str, sizes: list[int], stored: list[int], work: Path) -> None:
    columns = {"hpccr": stored}
    if shutil.which("borg"):
        columns["borg"] = growth(work, "borg", borg)
    if shutil.which("restic"):
        columns["restic"] = growth(work, "restic", restic)
    print(f"\n{title}: bytes stored to bytes of the images\n")
    print(f"{'checkpoint':>16}{'images, MB':>12}" + "".join(f"{name:>10}" for name in columns))
    for number, size in enumerate(sizes):
        row = "".join(f"{values[number] / size:10.3f}" for values in columns.values())
        print(f"{number + 1:>16}{size / 1e6:12.1f}{row}")
    later = sum(sizes[1:])
    print(f"{'2 to 10':>16}{later / 1e6:12.1f}" + "".join(f"{sum(v[1:]) / later:10.3f}" for v in columns.values()))


def growth(work: Path, name: str, backup) -> list[int]:
    """By how much the repository grows with each checkpoint."""
    repository = work / name
    found, before = [], 0
    for number in range(1, CHECKPOINTS + 1):
        backup(repository, work / str(number), number)
        now = sum(path.stat().st_size for path in repository.rglob("*") if path.is_file())
        found.append(now - before)
        before = now
    return found


def borg(repository: Path, images: Path, number: int) -> None:
    environment = {**os.environ, "BORG_BASE_DIR": str(repository.parent / "home")}
    if number == 1:
        subprocess.run(["borg", "init", "--encryption=none", str(repository)], env=environment, check=True)
    command = ["borg", "create", "--compression", "zstd,1", f"{repository}::{number}", "."]
    subprocess.run(command, env=environment, cwd=images, check=True)


def restic(repository: Path, images: Path, number: int) -> None:
    environment = {**os.environ, "RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": str(repository.parent / "home")}
    command = ["restic", "--repo", str(repository), "--quiet"]
    if number == 1:
        subprocess.run([*command, "init"], env=environment, check=True)
    subprocess.run([*command, "backup", "."], env=environment, cwd=images, check=True)
