"""The layer with /opt/hpccr: a virtual environment that has the project's dependencies and runs the code at /src.

The commands in /usr/local/bin are as an administrator installs them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from pathlib import Path

import index
from overlay import mount_overlay
from paths import CHECKOUT
from syscalls import bind, mount

HOME = "/opt/hpccr"
COMMANDS = [CHECKOUT / "hpccr/noded/dist" / name for name in ("hpccr", "hpccrd")]


def recipe() -> bytes:
    """All that the layer's content depends on: this file, the commands and what pyproject.toml says of the package."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    wanted = {key: project.get(key) for key in ("build-system", "project")}
    commands = b"".join(path.read_bytes() for path in COMMANDS)
    return Path(__file__).read_bytes() + commands + json.dumps(wanted, sort_keys=True).encode()


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
    commands = layer / "usr/local/bin"
    commands.mkdir(parents=True)
    (layer / "opt").mkdir()
    (work / "upper" / HOME[1:]).rename(layer / HOME[1:])
    for path in COMMANDS:
        shutil.copy(path, commands)
        (commands / path.name).chmod(0o755)


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
