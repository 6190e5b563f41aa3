"""A writable root on top of the cached layers."""

from __future__ import annotations

from pathlib import Path

from paths import CACHE
from syscalls import mount


def mount_scratch_root(layers: list[Path]) -> Path:
    """Mount the layers with a writable layer in memory, for this mount namespace only; the new root."""
    scratch = CACHE / "scratch"
    scratch.mkdir(exist_ok=True)
    mount("tmpfs", scratch, "tmpfs", data="mode=0755")
    return mount_overlay(layers, scratch / "upper", scratch / "work", scratch / "root")


def mount_overlay(layers: list[Path], upper: Path, work: Path, root: Path) -> Path:
    """Mount an overlay of `layers` (topmost first) at `root`; the directories are made."""
    for directory in (upper, work, root):
        directory.mkdir(parents=True, exist_ok=True)
    lower = ":".join(str(layer) for layer in layers)
    mount("overlay", root, "overlay", data=f"lowerdir={lower},upperdir={upper},workdir={work}")
    return root
