"""CRIU's words, and the reasons from its logs."""

from __future__ import annotations

import asyncio
import socket

import pytest

from hpccr.noded.control import Identity
from hpccr.noded.criu import GROWING, Criu, Notification, errors, load, message
from hpccr.noded.reaper import Reaper

IDENTITY = Identity(uid=1, gid=1, groups=(), umask=0, rlimits=(), cpus=(), nice=0)
LOG = """\
(00.000012) Version: 4.2.1 (gitid 0)
(00.001000) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.002000) 301: Warn  (criu/net.c:1): harmless
(00.003000)    302: Error (criu/files-reg.c:2143): File home/x has bad size 5 (expect 4)
Error (criu/cr-restore.c:1): without a time
(00.004000) Error (criu/cr-restore.c:2320): Restoring FAILED.
"""


def test_the_cause_without_time_and_pid_and_without_its_consequences() -> None:
    assert errors(LOG) == ["Error (criu/files-reg.c:2143): File home/x has bad size 5 (expect 4)"]


def test_consequences_where_there_is_no_cause() -> None:
    consequences = "\n".join(LOG.splitlines()[-1:])
    assert errors(consequences) == ["Error (criu/cr-restore.c:2320): Restoring FAILED."]


def test_tasks_that_are_started_too_fast_are_the_cause_unless_criu_complains_of_one_that_is_there() -> None:
    given_up = "(00.000600) Collected (-1 attempts, 1349 in_progress)\n"
    limits = LOG.splitlines(keepends=True)[1]
    assert errors(limits + given_up + "(00.000700) Error (criu/cr-dump.c:1975): Dumping FAILED.\n") == [GROWING]
    ended = "(00.000500) Error (criu/util.c:412): Can't open 397772: No such file or directory\n"
    assert errors(ended + given_up) == [GROWING]
    trap = "Error (compel/src/lib/infect.c:323): Can't dump the 304 thread with a pending SIGTRAP."
    assert errors(6 * f"(00.000500) {trap}\n" + ended + given_up) == [trap]
    for last in ("(-1 attempts, 0 in_progress)", "(3 attempts, 0 in_progress)", "(3 attempts, -1 in_progress)"):
        assert errors(f"{LOG}(00.000600) Collected {last}\n") == errors(LOG)


def test_no_error_at_all() -> None:
    assert errors("") == []


def test_the_first_errors_and_the_last_are_told() -> None:
    found = errors("\n".join(f"(00.1) {pid}: Error (criu/x.c:{pid}): e{pid}\x1b" for pid in range(5)))
    assert message(found) == ["Error (criu/x.c:0): e0?", "Error (criu/x.c:1): e1?", "Error (criu/x.c:4): e4?"]
    assert message(found[:3]) == found[:3]


@pytest.mark.parametrize("turns", range(6))
def test_a_word_is_not_lost_if_who_waits_is_cancelled_when_it_comes(turns: int) -> None:
    """turns: of the event loop between the word's coming and the cancellation."""
    rpc, _ = load()

    async def run() -> None:
        criu = Criu(rpc, Reaper(), program="criu", identity=IDENTITY, directory=-1)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            criu._socket = ours
            waiting = asyncio.create_task(criu.next())
            for _ in range(3):
                await asyncio.sleep(0)
            word = rpc.criu_resp(type=rpc.NOTIFY, success=True, notify=rpc.criu_notify(script="pre-dump"))
            theirs.send(word.SerializeToString())
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
            found = await asyncio.wait_for(criu.next(), 5) if waiting.cancelled() else waiting.result()
            assert found == Notification("pre-dump", 0) and criu.at == "pre-dump"
            await criu.kill()
            assert ours.fileno() == -1

    asyncio.run(run())
