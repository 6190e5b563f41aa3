"""Checks of a running hpccrd, from inside a node of the testbed: `python hpccrd_checks.py CASE [ARGUMENT...]`.

Run with the Python that has hpccr, as root or as a user; exit code 0 means that the case holds. test_hpccrd.py runs
them. Cases with two nodes: `relay` on one node serves a lease to the case that runs on the other.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpccr.agent.lease import Lease
from hpccr.errors import ExitCode
from hpccr.model import StepKey
from hpccr.wire import messages as m
from hpccr.wire.frames import Channel

import hpccrd_abuse  # noqa: F401 - its cases register themselves
import hpccrd_embedded  # noqa: F401
from hpccrd_client import (
    CASES,
    DEADLINE,
    PHASES,
    RELAY_PORT,
    SOCKET,
    WAIT,
    Capsule,
    capsule,
    case,
    checkpointed,
    connected,
    create,
    echoes,
    fetch,
    join,
    remote,
    restored,
    running,
    start,
    step_key,
)
from leftovers import network_namespaces
from talkers import TALKERS


@case
async def basic() -> None:
    """Create, Connect, Start, output, exit code, Destroy."""
    async with capsule() as made:
        await connected(made)
        started = await made.expect(start("sh", "-c", "echo hello; exit 7"), m.Started)
        assert started.pid >= 300, started
        exited = await made.next()
        assert exited == m.Exited(7), exited
        assert await made.all_output() == "hello\n", made.output
        assert isinstance(await made.ask(m.Prepare(sequence=1, checkpoint="0" * 32)), m.Failed)
        await made.expect(m.Destroy(), m.Destroyed)
        assert await made.next() is None


@case
async def identity() -> None:
    """The job has its requester's ids, limits, umask, affinity, groups and control groups, and no capability."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (123, 456))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o031)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.setpriority(os.PRIO_PROCESS, 0, 3)
    script = (
        "import os,resource;print(os.getresuid(),os.getresgid(),sorted(os.getgroups()),oct(os.umask(0)),"
        "resource.getrlimit(resource.RLIMIT_NOFILE),resource.getrlimit(resource.RLIMIT_CORE),os.sched_getaffinity(0),"
        "os.getpriority(os.PRIO_PROCESS,0),os.getcwd(),os.environ['COLOUR']);"
        "print(open('/proc/self/cgroup').read());"
        "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('Cap') and 'Bnd' not in l])"
    )
    async with capsule() as made:
        await connected(made)
        home = os.path.expanduser("~")
        await made.expect(start(sys.executable, "-c", script, cwd=home, COLOUR="blue"), m.Started)
        assert await made.next() == m.Exited(0), made.output
        output = await made.all_output()
        uid, gid = os.getuid(), os.getgid()
        groups = sorted(os.getgroups())
        first = f"{(uid,) * 3} {(gid,) * 3} {groups} 0o31 (123, 456) (0, 0) {os.sched_getaffinity(0)} 3 {home} blue\n"
        assert output.startswith(first), (output, first)
        assert Path("/proc/self/cgroup").read_text() in output, output
        if uid:
            assert f"{['0' * 16] * 4}" in output, output


@case
async def checkpoint(store: str) -> None:
    """A counter is checkpointed, goes on, is flushed, killed, and continues from the checkpoint in a new capsule."""
    key, directory = step_key(), fresh(store)
    counter = "n=0; echo up; while read line; do n=$((n+1)); echo got $line; echo $n; done; exit $n"
    async with capsule() as first:
        await running(first, key, job=("sh", "-c", counter))
        await echoes(first)
        await echoes(first)
        identifier = await checkpointed(first)
        await first.expect(m.Flush(directory=directory), m.FlushStarted)
        flushed = await first.expect_event(m.Flushed)
        assert flushed.bytes > 4096
        await echoes(first)
        await first.until(r"\n3\n")
        await first.expect(m.Destroy(), m.Destroyed)
    async with capsule() as second:
        await connected(second, key)
        found = await restored(second, directory, identifier)
        assert (found.tasks, found.bytes) == (2, flushed.bytes), found
        await second.expect(m.Resume(), m.Resumed)
        await second.expect(m.Unhold(), m.Unheld)
        await echoes(second)
        await second.until(r"\n3\n")
        # And it can be checkpointed again.
        await checkpointed(second, sequence=2)
        os.close(second.stdin)
        assert await second.next() == m.Exited(3)
        await second.expect(m.Destroy(), m.Destroyed)


@case
async def kill_at_release(store: str) -> None:
    """Release(kill=True): the job is gone without Exited, the checkpoint is not."""
    key, directory = step_key(), fresh(store)
    async with capsule() as first:
        await running(first, key)
        identifier = await checkpointed(first, kill=True)
        await first.expect(m.Flush(directory=directory), m.FlushStarted)
        await first.expect_event(m.Flushed)
        await first.refused(m.Prepare(sequence=2, checkpoint=identifier), ExitCode.USAGE, "has ended")
        await first.expect(m.Destroy(), m.Destroyed)
    async with capsule() as second:
        await resumed(second, key, directory, identifier)
        await echoes(second)


@case
async def abort() -> None:
    """A checkpoint is given up in each phase, between requests and during one; the job never notices."""
    async with capsule() as made:
        await running(made)
        await made.expect(m.Abort(reason="nothing under way"), m.Aborted)
        for last in range(len(PHASES)):
            await made.expect(m.Prepare(sequence=last + 1, checkpoint="0" * 32), m.Prepared)
            for request, reply in PHASES[:last]:
                await made.expect(request, reply)
            await made.expect(m.Abort(reason=f"after {last} phases"), m.Aborted)
            await echoes(made)
        for last in range(len(PHASES)):
            requests: list[m.Message] = [m.Prepare(sequence=9, checkpoint="0" * 32), *(p[0] for p in PHASES)]
            for request in requests[:last]:
                answer = await made.ask(request)
                assert not isinstance(answer, m.Failed), (last, request, answer)
            await made.lease.send(requests[last])
            await made.lease.send(m.Abort(reason="in the middle"))
            first = await made.next()
            # It may have been done when the abort came, but it is answered first and aborted anyway.
            assert isinstance(first, m.Failed | m.Prepared | m.Frozen | m.Dumped), first
            assert await made.next() == m.Aborted()
            await echoes(made)
        await checkpointed(made, sequence=10)
        await echoes(made)
        await made.expect(m.Destroy(), m.Destroyed)


@case
async def flush_outlives(store: str) -> None:
    """The lease ends at once after Flush: the fragment is published all the same."""
    directory = fresh(store)
    async with capsule() as made:
        await running(made)
        await checkpointed(made, kill=True)
        await made.expect(m.Flush(directory=directory), m.FlushStarted)
    async with asyncio.timeout(DEADLINE):
        while not os.path.exists(f"{directory}/fragment.json"):
            await asyncio.sleep(0.05)


@case
async def ends_before_unhold(store: str) -> None:
    """A job ends as soon as it goes on, before the hold is lifted: that is no failure of the restore."""
    key, directory = step_key(), fresh(store)
    identifier = await make_fragment(key, directory, job=("sh", "-c", "echo up; read line; exit 5"))
    async with capsule() as made:
        await connected(made, key)
        await restored(made, directory, identifier)
        os.close(made.stdin)
        # Its end may be known before Resume is answered.
        answers = [await made.ask(m.Resume()), await made.next()]
        assert m.Resumed() in answers and m.Exited(5) in answers, answers
        await made.expect(m.Unhold(), m.Unheld)
        await made.expect(m.Destroy(), m.Destroyed)


@case
async def flushes_here(directory: str, count: str) -> None:
    """Have jobs killed by a checkpoint, and begin to flush one with each line of stdin; stay until the leases end."""
    made = [Capsule(await Lease.open(SOCKET)) for _ in range(int(count))]
    for one in made:
        await running(one)
        await checkpointed(one, kill=True)
    os.makedirs(directory)
    print("killed", flush=True)
    for number, one in enumerate(made):
        if not await asyncio.to_thread(sys.stdin.readline):
            break
        await one.expect(m.Flush(directory=f"{directory}/{number}"), m.FlushStarted)
        print("began", flush=True)
    for one in made:
        while await one.next(deadline=None) is not None:
            pass


@case
async def flush_here(directory: str) -> None:
    """Begin a flush of a larger job and stay until the lease ends."""
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    fill = "import sys; data = bytes(range(256)) * (1 << 18); print('up', flush=True); sys.stdin.read()"
    async with capsule() as made:
        await running(made, job=(sys.executable, "-c", fill))
        await checkpointed(made)
        await made.expect(m.Flush(directory=directory), m.FlushStarted)
        await made.next(deadline=None)


@case
async def flush_fails(store: str, small: str) -> None:
    """Stores that cannot be written: the reason is told, the job goes on, and the flush can be tried elsewhere."""
    directory, older = fresh(store), fresh(store)
    async with capsule() as made:
        await running(made)
        identifier = await checkpointed(made)
        await made.expect(m.Flush(directory=older), m.FlushStarted)
        await made.expect_event(m.Flushed)
        before = {name: os.stat(f"{older}/{name}").st_mtime_ns for name in os.listdir(older)}
        await checkpointed(made, sequence=2)
        for wrong, pattern in (
            ("/root/x", "Permission denied"),
            ("/proc/x", "No such file"),
            ("/etc/passwd/x", "not a directory"),
            (f"{small}/x", "No space left"),
            (older, "already holds"),
            (f"{store}/../x", "not an absolute path"),
        ):
            await made.expect(m.Flush(directory=wrong), m.FlushStarted)
            failed = await made.expect_event(m.FlushFailed)
            assert pattern in failed.message, (wrong, failed)
            assert failed.sequence == 2
        assert {name: os.stat(f"{older}/{name}").st_mtime_ns for name in os.listdir(older)} == before
        await made.refused(m.Flush(directory="relative"), ExitCode.USAGE, "absolute")
        await made.expect(m.Flush(directory=directory), m.FlushStarted)
        await made.expect_event(m.Flushed)
        await made.refused(m.Flush(directory=directory), ExitCode.USAGE, "no released checkpoint")
        await echoes(made)
        await made.expect(m.Destroy(), m.Destroyed)
        assert identifier


async def stopped_transfer(known: set[int]) -> set[int]:
    """The processes of a transfer that has just begun, which are stopped."""
    async with asyncio.timeout(DEADLINE):
        while True:
            found = subprocess.run(["pgrep", "-f", "hpccr.noded.transfer"], capture_output=True, text=True).stdout
            if fresh := {int(pid) for pid in found.split()} - known:
                for pid in fresh:
                    os.kill(pid, signal.SIGSTOP)
                return fresh
            await asyncio.sleep(0)


@case
async def flush_overtaken_fails() -> None:
    """A flush that the final checkpoint's has overtaken fails, and then that one: what the spool has of the final
    checkpoint is all that is left of the job, and can still be flushed."""
    async with capsule() as made:
        await running(made)
        await checkpointed(made)
        await made.expect(m.Flush(directory="/proc/x"), m.FlushStarted)
        first = await stopped_transfer(set())
        await checkpointed(made, sequence=2, kill=True)
        await made.expect(m.Flush(directory="/proc/x"), m.FlushStarted)
        second = await stopped_transfer(first)
        for sequence, pids in ((1, first), (2, second)):
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            assert (await made.expect_event(m.FlushFailed)).sequence == sequence
        with tempfile.TemporaryDirectory(dir="/var/tmp") as store:
            await made.expect(m.Flush(directory=f"{store}/2"), m.FlushStarted)
            assert (await made.expect_event(m.Flushed)).sequence == 2
        await made.expect(m.Destroy(), m.Destroyed)


@case
async def damaged(store: str) -> None:
    """What is not exactly what was sealed for this user, step, capsule and checkpoint is refused before it is used."""
    key, directory = step_key(), fresh(store)
    identifier = await make_fragment(key, directory)
    other_key, other = step_key(), fresh(store)
    await make_fragment(other_key, other)

    async def refused(where: str, code: ExitCode, pattern: str, *, sequence: int = 1, name: str = identifier) -> None:
        async with capsule() as made:
            await connected(made, key)
            await made.refused(fetch(where, name, sequence=sequence), code, pattern)
            # The capsule is gone, the lease answers still.
            await made.refused(m.Resume(), ExitCode.USAGE, "gone")
            await made.expect(m.Destroy(), m.Destroyed)

    def copy() -> str:
        shutil.copytree(directory, made := fresh(store))
        return made

    await refused(fresh(store), ExitCode.NO_CHECKPOINT, r"no fragment\.json")
    await refused(other, ExitCode.CORRUPT, "step testbed-")
    await refused(directory, ExitCode.CORRUPT, "sequence 1, not 2", sequence=2)
    await refused(directory, ExitCode.CORRUPT, "checkpoint", name="f" * 32)
    largest = max(os.listdir(directory), key=lambda name: os.stat(f"{directory}/{name}").st_size)
    for name in ("fragment.json", largest):
        where = copy()
        flip(f"{where}/{name}")
        await refused(where, ExitCode.CORRUPT, "seal|sealed" if name == "fragment.json" else re.escape(where))
        os.unlink(f"{where}/{name}")
        code = ExitCode.NO_CHECKPOINT if name == "fragment.json" else ExitCode.CORRUPT
        await refused(where, code, re.escape(where))
    where = copy()
    os.truncate(f"{where}/{largest}", os.stat(f"{where}/{largest}").st_size - 1)
    await refused(where, ExitCode.CORRUPT, re.escape(where))
    os.unlink(f"{where}/{largest}")
    os.mkfifo(f"{where}/{largest}")
    await refused(where, ExitCode.CORRUPT, re.escape(where))
    async with capsule() as made:
        await resumed(made, key, directory, identifier)
        await echoes(made)


@case
async def stolen(directory: str, record: str) -> None:
    """A copy of another user's fragment, with all that was asked for but the user."""
    cluster, job, step, identifier = Path(record).read_text().split()
    async with capsule() as made:
        await connected(made, StepKey(cluster=cluster, job=job, step=step))
        await made.refused(fetch(directory, identifier), ExitCode.CORRUPT, "user 1001, not 1002")


@case
async def offered(store: str, record: str) -> None:
    """Make a fragment and note what a restore of it has to name."""
    key, directory = step_key(), store
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    identifier = await make_fragment(key, directory)
    Path(record).write_text(f"{key.cluster} {key.job} {key.step} {identifier}")


def fresh(store: str) -> str:
    os.makedirs(store, exist_ok=True)
    return os.path.join(store, f"capsule-{secrets.token_hex(4)}")


def flip(path: str) -> None:
    with open(path, "r+b") as file:
        position = os.stat(path).st_size // 2
        byte = os.pread(file.fileno(), 1, position)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), position)


async def make_fragment(key: StepKey, directory: str, *, job: tuple[str, ...] = WAIT) -> str:
    async with capsule() as made:
        await running(made, key, job=job)
        identifier = await checkpointed(made, kill=True)
        await made.expect(m.Flush(directory=directory), m.FlushStarted)
        await made.expect_event(m.Flushed)
        await made.expect(m.Destroy(), m.Destroyed)
    return identifier


async def resumed(made: Capsule, key: StepKey, directory: str, identifier: str) -> None:
    await connected(made, key)
    await restored(made, directory, identifier)
    await made.expect(m.Resume(), m.Resumed)
    await made.expect(m.Unhold(), m.Unheld)


@case
async def leave(store: str, state: str) -> None:
    """Let go of a lease in some state, without a word."""
    key, directory = step_key(), fresh(store)
    if state in ("fetching", "restored", "resumed", "unheld"):
        identifier = await make_fragment(key, directory)
    async with capsule() as made:
        if state == "creating":
            await made.lease.send(create(key))
            return
        if state == "created":
            await made.expect(create(key), m.Created)
            return
        await connected(made, key)
        match state:
            case "ended":
                await made.expect(start("true"), m.Started)
                assert await made.next() == m.Exited(0)
            case "running":
                await made.expect(start(*WAIT, stdin="pipe"), m.Started)
            case "fetching":
                await made.lease.send(fetch(directory, identifier))
            case "restored" | "resumed" | "unheld":
                await restored(made, directory, identifier)
                if state != "restored":
                    await made.expect(m.Resume(), m.Resumed)
                if state == "unheld":
                    await made.expect(m.Unhold(), m.Unheld)
            case "connected":
                pass
            case _:
                await made.expect(start(*WAIT, stdin="pipe"), m.Started)
                await made.until("up")
                await _checkpoint_until(made, state)


async def _checkpoint_until(made: Capsule, state: str) -> None:
    if state == "preparing":
        await made.lease.send(m.Prepare(sequence=1, checkpoint="0" * 32))
        return
    await made.expect(m.Prepare(sequence=1, checkpoint="0" * 32), m.Prepared)
    for name, (request, reply) in zip(("frozen", "dumped", "released"), PHASES, strict=True):
        if state == "prepared":
            return
        if state == "dumping" and name == "dumped":
            await made.lease.send(request)
            return
        await made.expect(request, reply)
        if state == name:
            return


SENDING = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connection.settimeout(0.5)
try:
    while connection.send(bytes(1 << 20)):
        pass
except TimeoutError:
    print("up", flush=True)
sys.stdin.read()
"""


@case
async def hold(address: str = "", port: str = "") -> None:
    """Have a running capsule until hpccrd ends it; prints a line when it runs.

    With an address its job has sent what the server there does not take: the kernel keeps such a connection, and its
    namespace, when the job is gone.
    """
    async with capsule() as made:
        job = {"job": (sys.executable, "-c", SENDING, address, port)} if address else {}
        await running(made, **job)
        print("holding", flush=True)
        assert await made.next(deadline=None) is None


@case
async def clean() -> None:
    """Nothing of any capsule is left on this node, at the latest after a while (root)."""
    deadline = asyncio.get_running_loop().time() + DEADLINE
    while left := leftovers():
        assert asyncio.get_running_loop().time() < deadline, left
        await asyncio.sleep(0.05)


@contextmanager
def busy_processors() -> Iterator[None]:
    """So that who is to run next has to wait, and two things fall into another order than on a quiet machine."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def checkpointing(made: Capsule, moment: float, chance: random.Random) -> list[m.Message]:
    """Make a checkpoint until `moment` (by the loop's clock) or its end, sometimes not as far; gives the answers."""
    answers: list[m.Message] = []
    requests = [m.Prepare(sequence=1, checkpoint=secrets.token_hex(16)), *(request for request, _ in PHASES)]
    for request in requests[: chance.randint(1, 2 * len(requests))]:
        await made.lease.send(request)
        try:
            answers.append(await made.next(deadline=max(0, moment - asyncio.get_running_loop().time())))
        except TimeoutError:
            break
    return answers


@case
async def destroyed_at_any_moment(seed: str, count: str) -> None:
    """A capsule is destroyed while a checkpoint of it is made, succeeds, fails or is given up: when hpccrd says that it
    is gone, nothing of it is in the spool (root)."""
    chance = random.Random(int(seed))
    loop = asyncio.get_running_loop()
    with busy_processors():
        for _ in range(int(count)):
            async with capsule() as made:
                await running(made, job=("sh", "-c", "echo up; read line"))
                after = chance.uniform(0, 0.3) if chance.random() < 0.5 else DEADLINE
                end = loop.call_later(after, os.write, made.stdin, b"end\n")
                await checkpointing(made, loop.time() + chance.uniform(0, 0.3), chance)
                end.cancel()
                os.close(made.stdin)
                if chance.random() < 0.5:
                    await made.lease.send(m.Abort(reason="too late"))
                await made.lease.send(m.Destroy())
                while not isinstance(await made.next(), m.Destroyed):
                    pass
                left = [name for name in os.listdir("/var/spool/hpccr") if not name.startswith("kept-")]
                assert not left, left


@case
async def restored_and_destroyed_at_any_moment(seed: str, count: str, store: str) -> None:
    """A capsule is destroyed while a job is restored in it; the last one restores the same checkpoint to the end."""
    chance = random.Random(int(seed))
    loop = asyncio.get_running_loop()
    key, directory = step_key(), fresh(store)
    identifier = await make_fragment(key, directory)
    begin = m.Restore(stdin="pipe", merged=True)
    requests = (fetch(directory, identifier), m.RollBack(), begin, m.Resume(), m.Unhold())
    with busy_processors():
        for number in range(int(count) + 1):
            async with capsule() as made:
                await connected(made, key)
                moment = loop.time() + (chance.uniform(0, 0.8) if number < int(count) else DEADLINE)
                for request in requests:
                    try:
                        answer = await asyncio.wait_for(made.ask(request), moment - loop.time())
                    except TimeoutError:
                        break
                    assert not isinstance(answer, m.Failed), answer
                else:
                    await echoes(made)
                await made.lease.send(m.Destroy())
                while not isinstance(await made.next(), m.Destroyed):
                    pass
                if made.stdin >= 0:
                    os.close(made.stdin)


@case
async def given_up_at_any_moment(seed: str, count: str) -> None:
    """The job goes on whenever a checkpoint of it is given up, and the next one works."""
    chance = random.Random(int(seed))
    loop = asyncio.get_running_loop()
    talks = textwrap.dedent(TALKERS).replace('"ready"', '"up"').replace('"echo"', '"got"')
    with busy_processors():
        async with capsule() as made:
            await running(made, job=(sys.executable, "-c", talks))
            for number in range(int(count)):
                answers = await checkpointing(made, loop.time() + chance.uniform(0, 0.3), chance)
                await made.lease.send(m.Abort(reason=f"round {number}"))
                while (answer := await made.next()) != m.Aborted():
                    answers.append(answer)
                for answer in answers:
                    assert not isinstance(answer, m.Failed) or re.search("given up|aborted", answer.message), answer
                await echoes(made)
                if chance.random() < 0.2:
                    await checkpointed(made)
                    await echoes(made)
            await made.expect(m.Destroy(), m.Destroyed)


def leftovers() -> list[str]:
    def lines(*argv: str) -> list[str]:
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()

    left = [line for line in lines("ip", "-br", "link") if line.startswith(("hp", "vxlan"))]
    left += [line for line in lines("nft", "list", "tables") if "hpccr" in line]
    left += [line for line in lines("ss", "-Hlun") if ":8473 " in line]
    left += [name for name in network_namespaces() if name != "own"]
    left += [line for line in lines("ps", "-eo", "args") if "hpccr.noded" in line or "capsule/launch" in line]
    left += os.listdir("/run/hpccr/capsules")
    left += [name for name in os.listdir("/var/spool/hpccr") if not name.startswith("kept-")]
    if os.path.exists("/run/hpccr/ip_forward"):
        left.append("ip_forward")
    return left


@case
async def probe() -> None:
    """doctor's checks: all well on this node, and each has something to say."""
    async with capsule() as made, capsule() as other:
        await connected(other)
        probed = await made.expect(m.Probe(protocol=m.PROTOCOL), m.Probed)
        for check in probed.checks:
            assert check.ok, check
            assert check.detail
        names = {check.name for check in probed.checks}
        assert names >= {"criu", "criu check", "pycriu", "namespaces", "vxlan", "nft", "tar", "site key", "spool"}, (
            names
        )
        assert probed.leases == 1
        assert await made.next() is None


@case
async def relay(connections: str = "1") -> None:
    """Serve leases of this node to cases that run on another one, then end. Prints a line when it listens."""
    left = int(connections)
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        channel: Channel[m.NodeRequest] = Channel(reader, writer, m.NodeRequest)
        async with capsule() as made:
            made.output = b""

            async def back() -> None:
                while (reply := await made.next(deadline=None)) is not None:
                    await channel.send(reply)

            async def output() -> None:
                sent = 0
                while True:
                    await made.more_than(sent)
                    data, sent = made.output[sent:], len(made.output)
                    await channel.send(m.Output(stream=1, data=data))

            tasks = [asyncio.create_task(back()), asyncio.create_task(output())]
            while (request := await channel.receive()) is not None:
                if isinstance(request, m.Start | m.Restore):
                    await made._send_with_pipes(request)
                else:
                    await made.lease.send(request)
            for task in tasks:
                task.cancel()
        await channel.close()
        left -= 1
        if not left:
            done.set()

    server = await asyncio.start_server(serve, "0.0.0.0", RELAY_PORT)
    print("listening", flush=True)
    await done.wait()
    server.close()


SERVE = (
    "import socket; s=socket.create_server(('', 5000)); c,a=s.accept(); c.sendall(b'from '+a[0].encode()); c.close()"
)
CALL = "import socket,sys; s=socket.create_connection((sys.argv[1], int(sys.argv[2]))); print(s.recv(99).decode())"


async def talk(one: Capsule, other: Capsule) -> None:
    """The first listens, the second calls it by name and address, both over the capsule network."""
    await join(one, other)
    wait = "until grep -q ':1388 ' /proc/net/tcp*; do :; done; "  # until it listens: 0x1388 is 5000
    await one.expect(start("sh", "-c", f'{sys.executable} -c "$0" & {wait}echo ready; wait', SERVE), m.Started)
    await one.until("ready")
    await other.expect(start("sh", "-c", f'{sys.executable} -c "$0" hpccr-0 5000; hostname', CALL), m.Started)
    # Capsule 1 has no command of its own: argv is for capsule 0 and is run here only because this is a test.
    await other.until(r"from 10\.90\.0\.11\nhpccr-1\n")
    for made in (one, other):
        assert await made.next() == m.Exited(0)
        await made.expect(m.Destroy(), m.Destroyed)


@case
async def pair() -> None:
    """Two capsules of a step on one node."""
    async with capsule() as one, capsule() as other:
        await talk(one, other)


@case
async def pair_apart(node: str) -> None:
    """Two capsules of a step on two nodes."""
    async with remote(node) as one, capsule() as other:
        await talk(one, other)


@case
async def uplink(address: str, port: str) -> None:
    """A capsule reaches a server on another node, which sees it come from this node."""
    async with capsule() as made:
        await connected(made)
        # MPI libraries of other jobs on the node would take a device with an address for a way to other nodes.
        assert "hpu" not in subprocess.run(["ip", "-o", "address"], check=True, capture_output=True, text=True).stdout
        assert "hpu" in subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout
        await made.expect(start(sys.executable, "-c", CALL, address, port), m.Started)
        await made.until(r"hello")
        assert await made.next() == m.Exited(0)
        await made.expect(m.Destroy(), m.Destroyed)


def main() -> int:
    name, *arguments = sys.argv[1:]
    asyncio.run(CASES[name](*arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
