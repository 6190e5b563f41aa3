"""hpccr.slurm and its commands against a real Slurm: what it shows when, and what helper steps live through."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import pytest

from jobs import Job, Jobs
from nodes import Cluster, send
from test_doctor import ask, doctor, failures
from waiting import wait_for

PYTHON = "/opt/hpccr/bin/python"
SCRIPT = f"{PYTHON} /src/tests/cluster/programs/signalled.py"


class Backend:
    """One way to talk to Slurm, as `q` in expressions that are evaluated on the login node."""

    def __init__(self, cluster: Cluster, name: str, made: str) -> None:
        self.name = name
        self._cluster = cluster
        self._made = f"from hpccr.slurm.query import SlurmError; {made}\n"

    def query(self, expression: str, user: str = "user1") -> Any:
        """What an expression gives a user; dataclasses as maps, sets sorted."""
        program = (
            f"{self._made}import dataclasses, json, sys\n"
            "def plain(v): return dataclasses.asdict(v) if dataclasses.is_dataclass(v) else sorted(v)\n"
            f"json.dump({expression}, sys.stdout, default=plain)"
        )
        return json.loads(self._cluster.check("ctl", PYTHON, "-c", program, user=user))

    def refused(self, expression: str, user: str) -> str:
        """The message and hint of the error that the expression raises."""
        program = f"{self._made}try:\n    {expression}\nexcept SlurmError as e:\n    print(e.message, '|', e.hint)\n"
        return self._cluster.check("ctl", PYTHON, "-c", program, user=user)


MATCHING = "from hpccr.slurm.library import matching; print(matching())"


@pytest.fixture(params=["commands", "pyslurm"])
def backend(request: pytest.FixtureRequest, cluster: Cluster) -> Backend:
    if request.param == "commands":
        return Backend(cluster, "commands", "from hpccr.slurm.commands import CommandQuery; q = CommandQuery()")
    if missing := cluster.check("ctl", PYTHON, "-c", MATCHING).strip():
        pytest.skip(missing)
    return Backend(cluster, "pyslurm", "from hpccr.slurm.library import PyslurmQuery; q = PyslurmQuery()")


def signalled(job: Job, within: float = 60) -> list[dict[str, Any]]:
    path = job.directory / "signalled.json"
    wait_for(f"a signal to job {job.id}", path.exists, within=within)
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def helper_lines(job: Job, node: str) -> list[str]:
    path = job.directory / f"helper-{node}.txt"
    return path.read_text().splitlines() if path.exists() else []


def start(jobs: Jobs, backend: Backend, *options: str) -> Job:
    """A job that uses all CPUs of two nodes, with its helpers up."""
    job = jobs.submit(f"{SCRIPT} {backend.name}", nodes=2, tasks=16, options=("--requeue", *options), plain=True)
    job.wait_output("waiting")
    for node in job.slurm().nodes:
        wait_for("helpers on all nodes", lambda node=node: helper_lines(job, node))
    return job


def test_a_job_is_seen_and_steered(cluster: Cluster, jobs: Jobs, backend: Backend) -> None:
    job = jobs.submit("sleep 300", nodes=2, tasks=4, options=("--requeue", "--job-name=seen"), plain=True)
    job.wait_state("RUNNING")
    found = backend.query(f"q.job('{job.id}')")
    assert (found["job"], found["array"], found["user"], found["uid"]) == (str(job.id), None, "user1", 1001)
    assert (found["states"], found["restarts"], found["requeue"]) == (["RUNNING"], 0, True)
    assert (found["name"], found["cluster"], found["partition"]) == ("seen", cluster.name, "main")
    assert tuple(found["nodes"]) == job.slurm().nodes and found["batch_node"] == found["nodes"][0]
    assert abs(found["start_time"] - time.time()) < 60 and found["preempt_time"] is None
    assert backend.query("q.jobs('user1')") == [found]
    assert backend.query("q.jobs('user2')") == []

    backend.query(f"q.set_comment('{job.id}', 'checkpoint 3, 1 min ago: é')")
    assert backend.query(f"q.job('{job.id}').comment") == "checkpoint 3, 1 min ago: é"
    assert backend.query(f"q.extra_text('{job.id}')") == ""
    backend.query(f"q.set_extra_text('{job.id}', 'checkpoint 3')")
    assert backend.query(f"q.extra_text('{job.id}')") == "checkpoint 3"
    assert backend.query("q.cluster()") == cluster.name
    assert "owner" in backend.refused(f"q.requeue('{job.id}')", "user2")
    assert "squeue --me" in backend.refused("q.job('999999')", "user1")

    cluster.drain(*cluster.nodes)
    backend.query(f"q.requeue('{job.id}')")
    wait_for("pending", lambda: backend.query(f"q.job('{job.id}').states") == ["PENDING"], within=60, every=0.5)
    backend.query(f"q.start_now('{job.id}')")
    cluster.resume()
    job.wait_state("RUNNING")
    found = backend.query(f"q.job('{job.id}')")
    assert found["restarts"] == 1 and found["comment"].startswith("checkpoint 3")


def test_nodes_are_seen(cluster: Cluster, backend: Backend) -> None:
    last = cluster.nodes[-1]

    def registered() -> Any:
        """From a resume on until a node has registered anew, Slurm does not know when it was booted."""
        nodes = backend.query("q.nodes()")
        return nodes if all(node["boot_time"] for node in nodes) else None

    cluster.drain(last)
    try:
        found = wait_for("all nodes to register", registered, every=0.25)
    finally:
        cluster.resume()
    assert [node["name"] for node in found] == list(cluster.nodes)
    # A flag that comes and goes on a busy machine.
    states = [[state for state in node["states"] if state != "NOT_RESPONDING"] for node in found]
    assert states == [["IDLE"]] * (len(found) - 1) + [["DRAIN", "IDLE"]]
    assert found[-1]["reason"] == "test" and abs(found[-1]["reason_time"] - time.time()) < 60
    assert all({"main", "low"} <= set(node["partitions"]) and node["boot_time"] < time.time() for node in found)


def test_a_task_of_an_array(jobs: Jobs, backend: Backend) -> None:
    job = jobs.submit("sleep 300", nodes=1, tasks=1, options=("--array=4",), plain=True)
    assert backend.query(f"q.job('{job.id}_4').job") == str(job.id)
    job.wait_state("RUNNING")
    found = backend.query(f"q.job('{job.id}_4')")
    assert (found["array"], found["job"]) == (f"{job.id}_4", str(job.id))


def test_why_a_job_is_signalled_and_what_helpers_live_through(cluster: Cluster, jobs: Jobs, backend: Backend) -> None:
    """Requeue, cancel and a plain signal at the same time; helpers are killed by nothing but KillWait's SIGKILL."""
    requeued, cancelled, poked = (start(jobs, backend) for _ in range(3))
    cluster.check("ctl", "scontrol", "requeue", str(requeued.id), user="user1")
    cluster.check("ctl", "scancel", str(cancelled.id), user="user1")
    cluster.check("ctl", "scancel", "--batch", "--signal=USR1", str(poked.id), user="user1")
    for job, cause in ((requeued, "requeue"), (cancelled, "cancelled"), (poked, "unknown")):
        found = signalled(job)
        assert found[0]["helpers"] is None
        # More than one: a step that has not ended after some seconds gets SIGTERM again.
        assert {entry["cause"] for entry in found} == {cause}
    ended = time.monotonic()
    for job in (requeued, cancelled):
        at = signalled(job)[0]["time"]
        nodes = [path.stem.partition("-")[2] for path in job.directory.glob("helper-*.txt")]
        assert len(nodes) == 2

        def outlived(job: Job = job, at: float = at, nodes: list[str] = nodes) -> bool:
            lines = [helper_lines(job, node) for node in nodes]
            return all(float(last.split()[1]) > at + 6 for last in (part[-1] for part in lines) if " " in last)

        wait_for("helpers alive 6 s after SIGTERM", outlived, within=25, every=0.5)
        for node in nodes:
            assert [line.split()[0] for line in helper_lines(job, node)].count("TERM") >= 1
    # Else they would live until KillWait, 30 s, is over.
    assert time.monotonic() - ended < 28
    for node in cluster.nodes:
        send(signal.SIGKILL, cluster.pids(node, r"helper-%s\.txt|signalled\.py"))
    cancelled.wait_over()
    poked.cancel()


def test_a_time_limit(cluster: Cluster, jobs: Jobs, backend: Backend) -> None:
    job = start(jobs, backend, "--time=1")
    # A moment that is not over when slurmctld hears of it; it looks at the limits every 30 s.
    cluster.check("ctl", "scontrol", "update", f"JobId={job.id}", "EndTime=now+5")
    assert {found["cause"] for found in signalled(job, within=150)} == {"timeout"}


def test_doctor_on_all_nodes_and_inside_a_full_job(cluster: Cluster, jobs: Jobs) -> None:
    found = doctor(cluster)
    assert failures(found) == [] and found["ok"]
    assert [node["node"] for node in found["nodes"]] == list(cluster.nodes)

    job = jobs.submit("hpccr doctor", nodes=2, tasks=16, plain=True)
    job.wait_success()
    lines = job.output.read_text().splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [[node, "ok"] for node in job.slurm().nodes] + [["all", "nodes"]]

    private = ask(cluster, "--dir", "/tmp/not-shared")
    assert private.returncode == 1 and "on storage that all nodes share" in private.stdout
    cluster.check("ctl", "rm", "-r", "/tmp/not-shared")


def test_doctor_names_a_node_that_is_down(cluster: Cluster, untouched: None) -> None:
    last = cluster.nodes[-1]
    cluster.drain(last)
    try:
        done = ask(cluster)
        assert done.returncode == 1
        assert f"{last}" in done.stdout and "DRAIN" in done.stdout and "state=resume" in done.stdout
    finally:
        cluster.resume()


def test_commands_on_jobs_that_cannot_be_asked(cluster: Cluster, jobs: Jobs) -> None:
    """Someone else's, without hpccr, and unknown: each says which it is."""
    other = jobs.submit("sleep 300", user="user2", nodes=1, tasks=1, plain=True)
    plain = jobs.submit("sleep 300", nodes=1, tasks=1, plain=True)
    plain.wait_state("RUNNING")
    for job, says in ((other, "belongs to user2"), (plain, "runs without hpccr")):
        for verb in ("checkpoint", "requeue", "status"):
            done = job.hpccr(verb, user="user1")
            assert done.returncode == 1 and says in done.stderr, done.stderr
    unknown = cluster.run("ctl", "hpccr", "checkpoint", "999999", user="user1")
    assert unknown.returncode == 1 and "no job 999999" in unknown.stderr
