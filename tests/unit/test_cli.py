"""The commands as a user calls them, in process, on a store made here and a coordinator that is only its protocol."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import test_store
from test_store import IMAGE, record, the_pack, write, write_manifest

from hpccr.cli import nodecheck, output
from hpccr.cli.main import VERBS, entry
from hpccr.cli.nodecheck import NodeReport, compare
from hpccr.cli.run import _agent_command
from hpccr.coordinator.status import CheckpointStatus, StepStatus, encode_status
from hpccr.model import FORMAT, EndpointRecord, StepKey
from hpccr.store import elsewhere, events, publish, verify
from hpccr.store.layout import Checkpoint, Step, Store
from hpccr.store.verify import Finding
from hpccr.wire import messages as m
from hpccr.wire.frames import Channel
from hpccr.wire.handshake import HandshakeError, authenticate, new_secret

KEY = StepKey(cluster="tb", job="17", step="0")


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Slurm, no configuration and no variables of this machine."""
    for name in list(os.environ):
        if name.startswith(("HPCCR_", "SLURM")):
            monkeypatch.delenv(name)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HPCCR_STORE_DIR", str(tmp_path / "store"))


@pytest.fixture
def step(tmp_path: Path) -> Step:
    """A running step without a coordinator, with checkpoints 1 and 2 complete and 3 not."""
    step = Store.at(tmp_path / "store").step(KEY)
    publish.make_directory(step.path)
    publish.publish(step.record_path, record())
    events.append(step.events_path, "started", nodes=["node1", "node2"])
    for sequence in (1, 2):
        write(step.checkpoint(sequence))
    write_manifest(step.checkpoint(3), 2)
    return step


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def hpccr(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*argv: str) -> Outcome:
        capfd.readouterr()
        try:
            code = entry(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capfd.readouterr())

    return call


Call = Callable[..., Outcome]


class Coordinator:
    """The port of a coordinator: answers each request with the messages given, and remembers the requests."""

    def __init__(self, step: Step, answers: list[m.Message]) -> None:
        self.step = step
        self.answers = answers
        self.requests: list[m.Message] = []
        self.secret = new_secret()
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with server:
            await self._stop.wait()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await authenticate(reader, writer, self.secret, server=True)
            channel: Channel[m.FirstMessage] = Channel(reader, writer, m.FirstMessage)
            request = await channel.receive()
            assert request is not None
            self.requests.append(request)
            for answer in self.answers:
                await channel.send(answer)
        except HandshakeError:
            pass
        finally:
            writer.close()

    def __enter__(self) -> "Coordinator":
        self._thread.start()
        assert self._ready.wait(10)
        self.announce(self.secret)
        return self

    def announce(self, secret: str) -> None:
        # The first address leads nowhere: the client goes on to the next.
        endpoint = EndpointRecord(FORMAT, KEY, ("127.0.0.9", "127.0.0.1"), self.port, secret, 5, "node1")
        publish.publish(self.step.endpoint_path, endpoint)

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def coordinator(step: Step) -> Iterator[Callable[..., Coordinator]]:
    started: list[Coordinator] = []

    def start(*answers: m.Message) -> Coordinator:
        started.append(Coordinator(step, list(answers)))
        return started[-1].__enter__()

    yield start
    for one in started:
        one.__exit__()


REPLY = m.CheckpointReply(sequence=4, freeze_seconds=0.134, total_seconds=1.5, bytes=3 << 20, durable=True)


# --- the frame ----------------------------------------------------------------------------------------------------


def test_help_names_every_verb_and_the_exit_codes(hpccr: Call) -> None:
    shown = hpccr("--help")
    assert shown.code == 0 and all(f"  {verb} " in shown.out for verb in VERBS if verb != "checkpoint")
    for verb in VERBS:
        assert "exit codes: 0 ok" in hpccr(verb, "--help").out


@pytest.mark.parametrize(
    "argv", [(), ("nonsense",), ("list", "--nonsense"), ("checkpoint",), ("checkpoint", "1", "--timeout", "-3")]
)
def test_wrong_usage_is_2(hpccr: Call, argv: tuple[str, ...]) -> None:
    assert hpccr(*argv).code == 2


def test_errors_have_a_message_a_hint_and_a_code(hpccr: Call, tmp_path: Path) -> None:
    shown = hpccr("status", "99")
    assert shown.code == 1 and shown.out == ""
    assert shown.err.splitlines()[0].startswith("hpccr: error: no job 99 in the store")
    assert shown.err.splitlines()[1].startswith("hint: ")
    assert "Traceback" not in shown.err and "Traceback" in hpccr("--debug", "status", "99").err
    assert "Traceback" in hpccr("status", "99", "--debug").err
    (tmp_path / "bad.toml").write_text("[store]\nkeep = 0\n")
    assert hpccr("--config", str(tmp_path / "bad.toml"), "list").code == 2
    (tmp_path / "no.tar").mkdir()
    for name, hint in (("none/x.tar", "hint: has it been removed"), ("no.tar", "hint: --debug")):
        shown = hpccr("import", str(tmp_path / name))
        assert shown.code == 1 and shown.err.splitlines()[1].startswith(hint), shown.err
    (tmp_path / "store").write_text("not a directory")
    assert hpccr("doctor", "--local").code == 1


def test_a_verb_imports_only_its_own_module() -> None:
    """`hpccr agent` starts on every node of every job: what it does not need is not loaded."""
    program = (
        "import sys; from hpccr.cli.main import entry\n"
        "try: entry(['list'])\n"
        "finally: print(*sorted(m for m in sys.modules if m.startswith('hpccr.cli.') or m in ('rich', 'pyroute2')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\n")[-2] == "hpccr.cli.jobs hpccr.cli.list hpccr.cli.main hpccr.cli.output"


def test_a_reader_that_has_enough_is_no_error(step: Step) -> None:
    program = "import sys; from hpccr.cli.main import entry; sys.exit(entry(['list', '--json', '--all']))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write_end, stderr=subprocess.PIPE, env=environment)
    os.close(write_end)
    assert done.stderr == b"" and done.returncode == 1


# --- the store's verbs --------------------------------------------------------------------------------------------


def test_list(hpccr: Call, step: Step) -> None:
    assert hpccr("list").out.splitlines()[1].split()[:4] == ["tb-17", "0", "stopped", "2"]
    (found,) = hpccr("list", "--json").json
    assert found["last"]["sequence"] == 2 and found["last"]["state"] == "complete" and found["state"] == "stopped"
    publish.publish(step.record_path, record("finished", 0))
    assert hpccr("list", "--json").json == []
    assert hpccr("list", "--json", "--all").json[0]["state"] == "finished"


def slurm_job(number: int, state: str, **more: Any) -> dict[str, Any]:
    """A job of ours as squeue shows it."""
    return {
        "job_id": number,
        "cluster": "tb",
        "user_id": os.geteuid(),
        "job_state": [state],
        "batch_host": "node7",
        "start_time": time.time() - 3600,
        **more,
    }


def test_list_with_what_slurm_says(hpccr: Call, step: Step, tmp_path: Path) -> None:
    """And with the time of the next checkpoint, while the job runs."""
    publish.publish(step.endpoint_path, EndpointRecord(FORMAT, KEY, ("nowhere",), 1, new_secret(), 1, "nowhere"))
    publish.publish(step.record_path, msgspec.structs.replace(record("running"), due=time.time() + 600))

    def listed(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
        answer = json.dumps({"jobs": jobs, "meta": {"slurm": {"cluster": "tb"}}})
        for name in ("squeue", "scontrol"):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nexec /bin/cat <<'END'\n{answer}\nEND\n")
            (tmp_path / "bin" / name).chmod(0o700)
        found: list[dict[str, Any]] = hpccr("list", "--json").json
        return found

    assert [row["state"] for row in listed(slurm_job(17, "RUNNING"))] == ["running"]
    assert hpccr("list").out.splitlines()[1].endswith("in 10 min")
    assert [row["state"] for row in listed(slurm_job(17, "PENDING"))] == ["queued"]
    assert [row["state"] for row in listed(slurm_job(17, "SUSPENDED"))] == ["suspended"]
    assert [row["state"] for row in listed()] == ["stopped"] and hpccr("list").out.splitlines()[1].endswith("-")
    waiting = {"comment": "hpccr: waiting to start"}
    found = listed(
        slurm_job(17, "RUNNING", **waiting),
        slurm_job(18, "RUNNING", **waiting),
        slurm_job(19, "PENDING", **waiting),
        slurm_job(20, "RUNNING", comment="hpccr: no checkpoint yet"),
        slurm_job(21, "RUNNING", **(waiting | {"start_time": time.time() - 10})),
    )
    shown = [(row["job"], row["state"]) for row in found]
    assert shown == [("17", "running"), ("18", "unprotected"), ("19", "queued")]
    told = hpccr("list")
    assert "tb-18" in told.out and "hint: has node7 the plugin?" in told.err and "job 19" not in told.err


def test_a_job_of_another_cluster_is_not_taken_for_the_one_of_its_number(
    hpccr: Call, step: Step, tmp_path: Path
) -> None:
    publish.publish(step.endpoint_path, EndpointRecord(FORMAT, KEY, ("127.0.0.1",), 1, new_secret(), 1, "here"))
    publish.publish(step.record_path, record("running"))
    stranger = slurm_job(17, "SUSPENDED", comment="hpccr: waiting to start") | {"cluster": "other"}
    fake_scontrol(tmp_path, stranger)
    for jobs in ([stranger], []):
        answer = json.dumps({"jobs": jobs, "meta": {"slurm": {"cluster": "other"}}})
        for name in ("squeue", "scontrol"):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nprintf '%s' '{answer}'\n")
            (tmp_path / "bin" / name).chmod(0o755)
        assert [row["state"] for row in hpccr("list", "--json").json] == ["running"]
        assert "is suspended" not in hpccr("checkpoint", "17").err
    step.endpoint_path.unlink()
    assert "its job is" not in hpccr("checkpoint", "17").err


def test_restore_knows_the_directories_of_files(hpccr: Call, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose names are no text, which step.json has as in a URL."""
    found: list[tuple[str, ...]] = []
    monkeypatch.setattr("hpccr.cli.restore.start", lambda config, *_, **__: found.append(config.files.trees) or 0)
    publish.publish(step.record_path, msgspec.structs.replace(record(), trees=("/proj/caf%E9", "/proj/b")))
    assert hpccr("restore", "17").code == 0
    assert found == [(os.fsdecode(b"/proj/caf\xe9"), "/proj/b")]


def test_a_job_with_a_store_of_its_own(
    hpccr: Call, step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual store leads to it, as long as it is there."""
    usual = Store.at(tmp_path / "usual")
    elsewhere.remember(usual, Store.at(tmp_path / "store").job("tb", "17"))
    elsewhere.remember(usual, Store.at(tmp_path / "store").job("tb", "17"))
    monkeypatch.setenv("HPCCR_STORE_DIR", str(usual.root))
    (found,) = hpccr("list", "--json").json
    assert found["name"] == "tb-17" and found["path"] == str(step.path)
    assert "complete" in hpccr("status", "17").out and "complete" in hpccr("status", "tb-17").out
    assert hpccr("status", "18").code == 1
    assert "no step 3" in hpccr("restore", "17", "--step", "3").err
    step.path.parent.rename(tmp_path / "gone")
    assert hpccr("list", "--json").json == [] and hpccr("status", "17").code == 1
    elsewhere.remember(usual, Store.at(tmp_path / "store").job("tb", "18"))
    assert os.listdir(usual.root / "elsewhere") == ["tb-18"]


def test_inspect(hpccr: Call, step: Step) -> None:
    shown = hpccr("inspect", "17", "--json").json
    assert shown["summary"]["sequence"] == 2 and [f["node"] for f in shown["fragments"]] == ["node0", "node1"]
    text = hpccr("inspect", "tb-17", "1").out
    assert "checkpoint 1 of tb-17/0: complete" in text and "5 bytes" in text
    assert "no fragment of capsule 0, 1" in hpccr("inspect", "17", "3").out
    missing = hpccr("inspect", "17", "9")
    assert missing.code == 10 and "3, 2, 1" in missing.err


def test_verify(hpccr: Call, step: Step) -> None:
    assert hpccr("verify", "17").code == 0
    path = the_pack(step.checkpoint(2).capsule_path(1))
    data = path.read_bytes()
    path.write_bytes(b"X" + data[1:])
    shown = hpccr("verify", "17")
    assert shown.code == 12 and f"{path}: has been changed" in shown.out
    found = hpccr("verify", "17", "2", "--json")
    assert found.code == 12 and found.json["ok"] is False and found.json["findings"][0]["path"] == str(path)
    assert hpccr("verify", "17", "1").code == 0
    # What is known to be damaged is restored by nobody, until it is found whole.
    assert [c.sequence for c in step.complete()] == [1]
    assert "found damaged" in hpccr("status", "17").out
    path.write_bytes(data)
    assert hpccr("verify", "17", "2").code == 0
    assert [c.sequence for c in step.complete()] == [2, 1]
    assert hpccr("verify", "17", "3").code == 12  # never finished: there is nothing to mark
    assert not (step.checkpoint(3).path / "damaged.json").exists()


def test_what_gc_removes_is_not_damaged(hpccr: Call, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(checkpoint: Checkpoint, **options: Any) -> list[Finding]:
        publish.remove_tree(checkpoint.path)
        return verify.verify(checkpoint, **options)

    monkeypatch.setattr("hpccr.cli.verify.verify", slow)
    done = hpccr("verify", "17", "1")
    assert done.code == 10 and "was removed while it was read" in done.err and not done.out


def test_gc(hpccr: Call, step: Step) -> None:
    assert hpccr("gc", "--keep", "0").code == 2
    assert "would remove 1" in hpccr("gc", "--keep", "1", "--dry-run").out
    assert hpccr("gc", "17", "--keep", "1", "--json").json[0]["removed"] == [1]
    assert [c.sequence for c in step.checkpoints()] == [3, 2]


def test_rm(hpccr: Call, step: Step) -> None:
    assert hpccr("rm", "17", "1").code == 0 and [c.sequence for c in step.checkpoints()] == [3, 2]
    refused = hpccr("rm", "17", "2")
    assert refused.code == 11 and "restored from" in refused.err and "--force" in refused.err
    assert hpccr("rm", "17", "9").code == 10
    assert hpccr("rm", "17", "--step", "0").code == 2
    assert hpccr("rm", "17").code == 11
    publish.publish(step.endpoint_path, EndpointRecord(FORMAT, KEY, ("h",), 1, "0" * 64, 1, "h"))
    assert hpccr("rm", "17", "--force").code == 11 and step.path.exists()
    step.endpoint_path.unlink()
    assert hpccr("rm", "17", "2", "--force").code == 0
    assert hpccr("rm", "17").code == 0 and os.listdir(step.root) == []


def test_a_finished_job_is_removed_without_force(hpccr: Call, step: Step) -> None:
    publish.publish(step.record_path, record("finished", 0))
    assert hpccr("rm", "17").code == 0 and os.listdir(step.root) == []


def test_export_and_import(hpccr: Call, step: Step, tmp_path: Path) -> None:
    out = tmp_path / "a.hpccr"
    shown = hpccr("export", "17", "-o", str(out))
    assert shown.code == 0 and "checkpoint 2 of tb-17/0" in shown.out and out.stat().st_size > 1000
    assert hpccr("import", str(out)).code == 11
    came = hpccr("import", str(out), "--dir", str(tmp_path / "other"))
    assert came.code == 0 and "hpccr restore tb-17 --step 0" in came.out
    assert hpccr("verify", "17", "2", "--dir", str(tmp_path / "other")).code == 0
    assert hpccr("export", "17", "3", "-o", str(out)).code == 10
    (tmp_path / "none").write_bytes(b"")
    assert hpccr("import", str(tmp_path / "none")).code == 12


def test_inspect_says_what_is_stored(hpccr: Call, step: Step) -> None:
    stored = hpccr("inspect", "17", "--json").json["stored"]
    assert [found["capsule"] for found in stored] == [0, 1] and all(found["own"] < found["shared"] for found in stored)
    assert "STORED" in hpccr("inspect", "17").out


def test_inspect_of_what_is_damaged(hpccr: Call, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows what can be read, and says what cannot."""
    monkeypatch.setattr(test_store, "IMAGE", msgspec.structs.replace(IMAGE, files=3))
    write(step.checkpoint(4))
    for capsule in range(2):
        (step.checkpoint(4).capsule_path(capsule) / "index.bin").unlink()
    shown = hpccr("inspect", "17", "4")
    assert shown.code == 0 and "CAPSULE" in shown.out and "job's files cannot be read: " in shown.out
    assert hpccr("inspect", "17", "4", "--json").json["files"] is None


def test_status_of_a_step_that_does_not_run(hpccr: Call, step: Step) -> None:
    shown = hpccr("status", "17")
    assert shown.code == 0 and "stopped" in shown.out and "node[1-2]" in shown.out and "started" in shown.out
    found = hpccr("status", "17", "--json").json
    assert found["live"] is False and [c["sequence"] for c in found["checkpoints"]] == [3, 2, 1]
    assert found["events"][0]["event"] == "started" and found["record"]["nodes"] == ["node1", "node2"]
    assert hpccr("status", "17", "--step", "4").code == 2


# --- with a coordinator -------------------------------------------------------------------------------------------


def test_status_of_a_running_step(hpccr: Call, coordinator: Callable[..., Coordinator]) -> None:
    status = StepStatus(
        key=KEY,
        state="checkpointing",
        phase="dump",
        capsules=2,
        nodes=("node1", "node2"),
        started=time.time(),
        last=CheckpointStatus(sequence=2, created=1.0, bytes=5, freeze_seconds=0.1, complete=True),
        taken=2,
        last_error="no room",
    )
    coordinator(m.StatusReply(encode_status(status)))
    shown = hpccr("status", "17").out
    assert "checkpointing (dump)" in shown and "2 taken" in shown and "no room" in shown
    found = hpccr("status", "17", "--json").json
    assert found["live"] is True and found["status"]["last"]["sequence"] == 2


def test_a_checkpoint(hpccr: Call, coordinator: Callable[..., Coordinator]) -> None:
    running = coordinator(m.Progress("dump", 0, 0), m.Progress("flush", 5, 10), REPLY)
    shown = hpccr("checkpoint", "17")
    assert shown.code == 0 and shown.err == ""
    assert shown.out == "checkpoint 4 of tb-17/0 is in the store: 3.0 MiB, frozen for 0.13 s\n"
    found = hpccr("checkpoint", "17", "--no-wait", "--json").json
    assert (found["sequence"], found["durable"], found["job"]) == (4, True, "17")
    assert hpccr("requeue", "17").out.endswith("the job is requeued\n")
    assert running.requests == [
        m.CheckpointRequest(requeue=False, wait=True, reason="command"),
        m.CheckpointRequest(requeue=False, wait=False, reason="command"),
        m.CheckpointRequest(requeue=True, wait=True, reason="requeue"),
    ]


def test_what_the_coordinator_refuses(hpccr: Call, coordinator: Callable[..., Coordinator]) -> None:
    coordinator(m.Failed(13, "process 311 (app) has an io_uring open", "run it without", "node2"))
    shown = hpccr("checkpoint", "17")
    assert shown.code == 13
    assert shown.err == "hpccr: error: node2: process 311 (app) has an io_uring open\nhint: run it without\n"


def test_a_coordinator_that_ends_in_between(hpccr: Call, coordinator: Callable[..., Coordinator]) -> None:
    coordinator(m.Progress("dump", 0, 0))
    assert "ended before it answered" in hpccr("checkpoint", "17").err
    assert hpccr("checkpoint", "17").code == 14


@pytest.mark.parametrize("requeued", [True, False])
def test_slurm_kills_the_coordinator_at_the_requeue_before_it_answers(
    hpccr: Call, coordinator: Callable[..., Coordinator], monkeypatch: pytest.MonkeyPatch, requeued: bool
) -> None:
    coordinator(m.Progress("dump", 0, 0), m.Leaving(REPLY))
    restarts = iter((3, 3 + requeued))
    monkeypatch.setattr("hpccr.cli.requeue.job_of", lambda step: SimpleNamespace(restarts=next(restarts)))
    shown = hpccr("requeue", "17")
    if requeued:
        assert shown.code == 0 and shown.out.endswith("the job is requeued\n")
    else:
        assert shown.code == 14 and "ended before it answered" in shown.err


def test_a_requeue_saves_all_that_runs_of_the_job(
    hpccr: Call, step: Step, coordinator: Callable[..., Coordinator]
) -> None:
    other = Store.at(step.root).step(StepKey("tb", "17", "1"))
    publish.make_directory(other.path)
    first = coordinator(REPLY)
    with Coordinator(other, [msgspec.structs.replace(REPLY, sequence=7)]) as second:
        lines = hpccr("requeue", "17").out.splitlines()
        assert lines[0].startswith("checkpoint 4 of tb-17/0") and lines[1].startswith("checkpoint 7 of tb-17/1")
        assert first.requests == [m.CheckpointRequest(requeue=False, wait=True, reason="requeue")]
        assert second.requests == [m.CheckpointRequest(requeue=True, wait=True, reason="requeue")]
        (found,) = hpccr("requeue", "17", "--json").json["others"]
        assert (found["step"], found["sequence"]) == ("0", 4)
        # One that cannot be saved: nobody is asked to requeue the job.
        first.answers[:] = [m.Failed(1, "no room", "make some", "node2")]
        refused = hpccr("requeue", "17")
        assert refused.code == 1 and "tb-17/0 would lose its work: node2: no room\nhint: make some" in refused.err
        first.announce(new_secret())
        refused = hpccr("requeue", "17")
        assert refused.code == 14 and f"remove {step.endpoint_path}" in refused.err
        assert len(second.requests) == 2


def test_another_program_on_its_port(hpccr: Call, coordinator: Callable[..., Coordinator]) -> None:
    running = coordinator(REPLY)
    running.announce(new_secret())
    shown = hpccr("checkpoint", "17")
    assert shown.code == 14 and "is not the step's coordinator" in shown.err and running.requests == []


def test_a_coordinator_that_is_gone(hpccr: Call, step: Step) -> None:
    with Coordinator(step, []):
        pass
    shown = hpccr("checkpoint", "17")
    assert shown.code == 14 and "127.0.0.1" in shown.err and "requeue" in shown.err
    found = hpccr("status", "17", "--json").json
    assert found["live"] is False and "cannot reach" in found["problem"]


def test_a_deadline(hpccr: Call, step: Step) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    with server:
        port = server.getsockname()[1]
        publish.publish(step.endpoint_path, EndpointRecord(FORMAT, KEY, ("127.0.0.1",), port, new_secret(), 5, "node1"))
        shown = hpccr("checkpoint", "17", "--timeout", "0.2")
    assert shown.code == 1 and "no answer within" in shown.err


def test_a_step_that_does_not_run_cannot_be_checkpointed(hpccr: Call, step: Step) -> None:
    shown = hpccr("checkpoint", "17")
    assert shown.code == 1 and "is not running" in shown.err
    publish.publish(step.record_path, record("finished", 3))
    assert "has finished with exit code 3" in hpccr("requeue", "17").err


# --- Slurm's word about jobs that are not in the store ------------------------------------------------------------


def fake_scontrol(tmp_path: Path, job: dict[str, Any]) -> None:
    path = tmp_path / "bin" / "scontrol"
    path.write_text(f"#!/bin/sh\nprintf '%s' '{json.dumps({'jobs': [job], 'meta': {}})}'\n")
    path.chmod(0o755)


def test_whose_a_missing_job_is(hpccr: Call, tmp_path: Path) -> None:
    job = {"job_id": 5, "job_state": ["RUNNING"], "user_id": os.geteuid() + 1, "user_name": "someone", "cluster": "tb"}
    fake_scontrol(tmp_path, job)
    shown = hpccr("checkpoint", "5")
    assert shown.code == 1 and "job 5 belongs to someone" in shown.err
    fake_scontrol(tmp_path, job | {"user_id": os.geteuid()})
    assert "runs without hpccr" in hpccr("checkpoint", "5").err
    fake_scontrol(tmp_path, job | {"user_id": os.geteuid(), "job_state": ["PENDING"], "state_reason": "Priority"})
    assert "has not started yet (Priority)" in hpccr("checkpoint", "5").err


# --- doctor -------------------------------------------------------------------------------------------------------


def report(
    node: str, *, criu: str = "criu 4.2.1", version: str = "1", flags: tuple[str, ...] = ("a", "b")
) -> NodeReport:
    return NodeReport(node, version, (m.Check("criu", True, criu), m.Check("site key", True, "k1")), flags)


def test_nodes_must_be_alike() -> None:
    assert compare([report("n1")]) == []
    assert all(check.ok for check in compare([report("n1"), report("n2"), NodeReport("n3", "", ())]))
    found = {
        check.name: check
        for check in compare([report("n1"), report("n2", criu="criu 4.2.0", version="2", flags=("a", "b", "avx512f"))])
    }
    assert not found["hpccr version"].ok and not found["same criu"].ok and found["same site key"].ok
    assert found["same CPU features"].detail == "n2 has avx512f" and "--constraint" in found["same CPU features"].hint


def test_doctor_on_this_machine(hpccr: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hpccr("doctor", "--nodes", "n1").code == 2
    fake_scontrol(tmp_path, {})  # where there is Slurm, no hpccrd is started to look
    monkeypatch.setenv("HPCCR_NODE_SOCKET", str(tmp_path / "no.sock"))
    shown = hpccr("doctor", "--local", "--json")
    assert shown.code == 1
    found = {check["name"]: check for check in shown.json["checks"]}
    assert found["store"]["ok"] and (tmp_path / "store").stat().st_mode & 0o777 == 0o700
    assert not found["hpccrd"]["ok"] and "systemctl" in found["hpccrd"]["hint"]


def test_the_store_and_its_token(tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert nodecheck.check_store(store).ok and list(store.iterdir()) == []
    assert not nodecheck.check_token(store, ".doctor-1").ok
    (store / ".doctor-1").write_text("")
    assert nodecheck.check_token(store, ".doctor-1").ok
    store.chmod(0o755)
    assert "chmod 700" in nodecheck.check_store(store).hint
    (tmp_path / "file").write_text("")
    assert not nodecheck.check_store(tmp_path / "file").ok


# --- output -------------------------------------------------------------------------------------------------------


def test_figures_for_people() -> None:
    assert [output.size(n) for n in (0, 1023, 1536, 150 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "150 MiB",
        "5.0 TiB",
    ]
    assert [output.duration(s) for s in (0.134, 30, 4000, 100_000, 1e6)] == ["0.13 s", "30 s", "67 min", "28 h", "12 d"]
    assert output.age(100, now=160) == "60 s" and output.age(200, now=100) == "0.00 s"


def test_a_plain_table(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("A", "LONG"), [("xyz", "1"), ("", "22")], right=frozenset({"LONG"}))
    assert capsys.readouterr().out == "A    LONG\nxyz     1\n       22\n"


def test_the_home_directory_is_not_one_jobs_state(hpccr: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home" / "user"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for tree in (str(home), str(home.parent), "/", "~"):
        refused = hpccr("run", f"--files={tree}", "true")
        assert refused.code == 2 and "whole home directory" in refused.err, refused.err


def in_job(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    for name, value in {"CLUSTER_NAME": "tb", "JOB_ID": "17", "JOB_NODELIST": "node1", **more}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_a_job_with_the_number_of_an_older_one(hpccr: Call, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch, JOB_START_TIME="100000")
    done = hpccr("run", "true")
    assert done.code == 13 and "is not a node of job 17" in done.err  # which is far enough
    assert "checkpoints of another job 17" in done.err and "this is step 1" in done.err
    assert step.record() == record() and step.complete()


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--batch",), 3, "hpccr rm --force 17; scontrol requeue 17"),
        (("--batch",), 0, "hpccr rm --force 17; scontrol requeue 17"),
        ((), 3, "hpccr run --fresh"),
        ((), 0, ""),  # one command of a script of several
    ],
)
def test_what_has_ended_is_not_run_again_and_that_is_said(
    hpccr: Call, step: Step, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: int, told: str
) -> None:
    in_job(monkeypatch, RESTART_COUNT="1")
    publish.publish(step.record_path, record("finished", exit_code=code))
    done = hpccr("run", *options, "./script")
    assert done.code == code and done.out == ""
    if told:
        assert f"script ended with exit code {code}" in done.err and told in done.err
    else:
        assert done.err == ""


def test_a_configuration_file_that_is_no_text(hpccr: Call, tmp_path: Path) -> None:
    (tmp_path / "hpccr.toml").write_bytes('[store]\ndir = "/scratch/é"\n'.encode("latin-1"))
    done = hpccr("--config", str(tmp_path / "hpccr.toml"), "list")
    assert done.code == 2 and f"cannot read {tmp_path}/hpccr.toml" in done.err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_that_are_closed(step: Step, closed: str) -> None:
    shell = f'exec "$0" -m hpccr list {closed}'
    done = subprocess.run(["/bin/sh", "-c", shell, sys.executable], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert ("tb-17" in done.stdout) == (" >" not in f" {closed}")


def test_an_agent_takes_no_module_from_its_user(tmp_path: Path) -> None:
    """Neither from the working directory nor from PYTHONPATH; and PYTHONHOME is another Python's."""
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong queue')\n")
    (tmp_path / "hpccr.py").write_text("raise SystemExit('the wrong hpccr')\n")
    step = Step(tmp_path, KEY)
    command = [*_agent_command(step)({}), "--help"]
    environment = os.environ | {"PYTHONHOME": "/nonexistent", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--endpoint" in done.stdout, done
