"""The store on shared storage: what checkpoints share, what a killed flush leaves, and a checkpoint that travels."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs import Job, Jobs
from nodes import USERS, Cluster, stopped
from waiting import Late, rounds, wait_for
from workloads import Workloads

FLUSH = r"-m hpccr\.(noded\.transfer|store\.worker flush)"


def start(jobs: Jobs, workloads: Workloads) -> Job:
    """A job on two nodes that computes until it is cancelled."""
    job = jobs.submit(workloads.stencil())
    job.wait_event("started")
    wait_for("output", lambda: job.output.exists() and job.output.stat().st_size)
    return job


def goes_on(job: Job, workloads: Workloads) -> None:
    """The job runs, and all it has printed is what it would have printed undisturbed. It is ended here."""
    size = job.output.stat().st_size
    wait_for("more output", lambda: job.output.stat().st_size > size)
    job.cancel()
    lines = job.said().splitlines(keepends=True)
    workloads.check_endless("".join(line for line in lines if line.startswith("step ")))


def complete(job: Job) -> list[int]:
    return [found["sequence"] for found in job.status()["checkpoints"] if found["state"] == "complete"]


def verified(job: Job) -> None:
    """What is listed as complete is whole, unless gc has removed it since: what is damaged stays listed as that."""
    for sequence in complete(job):
        done = job.hpccr("verify", str(sequence))
        listed = [found["sequence"] for found in job.status()["checkpoints"]]
        assert "is whole" in done.stdout or sequence not in listed, done.stdout + done.stderr


def new_pids(cluster: Cluster, node: str, known: set[int]) -> list[int]:
    """Processes of a flush that were not there before."""
    return wait_for("a flush", lambda: sorted(set(cluster.pids(node, FLUSH)) - known), every=0.005)


def test_checkpoints_share_what_did_not_change(jobs: Jobs, workloads: Workloads) -> None:
    job = start(jobs, workloads)
    for _ in range(4):
        job.checkpoint()
    found = json.loads(job.hpccr_ok("inspect", "--json"))
    size = found["summary"]["bytes"]
    assert sum(one["own"] for one in found["stored"]) < size / 4
    assert all(one["shared"] for one in found["stored"])
    ranks = [p for one in found["contents"] for p in one["processes"] if p["rank"] is not None]
    assert sorted(p["rank"] for p in ranks) == [0, 1, 2, 3], found["contents"]
    assert {p["name"] for p in ranks} == {"python3"} and all("stencil.py" in p["command"] for p in ranks)
    assert [one["ranks"] for one in found["contents"]] == [2, 2]
    assert all(p["memory"] > 1 << 20 and p["sockets"] for p in ranks)
    assert size * 0.8 < sum(one["memory"] for one in found["contents"]) < size
    files = [f for one in found["contents"] for f in one["files"] if f["path"].endswith("/residuals.txt")]
    assert files and files[0]["position"] and files[0]["access"].startswith("write")
    for one in found["contents"]:
        assert any(s["kind"] == "tcp" and s["state"] == "established" and s["peer"] for s in one["sockets"])
    assert "residuals.txt" in job.hpccr_ok("inspect", "-v") and "RANK" in job.hpccr_ok("inspect")
    wait_for("gc", lambda: complete(job) == [4, 3])
    for sequence in complete(job):
        assert "is whole" in job.hpccr_ok("verify", str(sequence))
    for path in job.store.rglob("*"):
        status = path.lstat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode) & 0o077) == (USERS["user1"], 0), path
    job.requeue()
    goes_on(job, workloads)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_restored_from_the_spool(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """On the same nodes nothing of the images is read from the store; damaged or lost copies are not used; and nothing
    stays when the job has ended."""
    job = jobs.submit(workloads.ticker())
    job.wait_output("tick")
    nodes = job.slurm().nodes
    others = [node for node in cluster.nodes if node not in nodes]
    job.checkpoint()

    def requeued(while_held: Callable[[Path], None]) -> list[bool]:
        restored = len(job.events("restored"))
        job.requeue_and_hold()
        assert [len(cluster.kept(node)) for node in nodes] == [1, 1], "the newest of each capsule is kept"
        while_held(job.step() / f"ckpt-{complete(job)[0]:06d}")
        job.release()
        cluster.drain(*others)
        local: list[bool] = job.wait_event("restored", restored + 1)["local"]
        return local

    def take_away(checkpoint: Path) -> None:
        for pack in checkpoint.glob("capsule-*/*"):
            if pack.name != "fragment.json":  # by which the coordinator knows that it is complete
                pack.unlink()

    assert requeued(take_away) == [True, True]

    def damage(checkpoint: Path) -> None:
        (one,), (other,) = (cluster.kept(node) for node in nodes)
        flip(max(one.glob("*.img"), key=lambda path: path.stat().st_size))
        shutil.rmtree(other)

    assert requeued(damage) == [False, False]
    assert [len(cluster.kept(node)) for node in nodes] == [0, 0]
    job.checkpoint()
    assert [len(cluster.kept(node)) for node in nodes] == [1, 1]
    job.cancel()
    workloads.check_ticks(job.said())
    wait_for("nothing kept", lambda: not any(cluster.kept(node) for node in nodes))


def test_what_was_found_damaged_is_not_built_upon(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """After a fall back the job makes what was damaged again; the checkpoints that follow are whole nevertheless, and
    the one that was restored stays until there are others."""
    job = start(jobs, workloads)
    job.checkpoint()
    job.requeue_and_hold()
    job.forget_images()
    damaged = job.step() / "ckpt-000002"
    packs = [path for path in (damaged / "capsule-1").glob("*.pack") if path.stat().st_nlink == 1]
    flip(max(packs, key=lambda path: path.stat().st_size))
    assert complete(job) == [2, 1]
    job.release()
    assert job.wait_event("restored")["sequence"] == 1
    assert complete(job) == [1]
    assert "found damaged" in job.hpccr_ok("status")
    for newest in (3, 4):
        job.checkpoint()
        wait_for("gc", lambda: complete(job) == [newest, {3: 1, 4: 3}[newest]])  # noqa: B023
        for sequence in complete(job):
            assert "is whole" in job.hpccr_ok("verify", str(sequence))
    goes_on(job, workloads)


ATTACH = "import sys; from hpccr.noded.syscalls import ptrace_seize; ptrace_seize(int(sys.argv[1]))"


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: values.split() for name, values in (line.split(":", 1) for line in lines)}


def is_the_users(pid: int) -> bool:
    try:
        return status_of(pid)["Uid"] == [str(USERS["user1"])] * 4
    except (FileNotFoundError, ProcessLookupError):
        return False


def outside_the_job(cluster: Cluster, job: Job, node: str, pids: list[int]) -> None:
    """The processes of a flush are not in the job's cgroups and not spared when memory runs out, and the user cannot
    get into the one that has his ids."""
    mark = f"job_{job.id}/"
    (rank, *_) = cluster.pids(node, r"ticker\.py")
    assert mark in Path(f"/proc/{rank}/cgroup").read_text()
    for pid in pids:
        assert mark not in Path(f"/proc/{pid}/cgroup").read_text()
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "0\n"
    (worker,) = filter(is_the_users, pids)
    tried = cluster.run(node, "/opt/hpccr/bin/python", "-c", ATTACH, status_of(worker)["NSpid"][-1], user="user1")
    assert "Operation not permitted" in tried.stderr, tried.stderr


def test_a_checkpoint_before_the_last_is_durable(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """By interval it is left out (or waits, where that is wanted), asked for it waits, and all that is told; a terminal
    shows how far the flush is."""
    often = {"HPCCR_CHECKPOINT_INTERVAL": "10s"}
    patient = jobs.submit(workloads.ticker(hold=16), environment=often | {"HPCCR_CHECKPOINT_BACKLOG": "wait"})
    patient.wait_event("started")
    with flush_held(patient):
        cluster.drain(*patient.slurm().nodes)
        job = jobs.submit(workloads.ticker(hold=16), environment=often)
        job.wait_event("started")
        cluster.resume()
        with flush_held(job) as (node, pids):
            outside_the_job(cluster, job, node, pids)
            terminal = cluster.popen("ctl", "script", "-qec", f"hpccr checkpoint {job.id}", "/dev/null", user="user1")
            assert job.wait_event("waiting")["pending"] == 1
            skipped = job.wait_event("skipped")
            assert (skipped["reason"], skipped["pending"]) == ("interval", 1)
            status = job.status()["status"]
            assert (status["waiting"], status["phase"]) == (True, "flush") and status["skipped"] >= 1
            assert 0 <= status["flush"]["done"] < status["flush"]["total"]
            shown = job.hpccr_ok("status")
            assert " left out" in shown and "the next one waits" in shown
            assert len(job.events("released")) == 1
        waits = patient.wait_event("waiting")
        assert (waits["reason"], waits["pending"]) == ("interval", 1)
        assert "the next one waits" in patient.hpccr_ok("status")
        ticks(patient)
        assert len(patient.events("released")) == 1 and not patient.events("durable")
    shown, _ = terminal.communicate(timeout=60)
    assert terminal.returncode == 0, shown
    assert "waits for checkpoint 1" in shown and "\u2501" in shown and "MiB" in shown, shown
    assert "checkpoint 2 of" in shown
    assert patient.wait_event("released", 2)["reason"] == "interval" and not patient.events("skipped")
    patient.requeue()
    for one in (job, patient):
        ticks(one)
        one.cancel()
        workloads.check_ticks(one.said())


def ticks(job: Job) -> None:
    size = job.output.stat().st_size
    wait_for("more output", lambda: job.output.stat().st_size > size)


@contextmanager
def flush_held(job: Job) -> Iterator[tuple[str, list[int]]]:
    """A checkpoint of the job is made, and what writes it to the store stands still on one node in this block."""
    cluster, node = job.cluster, job.slurm().nodes[1]
    client = cluster.popen("ctl", "hpccr", "checkpoint", str(job.id), user=job.user)
    pids = wait_for(
        "a worker", lambda: any(map(is_the_users, found := cluster.pids(node, FLUSH))) and found, every=0.005
    )
    with stopped(pids):
        yield node, pids
    client.communicate(timeout=60)
    assert client.returncode == 0


def test_what_was_passed_over_is_not_gone_back_to(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """A node is lost while the newest checkpoint is not flushed there, and the job goes on from the one before. That
    the flush ends after all does not make it the job's again, whose files and output are another history's by then."""
    job = start(jobs, workloads)
    job.checkpoint()
    node = job.slurm().nodes[1]

    def lose(count: int) -> None:
        (agent,) = cluster.pids(node, r"-m hpccr agent|/hpccr agent")
        os.kill(agent, signal.SIGKILL)
        assert job.wait_event("restored", count, within=120)["sequence"] == 1

    client = cluster.popen("ctl", "hpccr", "checkpoint", "--wait", str(job.id), user="user1")
    with stopped(new_pids(cluster, node, set())):
        job.wait_event("released", 2)
        lose(1)
    client.communicate(timeout=60)
    assert client.returncode != 0
    wait_for("its flush", lambda: complete(job) == [2, 1])
    assert [(event["sequence"], event["source"]) for event in job.events("abandoned")] == [(2, 1)]
    assert "abandoned: the job went on from checkpoint 1" in job.hpccr_ok("status")
    lose(2)
    assert job.checkpoint()["sequence"] == 3
    goes_on(job, workloads)


def test_killed_flushes(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """Either process of a flush is killed, at any moment: what is listed as complete is whole, and the job goes on."""
    job = start(jobs, workloads)
    chance = random.Random(workloads.seed)
    job.checkpoint()
    failed = 0
    for _ in range(rounds(5, 50)):
        node = chance.choice(job.slurm().nodes)
        known = set(cluster.pids(node, FLUSH))
        asked = cluster.popen("ctl", "hpccr", "checkpoint", "--wait", str(job.id), user="user1")
        try:
            os.kill(chance.choice(new_pids(cluster, node, known)), signal.SIGKILL)
        except (Late, ProcessLookupError):
            pass  # it was faster
        asked.communicate(timeout=120)
        failed += asked.returncode != 0
        verified(job)
    assert failed, "no flush was hit"
    assert job.checkpoint()["sequence"] in complete(job)
    job.requeue()
    goes_on(job, workloads)


def test_a_checkpoint_travels(jobs: Jobs, cluster: Cluster, workloads: Workloads) -> None:
    """Exported, removed, imported, restored on one node outside Slurm."""
    job = start(jobs, workloads)
    job.requeue_and_hold()
    job.cancel()
    job.release()
    archive = cluster.there(job.directory / "job.hpccr")
    job.hpccr_ok("export", "-o", archive)
    assert job.hpccr("rm").returncode == 11
    job.hpccr_ok("rm", "--force")
    assert not job.store.exists()
    done = cluster.check("ctl", "hpccr", "import", archive, user="user1")
    assert "goes on with it" in done
    size = job.output.stat().st_size
    restore = f"cd {cluster.there(job.directory)} && exec hpccr restore {job.store.name} >> out.txt"
    restored = cluster.popen(cluster.nodes[2], "sh", "-c", restore, user="user1")
    try:
        wait_for("more output", lambda: job.output.stat().st_size > size)
        restored.terminate()
        restored.communicate(timeout=60)
    finally:
        restored.kill()
    lines = job.said().splitlines(keepends=True)
    workloads.check_endless("".join(line for line in lines if line.startswith("step ")))
