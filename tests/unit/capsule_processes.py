"""Real launch roots and hpccr-rsh on the loopback device, as the user who runs the tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CAPSULE = Path(__file__).resolve().parents[2] / "hpccr" / "capsule"
SECRET = "5ec2e7" * 8
DEADLINE = 30.0

# launch.py with constants changed: what takes seconds in a job must not take them in a test.
VARIED = """
import sys
sys.path.append({path!r})
from hpccr.capsule import link, root
link.HANDSHAKE_TIMEOUT = {handshake}
root.HANGUP_GRACE = {grace}
root.become_subreaper()
root.main([root.SUBREAPER_DONE, *sys.argv[1:]])
"""


class Endpoint:
    """Where a launch root listens (or, without a process, something else or nothing does), and hpccr-rsh to it."""

    def __init__(self, process: subprocess.Popen[bytes] | None, port: int) -> None:
        self._process = process
        self.port = port

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        base = {"PATH": os.environ["PATH"], "HPCCR_STEP_SECRET": SECRET, "HPCCR_PYTHON": sys.executable}
        return base | {"HPCCR_RSH_PORT": str(self.port)} | dict(extra or {})

    def start(self, *words: str, env: Mapping[str, str] | None = None, **options: object) -> subprocess.Popen[bytes]:
        """hpccr-rsh 127.0.0.1 WORDS... with pipes for all streams unless told otherwise."""
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [str(CAPSULE / "hpccr-rsh"), "127.0.0.1", *words]
        return subprocess.Popen(command, env=self.environment(env), **(streams | options))  # type: ignore[call-overload]

    def run(
        self, *words: str, input: bytes = b"", env: Mapping[str, str] | None = None, **options: object
    ) -> subprocess.CompletedProcess[bytes]:
        with self.start(*words, env=env, **options) as process:
            out, err = process.communicate(input, timeout=DEADLINE)
        return subprocess.CompletedProcess(process.args, process.returncode, out or b"", err or b"")

    def connect(self) -> socket.socket:
        """A bare connection, not authenticated."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)


@contextmanager
def launch_root(
    *command: str, index: int = 1, handshake: float = 10.0, grace: float = 5.0, env: Mapping[str, str] | None = None
) -> Iterator[Endpoint]:
    """A launch root on a free port of 127.0.0.1, killed at the end."""
    port = free_port()
    varied = VARIED.format(path=str(CAPSULE.parents[1]), handshake=handshake, grace=grace)
    arguments = ["--index", str(index), "--address", "127.0.0.1", "--port", str(port), "--", *command]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", varied, *arguments],
        env={"PATH": os.environ["PATH"], "HPCCR_STEP_SECRET": SECRET} | dict(env or {}),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=default_signals,
    )
    try:
        wait_until(lambda: is_listening(port) or process.poll() is not None)
        assert process.poll() is None
        yield Endpoint(process, port)
    finally:
        process.kill()
        process.wait()


def launch(*command: str, env: Mapping[str, str] | None = None, **options: object) -> subprocess.Popen[bytes]:
    """launch.py as capsule init starts it, without listening; stdin, stdout and stderr are pipes."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    arguments = [sys.executable, "-I", "-S", str(CAPSULE / "launch.py"), "--index", "0", "--", *command]
    environ = {"PATH": os.environ["PATH"]} | dict(env or {})
    given = streams | {"preexec_fn": default_signals} | options
    return subprocess.Popen(arguments, env=environ, start_new_session=True, **given)  # type: ignore[call-overload]


def default_signals() -> None:
    """Before exec: what these tests were started with, nohup(1) for one, is not what capsule init gives."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def is_listening(port: int) -> bool:
    """By the kernel's table: a connection would be one that the launch root has to deal with."""
    wanted = f"0100007F:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(fields[1] == wanted and fields[3] == "0A" for fields in map(str.split, lines))


def wait_until(true: Callable[[], bool]) -> None:
    """Ask again and again until it is, for things of which the kernel sends no notice; fails after DEADLINE."""
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Direct children; empty also if there is no such process."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def peak_memory(pid: int) -> int:
    """Most bytes that were ever resident."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10
