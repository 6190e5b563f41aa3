"""The layer with /opt/hpccr: a virtual environment that has the project's dependencies and runs the code at /src."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import index
from overlay import mount_overlay
from paths import CHECKOUT
from syscalls import bind, mount

HOME = "/opt/hpccr"


def recipe() -> bytes:
    """All that the layer's content depends on: this file and what pyproject.toml says of the package."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    wanted = {key: project.get(key) for key in ("build-system", "project")}
    return Path(__file__).read_bytes() + json.dumps(wanted, sort_keys=True).encode()


def build(work: Path, base: Path) -> None:
    """Make the layer in work/layer with this machine's package index; to be run in a mount namespace of its own."""
    root = mount_overlay([base], work / "upper", work / "overlay", work / "root")
    _mount_checkout(root, work)
    index.bring_into(root)
    mount("proc", root / "proc", "proc")
    bind("/dev", root / "dev")
    for command in (
        ["python3", "-m", "venv", "--system-site-packages", HOME],
        [f"{HOME}/bin/pip", "install", *_requirements()],
        # Editable with a plain path entry, so that packages added to the checkout later are found.
        [f"{HOME}/bin/pip", "install", "--no-deps", "--config-settings", "editable_mode=compat", "-e", "/src"],
    ):
        subprocess.run(["chroot", root, *command], check=True, stdin=subprocess.DEVNULL, env=index.environment())
    layer = work / "layer"
    links = layer / "usr/local/bin"
    links.mkdir(parents=True)
    (layer / "opt").mkdir()
    (work / "upper" / HOME[1:]).rename(layer / HOME[1:])
    for name in ("hpccr", "hpccrd"):
        (links / name).symlink_to(f"{HOME}/bin/{name}")


def _requirements() -> list[str]:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return [*project.get("dependencies", []), *project.get("optional-dependencies", {}).get("dev", [])]


def _mount_checkout(root: Path, work: Path) -> None:
    """The checkout at /src, writable for setuptools' droppings, which are thrown away."""
    scratch = work / "src"
    scratch.mkdir()
    mount("tmpfs", scratch, "tmpfs")
    mount_overlay([CHECKOUT], scratch / "upper", scratch / "overlay", root / "src")
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    readme = root / "src" / str(project.get("readme", "README.md"))
    if not readme.exists():
        readme.write_text("\n")
