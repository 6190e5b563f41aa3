"""The layer with the SPANK plugin, built from slurm_plugin/ against the Slurm of the base layer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from overlay import mount_overlay
from paths import CHECKOUT
from syscalls import bind, mount

SOURCES = CHECKOUT / "slurm_plugin"
LIBDIR = "/usr/local/lib/slurm"
PLUGSTACK = f"optional {LIBDIR}/spank_hpccr.so hpccr=/usr/local/bin/hpccr\n"
"""Its line in plugstack.conf.d."""


def _files() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.is_file())


def recipe() -> bytes:
    """All that the layer's content depends on, beside the base layer."""
    parts = [Path(__file__).read_bytes()]
    parts += [path.name.encode() + b"\0" + path.read_bytes() for path in _files()]
    return b"\0".join(parts)


def build(work: Path, base: Path) -> None:
    """Make the layer in work/layer, its unit test included; to be run in a mount namespace of its own."""
    root = mount_overlay([base], work / "upper", work / "overlay", work / "root")
    mount("proc", root / "proc", "proc")
    bind("/dev", root / "dev")
    mount("tmpfs", root / "tmp", "tmpfs")
    sources = root / "tmp/slurm_plugin"
    sources.mkdir()
    for path in _files():
        shutil.copy(path, sources)
    make = ["make", "-C", "/tmp/slurm_plugin", "all", "install", f"LIBDIR={LIBDIR}", "DESTDIR=/tmp/layer"]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
    subprocess.run(["chroot", root, *make], check=True, stdin=subprocess.DEVNULL, env=environment)
    shutil.copytree(root / "tmp/layer", work / "layer")
