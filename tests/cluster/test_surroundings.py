"""Jobs that have dealings with what is around them: a terminal, Slurm itself."""

from __future__ import annotations

import json
import random

from jobs import Job, Jobs
from nodes import Cluster
from waiting import rounds, wait_for
from workloads import SOURCES, Workloads

ASKING = """\
number=0
while [ $number -lt 60 ]; do
    number=$((number + 1))
    while [ $number = 58 ] && ! [ -e gate ]; do sleep 0.1; done
    # What it asks while it is checkpointed is not answered after a restart: the connection is to outside.
    until state=$(squeue --noheader --jobs $SLURM_JOB_ID --format %T 2>>asked) && [ -n "$state" ]; do sleep 0.1; done
    until known=$(scontrol show job $SLURM_JOB_ID 2>>asked); do sleep 0.1; done
    echo "step $number $state $(echo "$known" | grep -c "^JobId=$SLURM_JOB_ID ")"
done
[ -t 1 ] && stty size < /dev/tty
"""


SERVER = """\
import socket, threading
listening = socket.create_server(("", 7177))
print("ready", flush=True)

def serve(talk):
    while data := talk.recv(99):
        talk.sendall(data)

while True:
    threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()
"""

CLIENT = """\
import os, socket, time

def connect():
    talk = socket.create_connection(("ctl", 7177))
    talk.settimeout(60)
    return talk

talk, again = connect(), 0
for number in range(60):
    while number == 58 and not os.path.exists("gate"):
        time.sleep(0.05)
    while True:
        try:
            talk.sendall(b"step %d" % number)
            answer = talk.recv(99)
            if not answer:
                raise ConnectionError("closed")
            break
        except OSError as error:
            assert isinstance(error, ConnectionError), error
            talk, again = connect(), again + 1
    print(answer.decode(), flush=True)
    # Slowly: the test waits for more steps after a checkpoint, however long that took.
    time.sleep(0.05 if os.path.exists("gate") else 0.5)
print("connected again", again)
"""


def test_a_connection_to_a_server_outside(jobs: Jobs, cluster: Cluster) -> None:
    """It goes on over a checkpoint, and after a restart the program finds it ended at once, and can connect anew."""
    with cluster.popen("ctl", "python3", "-u", "-c", SERVER) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == "ready\n"
            job = jobs.submit("python3 client.py", nodes=1, tasks=1, files={"client.py": CLIENT})
            wait_for("step 3", lambda: steps(job) > 3)
            job.checkpoint()
            before = steps(job)
            wait_for("more steps", lambda: steps(job) > before + 2)
            job.requeue()
            job.open_gate()
            job.wait_success()
            assert job.said() == "".join(f"step {number}\n" for number in range(60)) + "connected again 1\n"
        finally:
            server.kill()


def steps(job: Job) -> int:
    said = job.output.read_text() if job.output.exists() else ""
    return said.count("step ")


def test_a_job_in_a_terminal_that_asks_slurm(jobs: Jobs, workloads: Workloads) -> None:
    """In `script`, on a pseudo-terminal, it calls squeue and scontrol between its steps. `script` takes a poll(2) that
    is interrupted for the end of its program."""
    dice = random.Random(workloads.seed)
    job = jobs.submit(
        "script --quiet --return --flush --command 'stty rows 33 cols 77; sh steps.sh' typescript",
        nodes=1,
        tasks=1,
        files={"steps.sh": ASKING},
    )
    for _ in range(rounds(1, 10)):
        step = min(50, steps(job) + dice.randrange(1, 8))
        wait_for(f"step {step}", lambda step=step: steps(job) >= step)  # type: ignore[misc]
        for _ in range(3):
            job.hpccr_ok("checkpoint")
        job.requeue()
    job.open_gate()
    job.wait_success()
    expected = [*(f"step {number} RUNNING 1" for number in range(1, 61)), "33 77"]
    # What was on its way through the terminal may have a carriage return more: CRIU writes it anew.
    said, typed = (
        path.read_bytes().replace(b"\r", b"").decode().splitlines()
        for path in (job.output, job.directory / "typescript")
    )
    assert said == expected
    assert [line for line in typed if line and not line.startswith("Script ")] == expected


MULTIPLEXED = """\
number=0
until [ -e enough.$1 ] && [ $number -gt 40 ]; do
    number=$((number + 1))
    echo "$1 $number $(stty size)" | tee -a said.$1
    sleep 0.1
done
touch done.$1
"""
MULTIPLEXERS = """\
export SCREENDIR=$PWD/screens
mkdir -m 700 screens
screen -c /dev/null -d -m sh steps.sh screen
tmux -f /dev/null new-session -d -x 77 -y 33 'sh steps.sh tmux; tmux wait-for -S over'
tmux wait-for over
until [ -e done.screen ]; do sleep 0.1; done
wc -l < said.tmux
"""


def test_jobs_in_tmux_and_screen(jobs: Jobs) -> None:
    """Daemons with pseudo-terminals, a client that waits for one of them, and sockets in private and shared places.

    What runs in tmux is the child of a shell: after a restart its terminal controls only the shell (README).
    """
    job = jobs.submit("sh job.sh", nodes=1, tasks=1, files={"job.sh": MULTIPLEXERS, "steps.sh": MULTIPLEXED})
    said = {name: job.directory / f"said.{name}" for name in ("tmux", "screen")}

    def sizes() -> list[int]:
        return [path.stat().st_size if path.exists() else 0 for path in said.values()]

    def at_work() -> None:
        before = sizes()
        wait_for("tmux and screen to go on", lambda: all(now > then for now, then in zip(sizes(), before, strict=True)))

    for _ in range(rounds(1, 5)):
        at_work()
        job.hpccr_ok("checkpoint")
        at_work()
        job.requeue()
    job.wait_event("restored", rounds(1, 5))
    at_work()
    for name in said:
        job.cluster.write(job.directory / f"enough.{name}", "", job.user)
    job.wait_success()
    for name, size in (("tmux", "33 77"), ("screen", "24 80")):
        lines = said[name].read_text().splitlines()
        assert lines == [f"{name} {number} {size}" for number in range(1, len(lines) + 1)]


def test_segments_are_as_long_as_before(jobs: Jobs) -> None:
    """A TCP connection made anew by CRIU would send segments of 524 bytes for the rest of its life."""
    line = "exec python3 -I $SEGMENTS $SLURM_PROCID"
    job = jobs.submit(f"srun sh -c '{line}'", nodes=2, tasks=2, environment={"SEGMENTS": f"{SOURCES}/segments.py"})
    said = [job.directory / f"segments.{number}" for number in range(2)]

    def newest() -> list[list[int]]:
        return [json.loads(path.read_text().splitlines()[-1]) for path in said]

    wait_for("both to talk", lambda: all(path.exists() and path.read_text() for path in said))
    job.hpccr_ok("checkpoint")
    before = newest()
    for number in range(1, 1 + rounds(1, 5)):
        job.requeue()
        job.wait_event("restored", number)
        wait_for("segments as long as before", lambda: all(map(no_shorter, newest(), before)))
    job.cluster.write(job.directory / "enough", "", job.user)
    job.wait_success()


def no_shorter(now: list[int], before: list[int]) -> bool:
    """On loopback they are longer once the windows have grown."""
    return all(one >= other for one, other in zip(now, before, strict=True))
