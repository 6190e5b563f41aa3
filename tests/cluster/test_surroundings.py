"""Jobs that have dealings with what is around them: a terminal, Slurm itself."""

from __future__ import annotations

import random

from jobs import Job, Jobs
from waiting import rounds, wait_for
from workloads import Workloads

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


def steps(job: Job) -> int:
    said = job.output.read_text() if job.output.exists() else ""
    return said.count("step ")


def test_a_job_in_a_terminal_that_asks_slurm(jobs: Jobs, workloads: Workloads) -> None:
    """In `script`, on a pseudo-terminal, it calls squeue and scontrol between its steps."""
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
