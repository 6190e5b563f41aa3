"""Tasks of arrays: what is done to one of them is done to no other."""

from __future__ import annotations

from jobs import Job, Jobs
from waiting import wait_for

TASKS = 3


def test_the_task_that_has_the_arrays_id_is_requeued_alone(jobs: Jobs) -> None:
    """The task that starts last keeps the id of the array, by which Slurm's commands mean every task of it."""
    cluster = jobs.cluster
    body = "echo on $SLURM_ARRAY_TASK_ID; until [ -e gate ]; do sleep 0.1; done; echo end"
    lines = ["--checkpoint=requeue", f"--array=1-{TASKS}", "--output=out-%a.txt"]
    last = jobs.sbatch(body, lines)
    outputs = [last.directory / f"out-{task}.txt" for task in range(1, TASKS + 1)]
    wait_for("output of all tasks", lambda: all(path.exists() and path.stat().st_size for path in outputs))
    tasks = [Job(cluster, last.user, last.directory, found["job_id"]) for found in last.records()]
    assert len(tasks) == TASKS
    others = [task for task in tasks if task.id != last.id]
    jobs.all += others
    for task in others:
        task.checkpoint()

    def comments() -> list[str]:
        return [found["comment"] for found in last.records() if found["job_id"] != last.id]

    wait_for("their comments", lambda: all(comment.startswith("hpccr: checkpoint 1") for comment in comments()))
    before = comments()
    assert "requeued" in last.hpccr_ok("requeue", "--now")
    last.wait_event("restored", within=90)
    # Its comment has been written once more since it was requeued.
    last.checkpoint()
    wait_for("its comment", lambda: "checkpoint 2" in cluster.check("ctl", "squeue", "-h", "-o", "%k", "-u", last.user))
    assert comments() == before
    last.open_gate()
    for task in tasks:
        task.wait_success()
    assert last.slurm().restarts == 1
    for task in others:
        assert task.slurm().restarts == 0 and not task.events("terminate") and not task.events("restored")
