"""What a capsule's parts share: stdio, limits, exit codes, helpers, and the end of processes."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Iterator

import pytest

from hpccr.errors import ExitCode, HpccrError, UnsupportedError
from hpccr.model import Stdio
from hpccr.noded import capsule, child, launch
from hpccr.noded.reaper import Reaper


@pytest.fixture
def fds() -> Iterator[list[int]]:
    made = [*os.pipe(), *os.pipe()]
    yield made
    for fd in made:
        os.close(fd)


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def test_streams_are_taken_in_order(fds: list[int]) -> None:
    first, second, third, _ = fds
    assert capsule.Streams.take([first, second, third], stdin="pipe", merged=False).inodes() == Stdio(
        inode(first), inode(second), inode(third)
    )
    assert capsule.Streams.take([first], stdin="null", merged=True).inodes() == Stdio(0, inode(first), inode(first))


@pytest.mark.parametrize(("stdin", "merged", "count"), [("pipe", True, 1), ("null", False, 3), ("pipe", False, 2)])
def test_a_wrong_number_of_descriptors_is_refused(fds: list[int], stdin: str, merged: bool, count: int) -> None:
    with pytest.raises(HpccrError, match="descriptors for stdio"):
        capsule.Streams.take(fds[:count], stdin=stdin, merged=merged)


def test_only_pipes_can_be_given_to_a_restored_job() -> None:
    with open("/dev/null") as null, pytest.raises(HpccrError, match="must be pipes"):
        capsule.Streams(None, null.fileno(), null.fileno()).inodes()


@pytest.mark.parametrize(("one", "other", "lower"), [(1, 2, 1), (2, 1, 1), (-1, 5, 5), (5, -1, 5), (-1, -1, -1)])
def test_the_stricter_limit(one: int, other: int, lower: int) -> None:
    assert resource.RLIM_INFINITY == -1
    assert launch._lower(one, other) == lower


@pytest.mark.parametrize(("cwd", "private"), [("/tmp", True), ("/tmp/a", True), ("/tmpx", False), ("/home", False)])
def test_the_hint_for_a_missing_directory_knows_private_ones(cwd: str, private: bool) -> None:
    hint = launch._hint(f"changing to the working directory {cwd}", cwd, ["/dev/shm", "/tmp"])
    assert ("private to each capsule" in hint) is private


def test_a_helpers_value_and_errors_come_back() -> None:
    assert child.call(lambda: [1, "two"]) == [1, "two"]

    def refuse() -> None:
        raise UnsupportedError("not that", hint="this")

    with pytest.raises(UnsupportedError, match="not that") as caught:
        child.call(refuse)
    assert caught.value.hint == "this" and caught.value.code is ExitCode.UNSUPPORTED
    with pytest.raises(HpccrError, match="No such file"):
        child.call(lambda: os.stat("/nowhere"))
    with pytest.raises(HpccrError, match="ZeroDivisionError"):
        child.call(lambda: 1 // 0)
    with pytest.raises(HpccrError, match="helper process"):
        child.call(lambda: os._exit(3))


def test_a_helper_has_no_descriptor_but_those_named(fds: list[int]) -> None:
    opened = child.call(lambda: sorted(int(name) for name in os.listdir("/proc/self/fd")), keep=[fds[0]])
    assert fds[0] in opened and not {fds[1], fds[2], fds[3]} & set(opened)


def test_tools_get_a_clean_environment_and_only_their_stdio(fds: list[int]) -> None:
    reading, writing = fds[:2]
    pid = child.execute(["sh", "-c", "env; ls /proc/self/fd; cat"], stdout=writing)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    lines = os.read(reading, 65536).decode().split()
    variables = {line.partition("=")[0] for line in lines if "=" in line}
    assert variables <= {"PATH", "LC_ALL", "PWD", "SHLVL", "_", "OLDPWD"}  # the last four are the shell's
    assert [line for line in lines if line.isdigit()] == ["0", "1", "2", "3"]  # 3: ls's own
    missing = child.execute(["/nowhere/tool"])
    assert os.waitstatus_to_exitcode(os.waitpid(missing, 0)[1]) == 127


def test_children_are_reaped_and_those_watched_tell_their_code() -> None:
    async def scenario() -> tuple[int, int]:
        reaper = Reaper()
        reaper.start(asyncio.get_running_loop())
        first = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], {})
        second = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
        one, two = reaper.watch(first), reaper.watch(second)
        await capsule.wait_ended(capsule.kill([second, 1 << 22]))
        return await one, await two

    assert asyncio.run(scenario()) == (7, -signal.SIGKILL)
