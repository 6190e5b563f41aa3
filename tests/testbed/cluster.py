"""The cluster as a whole: up, down, and what can happen to a node in between."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boot
import cgroups
import network
from enter import compile_sources
from init import HPCCRD_MODULE, HPCCRD_SOCKET
from paths import CHECKOUT, CTL, DISKS, HERE, RUN, Instance, TestbedError, common, say
from rootfs import ensure_rootfs
from syscalls import spawn, wait_status

IDLE_WITHIN = 45.0
HPCCRD_WITHIN = 20.0
_LOG_LINES = 8


@contextlib.contextmanager
def locked(instance: Instance) -> Iterator[None]:
    """One at a time may change an instance. Also held by half-made nodes, so whoever gets it finds none of those."""
    instance.lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(instance.lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        # `down` removes the file: what was waited for may be a lock on nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == instance.lock.stat().st_ino:
                break
        os.close(fd)
    try:
        yield
    finally:
        os.close(fd)


def up(instance: Instance, count: int) -> None:
    """Boot a cluster of `count` compute nodes in place of a running one; returns when Slurm calls all of them idle."""
    if not 1 <= count <= network.MAX_NODES:
        raise TestbedError(f"cannot make {count} nodes", f"1 to {network.MAX_NODES} are possible")
    check_machine()
    layers = ensure_rootfs()
    compile_sources(layers)
    nodes = [CTL, *(f"node{i}" for i in range(1, count + 1))]
    with locked(instance):
        _destroy(instance)
        keys = [secrets.token_hex(32), secrets.token_hex(32)]
        cluster = boot.Cluster(nodes, [str(layer) for layer in layers], *keys)
        with common():
            boot.save_cluster(instance, cluster)
            instance.shared.mkdir(parents=True, mode=0o755)
        boot.make_homes(instance.shared)
        network.start_switch(instance)
        _boot_all(instance, cluster, nodes)
        _wait_until_ready(instance, cluster.compute)


def down(instance: Instance) -> None:
    """Remove the cluster and all that is left of it, whatever state it is in."""
    with locked(instance):
        _destroy(instance)
        instance.lock.unlink(missing_ok=True)


def kill(instance: Instance, node: str) -> None:
    """Power a node off without warning. Its disk stays."""
    with locked(instance):
        boot.known(instance, node)
        cgroups.destroy(instance.name, node)
        (instance.run / f"{node}.pid").unlink(missing_ok=True)


def start(instance: Instance, node: str) -> None:
    """Power a node on that is off; returns when Slurm has it back."""
    with locked(instance):
        cluster = boot.known(instance, node)
        if boot.is_on(instance, node):
            raise TestbedError(f"{node} is running already", f"`testbed kill {node}` powers it off")
        _boot_all(instance, cluster, [node])
        _wait_until_ready(instance, [node] if node != CTL else [])


def set_cable(instance: Instance, node: str, *, plugged: bool) -> None:
    """Cut the node's network (existing connections go silent), or join it again."""
    with locked(instance):
        boot.known(instance, node)
        boot.pid_one(instance, node)
        network.set_cable(instance, node, plugged=plugged)


def status(instance: Instance) -> list[dict[str, str]]:
    """A row per node: node, state (running, partitioned, off) and Slurm's state of it."""
    cluster = boot.load_cluster(instance)
    ports = network.unplugged(instance)
    slurm = _slurm_states(instance)
    rows = []
    for node in cluster.nodes:
        state = "off"
        if boot.is_on(instance, node):
            state = "partitioned" if network.is_unplugged(node, ports) else "running"
        rows.append({"node": node, "state": state, "slurm": slurm.get(node, "-" if node == CTL else "unknown")})
    return rows


def shared_path(instance: Instance) -> Path:
    """This machine's path of /shared; raises TestbedError when the cluster is not up."""
    boot.load_cluster(instance)
    return instance.shared


def check_machine() -> None:
    """Raise TestbedError where a cluster cannot be made."""
    if os.geteuid() != 0:
        raise TestbedError("a cluster of namespaces can only be made by root", "run this as root")
    cgroups.hierarchies()
    for program in ("ip", "mmdebstrap"):
        if not shutil.which(program):
            raise TestbedError(f"{program} is not installed", "run `make setup` in the checkout")
    if CHECKOUT.stat().st_mode & 0o005 != 0o005:
        raise TestbedError(f"{CHECKOUT} cannot be read by the cluster's users", f"run `chmod -R a+rX {CHECKOUT}`")


def _destroy(instance: Instance) -> None:
    cgroups.destroy(instance.name)
    for directory in (instance.run, instance.disks):
        if directory.exists():
            shutil.rmtree(directory)
    with common():
        for parent in (RUN, DISKS):
            with contextlib.suppress(OSError):  # other instances may be there
                parent.rmdir()


def _boot_all(instance: Instance, cluster: boot.Cluster, nodes: list[str]) -> None:
    """Boot nodes side by side."""

    def one(node: str) -> Callable[[], int]:
        def body() -> int:
            boot.boot(instance, cluster, node)
            return 0

        return body

    children = {node: spawn(one(node)) for node in nodes}
    failed = [node for node, pid in children.items() if wait_status(pid) != 0]
    if failed:
        raise TestbedError(f"could not boot {', '.join(failed)}", "`testbed down` removes what was made")


def _wait_until_ready(instance: Instance, compute: list[str]) -> None:
    deadline = time.monotonic() + IDLE_WITHIN
    while True:
        states = _slurm_states(instance)
        waiting = [node for node in compute if states.get(node) not in ("idle", "mixed", "allocated")]
        if not waiting and (compute or states):
            break
        if time.monotonic() > deadline:
            raise TestbedError(
                f"not idle after {IDLE_WITHIN:.0f} s: "
                + ", ".join(f"{node} ({states.get(node, 'unknown')})" for node in waiting)
                + _last_lines(instance, [CTL, *waiting[:2]]),
                "the nodes are left as they are: look, then `testbed down`",
            )
        time.sleep(0.05)
    _wait_for_hpccrd(instance, compute)


def _wait_for_hpccrd(instance: Instance, compute: list[str]) -> None:
    if not (CHECKOUT / HPCCRD_MODULE.relative_to("/src")).is_file():
        say("warning: this checkout has no hpccrd yet, so none is running")
        return
    deadline = time.monotonic() + HPCCRD_WITHIN
    waiting = list(compute)
    while waiting := [node for node in waiting if not _root_of(instance, node, HPCCRD_SOCKET).exists()]:
        if time.monotonic() > deadline:
            raise TestbedError(
                f"hpccrd is not up after {HPCCRD_WITHIN:.0f} s on {', '.join(waiting)}"
                + _last_lines(instance, waiting[:2]),
                "the nodes are left as they are: look, then `testbed down`",
            )
        time.sleep(0.02)


def _root_of(instance: Instance, node: str, path: Path) -> Path:
    """This machine's path of a path on a running node."""
    return Path(f"/proc/{boot.pid_one(instance, node)}/root") / str(path)[1:]


def _last_lines(instance: Instance, nodes: list[str]) -> str:
    text = ""
    for node in nodes:
        with contextlib.suppress(TestbedError):
            log = _root_of(instance, node, Path("/var/log"))
            names = ["init.log", "munged.log", "slurmctld.log", "slurm/slurmctld.log", "slurmd.log", "slurm/slurmd.log"]
            for name in [*names, "hpccrd.log"]:
                if (log / name).is_file():
                    lines = (log / name).read_text(errors="replace").splitlines()[-_LOG_LINES:]
                    text += f"\n--- {node}:/var/log/{name}\n" + "\n".join(lines)
    return text


def _slurm_states(instance: Instance) -> dict[str, str]:
    """Node -> Slurm's state of it ("idle", "down*", ...); empty while slurmctld does not answer."""
    command = [sys.executable, str(HERE / "testbed"), "exec", CTL, "--", "sinfo", "-h", "-N", "-o", "%N %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    except subprocess.TimeoutExpired:
        return {}
    if done.returncode:
        return {}
    return dict(line.split() for line in done.stdout.splitlines())
