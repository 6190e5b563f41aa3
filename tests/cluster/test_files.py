"""Files of a job that was killed at some moment after a checkpoint, and restored, are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
from pathlib import Path

from jobs import Job, Jobs
from nodes import Cluster
from test_store_faults import frozen
from waiting import rounds, soak, wait_for
from workloads import MPICH, OPEN_MPI, SOURCES, Workloads

TREE = "mkdir tree"


def command(workloads: Workloads, steps: int, seed: int) -> str:
    mpirun = OPEN_MPI.format(each=2, ranks=4)
    return f"{mpirun} python3 {SOURCES}/files.py --seed {seed} --steps {steps} --tree tree --gate gate files"


def contents(top: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of everything in a directory."""
    return {
        str(path.relative_to(top)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(top.rglob("*"))
    }


def steps_done(job: Job) -> int:
    said = job.output.read_text() if job.output.exists() else ""
    return max([0, *(int(line.split()[1]) for line in said.splitlines() if line.startswith("step "))])


def runs_on(job: Job, steps: int, last: int) -> None:
    """For that many steps more, if it has so many before its gate."""
    step = min(steps_done(job) + steps, last - 30)
    wait_for(f"step {step} of job {job.id}", lambda: steps_done(job) >= step, within=90)


def lose_a_part(job: Job, cluster: Cluster) -> None:
    """Kill the agent of its second node, so that hpccr takes down what is left and restores the newest checkpoint."""
    restored = len(job.events("restored"))
    cluster.check(job.slurm().nodes[1], "pkill", "-KILL", "-u", job.user, "-f", "hpccr agent --endpoint")
    job.wait_event("restored", restored + 1)


def test_files_are_those_of_an_undisturbed_run(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """Written in place, by MPI-IO from all ranks, mapped, by SQLite, replaced, removed; a directory of closed files.

    HPCCR_SEED gives the moments.
    """
    seed = workloads.seed
    dice = random.Random(seed)
    steps = rounds(1200, 5000)
    twin = jobs.submit(command(workloads, steps, seed), before=f"{TREE}; touch gate", plain=True)
    twin.wait_success()
    job = jobs.submit(f"--files=tree {command(workloads, steps, seed)}", before=f"test -d tree || {TREE}")
    losses = rounds(2, 8)
    for number in range(losses):
        runs_on(job, dice.randrange(1, 150), steps)
        job.checkpoint()
        runs_on(job, dice.randrange(1, 100), steps)
        if number == 0:
            told = job.hpccr_ok("inspect")
            assert f"everything in {cluster.there(job.directory)}/tree" in told and "files/shared" in told
            found = json.loads(job.hpccr_ok("inspect", "--json"))
            saved = [Path(file["path"]).name for file in found["files"] if stat.S_ISREG(file["mode"])]
            # Both capsules have it open: it is saved once.
            assert saved.count("shared") == 1 and saved.count("log") == 4 and "counter" in saved
        lose_a_part(job, cluster)
    job.requeue()
    job.open_gate()
    job.wait_success()
    assert job.said() == twin.said()
    assert f"database {steps} ok" in job.said()
    for name in ("files", "tree"):
        found, expected = contents(job.directory / name), contents(twin.directory / name)
        assert found.keys() == expected.keys()
        assert [path for path in found if found[path] != expected[path]] == []


# --- beside the job ---------------------------------------------------------------------------------------------------

NUMBERS = "number=0; until [ -e gate ]; do number=$((number + 1)); echo $number; sleep 0.02; done"


def test_what_the_script_writes_beside_the_job(jobs: Jobs, cluster: Cluster) -> None:
    """Its own output is in a directory of --files and the job's is another file: nobody takes anything of it back."""
    beside = "(until [ -e beside ]; do sleep 0.1; done; echo said meanwhile) & said=$!"
    command = f"hpccr run --files=. bash -c '{NUMBERS}' > numbers.txt 2>&1"
    script = f"echo begin; {beside}\n{command}\nwait $said; echo end"
    job = jobs.sbatch(script, ["--open-mode=append"], nodes=2, tasks=2)
    job.wait_event("started")
    job.checkpoint()
    cluster.write(job.directory / "beside", "", job.user)
    job.wait_output("said meanwhile\n")
    lose_a_part(job, cluster)
    cluster.write(job.directory / "gate", "", job.user)
    job.wait_success()
    assert job.said() == "begin\nsaid meanwhile\nend\n"
    numbers = (job.directory / "numbers.txt").read_text().split()
    assert numbers == [str(number + 1) for number in range(len(numbers))] and numbers


APPENDER = """\
import os, time

def wait(condition):
    while not condition():
        time.sleep(0.02)

own = open("out.txt", "a", buffering=1)
for number in range(1, 61):
    for held, gate in ((21, "more"), (41, "gate")):
        wait(lambda: number != held or os.path.exists(gate))
    print("printed", number, flush=True)
    wait(lambda: f"printed {number}\\n" in open("out.txt").read())
    print("appended", number, file=own)
"""


def test_a_job_that_appends_to_its_own_output(jobs: Jobs, cluster: Cluster) -> None:
    """What it wrote last before the checkpoint comes back, and all that it prints afterwards is in the file."""
    job = jobs.submit("python3 appender.py", tasks=2, files={"appender.py": APPENDER})
    job.wait_output("appended 20\n")
    job.checkpoint()
    cluster.write(job.directory / "more", "", job.user)
    job.wait_output("appended 40\n")
    lose_a_part(job, cluster)
    job.wait_output("appended 40\n")
    job.requeue()
    job.open_gate()
    job.wait_success()
    assert job.said() == "".join(f"printed {number}\nappended {number}\n" for number in range(1, 61))


# --- killed in a rollback ---------------------------------------------------------------------------------------------

BLOCKS = 128
REWRITER = f"""\
import os, random, sys, time

dice = random.Random(1)
with open(sys.argv[1], "w+b", buffering=0) as file:
    for number in range({BLOCKS}):
        file.write(number.to_bytes(8) * (1 << 17))
    for step in range(1, 401):
        for held, gate in ((100, "more"), (380, "gate")):
            while step == held and not os.path.exists(gate):
                time.sleep(0.05)
        os.pwrite(file.fileno(), step.to_bytes(8), dice.randrange({BLOCKS} << 20))
        print("step", step, flush=True)
        time.sleep(0.01)
print("done", flush=True)
"""


def rewritten() -> bytes:
    """What the program above leaves."""
    dice = random.Random(1)
    content = bytearray(b"".join(number.to_bytes(8, "big") * (1 << 17) for number in range(BLOCKS)))
    for step in range(1, 401):
        place = dice.randrange(BLOCKS << 20)
        content[place : place + 8] = step.to_bytes(8, "big")
    return bytes(content)


def test_killed_in_the_middle_of_a_rollback(jobs: Jobs, cluster: Cluster) -> None:
    """The agent that it is done for, and the hpccrd that does it: it is done again, and the file is as it was."""
    with cluster.small_share("rolling", "400m", "user1", disk=True) as share:
        place = cluster.here(share)
        job = jobs.submit(f"python3 -u big.py {share}/big", tasks=2, files={"big.py": REWRITER})
        job.wait_output("step 20\n")
        whole = job.checkpoint()["sequence"]
        # Not before: what is written after the checkpoint is what there is to roll back.
        cluster.write(job.directory / "more", "", job.user)
        runs_on(job, 20, 400)
        node, other = job.slurm().nodes
        cluster.check(other, "pkill", "-KILL", "-u", job.user, "-f", "hpccr agent --endpoint")
        for number, pattern in enumerate((r"-m hpccr agent|/hpccr agent", r"python\S* -I /usr/local/bin/hpccrd")):
            # What was there before has been taken down by now.
            job.wait_event("boot", 2 + number)
            half = place / ".big.0.hpccr-rollback"
            before = changed(half)
            wait_for("a rollback", lambda: changed(half) > before, every=0.001)  # noqa: B023 - called in this turn only
            with frozen(place):  # so that it is not done before it is killed
                assert half.exists() and not job.events("restored")
                os.kill(cluster.pids(node, pattern)[0], signal.SIGKILL)
        assert job.wait_event("restored")["sequence"] == whole
        job.open_gate()
        job.wait_success()
        assert job.said() == "".join(f"step {step}\n" for step in range(1, 401)) + "done\n"
        assert [path.name for path in place.iterdir()] == ["big"]
        assert (place / "big").read_bytes() == rewritten()


def changed(path: Path) -> int:
    """When; 0 where there is nothing."""
    try:
        return path.stat().st_ctime_ns
    except FileNotFoundError:
        return 0


# --- any history ------------------------------------------------------------------------------------------------------


def history(steps: int, seed: int, *options: str) -> str:
    program = f"python3 {SOURCES}/history.py --seed {seed} --steps {steps} --gate gate {' '.join(options)} files"
    return f"{MPICH.format(ranks=2)} -ppn 1 {program}"


def logged(job: Job) -> int:
    """Steps of the slower of its two processes."""
    logs = [job.directory / "files" / f"rank-{rank}" / "log" for rank in range(2)]
    return min(log.read_bytes().count(b"\n") if log.exists() else 0 for log in logs)


def go_on(job: Job, steps: int, last: int) -> None:
    step = min(logged(job) + steps, last - 40)
    wait_for(f"step {step} of job {job.id}", lambda: logged(job) >= step, within=90)


def test_any_history_of_files(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """Random operations on open files, and in a directory of --files on closed ones too. HPCCR_SEED gives them."""
    seed = workloads.seed
    dice = random.Random(seed)
    steps = rounds(1500, 8000)
    pairs: list[tuple[Job, Job]] = []
    for options in ((), ("--closed",)):
        before = "test -d files || mkdir files"
        command = history(steps, seed, *options)
        trees = "--files=files " if options else ""
        twin = jobs.submit(command, before=f"{before}; touch gate", tasks=2, plain=True)
        pairs.append((twin, jobs.submit(f"{trees}{command}", before=before, tasks=2)))
    for _ in range(rounds(2, 10)):
        for _, job in pairs:
            go_on(job, dice.randrange(1, 150), steps)
            job.checkpoint()
        for _, job in pairs:
            go_on(job, dice.randrange(1, 100), steps)
            lose_a_part(job, cluster)
    for number, (_, job) in enumerate(pairs):
        if soak() or seed % len(pairs) == number:
            job.requeue(dice.choice(["hpccr", "scontrol"]) if soak() else "hpccr")
        job.open_gate()
    for twin, job in pairs:
        job.wait_success()
        twin.wait_success()
        assert job.said() == twin.said() == "done\ndone\n"
        found, expected = contents(job.directory / "files"), contents(twin.directory / "files")
        assert found.keys() == expected.keys()
        assert [path for path in found if found[path] != expected[path]] == []
