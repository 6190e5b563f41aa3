"""Jobs that are not what the count of requeues in their environment says, and those that are gone on with by hand."""

from __future__ import annotations

import json

import pytest

from jobs import Jobs
from waiting import wait_for

GATED = "echo begun; until [ -e gate ]; do sleep 0.1; done; echo end"


@pytest.mark.parametrize(("plugin", "how"), [(True, "hpccr"), (False, "scontrol")])
def test_a_job_that_is_submitted_inside_a_requeued_one(jobs: Jobs, plugin: bool, how: str) -> None:
    """It gets that one's count of requeues along, and Slurm replaces it only once this one is requeued itself."""
    inherited = {"SLURM_RESTART_COUNT": "2"}
    if plugin:
        body = f'echo "count ${{SLURM_RESTART_COUNT-none}}"; {GATED}'
        # And what a heterogeneous job says of itself, which hpccr refuses.
        job = jobs.sbatch(body, ["--checkpoint=requeue"], environment=inherited | {"SLURM_HET_SIZE": "2"})
    else:
        body = f'echo "count $SLURM_RESTART_COUNT"; exec hpccr run sh -c "{GATED}"'
        job = jobs.sbatch(body, ["--requeue --open-mode=append"], environment=inherited)
    job.wait_output("begun")
    job.requeue(how, avoid=False)
    job.open_gate()
    job.wait_success()
    assert job.slurm().restarts == 1 and len(job.events("restored")) == 1
    assert job.said() == f"count {'none' if plugin else 2}\nbegun\nend\n"


def test_a_job_that_was_requeued_and_is_gone_on_with_in_another(jobs: Jobs) -> None:
    job = jobs.sbatch(GATED, ["--checkpoint=requeue"])
    job.wait_output("begun")
    job.requeue("scontrol", avoid=False)
    job.cancel()
    other = jobs.sbatch(f"exec hpccr restore {job.id}")
    record = job.step() / "step.json"
    wait_for("the job to run again", lambda: json.loads(record.read_text())["state"] == "running" or other.slurm().over)
    # The script has been one all the time, and is not sent what asks for a checkpoint.
    other.signal("USR1", "--batch")
    wait_for("its checkpoint", lambda: [event["reason"] for event in job.events("released")][1:] == ["signal"])
    job.open_gate()
    other.wait_success()
    assert len(job.events("restored")) == 2 and other.said().endswith("end\n")


def test_two_at_once_in_one_job(jobs: Jobs) -> None:
    """Neither goes back to its beginning when the job is requeued by way of the other."""
    run = 'hpccr run sh -c "echo {0} begun; until [ -e gate ]; do sleep 0.1; done; echo {0} end" >> {0}.txt &'
    # One after the other, in both runs of the job: which step each of them is, is decided by that.
    turn = "until [ -e turn-${SLURM_RESTART_COUNT:-0} ]; do sleep 0.1; done"
    job = jobs.sbatch(f"{run.format('a')} {turn}; {run.format('b')} wait", ["--requeue"])

    def next_turn(restarts: int) -> None:
        job.cluster.write(job.directory / f"turn-{restarts}", "", job.user)

    a, b = job.directory / "a.txt", job.directory / "b.txt"
    wait_for("the first one's output", lambda: a.exists() and a.read_text())
    next_turn(0)
    assert "step 0 of the job runs at the same time" in job.wait_event("warning", step=1)["text"]
    wait_for("the second one's output", lambda: b.exists() and b.read_text())
    said = job.hpccr_ok("requeue").splitlines()
    assert [line.split(" is ")[0].rpartition("/")[2] for line in said] == ["0", "1"]
    job.wait_event("restored", within=90)
    next_turn(1)
    job.wait_event("restored", step=1)
    job.open_gate()
    job.wait_success()
    assert (a.read_text(), b.read_text()) == ("a begun\na end\n", "b begun\nb end\n")
