"""Starting the launch root: from a fork of root's init to a process that is the user's in every respect."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

import msgspec

from hpccr.errors import ExitCode, HpccrError, encodable
from hpccr.noded import child, syscalls
from hpccr.noded.control import Identity


def limits(identity: Identity) -> None:
    """Take the requester's resource limits, umask, affinity and nice value. Root is needed for some."""
    for number, soft, hard in identity.rlimits:
        _limit(number, soft, hard)
    os.umask(identity.umask)
    if identity.cpus:
        os.sched_setaffinity(0, identity.cpus)
    os.setpriority(os.PRIO_PROCESS, 0, identity.nice)


def lower(pids: Iterable[int], identity: Identity) -> None:
    """Take from processes what they may have beyond the requester's limits, nice value and scheduling class: CRIU gives
    restored ones what they had. In a child with the user's ids."""
    realtime = next((hard for number, _, hard in identity.rlimits if number == resource.RLIMIT_RTPRIO), 0)
    for pid in pids:
        for number, _, most in identity.rlimits:
            soft, hard = resource.prlimit(pid, number)
            new = _lower(hard, most)
            if new != hard:
                resource.prlimit(pid, number, (_lower(soft, new), new))
        for thread in map(int, os.listdir(f"/proc/{pid}/task")):
            if os.sched_getscheduler(thread) in (os.SCHED_FIFO, os.SCHED_RR) and not realtime:
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
            if os.getpriority(os.PRIO_PROCESS, thread) < identity.nice:
                os.setpriority(os.PRIO_PROCESS, thread, identity.nice)


def _limit(number: int, soft: int, hard: int) -> None:
    try:
        resource.setrlimit(number, (soft, hard))
    except ValueError:
        # Without CAP_SYS_RESOURCE a hard limit can only go down (Python: "not allowed to raise maximum limit").
        _, ceiling = resource.getrlimit(number)
        hard = _lower(hard, ceiling)
        resource.setrlimit(number, (_lower(soft, hard), hard))


def _lower(one: int, other: int) -> int:
    """The stricter of two limits, either of which may be RLIM_INFINITY (-1)."""
    return one if other == resource.RLIM_INFINITY or resource.RLIM_INFINITY != one <= other else other


def enter_cgroups(procs: Sequence[int]) -> None:
    """Move the calling process: `procs` are cgroup.procs files open for writing, one per hierarchy."""
    for fd in procs:
        os.write(fd, b"0")


def start(
    argv: Sequence[bytes],
    environment: Mapping[bytes, bytes],
    cwd: bytes,
    identity: Identity,
    *,
    cgroups: Sequence[int],
    stdio: tuple[int | None, int, int],
    private: Sequence[str],
) -> int:
    """Start argv as the user, in the cgroups, in a new ipc namespace and session; its pid.

    stdio: descriptors for 0, 1, 2; None is /dev/null. private: the capsule's own directories, for the hint only.
    Raises HpccrError when anything on the way to execve fails, naming what.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _become_root_of_job(argv, environment, cwd, identity, cgroups, stdio, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        failure = pipe.read()
    if not failure:
        return pid
    os.waitpid(pid, 0)
    doing, reason, number = msgspec.msgpack.decode(failure, type=tuple[str, str, int])
    raise HpccrError(f"cannot start the job: {doing}: {reason}", hint=_hint(doing, cwd, private), code=ExitCode(number))


def _become_root_of_job(
    argv: Sequence[bytes],
    environment: Mapping[bytes, bytes],
    cwd: bytes,
    identity: Identity,
    cgroups: Sequence[int],
    stdio: tuple[int | None, int, int],
    writing: int,
) -> NoReturn:
    doing = "entering the job's cgroups"
    try:
        enter_cgroups(cgroups)
        doing = "making an ipc namespace"
        # CRIU stays outside of it and so dumps its contents: SysV shared memory is refused otherwise.
        os.unshare(os.CLONE_NEWIPC)
        os.setsid()
        doing = "taking the requester's limits"
        limits(identity)
        doing = "taking the user's identity"
        child.become(identity)
        doing = "leaving root's session keyring"
        syscalls.join_new_session_keyring()
        doing = f"changing to the working directory {encodable(os.fsdecode(cwd))}"
        os.chdir(cwd)
        doing = "setting up stdio"
        child.redirect(*stdio)
        doing = f"executing {os.fsdecode(argv[0])}"
        child.reset_signals()
        syscalls.close_range(3, flags=syscalls.CLOSE_RANGE_CLOEXEC)
        os.execve(argv[0], list(argv), dict(environment))  # noqa: S606 - there is no shell to want
    except BaseException as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        os.write(writing, msgspec.msgpack.encode((doing, reason, int(ExitCode.FAILED))))
    finally:
        os._exit(127)


def _hint(doing: str, cwd: bytes, private: Sequence[str]) -> str:
    if "working directory" in doing:
        path = os.fsdecode(cwd)
        for place in private:
            if path == place or path.startswith(place.rstrip("/") + "/"):
                return (
                    f"{place} is private to each capsule and starts empty: submit from another directory, "
                    "or take it out of capsule.private"
                )
        return "the directory must exist on every node of the job and the user must be able to enter it"
    if "executing" in doing:
        return "the same hpccr must be installed on every node of the job"
    return ""
