"""A step of an MPI program: started by the mpirun of its library, laid out as srun would have it."""

from __future__ import annotations

import os
import select
import stat
import time

from hpccr.capsule import link
from hpccr.capsule.spawn import exit_code, fork
from hpccr.capsule.step import layout, library
from hpccr.capsule.step.options import KILL_WAIT, Usage
from hpccr.capsule.step.script import Plan, quote
from hpccr.capsule.step.streams import open_input, open_outputs
from hpccr.capsule.step.tasks import PASSED, ending, task_ids

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable
else:
    import _signal as signal

RSH = os.path.join(os.path.dirname(os.path.dirname(__file__)), "hpccr-rsh")

NOT_OF_SLURM = {"PRTE_MCA_ras": "^slurm", "OMPI_MCA_ras": "^slurm"}
"""Open MPI would count the job's tasks per node as what there is room for; a step may have another number."""


def run_mpi(found: library.Found, plan: Plan, environ: dict[bytes, bytes]) -> int:
    """Run the step; the highest exit code of a task that ended by itself, or mpirun's. Raises Usage, OSError."""
    launcher = library.launcher(found, os.environ)
    directory = f"/tmp/hpccr-srun-{os.getpid()}-{plan.number}"  # noqa: S108 - the capsule's own
    os.mkdir(directory, 0o700)
    try:
        return _run(launcher, found, plan, environ, directory)
    finally:
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)


def _run(launcher: str, found: library.Found, plan: Plan, environ: dict[bytes, bytes], directory: str) -> int:
    reports = os.path.join(directory, "ended")
    outputs = open_outputs(plan)
    if outputs.only:
        raise Usage("srun: the output of one task alone cannot be had of an MPI program", "use --output=file.%t", 13)
    stdin, only = open_input(plan)
    if only:
        raise Usage(
            f"srun: --input={only} cannot be had of an MPI program", "its input goes to task 0, a file's to all", 13
        )
    if plan.options.chdir:
        os.chdir(plan.options.chdir)
    file = _file_behind(stdin) if only is None else ""
    if file:
        # Not for mpirun as well: Intel's proxy dies of SIGPIPE when it has input for a task that does not take it.
        stdin = os.open("/dev/null", os.O_RDONLY)
    text = plan.script(report=_report(reports), stdin=file)
    words = [] if plan.options.multi_prog else plan.options.command
    alone = [] if found.sure or plan.options.kill_on_bad_exit else _each_for_itself(launcher, found.kind)
    argv = [launcher, *alone, *_layout(found.kind, plan, directory), "/bin/sh", "-c", text, "srun", *words]

    def prepare() -> None:
        for number, fd in {link.STDIN: stdin, **outputs.fds}.items():
            if fd != number:
                os.dup2(fd, number)
        _end_with_parent()

    for name, value in NOT_OF_SLURM.items():
        environ.setdefault(os.fsencode(name), os.fsencode(value))
    code = _Launcher([os.fsencode(word) for word in argv], environ, prepare, plan.options.time).wait()
    ended = _ended(reports)
    where = dict(plan.order())
    groups: dict[tuple[int, int], list[int]] = {}
    for rank, own in ended.items():
        groups.setdefault((where.get(rank, 0), own), []).append(rank)
    for (index, own), ranks in sorted(groups.items()):
        link.warn(f"srun: error: {layout.NAME}{index}: {task_ids(ranks)}: {ending(own)}")
    return max(ended.values(), default=code)


def _each_for_itself(launcher: str, kind: str) -> list[str]:
    """Options with which a task that fails does not end the others, since they may have nothing to do with it.

    Hydra does that only when a task has begun to use MPI; Open MPI before 5 knows no such option.
    """
    if kind != library.OPEN_MPI or "(Open MPI) 5" not in library.output([launcher, "--version"], os.environ):
        return []
    return ["--runtime-options", "error-nonzero-status=0"]


def _end_with_parent() -> None:
    """SIGTERM for this process, which becomes mpirun, when srun is killed: it would lose its place and run on."""
    import ctypes

    PR_SET_PDEATHSIG = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _layout(kind: str, plan: Plan, directory: str) -> list[str]:
    """mpirun's options for the tasks' places. Raises Usage for places that it cannot be told."""
    hosts = [f"{layout.NAME}{index}:{count}" for index, count in plan.counts.items()]
    tasks = ["-n", str(plan.tasks)]
    # Steps side by side would all be bound to the same cores, as none knows of the others.
    if kind == library.OPEN_MPI:
        root = ["--allow-run-as-root"] if os.getuid() == 0 else []
        # A node for each task, one after the other: by slots PRRTE would begin with the node that it is on itself.
        path = _write(directory, (f"{layout.NAME}{index}" for _, index in plan.order()))
        return [*root, "--hostfile", path, "--map-by", "seq", "--bind-to", "none", *tasks]
    if not plan.cyclic or len(hosts) == 1:
        path = _write(directory, hosts)
        return ["-machinefile" if kind == library.INTEL else "-f", path, *tasks]
    if max(plan.counts.values()) - min(plan.counts.values()) > 1:
        raise Usage("srun: MPICH cannot be told to go around nodes of different sizes", "use --distribution=block", 13)
    return ["-hosts", ",".join(f"{layout.NAME}{index}" for index in plan.counts), "-ppn", "1", *tasks]


def _write(directory: str, hosts: Iterable[str]) -> str:
    path = os.path.join(directory, "hosts")
    with open(path, "w", encoding="ascii") as file:
        file.writelines(f"{host}\n" for host in hosts)
    return path


def _report(path: str) -> str:
    """A command for the tasks' script that says in the file `path` of this capsule how the task has ended."""
    here, path = os.uname().nodename, quote(path)
    there = f'{quote(RSH)} -n {here} "echo $r $c >>{path}"'
    return f"{{ if [ $h = {here} ]; then echo $r $c >>{path}; else {there}; fi; }}"


def _ended(path: str) -> dict[int, int]:
    try:
        with open(path, encoding="ascii") as file:
            lines = [line.split() for line in file]
    except FileNotFoundError:
        return {}
    return {int(words[0]): int(words[1]) for words in lines if len(words) == 2}


def _file_behind(fd: int) -> str:
    """The name of the regular file that is read from its beginning by `fd`: each task opens it. "": there is none."""
    if not stat.S_ISREG(os.fstat(fd).st_mode) or os.lseek(fd, 0, os.SEEK_CUR) != 0:
        return ""
    name = os.readlink(f"/proc/self/fd/{fd}")
    return name if os.path.exists(name) else ""


class _Launcher:
    """mpirun, with the signals that srun gets."""

    def __init__(self, argv: list[bytes], environ: dict[bytes, bytes], prepare: object, limit: float | None) -> None:
        self._loop = link.Loop()
        passed = {number for number in PASSED if signal.getsignal(number) is not signal.SIG_IGN}
        self._signals = link.SignalPipe(passed | {signal.SIGCHLD})
        self._loop.watch(self._signals.fd, select.POLLIN, self._on_signals)
        self._limit = None if limit is None else time.monotonic() + limit
        self._kill_at: float | None = None
        self._code: int | None = None
        self._pid = fork("srun", argv, environ, prepare)  # type: ignore[arg-type]

    def wait(self) -> int:
        while self._code is None:
            self._reap()
            times = [moment for moment in (self._limit, self._kill_at) if moment is not None]
            if self._code is None:
                self._loop.turn(max(0.0, min(times) - time.monotonic()) if times else None)
                self._look_at_clock()
        return self._code

    def _reap(self) -> None:
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid:
            self._code = exit_code(status)

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        if self._limit is not None and self._limit <= now:
            self._limit, self._kill_at = None, now + KILL_WAIT
            link.warn("srun: error: the step is cancelled due to its time limit")
            self._signal(signal.SIGTERM)
        if self._kill_at is not None and self._kill_at <= now:
            self._kill_at = None
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._code is None:
            os.kill(self._pid, number)

    def _on_signals(self, _events: int) -> None:
        for number in set(self._signals.numbers()) - {signal.SIGCHLD}:
            self._signal(number)
