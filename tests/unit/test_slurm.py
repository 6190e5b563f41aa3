"""hpccr.slurm without a Slurm: texts, environments, and commands that answer what Slurm 24.11 was seen to answer."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccr.coordinator.site import SlurmSite
from hpccr.errors import UnsupportedError, UsageError
from hpccr.slurm import hostlist
from hpccr.slurm.commands import COMMENT_LIMIT, CommandQuery
from hpccr.slurm.env import Allocation
from hpccr.slurm.library import matching
from hpccr.slurm.query import Cause, JobInfo, SlurmError, UnknownJobError, cause, job_query
from hpccr.slurm.steps import agent_step_command, agent_step_environment


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-11,3]", ["node08", "node09", "node10", "node11", "node3"]),
        ("node[1-2],login,gpu[7]", ["node1", "node2", "login", "gpu7"]),
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
        ("node1,node1", ["node1", "node1"]),
        ("n[0099-0101]", ["n0099", "n0100", "n0101"]),
    ],
)
def test_host_lists_as_slurm_writes_them(text: str, hosts: list[str]) -> None:
    assert hostlist.expand(text) == hosts


@pytest.mark.parametrize(
    "text", ["", ",", "a,,b", "n[1-", "n]1[", "n[]", "n[3-1]", "n[a-b]", "n[1-2]]", "n[[1]]", "n[0-99999999]", "n[1,]"]
)
def test_what_is_no_host_list_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        hostlist.expand(text)


HOST = st.from_regex(r"\A[a-z][a-z-]{0,5}[0-9]{0,4}([a-z]{0,2}[0-9]{0,4})?\Z")


@given(st.lists(HOST, min_size=1, max_size=40))
def test_compressing_loses_nothing(hosts: list[str]) -> None:
    assert hostlist.expand(hostlist.compress(hosts)) == hosts


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(1, 6))
def test_ranges_are_short(first: int, count: int, width: int) -> None:
    hosts = [f"node{number:0{width}d}" for number in range(first, first + count)]
    text = hostlist.compress(hosts)
    assert hostlist.expand(text) == hosts
    assert len(text) < 40


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60))
def test_task_counts_come_back(counts: list[int]) -> None:
    assert hostlist.expand_tasks(hostlist.compress_tasks(counts)) == counts


def test_task_counts_as_slurm_writes_them() -> None:
    assert hostlist.expand_tasks("2(x3),1") == [2, 2, 2, 1]
    assert hostlist.compress_tasks([5, 1]) == "5,1"
    for text in ("", "x", "2(x0)", "2(3)", "2(x999999)", "٣"):
        with pytest.raises(UsageError):
            hostlist.expand_tasks(text)


@given(st.text(alphabet="n0123456789[],-(x)", max_size=30))
def test_any_text_is_taken_or_refused(text: str) -> None:
    for parse in (hostlist.expand, hostlist.expand_tasks):
        try:
            parse(text)
        except UsageError:
            pass


BATCH = {
    "SLURM_CLUSTER_NAME": "cluster",
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "node[1-3]",
    "SLURM_TASKS_PER_NODE": "5,1(x2)",
    "SLURM_JOB_START_TIME": "1795424450",
    "SLURM_JOB_END_TIME": "1795425050",
    "SLURMD_NODENAME": "node1",
    "SLURM_JOB_USER": "user1",
    "SLURM_JOB_UID": "1001",
}


def test_a_batch_environment() -> None:
    allocation = Allocation.from_environ(BATCH | {"SLURM_RESTART_COUNT": "2"})
    assert allocation == Allocation(
        cluster="cluster",
        job="17",
        restarts=2,
        nodes=("node1", "node2", "node3"),
        tasks=(5, 1, 1),
        start_time=1795424450,
        end_time=1795425050,
        this_node="node1",
        user="user1",
        uid=1001,
        array=None,
    )
    assert allocation.this_index == 0


def test_other_environments() -> None:
    assert Allocation.from_environ({}) is None
    assert Allocation.from_environ({"SLURM_CLUSTER_NAME": "x"}) is None
    login = Allocation.from_environ({k: v for k, v in BATCH.items() if k != "SLURMD_NODENAME"})
    assert login is not None and login.this_index is None and login.restarts == 0
    task = Allocation.from_environ(BATCH | {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"})
    assert task is not None and task.array == "12_0" and task.job == "17"
    with pytest.raises(UnsupportedError, match="heterogeneous"):
        Allocation.from_environ(BATCH | {"SLURM_HET_SIZE": "2"})
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST"):
        with pytest.raises(UsageError):
            Allocation.from_environ(BATCH | {name: "[x"})


def test_the_helper_step() -> None:
    command = agent_step_command(["node1", "node2", "node4"], ["hpccr", "agent"])
    assert command[0] == "srun" and command[-2:] == ["hpccr", "agent"]
    assert {"--overlap", "--nodes=3", "--nodelist=node[1-2,4]", "--ntasks-per-node=1", "--no-kill"} <= set(command)
    environment = agent_step_environment(BATCH | {"PATH": "/bin", "SLURM_MEM_PER_CPU": "1G", "SRUN_DEBUG": "9"})
    assert environment == {"SLURM_CLUSTER_NAME": "cluster", "SLURM_JOB_ID": "17", "PATH": "/bin"}


def info(**changes: Any) -> JobInfo:
    values: dict[str, Any] = {
        "job": "17",
        "array": None,
        "cluster": "cluster",
        "name": "j",
        "user": "user1",
        "uid": 1001,
        "partition": "main",
        "states": frozenset({"RUNNING"}),
        "reason": "None",
        "restarts": 0,
        "requeue": True,
        "batch": True,
        "comment": "",
        "nodes": ("node1",),
        "batch_node": "node1",
        "start_time": 100.0,
        "end_time": 700.0,
        "preempt_time": None,
    }
    return JobInfo(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "restarts", "expected"),
    [
        ({"states": {"PENDING", "COMPLETING"}, "restarts": 1}, 0, "requeue"),
        ({"states": {"PENDING", "COMPLETING"}, "restarts": 1, "preempt_time": 100.0}, 0, "preempted"),
        ({"states": {"CANCELLED", "COMPLETING"}}, 0, "cancelled"),
        ({"states": {"TIMEOUT", "COMPLETING"}, "reason": "TimeLimit"}, 0, "timeout"),
        ({"preempt_time": 150.0}, 0, "preempted"),
        ({"states": {"PREEMPTED", "COMPLETING"}}, 0, "preempted"),
        ({"states": {"NODE_FAIL", "COMPLETING"}}, 0, "node_fail"),
        ({"states": {"CANCELLED", "COMPLETING"}, "restarts": 1}, 1, "cancelled"),
        ({}, 0, "unknown"),
        ({"restarts": 3}, 3, "unknown"),
    ],
)
def test_why_a_job_was_signalled(changes: dict[str, Any], restarts: int, expected: Cause) -> None:
    if "states" in changes:
        changes = {**changes, "states": frozenset(changes["states"])}
    assert cause(info(**changes), restarts) == expected


JOB = {
    "array_job_id": {"set": True, "infinite": False, "number": 0},
    "array_task_id": {"set": False, "infinite": False, "number": 0},
    "batch_flag": True,
    "batch_host": "node1",
    "cluster": "tb",
    "comment": "hello",
    "end_time": {"set": True, "infinite": False, "number": 1795425050},
    "job_id": 17,
    "job_state": ["RUNNING"],
    "name": "j.sh",
    "nodes": "node[1-2]",
    "partition": "main",
    "preempt_time": {"set": True, "infinite": False, "number": 0},
    "requeue": True,
    "restart_cnt": 0,
    "start_time": {"set": True, "infinite": False, "number": 1795424450},
    "state_reason": "None",
    "user_id": 1001,
    "user_name": "user1",
}
META = {"slurm": {"cluster": "tb", "release": "24.11.5"}}


class Fake:
    """Commands on a PATH of their own that write down how they were called and answer as told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls = directory / "calls"
        self.query = CommandQuery(timeout=20, environ={"PATH": f"{directory}:/usr/bin:/bin", "SQUEUE_STATES": "failed"})

    def answers(self, output: Any, *, code: int = 0, complaint: str = "") -> CommandQuery:
        text = output if isinstance(output, str) else json.dumps(output)
        (self.directory / "out").write_text(text, errors="surrogateescape")
        (self.directory / "err").write_text(complaint)
        for name in ("scontrol", "squeue"):
            path = self.directory / name
            path.write_text(
                f'#!/bin/sh\necho "$SQUEUE_STATES$(basename $0) $@" >> {self.calls}\n'
                f"cat {self.directory}/err >&2; cat {self.directory}/out; exit {code}\n"
            )
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return self.query

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_a_job_as_slurm_24_11_shows_it(slurm: Fake) -> None:
    job = slurm.answers({"jobs": [JOB], "meta": META, "errors": []}).job("17")
    assert job == info(
        job="17",
        cluster="tb",
        name="j.sh",
        comment="hello",
        nodes=("node1", "node2"),
        start_time=1795424450.0,
        end_time=1795425050.0,
    )
    assert slurm.called() == ["scontrol show job 17 --json"]


def test_a_job_whose_names_are_not_text(slurm: Fake) -> None:
    """Slurm puts a directory's Latin-1 name into its JSON as it is."""
    job = JOB | {"name": "NAME", "current_working_directory": "NAME"}
    answer = json.dumps({"jobs": [job]}).replace("NAME", "caf\udce9")
    assert slurm.answers(answer).job("17").name == "caf\ufffd"
    assert [found.job for found in slurm.query.jobs("user1")] == ["17"]


def test_shapes_of_older_versions(slurm: Fake) -> None:
    old = JOB | {
        "job_state": "RUNNING",
        "restart_cnt": {"set": True, "number": 1},
        "end_time": 5,
        "comment": {"job": "c"},
    }
    job = slurm.answers({"jobs": [old]}).job("17")
    assert (job.states, job.restarts, job.end_time, job.comment) == (frozenset({"RUNNING"}), 1, 5.0, "c")


def test_the_right_task_of_an_array(slurm: Fake) -> None:
    def task(job: int, number: int) -> dict[str, Any]:
        return JOB | {
            "job_id": job,
            "array_job_id": {"set": True, "number": 17},
            "array_task_id": {"set": True, "number": number},
        }

    query = slurm.answers({"jobs": [task(18, 0), task(17, 1)]})
    assert query.job("17_0").job == "18"
    assert query.job("17").array == query.job("17").only == "17_1"
    assert [job.job for job in query.jobs("user1")] == ["17", "18"]
    assert slurm.called()[-1] == "squeue --json --user=user1"


def test_what_slurm_refuses(slurm: Fake, tmp_path: Path) -> None:
    query = slurm.answers({"jobs": []}, complaint="slurm_load_jobs error: Invalid job id specified\n")
    with pytest.raises(UnknownJobError) as unknown:
        query.job("999")
    assert "squeue --me" in unknown.value.hint
    with pytest.raises(SlurmError, match="has not told") as silent:
        slurm.answers({"jobs": []}).job("999")
    assert not isinstance(silent.value, UnknownJobError)
    query = slurm.answers("", code=1, complaint="Access/permission denied for job 3\nslurm_requeue error\n")
    with pytest.raises(SlurmError, match="slurm_requeue error") as refused:
        query.requeue("3")
    assert "owner" in refused.value.hint
    with pytest.raises(SlurmError, match="cannot understand"):
        slurm.answers("no JSON").job("3")
    with pytest.raises(SlurmError, match="cannot understand"):
        slurm.answers({"jobs": [{}]}).job("3")
    os.unlink(tmp_path / "scontrol")
    with pytest.raises(SlurmError, match="not on the PATH"):
        CommandQuery(environ={"PATH": str(tmp_path / "nowhere")}).job("3")


@pytest.mark.parametrize("job", ["", "1,2", "1;2", "JobId=1", "-1", "1_", "1_[2-3]", "user1", "²"])
def test_only_job_ids_reach_scontrol(slurm: Fake, job: str) -> None:
    query = slurm.answers({"jobs": []})
    for act in (query.job, query.requeue, query.start_now):
        with pytest.raises(SlurmError, match="not the id"):
            act(job)
    assert not slurm.calls.exists()


def test_comments_are_one_line_and_not_too_long(slurm: Fake) -> None:
    slurm.answers("").set_comment("3", "a\nb" + "é" * COMMENT_LIMIT)
    (call,) = slurm.called()
    prefix = "scontrol update JobId=3 Comment="
    assert call.startswith(prefix + "a b") and COMMENT_LIMIT - 2 < len(call[len(prefix) :].encode()) <= COMMENT_LIMIT


def test_a_users_comment_stays_and_the_checkpoint_is_shown_in_the_extra_text(slurm: Fake) -> None:
    def shown(**changes: str) -> list[str]:
        query = slurm.answers({"jobs": [JOB | changes], "meta": META})
        site = SlurmSite(allocation, query, "node1", quick=query)
        slurm.calls.unlink(missing_ok=True)
        site.show("checkpoint 3")
        return [call for call in slurm.called() if "update" in call]

    allocation = Allocation.from_environ(BATCH)
    assert allocation is not None
    assert shown(comment="") == ["scontrol update JobId=17 Comment=hpccr: checkpoint 3"]
    assert shown(comment="hpccr: no checkpoint yet") == ["scontrol update JobId=17 Comment=hpccr: checkpoint 3"]
    for extra in ("", "hpccr: checkpoint 2"):
        assert shown(comment="mine", extra=extra) == ["scontrol update JobId=17 Extra=hpccr: checkpoint 3"]
    assert shown(comment="mine", extra="mine too") == []


def test_the_cluster_that_answers(slurm: Fake) -> None:
    assert slurm.answers({"pings": [], "meta": META}).cluster() == "tb"


def test_a_pyslurm_that_cannot_be_loaded_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Fake
) -> None:
    """Of the right version by what it says, but its libslurm is not there."""
    (tmp_path / "pyslurm").mkdir()
    (tmp_path / "pyslurm" / "__init__.py").write_text("raise ImportError('libslurm.so.42: cannot open')\n")
    (tmp_path / "pyslurm-24.11.0.dist-info").mkdir()
    (tmp_path / "pyslurm-24.11.0.dist-info" / "METADATA").write_text("Name: pyslurm\nVersion: 24.11.0\n")
    slurm.answers("slurm-wlm 24.11.5\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert matching() == ""
    assert isinstance(job_query(), CommandQuery)
