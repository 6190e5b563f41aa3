"""Cases of hpccrd_checks.py that start an hpccrd of their own (root): embedded mode, and the unit's capabilities."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpccrd_client import DEADLINE, case

HPCCRD = str(Path(sys.executable).parent / "hpccrd")
UNIT = Path(__file__).resolve().parents[2] / "hpccr/noded/dist/hpccrd.service"


@contextmanager
def hpccrd(directory: str, *before: str, options: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """An embedded hpccrd that has told that it is ready."""
    os.makedirs(f"{directory}/own", exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(f"{directory}/notify")
        ready.settimeout(DEADLINE)
        process = subprocess.Popen(
            [*before, HPCCRD, *arguments(directory), *options],
            env=os.environ | {"NOTIFY_SOCKET": f"{directory}/notify"},
        )
        try:
            assert ready.recv(100) == b"READY=1"
            yield process
        finally:
            process.terminate()
            assert process.wait(DEADLINE) == 0
            assert ready.recv(100) == b"STOPPING=1"
            os.unlink(f"{directory}/notify")


def arguments(directory: str) -> list[str]:
    places = {"socket": "own/sock", "run": "run", "spool": "spool", "key": "key"}
    return ["--embedded", "--exit-with-parent", *(f"--{name}={directory}/{place}" for name, place in places.items())]


def run_cases(directory: str, *before: str) -> None:
    with hpccrd(directory, *before):
        assert os.stat(f"{directory}/key").st_mode & 0o777 == 0o600
        for argv in (["basic"], ["identity"], ["checkpoint", f"{directory}/store"]):
            subprocess.run(
                [sys.executable, sys.argv[0], *argv],
                env=os.environ | {"HPCCRD_SOCKET": f"{directory}/own/sock"},
                check=True,
            )
        assert os.listdir(f"{directory}/run/capsules") == []
    assert not os.path.exists(f"{directory}/own")
    assert os.listdir(f"{directory}/spool") == []


@case
async def embedded() -> None:
    """Its own socket, directories and key beside the system's hpccrd, for root's jobs."""
    with tempfile.TemporaryDirectory() as directory:
        await asyncio.to_thread(run_cases, directory)


@case
async def second() -> None:
    """The node's hpccrd is alone in its directories; embedded ones share them."""

    def run(directory: str) -> None:
        with hpccrd(directory):
            pass  # has made the key
        places = [argument for argument in arguments(directory) if argument != "--embedded"]
        os.mkdir(f"{directory}/own")
        with subprocess.Popen([HPCCRD, *places]) as first:
            try:
                asyncio.run(appears(f"{directory}/own/sock"))
                other = subprocess.run([HPCCRD, *places], capture_output=True, text=True, check=False)
                assert (other.returncode, "another hpccrd" in other.stderr) == (11, True), other
                with hpccrd(directory, options=[f"--socket={directory}/another/sock"]):
                    assert os.path.exists(f"{directory}/own/sock")
            finally:
                first.terminate()
        assert first.returncode == 0

    with tempfile.TemporaryDirectory() as directory:
        await asyncio.to_thread(run, directory)


async def appears(path: str) -> None:
    async with asyncio.timeout(DEADLINE):
        while not os.path.exists(path):
            await asyncio.sleep(0.02)


@case
async def impatient() -> None:
    """Connections without a request end when every coordinator would have given up."""

    def run(directory: str) -> None:
        Path(directory, "toml").write_text("[checkpoint]\nagent_timeout = 2.0\n")
        with hpccrd(directory, options=[f"--config={directory}/toml"]):
            environment = os.environ | {"HPCCRD_SOCKET": f"{directory}/own/sock"}
            subprocess.run([sys.executable, sys.argv[0], "silent", "wait"], env=environment, check=True)

    with tempfile.TemporaryDirectory() as directory:
        await asyncio.to_thread(run, directory)


@case
async def spool_fills() -> None:
    """Checkpoints for which there is no room, or that are given up while it is made: the job goes on, and the next one
    works."""

    def run(directory: str) -> None:
        Path(directory, "toml").write_text(f"[node]\nspool_reserve = {16 << 20}\n")
        spool = Path(directory, "spool")
        spool.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m,mode=700", "spool", spool], check=True)
        try:
            with hpccrd(directory, options=[f"--config={directory}/toml"]):
                environment = os.environ | {"HPCCRD_SOCKET": f"{directory}/own/sock"}
                for case in ("dump-without-room", "room-goes-during-a-dump", "given-up-while-room-is-made"):
                    subprocess.run([sys.executable, sys.argv[0], case, spool], env=environment, check=True)
        finally:
            subprocess.run(["umount", spool], check=True)

    with tempfile.TemporaryDirectory() as directory:
        await asyncio.to_thread(run, directory)


@case
async def unit_capabilities() -> None:
    """hpccrd works with the capabilities its unit leaves it."""
    named = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    wanted = {name.removeprefix("CAP_").lower() for line in named for name in line.split()}
    drop = ",".join(f"-{name}" for name in bounding_set() - wanted)
    with tempfile.TemporaryDirectory() as directory:
        await asyncio.to_thread(run_cases, directory, "setpriv", f"--bounding-set={drop}")


def bounding_set() -> set[str]:
    text = subprocess.run(["setpriv", "--dump"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"^Capability bounding set: (.*)$", text, re.MULTILINE)
    assert match
    return {name for name in match[1].split(",") if not name.startswith("cap_")}


@case
async def stopped() -> None:
    """A stop that comes while a capsule is being undone leaves nothing of it."""

    def run(directory: str) -> None:
        with hpccrd(directory):
            holder = subprocess.Popen(
                [sys.executable, sys.argv[0], "hold"],
                env=os.environ | {"HPCCRD_SOCKET": f"{directory}/own/sock"},
                stdout=subprocess.PIPE,
            )
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"holding\n"
            (name,) = os.listdir(f"{directory}/run/capsules")
            holder.kill()
            holder.wait()
        assert os.listdir(f"{directory}/run/capsules") == []
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
        assert name not in tables, tables

    with tempfile.TemporaryDirectory() as directory:
        await asyncio.to_thread(run, directory)


@case
async def orphaned() -> None:
    """An embedded hpccrd ends with the process that started it, however that ends, and its capsules with it."""
    with tempfile.TemporaryDirectory() as directory:
        code = "import subprocess,sys,time; p=subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()"
        parent = subprocess.Popen(
            [sys.executable, "-c", code, HPCCRD, *arguments(directory)], stdout=subprocess.PIPE, text=True
        )
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        await appears(f"{directory}/own/sock")
        holder = subprocess.Popen(
            [sys.executable, sys.argv[0], "hold"],
            env=os.environ | {"HPCCRD_SOCKET": f"{directory}/own/sock"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert select.select([pidfd], [], [], DEADLINE)[0], "hpccrd outlived its parent"
        assert holder.wait(DEADLINE) == 0
        os.close(pidfd)
        assert not os.path.exists(f"{directory}/own")
