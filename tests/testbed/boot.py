"""Powering a node on: namespaces, mounts and files, then init.py as its pid 1."""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from dataclasses import dataclass
from pathlib import Path

import cgroups
import network
import siteconf
from overlay import mount_overlay
from paths import CHECKOUT, CTL, HERE, Instance, TestbedError
from recipe import USERS
from syscalls import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    bind,
    mount,
    pivot_root,
    sethostname,
    spawn,
    unshare,
    wait_status,
)

_NAMESPACES = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}


@dataclass(frozen=True)
class Cluster:
    """What `up` decided once and every later boot of a node needs; kept in cluster.json."""

    nodes: list[str]
    layers: list[str]
    munge_key: str
    hpccr_key: str

    @property
    def compute(self) -> list[str]:
        return [node for node in self.nodes if node != CTL]


def save_cluster(instance: Instance, cluster: Cluster) -> None:
    instance.run.mkdir(parents=True, exist_ok=True)
    path = instance.run / "cluster.json"
    fd = os.open(path.with_suffix(".tmp"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as stream:
        json.dump(vars(cluster), stream)
    path.with_suffix(".tmp").rename(path)


def load_cluster(instance: Instance) -> Cluster:
    """Raises TestbedError when the cluster is not up."""
    try:
        return Cluster(**json.loads((instance.run / "cluster.json").read_text()))
    except FileNotFoundError:
        raise TestbedError(f"the cluster {instance.name!r} is not up", "run `testbed up`") from None


def known(instance: Instance, node: str) -> Cluster:
    """The cluster; raises TestbedError when it is not up or has no such node."""
    cluster = load_cluster(instance)
    if node not in cluster.nodes:
        raise TestbedError(f"there is no node {node!r}", f"there are: {', '.join(cluster.nodes)}")
    return cluster


def pid_one(instance: Instance, node: str) -> int:
    """The node's pid 1 as this machine numbers it; raises TestbedError when the node is off."""
    try:
        pid = int((instance.run / f"{node}.pid").read_text())
        groups = Path(f"/proc/{pid}/cgroup").read_text()
    except (FileNotFoundError, ValueError, ProcessLookupError):
        groups, pid = "", 0
    # A pid file may outlive its process, and the number may have gone to another.
    if f"/{cgroups.TOP}/{instance.name}/{node}" not in groups:
        raise TestbedError(f"{node} is off", f"run `testbed start {node}`")
    return pid


def is_on(instance: Instance, node: str) -> bool:
    try:
        pid_one(instance, node)
    except TestbedError:
        return False
    return True


def boot(instance: Instance, cluster: Cluster, node: str) -> None:
    """Power the node on; returns when its pid 1 runs. Nothing of it stays when this process is killed before that."""
    cgroups.create(instance.name, node)
    ready_read, ready_write = os.pipe()
    go_read, go_write = os.pipe()
    failed_read, failed_write = os.pipe()

    def launch() -> int:
        for fd in (ready_read, go_write, failed_read):
            os.close(fd)
        cgroups.join(instance.name, node)
        unshare(_NAMESPACES)
        os.write(ready_write, b"1")
        if os.read(go_read, 1) != b"1":
            return 1
        # Opened before: init changes the root of its mount namespace, which is this process's too.
        with open(instance.run / f"{node}.pid", "w") as pid_file:
            pid = os.fork()
            if pid == 0:
                _become_init(instance, cluster, node, failed_write)
            pid_file.write(f"{pid}\n")
        return 0

    launcher = spawn(launch)
    for fd in (ready_write, go_read, failed_write):
        os.close(fd)
    if os.read(ready_read, 1) == b"1":
        network.connect(instance, node, launcher)
        os.write(go_write, b"1")
    os.close(go_write)
    status = wait_status(launcher)
    with os.fdopen(failed_read, "r") as stream:
        reason = stream.read()
    os.close(ready_read)
    if status or reason:
        raise TestbedError(f"{node} could not be booted: {reason or f'status {status}'}")


def _become_init(instance: Instance, cluster: Cluster, node: str, failed: int) -> None:
    """In the node's pid 1: make its file system, then exec init.py. A failure is told through the pipe `failed`."""
    try:
        os.setsid()
        mount("none", "/", flags=MS_REC | MS_PRIVATE)
        root = _mount_root(instance, cluster, node)
        _write_files(instance, cluster, node, root)
        sethostname(node)
        null = os.open("/dev/null", os.O_RDONLY)
        log = os.open(root / "var/log/init.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for fd, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(fd, target)
        pivot_root(root)
        os.umask(0o022)
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        role = "ctl" if node == CTL else "compute"
        os.execve("/usr/bin/python3", ["init", "/src/tests/testbed/init.py", role], environment)
    except BaseException as error:
        os.write(failed, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(1)


def _mount_root(instance: Instance, cluster: Cluster, node: str) -> Path:
    disk = instance.disk(node)
    root = mount_overlay([Path(layer) for layer in cluster.layers], disk / "upper", disk / "work", disk / "root")
    bind(instance.shared, root / "shared")
    bind(CHECKOUT, root / "src", read_only=True)
    mount("proc", root / "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", root / "sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _mount_cgroups(root / "sys/fs/cgroup")
    make_devices(root / "dev")
    mount("tmpfs", root / "run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    mount("tmpfs", root / "tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    # All nodes share a kernel; a real node's boot has an identity of its own, and MPI libraries look at it.
    boot_id = root / "run/boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    bind(boot_id, root / "proc/sys/kernel/random/boot_id", read_only=True)
    return root


def _mount_cgroups(target: Path) -> None:
    """The hierarchies of this machine under the same names; the cgroup namespace makes the node's group their root."""
    found = cgroups.hierarchies()
    mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0755")
    for hierarchy in found:
        here = target / hierarchy.mountpoint.name
        here.mkdir()
        options = hierarchy.controllers
        if options.startswith("name="):
            options = f"none,{options}"
        kind = "cgroup2" if hierarchy.v2 else "cgroup"
        mount(kind, here, kind, MS_NOSUID | MS_NODEV | MS_NOEXEC, options)


def make_devices(dev: Path) -> None:
    """A minimal /dev at `dev`."""
    mount("tmpfs", dev, "tmpfs", MS_NOSUID, "mode=0755")
    umask = os.umask(0)
    for name, (major, minor) in _DEVICES.items():
        os.mknod(dev / name, stat.S_IFCHR | 0o666, os.makedev(major, minor))
    for name, (major, minor) in {"fuse": (10, 229), "net/tun": (10, 200)}.items():
        (dev / name).parent.mkdir(exist_ok=True, mode=0o755)
        os.mknod(dev / name, stat.S_IFCHR | 0o666, os.makedev(major, minor))
    os.umask(umask)
    (dev / "pts").mkdir()
    mount("devpts", dev / "pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5")
    (dev / "shm").mkdir()
    mount("tmpfs", dev / "shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    (dev / "mqueue").mkdir()
    mount("mqueue", dev / "mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    (dev / "ptmx").symlink_to("pts/ptmx")
    for name, target in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        (dev / name).symlink_to(f"/proc/self/fd{target}")


def make_homes(shared: Path) -> None:
    """The users' homes in what is to be /shared."""
    for name, uid in USERS.items():
        home = shared / "home" / name
        home.mkdir(parents=True, exist_ok=True)
        os.chown(home, uid, uid)
        home.chmod(0o700)


def _write_files(instance: Instance, cluster: Cluster, node: str, root: Path) -> None:
    accounts = Accounts(root)
    etc = root / "etc"
    (etc / "hosts").write_text(network.hosts(cluster.nodes))
    (etc / "hostname").write_text(f"{node}\n")
    (etc / "machine-id").write_text(uuid.uuid5(uuid.NAMESPACE_DNS, f"{instance.name}.{node}").hex + "\n")
    for name, text in siteconf.files(instance.name, cluster.compute).items():
        (etc / name).write_text(text)
    _write_secret(etc / "munge/munge.key", bytes.fromhex(cluster.munge_key), accounts.ids("munge"))
    _write_secret(etc / "hpccr/key", f"{cluster.hpccr_key}\n".encode(), (0, 0))
    shutil.copyfile(HERE / "hpccr.toml", etc / "hpccr/hpccr.toml")
    for directory, user in {"run/munge": "munge", "run/slurm": "slurm", "var/spool/slurmctld": "slurm"}.items():
        (root / directory).mkdir(parents=True, exist_ok=True)
        os.chown(root / directory, *accounts.ids(user))
    (root / "var/spool/slurmd").mkdir(parents=True, exist_ok=True)
    # As systemd does, so that ping needs no privilege.
    (root / "proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
    (root / "run/lock").mkdir(mode=0o1777, exist_ok=True)


def _write_secret(path: Path, content: bytes, owner: tuple[int, int]) -> None:
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as stream:
        os.fchown(fd, *owner)
        stream.write(content)


class Accounts:
    """The users of a root file system, read from its files: name services of this machine know nothing of them."""

    def __init__(self, root: Path) -> None:
        self._users = _table(root / "etc/passwd")
        self._groups = _table(root / "etc/group")

    def ids(self, user: str) -> tuple[int, int]:
        """uid and gid; raises TestbedError for an unknown user."""
        if user not in self._users:
            raise TestbedError(f"no user {user!r} on the node", f"there are: {', '.join(sorted(self._users))}")
        return int(self._users[user][2]), int(self._users[user][3])

    def groups(self, user: str) -> list[int]:
        listed = [int(g[2]) for g in self._groups.values() if user in g[3].split(",")]
        return sorted({self.ids(user)[1], *listed})

    def home(self, user: str) -> str:
        self.ids(user)
        return self._users[user][5]


def _table(path: Path) -> dict[str, list[str]]:
    return {line.split(":")[0]: line.split(":") for line in path.read_text().splitlines() if line}
