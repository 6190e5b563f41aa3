"""The layer with /opt/hpccr: a virtual environment that has the project's dependencies and runs the code at /src."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

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
    for path in (*_reaching_the_index(), "/etc/resolv.conf", "/etc/hosts"):
        _bind_same_path(root, Path(path))
    mount("proc", root / "proc", "proc")
    bind("/dev", root / "dev")
    for command in (
        ["python3", "-m", "venv", "--system-site-packages", HOME],
        [f"{HOME}/bin/pip", "install", *_requirements()],
        # Editable with a plain path entry, so that packages added to the checkout later are found.
        [f"{HOME}/bin/pip", "install", "--no-deps", "--config-settings", "editable_mode=compat", "-e", "/src"],
    ):
        subprocess.run(["chroot", root, *command], check=True, stdin=subprocess.DEVNULL, env=_environment())
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


def _environment() -> dict[str, str]:
    passed = re.compile(r"PIP_.*|.*_proxy|.*_PROXY|SSL_CERT_.*|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE")
    environment = {key: value for key, value in os.environ.items() if passed.fullmatch(key)}
    return environment | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(Path.home()), "LANG": "C.UTF-8"}


def _reaching_the_index() -> Iterator[str]:
    """pip's configuration files on this machine and every local path that they or the environment name."""
    home = Path.home()
    files = [
        Path("/etc/pip.conf"),
        Path("/etc/xdg/pip/pip.conf"),
        home / ".config/pip/pip.conf",
        home / ".pip/pip.conf",
    ]
    files += [Path(path) for key, path in os.environ.items() if key == "PIP_CONFIG_FILE"]
    found = [path for path in files if path.is_file()]
    texts = [path.read_text() for path in found] + list(_environment().values())
    yield from map(str, found)
    for text in texts:
        for name in re.findall(r"(?:(?<=file://)|(?<![^\s=,:]))/[^\s,:]+", text):
            path = Path(name)
            if path.is_file():
                yield name
            elif path.is_dir() and len(path.parts) > 2:
                # A local index links to files that lie beside it.
                yield str(path.parent if len(path.parts) > 3 else path)


def _bind_same_path(root: Path, path: Path) -> None:
    target = root / str(path)[1:]
    if not path.exists() or (path.is_dir() and target.is_dir() and str(path).startswith(("/usr/", "/etc/ssl"))):
        return
    if path.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    bind(path.resolve(), target)
