"""This machine's Python package index, within reach of pip inside a root that is being built."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from syscalls import bind


def bring_into(root: Path) -> None:
    """Bind what pip's configuration on this machine refers to, and name resolution, into `root`."""
    for path in (*_reaching_the_index(), "/etc/resolv.conf", "/etc/hosts"):
        _bind_same_path(root, Path(path))


def environment() -> dict[str, str]:
    """For pip inside that root: what this machine's own environment says of the index, and nothing else of it."""
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
    texts = [path.read_text() for path in found] + list(environment().values())
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
