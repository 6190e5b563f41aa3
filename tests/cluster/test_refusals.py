"""What must be refused, and what must not hurt: each gives its error and exit code, and the job lives on or an older
checkpoint is used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs import Job, Jobs
from nodes import SPOOL, USERS, Cluster, stopped
from test_store import new_pids
from turnstile import PHASES, Turnstile
from waiting import wait_for
from workloads import Workloads

FAILED, NO_CHECKPOINT, CORRUPT, UNSUPPORTED, PEER_LOST = 1, 10, 12, 13, 14


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command ended with that code and one error message with these words and a hint; no traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.startswith("hpccr: error: ") and "Traceback" not in done.stderr, done.stderr
    assert "\nhint: " in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def start(jobs: Jobs, workloads: Workloads, environment: dict[str, str] | None = None) -> Job:
    """A job on two nodes that computes until it is cancelled."""
    job = jobs.submit(workloads.stencil(), environment=environment)
    job.wait_event("started")
    wait_for("output", lambda: job.output.exists() and job.output.stat().st_size)
    return job


def goes_on(job: Job, workloads: Workloads) -> None:
    """The job runs, and all it has printed is what it would have printed undisturbed. It is ended here."""
    size = job.output.stat().st_size
    wait_for("more output", lambda: job.output.stat().st_size > size)
    job.cancel()
    check_steps(job, workloads)


def check_steps(job: Job, workloads: Workloads) -> None:
    """Beside the job's own lines only mpirun's last words may be in its output."""
    lines = job.said().splitlines(keepends=True)
    workloads.check_endless("".join(line for line in lines if line.startswith("step ")))


def lives_on(job: Job, workloads: Workloads) -> None:
    """The same, and it can be checkpointed as ever."""
    job.checkpoint()
    goes_on(job, workloads)


# --- the other user ---------------------------------------------------------------------------------------------------


def test_another_users_job(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    job = start(jobs, workloads)
    for verb in ("checkpoint", "requeue", "status"):
        refused(job.hpccr(verb, user="user2"), FAILED, "belongs to user1")
        refused(job.hpccr(verb, "--dir", "/shared/home/user1/.hpccr", user="user2"), FAILED, "Permission denied")
    # Even who knows where the coordinator listens gets nowhere without the step's secret.
    endpoint = json.loads((job.step() / "endpoint.json").read_text())
    forged = cluster.home("user2") / "forged"
    step = forged / job.store.name / "0"
    cluster.write(step / "step.json", (job.step() / "step.json").read_text(), "user2")
    cluster.write(step / "endpoint.json", json.dumps(endpoint | {"secret": "0" * 64}), "user2")
    try:
        done = job.hpccr("checkpoint", "--dir", cluster.there(forged), user="user2")
        refused(done, PEER_LOST, "is not the step's coordinator")
    finally:
        shutil.rmtree(forged)
    assert not job.events("checkpoint")
    lives_on(job, workloads)


def test_another_users_checkpoint(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    job = start(jobs, workloads)
    job.requeue_and_hold()
    job.cancel()
    job.release()
    copy = cluster.home("user2") / "copied"
    shutil.copytree(job.store.parent, copy)
    for path in (copy, *copy.rglob("*")):
        os.chown(path, USERS["user2"], USERS["user2"])
    try:
        done = cluster.run(
            cluster.nodes[2], "hpccr", "restore", str(job.id), "--dir", cluster.there(copy), user="user2"
        )
        refused(done, CORRUPT, "user 1001, not 1002")
    finally:
        shutil.rmtree(copy)


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def own_pack(checkpoint: Path) -> Path:
    """The largest pack of capsule 1 that no other checkpoint shares."""
    packs = [path for path in (checkpoint / "capsule-1").glob("*.pack") if path.stat().st_nlink == 1]
    return max(packs, key=lambda path: path.stat().st_size)


def flip_a_byte(checkpoint: Path) -> None:
    flip(own_pack(checkpoint))


def flip_a_byte_of_the_index(checkpoint: Path) -> None:
    flip(checkpoint / "capsule-0" / "index.bin")


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def cut_a_file(checkpoint: Path) -> None:
    os.truncate(own_pack(checkpoint), own_pack(checkpoint).stat().st_size - 1)


def remove_a_file(checkpoint: Path) -> None:
    own_pack(checkpoint).unlink()


def link_elsewhere(checkpoint: Path) -> None:
    """A symbolic link to a file with another content."""
    pack = own_pack(checkpoint)
    pack.unlink()
    pack.symlink_to("/etc/hosts")


def claim(checkpoint: Path, **changes: object) -> None:
    """Change what a fragment says of itself."""
    path = checkpoint / "capsule-1" / "fragment.json"
    sealed = json.loads(path.read_text())
    body = json.loads(sealed["body"]) | changes
    path.write_text(json.dumps(sealed | {"body": json.dumps(body)}))


def claim_another_node(checkpoint: Path) -> None:
    claim(checkpoint, node="elsewhere")


def break_the_seal(checkpoint: Path) -> None:
    path = checkpoint / "capsule-0" / "fragment.json"
    sealed = json.loads(path.read_text())
    path.write_text(json.dumps(sealed | {"seal": "0" * 64}))


def exchange_capsules(checkpoint: Path) -> None:
    one, other = checkpoint / "capsule-0", checkpoint / "capsule-1"
    one.rename(checkpoint / "between")
    other.rename(one)
    (checkpoint / "between").rename(other)


DAMAGES = (
    flip_a_byte,
    flip_a_byte_of_the_index,
    cut_a_file,
    remove_a_file,
    link_elsewhere,
    claim_another_node,
    break_the_seal,
    exchange_capsules,
)


def test_a_damaged_checkpoint_is_not_restored(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """Each damage is found. Undamaged, both capsules come back on one node, outside Slurm."""
    job = start(jobs, workloads)
    job.requeue_and_hold()
    job.cancel()
    job.release()
    cluster.forget_images()  # it may have run where it is restored
    checkpoint = job.step() / "ckpt-000001"
    good = job.directory / "good"
    shutil.copytree(checkpoint, good)
    restore = ("sh", "-c", f"cd {cluster.there(job.directory)} && exec hpccr restore {job.id} >> out.txt")
    for damage in DAMAGES:
        damage(checkpoint)
        print(damage.__name__)
        refused(cluster.run(cluster.nodes[2], *restore, user="user1"), CORRUPT)
        shutil.rmtree(checkpoint)
        shutil.copytree(good, checkpoint, symlinks=True)
        for path in (checkpoint, *checkpoint.rglob("*")):
            os.chown(path, USERS["user1"], USERS["user1"])
    size = job.output.stat().st_size
    whole = cluster.popen(cluster.nodes[2], *restore, user="user1")
    try:
        wait_for("more output", lambda: job.output.stat().st_size > size)
        assert job.wait_event("restored")["nodes"] == [cluster.nodes[2]] * 2
        whole.terminate()
        _, errors = whole.communicate(timeout=60)
    finally:
        whole.kill()
    assert "Traceback" not in errors, errors
    check_steps(job, workloads)


def another_jobs_fragment(other: Job) -> Callable[[Path], None]:
    def put(checkpoint: Path) -> None:
        shutil.rmtree(checkpoint / "capsule-1")
        shutil.copytree(other.step() / "ckpt-000001" / "capsule-1", checkpoint / "capsule-1")
        for path in (checkpoint / "capsule-1", *(checkpoint / "capsule-1").iterdir()):
            os.chown(path, USERS["user1"], USERS["user1"])

    return put


def damage_by(jobs: Jobs, workloads: Workloads, *, foreign: bool) -> Callable[[Path], None]:
    """What damages a checkpoint: a flipped byte, or a fragment of another job, which is started here for that."""
    if not foreign:
        return flip_a_byte
    other = start(jobs, workloads)
    other.checkpoint()
    return another_jobs_fragment(other)


@pytest.mark.parametrize("foreign", [False, True], ids=["tampered", "another job's"])
def test_the_older_checkpoint_is_used(jobs: Jobs, workloads: Workloads, foreign: bool) -> None:
    job = start(jobs, workloads)
    damage = damage_by(jobs, workloads, foreign=foreign)
    job.checkpoint()
    job.requeue_and_hold()
    job.forget_images()
    damage(job.step() / "ckpt-000002")
    job.release()
    assert job.wait_event("restored")["sequence"] == 1
    assert any("checkpoint 2 " in event["text"] for event in job.events("warning"))
    goes_on(job, workloads)


@pytest.mark.parametrize("foreign", [False, True], ids=["tampered", "another job's"])
def test_no_older_checkpoint(jobs: Jobs, workloads: Workloads, foreign: bool) -> None:
    """The job fails with the documented code; it is not started from the beginning behind its owner's back."""
    job = start(jobs, workloads)
    damage = damage_by(jobs, workloads, foreign=foreign)
    job.requeue_and_hold()
    job.forget_images()
    damage(job.step() / "ckpt-000001")
    job.release()
    ended = job.wait_over()
    assert (ended.states, ended.code) == ({"FAILED"}, CORRUPT)
    assert "hpccr: error: " in job.said() and "hint: " in job.said()


# --- trouble during a checkpoint --------------------------------------------------------------------------------------

PATIENT = {f"HPCCR_CHECKPOINT_{phase}_TIMEOUT": "60" for phase in ("PREPARE", "FREEZE", "DUMP")}


def test_an_agent_killed_in_each_phase(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """The step goes on in place from the older checkpoint."""
    job = start(jobs, workloads, PATIENT)
    nodes = job.slurm().nodes
    for number, phase in enumerate(PHASES[1:], 1):
        whole = job.checkpoint()
        (agent,) = cluster.pids(nodes[1], r"-m hpccr agent|/hpccr agent")
        # The hpccrd that is stopped in this phase is the agent's: the other one's capsule can be taken down at once.
        order = nodes if PHASES.index(phase) % 2 == 0 else nodes[::-1]
        with Turnstile(cluster, job, order) as turnstile:
            client = cluster.popen("ctl", "hpccr", "checkpoint", str(job.id), user="user1")
            turnstile.hold_in(phase)
            os.kill(agent, signal.SIGKILL)
            job.wait_event("lost", number)
        client.communicate(timeout=60)
        assert client.returncode == PEER_LOST, phase
        restored = job.wait_event("restored", number)
        assert restored["sequence"] >= whole["sequence"], phase
        if phase != "flush":
            # What had been frozen, dumped, even released on some node is not a checkpoint.
            assert restored["sequence"] == whole["sequence"], phase
    goes_on(job, workloads)


def test_a_node_that_does_not_answer_in_time(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    # What prepare writes out may take as long as a dump. They hold for the checkpoint that succeeds as well.
    limits = {"HPCCR_CHECKPOINT_PREPARE_TIMEOUT": "5", "HPCCR_CHECKPOINT_DUMP_TIMEOUT": "10"}
    job = start(jobs, workloads, limits)
    slow = job.slurm().nodes[1]
    with cluster.stopped(slow):
        client = cluster.popen("ctl", "hpccr", "checkpoint", str(job.id), user="user1")
        wait_for("phase aborting", lambda: job.status()["status"]["phase"] == "aborting", within=60)
    output, errors = client.communicate(timeout=60)
    refused(subprocess.CompletedProcess([], client.returncode, output, errors), PEER_LOST, slow, "preparing")
    job.wait_event("checkpoint-failed")
    (failed,) = job.events("checkpoint-failed")
    assert failed["code"] == PEER_LOST
    lives_on(job, workloads)


def test_the_spool_is_full(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    job = start(jobs, workloads)
    node = job.slurm().nodes[1]
    job.checkpoint()
    with cluster.small_spool(node, "1m"):
        refused(job.hpccr("checkpoint"), FAILED, node, "spool")
        refused(job.hpccr("requeue"), FAILED, node, "spool")
    assert [event["sequence"] for event in job.events("released")] == [1]
    assert list((cluster.root(node) / SPOOL[1:]).iterdir()) == cluster.kept(node)
    lives_on(job, workloads)


def test_a_requeue_without_its_final_checkpoint(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """The job is told to end, as without hpccr. That is not its end: the checkpoint before is restored."""
    job = start(jobs, workloads)
    node = job.slurm().nodes[1]
    job.checkpoint()
    with cluster.small_spool(node, "1m"):
        job.requeue("scontrol")
    assert job.wait_event("restored")["sequence"] == 1
    assert (job.wait_event("ended")["why"], job.events("finished")) == ("requeue", [])
    assert any("no final checkpoint before the requeue" in event["text"] for event in job.events("warning"))
    goes_on(job, workloads)


def test_a_requeue_does_not_wait_for_a_slow_flush(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """Nor for a checkpoint that waits for it."""
    job = start(jobs, workloads)
    node = job.slurm().nodes[1]
    with ExitStack() as stack:
        first = stack.enter_context(cluster.popen("ctl", "hpccr", "checkpoint", str(job.id), user="user1"))
        with stopped(new_pids(cluster, node, set())):
            second = stack.enter_context(cluster.popen("ctl", "hpccr", "checkpoint", str(job.id), user="user1"))
            assert job.wait_event("waiting")["pending"] == 1
            cluster.check("ctl", "scontrol", "requeue", str(job.id), user=job.user)
            job.wait_event("requeued", within=25)  # the epilog then waits for the flush
        assert job.wait_event("restored")["sequence"] == 2
        second.communicate(timeout=60)
        assert second.returncode != 0
        first.communicate(timeout=60)
    goes_on(job, workloads)


def test_the_store_is_full(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    with cluster.small_share("small", "300m", "user1") as store:
        there = {"HPCCR_STORE_DIR": store}
        job = start(jobs, workloads, there)
        job.checkpoint()
        filler, rest = cluster.here(store) / "filler", cluster.here(store) / "rest"
        space = os.statvfs(filler.parent)
        cluster.write(filler, bytes(space.f_bavail * space.f_frsize - (128 << 10)), "user1")
        refused(job.hpccr("checkpoint"), FAILED, "No space left")
        assert job.wait_event("flush-failed")["sequence"] == 2
        found = {row["sequence"]: row["state"] for row in job.status()["checkpoints"]}
        assert found[1] == "complete" and found.get(2) != "complete"
        # Not even the manifest can be written: nobody is killed for that.
        cluster.fill(rest, "user1")
        refused(job.hpccr("requeue"), FAILED, "cannot write", "No space left")
        rest.unlink()
        # The manifest can be, and what the tasks were killed for is flushed until there is room.
        failures = len(job.events("flush-failed"))
        with cluster.popen(
            "ctl", "env", f"HPCCR_STORE_DIR={store}", "hpccr", "requeue", str(job.id), user="user1"
        ) as client:
            job.wait_event("flush-failed", failures + 1)
            filler.unlink()
            output, _ = client.communicate(timeout=60)
        assert client.returncode == 0, output
        newest = job.events("released")[-1]["sequence"]
        assert job.wait_event("restored")["sequence"] == newest
        lives_on(job, workloads)
        # What a job ends with does not depend on whether that can be written down.
        last = jobs.submit("sh -c 'until test -e gate; do sleep 0.1; done'", nodes=1, tasks=1, environment=there)
        last.wait_event("started")
        cluster.fill(rest, "user1")
        last.open_gate()
        last.wait_success()
        assert "error" not in last.said()


def test_what_cannot_be_checkpointed(jobs: Jobs) -> None:
    """A process in namespaces of its own: refused by name before anything is frozen."""
    inside = "trap 'exit 0' TERM; sleep 60 & wait"  # a first process ignores what it has no handler for
    job = jobs.submit(f'unshare --user --pid --fork sh -c "{inside}"', nodes=1, tasks=1)
    job.wait_event("started")
    wait_for("the program", lambda: job.cluster.pids(job.slurm().nodes[0], "^sleep 60"))
    refused(job.hpccr("checkpoint"), UNSUPPORTED, "(unshare)")
    assert not job.events("released")
