"""Reasons from CRIU's logs."""

from __future__ import annotations

from hpccr.noded.criu import GROWING, errors, message

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
