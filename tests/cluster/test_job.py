"""What a job keeps of its own: input, output, exit code, signals; and what `hpccr status` and `list` tell."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import Job, Jobs
from nodes import Cluster
from waiting import wait_for
from workloads import SOURCES, Workloads

PIPELINE = f"sh {SOURCES}/pipeline.sh 80 100000 gate"

COUNTER = """\
import signal, sys, time
from pathlib import Path

def note(number, frame):
    print(f"got {signal.Signals(number).name}", flush=True)
    if number == signal.SIGUSR2:
        sys.exit(7)

for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
    signal.signal(number, note)
print("ready", flush=True)
while True:
    signal.pause()
"""


def running(job: Job, text: str) -> Job:
    job.wait_event("started")
    job.wait_output(text)
    return job


# --- input and output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["< /dev/null", "< input.txt", "< <(cat input.txt)"], ids=["null", "file", "pipe"])
def test_standard_input(jobs: Jobs, source: str) -> None:
    """It reaches the program as it is, and a restored program does not read any of it twice."""
    content = "".join(f"line {number} {'x' * (number % 200)}\n" for number in range(20000))
    command = f"{PIPELINE} {source}"
    twin = jobs.submit(command, nodes=1, tasks=1, files={"input.txt": content, "gate": ""}, plain=True)
    twin.wait_success()
    job = jobs.submit(command, nodes=1, tasks=1, files={"input.txt": content})
    running(job, "round 5")
    if "cat" not in source:  # what fed the pipe is outside of the checkpoint and starts again
        job.requeue()
    job.open_gate()
    job.wait_success()
    assert job.said() == twin.said()


READER = """\
import os, sys, time

for line in sys.stdin:
    print(line.strip(), flush=True)
    time.sleep(0.005)
    while line == "2500\\n" and not os.path.exists("gate"):
        time.sleep(0.05)
"""


def test_input_is_read_where_it_was_left(jobs: Jobs) -> None:
    """A program that has read a part of its input is restored: it gets the rest."""
    content = "".join(f"{number}\n" for number in range(3000))
    job = jobs.submit(
        "python3 -u program.py < input.txt", nodes=1, tasks=1, files={"input.txt": content, "program.py": READER}
    )
    running(job, "\n500\n")
    job.requeue()
    job.wait_output("\n2000\n")
    job.requeue("scontrol")
    job.open_gate()
    job.wait_success()
    assert job.said() == content


def test_standard_error_is_kept_apart(jobs: Jobs) -> None:
    twin = jobs.submit(PIPELINE, nodes=1, tasks=1, stderr=True, files={"gate": ""}, plain=True)
    twin.wait_success()
    job = running(jobs.submit(PIPELINE, nodes=1, tasks=1, stderr=True), "round 20")
    job.requeue()
    job.open_gate()
    job.wait_success()
    assert job.said() == twin.said()
    assert job.errors.read_text() == twin.errors.read_text() != ""


def test_output_redirected_in_the_script(jobs: Jobs) -> None:
    """`> file` truncates when the requeued script comes to it again; what was in it is put back."""
    twin = jobs.submit(f"{PIPELINE} > result.txt", nodes=1, tasks=1, files={"gate": ""}, plain=True)
    twin.wait_success()
    job = jobs.submit(f"{PIPELINE} > result.txt", nodes=1, tasks=1)
    result = job.directory / "result.txt"
    wait_for("output", lambda: result.exists() and "round 20" in result.read_text())
    job.requeue()
    job.open_gate()
    job.wait_success()
    assert result.read_text() == (twin.directory / "result.txt").read_text()


LINES = """\
number=0
until [ -e gate ]; do
    number=$((number + 1))
    printf '%d %01000d\\n' $number 0
    sleep 0.02
done
"""


def check_lines(output: Path) -> None:
    lines = output.read_text().splitlines()
    assert lines == [f"{number + 1} {0:01000}" for number in range(len(lines))] and lines


def test_a_disk_that_is_full_for_a_while_costs_no_output(jobs: Jobs, cluster: Cluster) -> None:
    """The job waits, and is not checkpointed; when there is room again it goes on as if nothing had been."""
    with cluster.small_share("output", "4m", "user1") as share:
        job = jobs.submit(f"bash lines.sh >> {share}/out.txt", nodes=1, tasks=1, files={"lines.sh": LINES})
        output, filler = cluster.here(share) / "out.txt", cluster.here(share) / "filler"
        job.wait_event("started")
        grows(output)
        cluster.fill(filler, "user1")
        assert "No space left on device" in job.wait_event("warning")["text"]
        refused = job.hpccr("checkpoint")
        assert refused.returncode == 1 and "output cannot be written" in refused.stderr, refused.stderr
        filler.unlink()
        assert "nothing is missing" in job.wait_event("warning", 2)["text"]
        job.requeue()
        grows(output)
        job.open_gate()
        job.wait_success()
        check_lines(output)


def grows(output: Path) -> None:
    size = output.stat().st_size if output.exists() else 0
    wait_for("more output", lambda: output.exists() and output.stat().st_size > size)


def test_output_of_a_job_that_starts_from_the_beginning_again(jobs: Jobs) -> None:
    """Requeued without a checkpoint to go on from, it prints what a single run prints, where it is appended too."""
    job = jobs.submit("--fresh bash lines.sh", nodes=1, tasks=1, files={"lines.sh": LINES})
    job.wait_event("started")
    grows(job.output)
    job.hpccr_ok("requeue")
    job.wait_event("started", 2)
    grows(job.output)
    job.open_gate()
    job.wait_success()
    check_lines(job.output)


# --- exit codes and signals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "number"),
    [("true", 0, 0), ("sh -c 'exit 139'", 139, 0), ("sh -c 'kill -SEGV $$'", 0, 11), ("sh -c 'kill -KILL $$'", 0, 9)],
)
def test_exit_codes(jobs: Jobs, command: str, code: int, number: int) -> None:
    """Slurm keeps what a job ended with apart from the signal that ended it."""
    twin = jobs.submit(command, nodes=1, tasks=1, plain=True)
    job = jobs.submit(command, nodes=1, tasks=1)
    ended = job.wait_over()
    twin.wait_over()
    assert (ended.code, ended.signal) == (code, number)
    assert ended.states == ({"FAILED"} if code or number else {"COMPLETED"})
    assert job.accounted() == twin.accounted()
    assert job.events("finished")[0]["exit_code"] == (128 + number if number else code)


def test_exit_code_of_a_restored_job(jobs: Jobs) -> None:
    job = jobs.submit(f"sh -c '{PIPELINE}; exit 5'", nodes=1, tasks=1)
    running(job, "round 5")
    job.requeue()
    job.open_gate()
    assert job.wait_over().code == 5


def test_an_mpi_job_that_fails(jobs: Jobs, workloads: Workloads) -> None:
    """One rank's failure is the job's, also under hpccr."""
    command = "mpirun.mpich -n 4 sh -c 'exit $((PMI_RANK == 3 ? 9 : 0))'"
    twin = jobs.submit(command, plain=True)
    assert jobs.submit(command).wait_over().code == twin.wait_over().code != 0


def test_signals(jobs: Jobs) -> None:
    """They reach the program, before and after a restore, and do no harm to hpccr's own helpers."""
    job = jobs.submit("python3 -u counter.py", nodes=2, tasks=2, files={"counter.py": COUNTER})
    running(job, "ready")
    job.signal("USR1", "--batch")
    job.wait_output("got SIGUSR1\n")
    job.requeue()
    job.signal("USR1", "--batch")
    job.wait_output("got SIGUSR1\ngot SIGUSR1\n")
    job.signal("USR1", "--full")  # to everything in the job, the agents among it
    job.wait_output("got SIGUSR1\ngot SIGUSR1\ngot SIGUSR1\n")
    job.signal("ALRM", "--batch")
    job.wait_output("got SIGALRM\n")
    job.signal("USR2", "--batch")
    assert job.wait_over().code == 7
    assert job.said().endswith("got SIGUSR2\n")
    assert not job.events("lost")


def test_a_cancelled_job_stops_at_once(jobs: Jobs, workloads: Workloads) -> None:
    job = jobs.submit(workloads.stencil())
    running(job, "step 2 ")
    job.cluster.check("ctl", "scancel", str(job.id), user=job.user)
    # KillWait is 30 s: it ended by itself.
    assert job.wait_over(within=20).states == {"CANCELLED"}
    assert not job.events("checkpoint")


# --- several runs in a script -----------------------------------------------------------------------------------------


def test_what_has_finished_is_not_run_again(jobs: Jobs) -> None:
    """The second `hpccr run` of a script is checkpointed; after the requeue the first one is passed over."""
    job = jobs.submit(PIPELINE, nodes=1, tasks=1, before="hpccr run sh -c 'echo first' >> first.txt")
    running_step = wait_for("the second step", lambda: job.events("started", step=1))
    assert running_step
    job.wait_output("round 5")
    job.hpccr_ok("requeue")
    wait_for("restored", lambda: job.events("restored", step=1), within=60)
    job.open_gate()
    job.wait_success()
    assert (job.directory / "first.txt").read_text() == "first\n"
    assert job.said().count("round 5 ") == 1 and "done 80" in job.said()


COUNT = """\
number=0
until [ -e "$1" ]; do
    number=$((number + 1))
    echo "$1 $number"
    sleep 0.05
done
"""


def test_two_steps_that_are_both_requeued_from_a_store_of_their_own(jobs: Jobs, cluster: Cluster) -> None:
    """What Slurm starts again is the script, which comes to its second step once. Commands find the job without being
    told where its checkpoints are, and what they show of it does not take the user's own comment."""
    job = jobs.submit(
        "bash count.sh second",
        nodes=1,
        tasks=1,
        options=("--comment=mine",),
        environment={"HPCCR_STORE_DIR": f"/shared/home/user1/{jobs.name}/store"},
        before="hpccr run bash count.sh first",
        files={"count.sh": COUNT},
    )

    def hpccr(verb: str, *arguments: str) -> str:
        return cluster.check("ctl", "hpccr", verb, *arguments, user="user1")

    def shown() -> dict[str, Any]:
        (found,) = job.records()
        return found

    def running_row() -> dict[str, Any] | None:
        (row,) = json.loads(hpccr("list", "--json"))
        return row if row["state"] == "running" else None

    for number, name in enumerate(("first", "second")):
        job.wait_event("started", step=number)
        grows(job.output)
        row = wait_for("a running job in the list", running_row)
        assert (row["job"], row["step"]) == (str(job.id), str(number))
        hpccr("checkpoint", str(job.id))
        wait_for("its checkpoint", lambda: shown()["extra"].startswith("hpccr: checkpoint "))
        assert shown()["comment"] == "mine"
        cluster.drain(*cluster.nodes)
        hpccr("requeue", "--now", str(job.id))
        found = shown()
        # Slurm would hold it back (AuthInfo's cred_expire).
        assert found["job_state"] == ["PENDING"] and found["eligible_time"]["number"] <= time.time() + 1
        cluster.resume()
        job.wait_event("restored", step=number)
        cluster.write(job.directory / name, "", job.user)
    job.wait_success()
    for step in (0, 1):
        assert [len(job.events(event, step=step)) for event in ("started", "restored", "finished")] == [1, 1, 1]
    lines = job.said().splitlines()
    counts = {name: sum(line.startswith(name) for line in lines) for name in ("first", "second")}
    assert lines == [f"{name} {number + 1}" for name, count in counts.items() for number in range(count)]


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_status_and_list(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    job = jobs.submit(workloads.stencil())
    running(job, "step 2 ")
    nodes = job.slurm().nodes
    found = job.status()
    assert found["live"] and found["status"]["state"] == "running"
    assert tuple(found["status"]["nodes"]) == nodes and found["status"]["capsules"] == 2
    released = job.checkpoint()
    last = job.status()["status"]["last"]
    assert (last["sequence"], last["complete"]) == (1, True) and last["bytes"] == released["bytes"]
    told = job.hpccr_ok("status")
    assert "running" in told and "complete" in told
    (row,) = json.loads(cluster.check("ctl", "hpccr", "list", "--json", user="user1"))
    assert (row["job"], row["state"], row["last"]["sequence"]) == (str(job.id), "running", 1)
    assert str(job.id) in cluster.check("ctl", "hpccr", "list", user="user1")
    job.requeue_and_hold()
    found = job.status()
    assert not found["live"] and [row["state"] for row in found["checkpoints"]] == ["complete", "complete"]
    job.release()
    job.wait_event("restored")
    job.cancel()
    found = job.status()
    assert not found["live"] and not found["problem"]
    # Somebody else's eyes see nothing of it.
    assert json.loads(cluster.check("ctl", "hpccr", "list", "--all", "--json", user="user2")) == []


def test_jobs_that_are_not_there(cluster: Cluster, untouched: None) -> None:
    for verb in ("status", "checkpoint", "requeue"):
        done = cluster.run("ctl", "hpccr", verb, "999999", user="user1")
        assert done.returncode == 1 and "999999" in done.stderr and "hint: " in done.stderr
    assert cluster.run("ctl", "hpccr", "status", user="user1").returncode == 2
    assert cluster.run("ctl", "hpccr", "frobnicate", user="user1").returncode == 2
    done = cluster.run("node1", "hpccr", "run", user="user1")
    assert done.returncode == 2 and "hint: " in done.stderr
