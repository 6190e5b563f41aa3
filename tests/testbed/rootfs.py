"""The root file system of the nodes: a base layer of Debian packages; over it the project's virtual environment, MPI
libraries from the Python package index, and the project's SPANK plugin.

All are cached under the hash of their recipes and never changed once in place; nodes stack an overlay on them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mpi_layer
import plugin_layer
import recipe
import venv_layer
from mirror import Mirror, apt_options, find_mirror
from paths import CACHE, RUN, TestbedError, say
from syscalls import contained

LAYERS_KEPT = 3  # of each kind: what a developer who changes branches goes back to


def base_layer() -> Path:
    """Where the base layer of this recipe is or will be."""
    return CACHE / f"base-{_hash(Path(recipe.__file__).read_bytes())}"


def environment_layer() -> Path:
    """Where the virtual environment for this recipe and this pyproject.toml is or will be."""
    return CACHE / f"venv-{_hash(base_layer().name.encode(), venv_layer.recipe())}"


def libraries_layer() -> Path:
    """Where the MPI libraries from the package index, for this base layer, are or will be."""
    return CACHE / f"mpi-{_hash(base_layer().name.encode(), mpi_layer.recipe())}"


def spank_layer() -> Path:
    """Where the SPANK plugin of this checkout, built for this base layer, is or will be."""
    return CACHE / f"plugin-{_hash(base_layer().name.encode(), plugin_layer.recipe())}"


def ensure_rootfs() -> list[Path]:
    """Build what is missing; the layers, topmost first, as an overlay's lowerdir wants them."""
    layers = [spank_layer(), libraries_layer(), environment_layer(), base_layer()]
    if all(layer.is_dir() for layer in layers):
        return layers
    builders = {
        base_layer(): ("root file system", _build_base),
        environment_layer(): ("virtual environment", venv_layer.build),
        libraries_layer(): ("MPI libraries of the package index", mpi_layer.build),
        spank_layer(): ("SPANK plugin", plugin_layer.build),
    }
    with _locked(CACHE / "lock"):
        for leftover in CACHE.glob("*.tmp"):
            shutil.rmtree(leftover)
        for layer, (what, build) in builders.items():
            if not layer.is_dir():
                _build(layer, what, build)
        for layer in layers:
            _prune(f"{layer.name.partition('-')[0]}-*", layer)
    return layers


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
            return
        say("waiting for another build of the root file system")
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _build(layer: Path, what: str, build: Callable[[Path, Path], None]) -> None:
    """Have `build(work directory, base layer)` make a layer in "layer" of the work directory, then publish it."""
    work = layer.with_name(layer.name + ".tmp")
    work.mkdir()
    log = CACHE / f"{layer.name}.log"
    say(f"building the {what} (log: {log})")
    started = time.monotonic()

    def body() -> int:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        build(work, base_layer())
        return 0

    if contained(body) != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise TestbedError(
            f"building the {what} failed; the last lines of {log}:\n{tail}", "see the log; then try again"
        )
    (work / "layer").rename(layer)
    shutil.rmtree(work)
    say(f"built the {what} in {time.monotonic() - started:.0f} s")


def _build_base(work: Path, _: Path) -> None:
    mirror = find_mirror()
    root = work / "layer"
    preferences = work / "preferences"
    newer = " ".join(recipe.FROM_NEWER_SUITE)
    preferences.write_text(
        f"Package: *\nPin: release n={recipe.NEWER_SUITE}\nPin-Priority: -1\n\n"
        f"Package: {newer}\nPin: release n={recipe.NEWER_SUITE}\nPin-Priority: 990\n"
    )
    hook = f'mkdir -p "$1/etc/apt/preferences.d" && cp {preferences} "$1/etc/apt/preferences.d/newer"'
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"]
    command += [f"--include={','.join(recipe.PACKAGES)}", f"--setup-hook={hook}"]
    command += [f"--dpkgopt={option}" for option in recipe.DPKG_OPTIONS]
    command += [f"--aptopt={option}" for option in apt_options()]
    command += [recipe.SUITE, str(root), _source(mirror, recipe.SUITE)]
    # The newer suite's index is sometimes served past its date.
    command += [_source(mirror, recipe.NEWER_SUITE, "check-valid-until=no")]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    subprocess.run(["chroot", root, "sh", "-c", recipe.CUSTOMIZE], check=True, stdin=subprocess.DEVNULL)


def _source(mirror: Mirror, suite: str, option: str = "") -> str:
    options = " ".join(filter(None, [f"signed-by={mirror.keyring}", option]))
    return f"deb [{options}] {mirror.url} {suite} main"


def _prune(pattern: str, keep: Path) -> None:
    """Remove old layers that no running cluster stands on."""
    used = "\n".join(state.read_text() for state in RUN.glob("*/cluster.json"))
    layers = sorted((p for p in CACHE.glob(pattern) if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    for layer in layers[LAYERS_KEPT:]:
        if layer != keep and layer.name not in used:
            shutil.rmtree(layer, ignore_errors=True)
            layer.with_name(layer.name + ".log").unlink(missing_ok=True)
