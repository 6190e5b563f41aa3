"""The test cluster seen from the machine that it runs on: commands on its nodes, its shared storage, its troubles."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from waiting import wait_for

CHECKOUT = Path(__file__).resolve().parents[2]
TESTBED = CHECKOUT / "tests" / "testbed" / "testbed"
sys.path.append(str(TESTBED.parent))

from enter import Entry  # noqa: E402
from paths import Instance, TestbedError  # noqa: E402

USERS = {"user1": 1001, "user2": 1002}
SPOOL = "/var/spool/hpccr"

_SYS_OPEN_TREE, _SYS_MOVE_MOUNT = 428, 429
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_CLONE_NEWNS = 0x00020000


class Failure(AssertionError):
    """A command on a node ended otherwise than it should."""


def send(number: int, pids: Iterable[int]) -> None:
    """Signal processes that were seen a moment ago. What has ended since then is none of the sender's business."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """Processes that stand still in this block."""
    pids = list(pids)
    send(signal.SIGSTOP, pids)
    try:
        yield
    finally:
        send(signal.SIGCONT, pids)


class Cluster:
    """A running testbed. Paths on nodes are given as nodes see them, unless a docstring says otherwise."""

    def __init__(self, name: str) -> None:
        self.name = name
        # What steers the tests is not for the nodes, where HPCCR_ variables are hpccr's settings.
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("HPCCR_", "PYTEST_"))}
        self.environment = {**outside, "HPCCR_TESTBED": name}
        rows = json.loads(self._testbed("status", "--json").stdout)
        self.nodes: tuple[str, ...] = tuple(row["node"] for row in rows if row["node"] != "ctl")
        self.shared = Path(self._testbed("path", "shared").stdout.strip())
        """/shared, as this machine sees it."""

    @classmethod
    def running(cls, name: str) -> Cluster | None:
        """The cluster if it is up and every node of it runs."""
        environment = {**os.environ, "HPCCR_TESTBED": name}
        found = subprocess.run([TESTBED, "status", "--json"], env=environment, capture_output=True, text=True)
        if found.returncode or any(row["state"] != "running" for row in json.loads(found.stdout)):
            return None
        return cls(name)

    @classmethod
    def up(cls, name: str, nodes: int = 4) -> Cluster:
        """Boot a cluster."""
        environment = {**os.environ, "HPCCR_TESTBED": name}
        subprocess.run([TESTBED, "up", "--nodes", str(nodes)], env=environment, check=True)
        return cls(name)

    def down(self) -> None:
        self._testbed("down")

    def _testbed(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TESTBED, *arguments], env=self.environment, capture_output=True, text=True, check=True, timeout=180
        )

    def kill(self, node: str) -> None:
        self._testbed("kill", node)

    def start(self, node: str) -> None:
        self._testbed("start", node)

    # --- commands -----------------------------------------------------------------------------------------------

    def run(
        self, node: str, *command: str, user: str = "root", input: str | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node to its end, whatever its exit code, which is as a shell gives it."""
        pipes = {"stdin": subprocess.DEVNULL if input is None else subprocess.PIPE}
        try:
            process = self.popen(node, *command, user=user, **pipes)
        except TestbedError as error:  # of a node that is off
            return subprocess.CompletedProcess(command, 1, "", f"{error}\n")
        with process:
            try:
                output, errors = process.communicate(input, timeout)
            except BaseException:
                process.kill()
                raise
        code = process.returncode
        return subprocess.CompletedProcess(command, code if code >= 0 else 128 - code, output, errors)

    def check(
        self, node: str, *command: str, user: str = "root", input: str | None = None, timeout: float = 120
    ) -> str:
        """Run a command that has to succeed; its standard output. Raises Failure with all it said."""
        done = self.run(node, *command, user=user, input=input, timeout=timeout)
        if done.returncode:
            raise Failure(f"{user}@{node}: {' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def popen(self, node: str, *command: str, user: str = "root", **options: object) -> subprocess.Popen[str]:
        """Start a command on a node; killing the process kills the command. As `testbed exec` does, but for the start
        of an interpreter, which took most of the time of many tests. Raises TestbedError when the node is off."""
        settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        with closing(Entry(Instance(self.name), node, user, self.environment)) as entry, entry.children():
            return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
                command, env=entry.environment, text=True, errors="replace", preexec_fn=entry.become, **settings
            )

    def call(self, node: str, function: Callable[[], Any], within: float = 30.0) -> Any:
        """What function() gives (JSON can hold it) on a node, as root, in a copy of this process. Raises Failure."""
        reading, writing = os.pipe()
        with closing(Entry(Instance(self.name), node, "root", self.environment)) as entry, entry.children():
            child = os.fork()
            if child == 0:
                _answer(entry, function, writing)
        os.close(writing)
        data = b""
        deadline = time.monotonic() + within
        try:
            while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
                if not (piece := os.read(reading, 1 << 20)):
                    break
                data += piece
            else:
                raise Failure(f"{node}: {function} is not done after {within:.0f} s")
        finally:
            os.close(reading)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        kind, value = json.loads(data or '["failed", "it died"]')
        if kind == "failed":
            raise Failure(f"{node}: {function}: {value}")
        return value

    # --- files --------------------------------------------------------------------------------------------------

    def here(self, path: str | Path) -> Path:
        """A path below /shared, as this machine sees it."""
        return self.shared / Path(path).relative_to("/shared")

    def there(self, path: Path) -> str:
        """A path of this machine below the shared storage, as the nodes see it."""
        return str(Path("/shared") / path.relative_to(self.shared))

    def home(self, user: str) -> Path:
        """A user's home, as this machine sees it."""
        return self.shared / "home" / user

    def write(self, path: Path, content: str | bytes, user: str) -> Path:
        """Write a file of a user (a path of this machine), with the directories that are missing."""
        uid = USERS[user]
        for directory in reversed([path.parent, *path.parent.parents]):
            if not directory.exists():
                directory.mkdir(mode=0o755)
                os.chown(directory, uid, uid)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        os.chown(path, uid, uid)
        return path

    def root(self, node: str) -> Path:
        """A node's root directory, as this machine sees it."""
        return Path(f"/proc/{self.pid_one(node)}/root")

    def pid_one(self, node: str) -> int:
        return int(Path(f"/run/hpccr-testbed/{self.name}/{node}.pid").read_text())

    # --- Slurm --------------------------------------------------------------------------------------------------

    def drain(self, *nodes: str) -> None:
        """No new job goes to these nodes until resume()."""
        self.check("ctl", "scontrol", "update", f"nodename={','.join(nodes)}", "state=drain", "reason=test")

    def resume(self) -> None:
        """Every node takes jobs again. For nodes that take them already this does nothing."""
        states = self.check("ctl", "sinfo", "-h", "-N", "-o", "%N %T").split("\n")
        if drained := sorted({line.split()[0] for line in states if "drain" in line}):
            self.check("ctl", "scontrol", "update", f"nodename={','.join(drained)}", "state=resume")

    # --- processes ----------------------------------------------------------------------------------------------

    def pids(self, node: str, pattern: str) -> list[int]:
        """Processes on a node whose command line matches, as this machine numbers them; capsules included."""
        found = []
        for pid in self._members(node):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if re.search(pattern, line):
                found.append(pid)
        return sorted(found)

    def activity(self, node: str) -> str:
        """The users' processes on a node, a line each: state, what it waits for, seconds of processor time, command."""
        lines = []
        for pid in self._members(node):
            try:
                place = Path(f"/proc/{pid}")
                if place.stat().st_uid == 0:
                    continue
                state, *rest = (place / "stat").read_text().rpartition(") ")[2].split()
                spent = (int(rest[10]) + int(rest[11])) / os.sysconf("SC_CLK_TCK")
                line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                lines.append(f"{pid} {state} {(place / 'wchan').read_text()} {spent:.2f} {line[:120]}")
            except (FileNotFoundError, ProcessLookupError):
                continue
        return "\n".join(lines)

    def _members(self, node: str) -> list[int]:
        """Every process of a node, in whatever pid namespace."""
        top = Path(f"/sys/fs/cgroup/freezer/hpccr-testbed/{self.name}/{node}")
        found: set[int] = set()
        for directory, _, _ in os.walk(top):
            try:
                found.update(int(pid) for pid in Path(directory, "cgroup.procs").read_text().split())
            except OSError:
                continue
        return sorted(found - {0})

    def pid_on_node(self, pid: int) -> int:
        """The number that a process of this machine has on its node."""
        status = Path(f"/proc/{pid}/status").read_text()
        return int(re.findall(r"^NSpid:\t(.*)$", status, re.MULTILINE)[0].split()[1])

    def hpccrd(self, node: str) -> int:
        """The node's daemon, as this machine numbers it."""
        return wait_for(
            f"hpccrd on {node}", lambda: min(self.pids(node, r"python\S* -I /usr/local/bin/hpccrd"), default=None)
        )

    @contextmanager
    def stopped(self, node: str) -> Iterator[None]:
        """The node's hpccrd does not get a turn in this block."""
        with stopped([self.hpccrd(node)]):
            yield

    # --- images in the spools -----------------------------------------------------------------------------------

    def kept(self, node: str) -> list[Path]:
        """What is kept in a node's spool for restores there, as this machine sees it."""
        return sorted((self.root(node) / SPOOL[1:]).glob("kept-*"))

    def forget_images(self) -> None:
        """From now on every restore reads the store."""
        for node in self.nodes:
            for path in self.kept(node):
                shutil.rmtree(path, ignore_errors=True)  # hpccrd may be at it as well

    # --- troubles -----------------------------------------------------------------------------------------------

    @contextmanager
    def small_spool(self, node: str, size: str) -> Iterator[None]:
        """A file system of `size` in the place of the node's spool."""
        self.check(node, "mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "small", SPOOL)
        try:
            yield
        finally:
            self.check(node, "umount", SPOOL)

    @contextmanager
    def small_share(self, name: str, size: str, user: str, *, disk: bool = False) -> Iterator[str]:
        """A file system of `size` that all nodes share, owned by `user`; its path on the nodes, below /shared.

        disk: ext4 instead of a tmpfs, so that it can be frozen or fail(). Without a journal: a file system that cannot
        write its own ends at once.
        """
        place = self.shared / name
        place.mkdir()
        uid = USERS[user]
        image = self.shared / f"{name}.ext4"
        if disk:
            subprocess.run(["truncate", "-s", size, image], check=True)
            owner = ["-E", f"root_owner={uid}:{uid}"]
            subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", *owner, image], check=True)
            subprocess.run(["mount", "-o", "loop", image, place], check=True)
            (place / "lost+found").rmdir()
            place.chmod(0o700)
        else:
            options = f"size={size},mode=0700,uid={uid},gid={uid}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "small", place], check=True)
        mounted = []
        try:
            for node in ("ctl", *self.nodes):
                _mount_on(self.pid_one(node), str(place), f"/shared/{name}")
                mounted.append(node)
            yield f"/shared/{name}"
        finally:
            for node in mounted:
                self.run(node, "umount", "-l", f"/shared/{name}")
            subprocess.run(["umount", "-l", place], check=True)
            place.rmdir()
            image.unlink(missing_ok=True)

    def fill(self, path: Path, user: str) -> None:
        """Write a file (a path of this machine) until its file system is full, whoever else writes there meanwhile."""
        self.write(path, "", user)
        with path.open("ab", buffering=0) as file:
            for piece in (bytes(1 << 20), bytes(1 << 12)):
                try:
                    while True:
                        file.write(piece)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    @contextmanager
    def failing(self, share: str) -> Iterator[None]:
        """The device below a small share on disk can be read but not written: EIO at the next sync. ext4 refuses what
        the loop device writes to an immutable file."""
        image = self.here(share).with_suffix(".ext4")
        subprocess.run(["chattr", "+i", image], check=True)
        try:
            yield
        finally:
            subprocess.run(["chattr", "-i", image], check=True)

    @contextmanager
    def unmounted(self, share: str, *nodes: str) -> Iterator[None]:
        """A small share is gone from these compute nodes (default: all), and comes back."""
        gone = []
        try:
            for node in nodes or self.nodes:
                self.check(node, "umount", "-l", share)
                gone.append(node)
            yield
        finally:
            for node in gone:
                _mount_on(self.pid_one(node), str(self.here(share)), share)


def _mount_on(pid: int, here: str, there: str) -> None:
    """Mount what is mounted at `here` also at `there` in the mount namespace of another process (open_tree(2))."""
    child = os.fork()
    if child == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        step = "open_tree"
        tree = libc.syscall(_SYS_OPEN_TREE, -100, here.encode(), _OPEN_TREE_CLONE)
        if tree >= 0:
            step = "setns"
            namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
            if libc.setns(namespace, _CLONE_NEWNS) == 0:
                step = "move_mount"
                if libc.syscall(_SYS_MOVE_MOUNT, tree, b"", -100, there.encode(), _MOVE_MOUNT_F_EMPTY_PATH) == 0:
                    os._exit(0)
        os.write(2, f"{step}: {os.strerror(ctypes.get_errno())}\n".encode())
        os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise Failure(f"cannot mount {here} at {there} for process {pid}")


def _answer(entry: Entry, function: Callable[[], Any], writing: int) -> NoReturn:
    entry.become()
    try:
        answer = ["done", function()]
    except BaseException:
        answer = ["failed", traceback.format_exc()]
    with os.fdopen(writing, "w") as pipe:
        json.dump(answer, pipe)
    os._exit(0)


def last_lines(path: Path, count: int) -> str:
    """The end of a log, for a report; a remark if there is none."""
    try:
        lines: Sequence[str] = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"({error})"
    return "\n".join(lines[-count:])
