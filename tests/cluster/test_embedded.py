"""One machine without Slurm and without hpccrd: `hpccr run` as root brings its own node service."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodes import Cluster, Failure
from waiting import Late, rounds, wait_for
from workloads import OPEN_MPI, SOURCES, Workloads

NODE = "node1"
# No hpccrd is listening there, so there is none.
ENVIRONMENT = ("env", "HPCCR_NODE_SOCKET=/run/none", "HPCCR_STORE_DIR=/root/store", "OMPI_ALLOW_RUN_AS_ROOT=1")
ENVIRONMENT += ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",)
GATE = "/root/out-gate.txt"
"""The file that a job's end waits for: it cannot have ended before."""


class Machine:
    """One node, used as if it were the only machine there is."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.place = cluster.root(NODE) / "root"
        self.started: list[subprocess.Popen[str]] = []

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        return self.cluster.run(NODE, *ENVIRONMENT, "sh", "-c", command)

    def start(self, command: str) -> subprocess.Popen[str]:
        process = self.cluster.popen(NODE, *ENVIRONMENT, "sh", "-c", f"exec {command}")
        self.started.append(process)
        return process

    def check(self, *command: str) -> str:
        return self.cluster.check(NODE, *ENVIRONMENT, *command)

    def job(self, within: float = 30) -> str:
        """The name of the job that runs."""

        def look() -> str | None:
            for row in json.loads(self.check("hpccr", "list", "--json")):
                if row["state"] == "running":
                    return str(row["name"])
            return None

        return wait_for("a running job", look, within=within)

    def step(self, name: str) -> Path:
        return self.place / "store" / name / "0"


@pytest.fixture
def machine(cluster: Cluster, untouched: None, request: pytest.FixtureRequest) -> Iterator[Machine]:
    made = Machine(cluster)
    try:
        yield made
    finally:
        for process in made.started:
            process.kill()
            process.communicate()
        for name in ("store", "tree"):
            shutil.rmtree(made.place / name, ignore_errors=True)
        for path in made.place.glob("out*.txt"):
            path.unlink()


def ended(process: subprocess.Popen[str], within: float = 120) -> int:
    try:
        _, errors = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        raise Late(f"{process.args} has not ended after {within:.0f} s") from None
    if "Traceback" in errors:
        raise Failure(errors)
    return process.returncode


@pytest.mark.parametrize("library", ["mpich", "openmpi"])
def test_checkpoint_stop_and_restore(machine: Machine, workloads: Workloads, library: str) -> None:
    if library == "mpich":
        number = rounds(1000, 4000)
        undisturbed, command = workloads.pairs(number, ranks=2), workloads.pairs(number, ranks=2, pause=20, gate=GATE)
    else:
        mpirun = OPEN_MPI.format(each=2, ranks=2)
        undisturbed = f"{mpirun} python3 {SOURCES}/stencil.py --size 200 --steps {rounds(1500, 5000)}"
        command = f"{undisturbed} --rate 60 --gate {GATE}"
    out = machine.place / "out.txt"
    (machine.place / "tree").mkdir()
    first = machine.start(f"hpccr run --files=/root/tree {command} > /root/out.txt 2> /root/out-errors.txt")
    name = machine.job()
    wait_for("output", lambda: out.exists() and out.stat().st_size)
    machine.check("hpccr", "checkpoint", name)
    size = out.stat().st_size
    wait_for("more output", lambda: out.stat().st_size > size)
    machine.check("hpccr", "requeue", name)
    assert ended(first) == 0
    assert machine.shell(f"hpccr checkpoint {name}").returncode != 0
    second = machine.start(f"hpccr restore {name} >> /root/out.txt 2> /root/out-errors.txt")
    assert machine.job() == name
    machine.check("hpccr", "checkpoint", "--wait", name)
    # What --files named is remembered.
    assert json.loads(machine.check("hpccr", "inspect", name, "--json"))["trees"] == ["/root/tree"]
    (machine.place / Path(GATE).name).touch()
    assert ended(second) == 0, (machine.place / "out-errors.txt").read_text()
    twin = machine.shell(f"{undisturbed} > /root/out-twin.txt")
    assert twin.returncode == 0, twin.stderr
    assert out.read_text() == (machine.place / "out-twin.txt").read_text()


COUNT = """\
for number in $(seq 1 30); do
    while [ $number = 10 ] && [ ! -e more ]; do sleep 0.1; done
    while [ $number = 20 ] && [ ! -e gate ]; do sleep 0.1; done
    echo out $number; echo err $number >&2; sleep 0.01
done
"""


def test_the_output_of_a_restored_job_goes_into_its_directory(machine: Machine) -> None:
    """Which is put back: to a file that was not there at the checkpoint, and to one that was and was not the job's
    output. Each run writes to its own."""
    tree = machine.place / "tree"
    tree.mkdir()
    (tree / "count").write_text(COUNT)
    (tree / "more").touch()
    (tree / "results").write_text("of another program\n" * 100)
    first = machine.start("sh -c 'cd /root/tree && exec hpccr run --files=. bash count > out.1 2> err.1'")
    name = machine.job()
    wait_for("output", lambda: (tree / "err.1").exists() and "19" in (tree / "err.1").read_text())
    machine.check("hpccr", "requeue", name)
    assert ended(first) == 0
    second = machine.start(f"sh -c 'cd /root/tree && exec hpccr restore {name} > out.2 2> results'")
    assert machine.job() == name
    (tree / "gate").touch()
    assert ended(second) == 0
    said = {path.name: path.read_text().splitlines() for path in tree.glob("*")}
    for what, one, two in (("out", "out.1", "out.2"), ("err", "err.1", "results")):
        assert said[one] == [f"{what} {number}" for number in range(1, 20)]
        assert [line for line in said[two] if what in line] == [f"{what} {number}" for number in range(20, 31)]


def test_a_restore_that_comes_to_nothing_costs_no_output(machine: Machine) -> None:
    """Its images cannot be read; once they are there again, what was written since is taken back."""
    tree, out = machine.place / "tree", machine.place / "out.txt"
    tree.mkdir()
    (tree / "count").write_text(COUNT)
    first = machine.start("sh -c 'cd /root/tree && exec hpccr run bash count >> /root/out.txt 2> /dev/null'")
    name = machine.job()
    wait_for("output", lambda: out.exists() and "out 9\n" in out.read_text())
    machine.check("hpccr", "checkpoint", "--wait", name)
    (tree / "more").touch()
    wait_for("more output", lambda: "out 19\n" in out.read_text())
    (coordinator,) = machine.cluster.pids(NODE, r"bin/hpccr run bash count *$")
    os.kill(coordinator, signal.SIGKILL)
    assert ended(first) != 0
    (machine.step(name) / "endpoint.json").unlink()
    before = out.read_text()
    checkpoint = machine.step(name) / "ckpt-000001"
    (pack,) = (checkpoint / "capsule-0").glob("*.pack")
    away = pack.rename(checkpoint / "away")
    restore = f"sh -c 'cd /root/tree && exec hpccr restore {name} >> /root/out.txt 2> /root/out-errors.txt'"
    assert ended(machine.start(restore)) == 12, (machine.place / "out-errors.txt").read_text()
    assert out.read_text() == before
    away.rename(pack)
    (checkpoint / "damaged.json").unlink(missing_ok=True)
    again = machine.start(restore)
    machine.job()
    (tree / "gate").touch()
    assert ended(again) == 0
    assert out.read_text() == "".join(f"out {number}\n" for number in range(1, 31))


def test_exit_code_and_no_leftovers_of_a_killed_one(machine: Machine) -> None:
    assert machine.shell("hpccr run sh -c 'exit 3'").returncode == 3
    assert machine.shell("hpccr run sh -c 'echo lost; exit 3' >&-").returncode == 3
    assert machine.shell("echo text | hpccr run cat").stdout == "text\n"
    # It would print for ever, but that its reader's end is its own.
    assert machine.shell("hpccr run yes | head -1").stdout == "y\n"
    running = machine.start("hpccr run sleep 1000")
    machine.job()
    (coordinator,) = machine.cluster.pids(NODE, r"bin/hpccr run sleep 1000 *$")
    os.kill(coordinator, signal.SIGKILL)
    assert ended(running) != 0  # its capsule is gone with it: the fixture looks
    assert machine.shell("hpccr run true").returncode == 0  # sweeps what the other one had no time to remove


def test_not_root(machine: Machine, cluster: Cluster) -> None:
    done = cluster.run(NODE, "env", "HPCCR_NODE_SOCKET=/run/none", "hpccr", "run", "true", user="user1")
    assert done.returncode == 13 and "must be root" in done.stderr and "hint: " in done.stderr
    shutil.rmtree(cluster.home("user1") / ".hpccr")


def test_nothing_to_restore(machine: Machine) -> None:
    assert machine.shell("hpccr run true").returncode == 0
    (row,) = json.loads(machine.check("hpccr", "list", "--all", "--json"))
    done = machine.shell(f"hpccr restore {row['name']}")
    assert done.returncode == 10 and "hint: " in done.stderr
