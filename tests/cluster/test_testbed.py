"""The testbed itself: a cluster of its own, so that it can be killed without harm to other tests."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("testbed")

TESTBED = Path(__file__).resolve().parents[1] / "testbed" / "testbed"
INSTANCE = f"{os.environ.get('HPCCR_TESTBED') or 'tests'}-selftest"
ENVIRONMENT = {**os.environ, "HPCCR_TESTBED": INSTANCE}
CRASHES = 60 if os.environ.get("HPCCR_SOAK") else 6


def run(*arguments: str, check: bool = True, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a testbed command with `text` as its standard input."""
    command = [str(TESTBED), *arguments]
    return subprocess.run(
        command, env=ENVIRONMENT, text=True, input=text or "", capture_output=True, timeout=120, check=check
    )


def on(node: str, command: str, user: str = "user1", check: bool = True) -> str:
    return run("exec", node, "--user", user, "--", "sh", "-c", command, check=check).stdout.strip()


def wait_until(condition: Callable[[], object], within: float, what: str) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within:.0f} s"
        time.sleep(0.05)


def traces() -> list[str]:
    """Everything on this machine that belongs to the instance."""
    found = [str(path) for top in ("/run", "/var/lib") if (path := Path(top, "hpccr-testbed", INSTANCE)).exists()]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/hpccr-testbed/{INSTANCE}")]
    # But not those of instances beside it, whose names may begin like this one's.
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [line for line in mounts if f"hpccr-testbed/{INSTANCE}/" in line.replace(" ", "/")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            member = f"/hpccr-testbed/{INSTANCE}/" in (process / "cgroup").read_text()
            # Of the testbed's own processes, those that were started for this instance.
            command = (process / "cmdline").read_bytes()
            script = str(TESTBED).encode() in command
            script = script and f"HPCCR_TESTBED={INSTANCE}".encode() in (process / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it is ending
            continue
        if member or script:
            found.append(f"{process}: {command!r}")
    return found


@pytest.fixture(scope="module")
def selftest() -> Iterator[None]:
    run("up", "--nodes", "2")
    yield
    run("down")
    wait_until(lambda: not traces(), 10, "no trace left")


def slurm_state(node: str) -> str:
    rows = json.loads(run("status", "--json").stdout)
    return str(next(row["slurm"] for row in rows if row["node"] == node))


def test_instances_come_and_go_beside_each_other() -> None:
    """What the last one removes is not removed under one that is just being made."""
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import cgroups
for _ in range(300):
    cgroups.create(sys.argv[2], "node1")
    cgroups.destroy(sys.argv[2])
"""
    names = [f"{INSTANCE}-{number}" for number in range(3)]
    processes = [subprocess.Popen([sys.executable, "-c", script, str(TESTBED.parent), name]) for name in names]
    assert [process.wait(60) for process in processes] == [0, 0, 0]


def test_exec_passes_exit_code_stdin_and_user(selftest: None) -> None:
    done = run("exec", "node1", "--user", "user2", "--", "sh", "-c", "id -un; cat; exit 7", check=False, text="hello")
    assert (done.returncode, done.stdout) == (7, "user2\nhello")
    assert run("exec", "node1", "--", "sh", "-c", "kill -9 $$", check=False).returncode == 137
    assert run("exec", "node1", "--", "no-such-command", check=False).returncode == 127


def test_the_command_dies_with_exec(selftest: None) -> None:
    with subprocess.Popen([TESTBED, "exec", "node1", "--", "sleep", "4242"], env=ENVIRONMENT) as process:
        wait_until(lambda: on("node1", "pgrep -f 'sleep [4]242'", check=False), 30, "the command runs")
        process.kill()
    wait_until(lambda: not on("node1", "pgrep -f 'sleep [4]242'", check=False), 30, "the command is gone")


def test_a_node_looks_like_a_node(selftest: None) -> None:
    assert on("node2", "hostname") == "node2"
    assert on("node1", "command -v hpccr; command -v hpccrd").splitlines() == [
        "/usr/local/bin/hpccr",
        "/usr/local/bin/hpccrd",
    ]
    assert on("node1", "stat -c %a /shared/home/user2") == "700"
    assert "Read-only" in on("node1", "touch /src/x 2>&1", user="root", check=False)
    assert on("node1", "cat /proc/self/cgroup | cut -d: -f3 | sort -u") == "/"
    shared = Path(run("path", "shared").stdout.strip())
    on("node1", "echo data > /shared/home/user1/file")
    assert (shared / "home/user1/file").read_text() == "data\n"
    boot_ids = {on(node, "cat /proc/sys/kernel/random/boot_id") for node in ("ctl", "node1", "node2")}
    assert len(boot_ids) == 3


def test_nothing_leads_outside(selftest: None) -> None:
    # An address for documentation (RFC 5737): there is a route, and it answers at once.
    assert "via 10.77.0.254" in on("node1", "ip route get 192.0.2.1")
    refused = on("node1", "nc -n -v -w 30 192.0.2.1 80 2>&1 </dev/null; echo $?", check=False)
    assert "No route to host" in refused and refused.endswith("1")


def test_jobs_run_and_leave_nothing(selftest: None, tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.write_text(run("leftovers", "snapshot").stdout)
    job = "sbatch --wait -N2 -n8 -o out --wrap 'echo $SLURM_TASKS_PER_NODE; srun hostname' >/dev/null; cat out"
    # Two jobs at once, each wanting all CPUs of both nodes.
    first, second = f"mkdir -p a; cd a; {job}", f"mkdir -p b; cd b; {job}"
    output = on("ctl", f"({first}) & ({second}); wait")
    assert sorted(output.splitlines()) == ["4(x2)"] * 2 + ["node1"] * 8 + ["node2"] * 8
    done = run("leftovers", "check", str(before), "--wait", "15", check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_leftovers_are_told(selftest: None, tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.write_text(run("leftovers", "snapshot").stdout)
    on("node1", "ip link add left0 type vxlan id 9 dstport 9", user="root")
    on("node1", "nft add table inet left; touch /dev/shm/left", user="root")
    done = run("leftovers", "check", str(before), check=False)
    on("node1", "ip link del left0; nft delete table inet left; rm /dev/shm/left", user="root")
    told = done.stdout.splitlines()
    wanted = ["link left: left0 (vxlan)", "nft left: table inet left", "file left: /dev/shm/left"]
    assert told == [f"node1: {line}" for line in wanted]
    assert run("leftovers", "check", str(before), "--wait", "5").stdout == ""


def test_requeue_is_quick(selftest: None) -> None:
    script = 'echo "${SLURM_RESTART_COUNT:-0}" >> runs; exec sleep 1000'
    job = on("ctl", f"rm -f runs; sbatch --parsable -o /dev/null --wrap '{script}'")
    wait_until(lambda: on("ctl", "cat runs", check=False) == "0", 15, "the job runs")
    on("ctl", f"scontrol requeue {job}")
    started = time.monotonic()
    # 6 s is the least that Slurm 24.11 allows; the rest is for a loaded machine.
    wait_until(lambda: on("ctl", "cat runs") == "0\n1", 20, "the job runs again")
    print(f"requeued and running again after {time.monotonic() - started:.1f} s")
    on("ctl", f"scancel {job}")


def test_partition_is_silence_and_heals(selftest: None) -> None:
    ping = "ping -c1 -W1 node2 >/dev/null; echo $?"
    assert on("node1", ping) == "0"
    run("partition", "node2")
    assert on("node1", ping) == "1"
    assert on("node2", "cat /sys/class/net/eth0/carrier") == "1"
    assert '"partitioned"' in run("status", "--json").stdout
    run("heal", "node2")
    wait_until(lambda: on("node1", ping) == "0", 10, "node2 answers")


def test_power_off_keeps_the_disk_only(selftest: None) -> None:
    on("node2", "echo kept > /var/tmp/kept; touch /tmp/lost /run/lost /dev/shm/lost; sync", user="root")
    run("kill", "node2")
    assert run("exec", "node2", "--", "true", check=False).returncode == 1
    wait_until(lambda: slurm_state("node2").startswith("down"), 40, "Slurm misses node2")
    run("start", "node2")
    assert slurm_state("node2") == "idle"
    assert on("node2", "cat /var/tmp/kept; ls /tmp /run/lost /dev/shm 2>/dev/null | grep lost", check=False) == "kept"
    assert on("ctl", "srun -w node2 hostname") == "node2"


def test_hpccrd_is_started_again(selftest: None) -> None:
    pid = on("node1", "pgrep -x hpccrd || pgrep -f bin/[h]pccrd", user="root", check=False).split()
    if not pid:
        pytest.skip("this checkout has no hpccrd")
    on("node1", f"kill -9 {pid[0]}", user="root")
    ended = f"test -S /run/hpccr/hpccrd.sock && pgrep -f bin/[h]pccrd | grep -vx {pid[0]}"
    wait_until(lambda: on("node1", ended, user="root", check=False), 15, "a new hpccrd")


def test_whatever_is_killed_nothing_is_left() -> None:
    """SIGKILL at random points of up, start and down: the next `down` removes everything, a next `up` works."""
    seed = int(os.environ.get("HPCCR_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed} (HPCCR_SEED={seed} repeats it)")
    choose = random.Random(seed)
    for _ in range(CRASHES):
        verb, longest = choose.choice([(["up", "--nodes", "2"], 1.4), (["start", "node1"], 0.4), (["down"], 0.3)])
        if verb[0] != "up":
            run("up", "--nodes", "1")
        if verb[0] == "start":
            run("kill", "node1")
        with subprocess.Popen([TESTBED, *verb], env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(choose.uniform(0.0, longest))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        if choose.random() < 0.5:
            run("up", "--nodes", "1")
            assert on("ctl", "srun hostname") == "node1"
        run("down")
        wait_until(lambda: not traces(), 10, f"no trace left (seed {seed}): {traces()}")
