"""srun inside of a capsule against a real launch root, which here stands for those of two capsules; and its parts."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from capsule_processes import CAPSULE, DEADLINE, Endpoint, launch_root, wait_until
from hypothesis import given
from hypothesis import strategies as st

from hpccr.capsule import client
from hpccr.capsule.step import layout, library, mpirun, script, srun
from hpccr.capsule.step.labels import Lines
from hpccr.capsule.step.layout import EXACT, SHARED, WHOLE, Demand
from hpccr.capsule.step.ledger import Ledger, Step, decode_answer
from hpccr.capsule.step.options import Options, Usage, exported
from hpccr.capsule.step.tasks import task_ids

JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_JOB_CPUS_PER_NODE": "4(x2)",
    "SLURM_JOB_NAME": "name",
    "SLURM_NTASKS": "4",
    "USER": "me",
}
# srun.py with another list of hosts.
VARIED = """
import sys
sys.path.append({path!r})
from hpccr.capsule import client
client.HOSTS_FILE = {hosts!r}
from hpccr.capsule.step import srun
srun.PATIENCE = 0.3
srun.main(sys.argv[1:])
"""


class Job:
    """A job of two capsules, the working directory of its srun calls."""

    def __init__(self, endpoint: Endpoint, directory: Path) -> None:
        self._endpoint, self.directory = endpoint, directory
        hosts = directory / "hosts"
        hosts.write_text("127.0.0.1 hpccr-0\n127.0.0.1 hpccr-1\n")
        self._main = VARIED.format(path=str(CAPSULE.parents[1]), hosts=str(hosts))

    def start(self, *words: str, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen[str]:
        environ = self._endpoint.environment(JOB | (env or {}))
        streams: dict[str, object] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-I", "-S", "-c", self._main, *words]
        streams |= {"env": environ, "cwd": self.directory, "text": True} | options
        return subprocess.Popen(command, **streams)  # type: ignore[call-overload,no-any-return]

    def run(self, *words: str, input: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        with self.start(*words, env=env) as process:
            out, err = process.communicate(input, timeout=DEADLINE)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def lines(self, *words: str, input: str = "", env: dict[str, str] | None = None) -> list[str]:
        """The sorted lines of a step that has to succeed and say nothing else."""
        done = self.run(*words, input=input, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        return sorted(done.stdout.splitlines())


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with launch_root(index=0, grace=0.2, env=JOB) as endpoint:
        yield endpoint


@pytest.fixture
def job(endpoint: Endpoint, tmp_path: Path) -> Job:
    return Job(endpoint, tmp_path)


# --- layout and environment ------------------------------------------------------------------------------------------

WHO = "echo $SLURM_PROCID $SLURMD_NODENAME $SLURM_LOCALID $SLURM_NODEID $SLURM_GTIDS"


def test_tasks_know_who_they_are(job: Job) -> None:
    assert job.lines("sh", "-c", WHO) == [
        "0 hpccr-0 0 0 0,1",
        "1 hpccr-0 1 0 0,1",
        "2 hpccr-1 0 1 2,3",
        "3 hpccr-1 1 1 2,3",
    ]
    assert job.lines("-n3", "--distribution=cyclic", "sh", "-c", WHO) == [
        "0 hpccr-0 0 0 0,2",
        "1 hpccr-1 0 1 1",
        "2 hpccr-0 1 0 0,2",
    ]
    assert job.lines("-N1", "-w", "hpccr-1", "--ntasks=1", "sh", "-c", WHO) == ["0 hpccr-1 0 0 0"]
    assert len(job.lines("--ntasks-per-node=3", "sh", "-c", WHO, env={"SLURM_NTASKS": ""})) == 6
    done = job.run("--ntasks-per-node=1", "-m", "cyclic", "sh", "-c", WHO)
    assert len(done.stdout.splitlines()) == 4 and "Ignoring --ntasks-per-node" in done.stderr


def test_environment_of_a_step(job: Job) -> None:
    done = job.lines("-n", "1", "-N1", "-c2", "-J", "other", "env", env={"PMI_RANK": "7", "SLURM_STEP_ID": "3"})
    found = dict(line.split("=", 1) for line in done)
    assert found["SLURM_NTASKS"] == found["SLURM_STEP_NUM_TASKS"] == "1"
    assert found["SLURM_STEP_NODELIST"] == "hpccr-0" and found["SLURM_TASKS_PER_NODE"] == "1"
    assert found["SLURM_CPUS_PER_TASK"] == "2" and found["SLURM_JOB_NAME"] == "other"
    assert found["SLURM_JOB_NUM_NODES"] == "2" and "PMI_RANK" not in found
    again = job.lines("-n1", "-N1", "sh", "-c", "echo $SLURM_STEP_ID")
    assert int(again[0]) == int(found["SLURM_STEP_ID"]) + 1
    assert job.lines("-n1", "-N1", "sh", "-c", "[ $$ = $SLURM_TASK_PID ] && echo pid") == ["pid"]


def test_fewer_tasks_than_nodes(job: Job) -> None:
    done = job.run("-n1", "sh", "-c", WHO)
    assert done.stdout == "0 hpccr-0 0 0 0\n"
    assert done.stderr == "srun: warning: can't run 1 processes on 2 nodes, setting nnodes to 1\n"


def test_a_program_in_the_working_directory_is_found(job: Job) -> None:
    program = job.directory / "program"
    program.write_text("#!/bin/sh\necho found $1\n")
    program.chmod(0o755)
    assert job.lines("-n2", "program", "a b") == ["found a b", "found a b"]


def test_export(job: Job) -> None:
    show = ["-n2", "sh", "-c", "echo ${A-no} ${B-no} ${C-no}"]
    environ = {"A": "1", "B": "2"}
    assert job.lines("--export=ALL,C=3", *show, env=environ) == ["1 2 3"] * 2
    assert job.lines("--export=B,C=3", *show, env=environ) == ["no 2 3"] * 2
    assert job.lines("--export=NONE", *show, env=environ) == ["no no no"] * 2


def test_multi_prog(job: Job) -> None:
    (job.directory / "conf").write_text("# comment\n0 echo first %t %o\n1-2 echo two %t %o\n* echo rest \\\n %t %o\n")
    assert job.lines("-l", "--multi-prog", "conf") == [
        "0: first 0 0",
        "1: two 1 0",
        "2: two 2 1",
        "3: rest 3 3",
    ]
    done = job.run("-n5", "--multi-prog", "nothing")
    assert done.returncode == 1 and "hpccr: error: srun: cannot read nothing" in done.stderr


# --- streams ---------------------------------------------------------------------------------------------------------


def test_output_files_of_each_kind(job: Job) -> None:
    say = "echo out $SLURM_PROCID; echo err $SLURM_PROCID >&2"
    assert job.lines("-o", "a.%t", "sh", "-c", say) == []
    for rank in range(4):
        assert (job.directory / f"a.{rank}").read_text() == f"out {rank}\nerr {rank}\n"
    assert job.lines("-o", "b-%j-%2t-%x-%%-%u.txt", "-e", "none", "sh", "-c", say) == []
    assert (job.directory / "b-12-03-name-%-me.txt").read_text() == "out 3\n"
    assert job.lines("-o", "all.txt", "-e", "err.%n", "-l", "sh", "-c", say) == []
    assert sorted((job.directory / "all.txt").read_text().splitlines()) == [f"{r}: out {r}" for r in range(4)]
    assert sorted((job.directory / "err.1").read_text().splitlines()) == ["2: err 2", "3: err 3"]
    assert job.lines("-o", "all.txt", "--open-mode=append", "sh", "-c", say) == []
    assert len((job.directory / "all.txt").read_text().splitlines()) == 4 + 8
    done = job.run("-o", "2", "sh", "-c", say)
    assert (done.stdout, done.stderr) == ("out 2\n", "err 2\n")
    assert job.lines("-o", "2", "-e", "none", "sh", "-c", say) == ["out 2"]


def test_working_directory(job: Job) -> None:
    (job.directory / "sub").mkdir()
    assert job.lines("-n2", "-D", "sub", "-o", "whole", "-e", "own.%t", "pwd") == []
    assert (job.directory / "whole").read_text() == f"{job.directory}/sub\n" * 2  # as of srun: its own is beside it
    assert (job.directory / "sub" / "own.1").exists()


def test_labels(job: Job) -> None:
    assert job.lines("-l", "-n4", "sh", "-c", "printf 'a\\nb'") == sorted(f"{r}: {x}" for r in range(4) for x in "ab")
    found = job.lines("-l", "-O", "-n11", "sh", "-c", "echo x")
    assert found[0] == " 0: x" and found[-1] == "10: x"


def test_input_goes_to_all_or_one(job: Job) -> None:
    data = "".join(f"line {number}\n" for number in range(20000))
    assert job.lines("md5sum", input=data) == [job.lines("-n1", "-N1", "md5sum", input=data)[0]] * 4
    assert job.lines("-i", "1", "sh", "-c", "echo $SLURM_PROCID $(wc -l)", input="x\n") == ["0 0", "1 1", "2 0", "3 0"]
    assert job.lines("--input=none", "wc", "-l", input="x\n") == ["0"] * 4
    (job.directory / "in").write_text("all\n")
    assert job.lines("--input=in", "cat") == ["all"] * 4
    assert job.lines("sh", "-c", "read x && echo $x", input="first\nsecond\n") == ["first"] * 4  # and is not waited for


def test_much_output_of_many(job: Job) -> None:
    done = job.run("-O", "-n12", "sh", "-c", "seq 20000")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 12 * 20000 and sorted(map(int, lines)) == sorted([*range(1, 20001)] * 12)


# --- the end ---------------------------------------------------------------------------------------------------------


def test_exit_codes_and_what_is_said(job: Job) -> None:
    done = job.run("-n4", "sh", "-c", "exit $((SLURM_PROCID * 3))")
    assert done.returncode == 9
    assert sorted(done.stderr.splitlines()) == [
        "srun: error: hpccr-0: task 1: Exited with exit code 3",
        "srun: error: hpccr-1: task 2: Exited with exit code 6",
        "srun: error: hpccr-1: task 3: Exited with exit code 9",
    ]
    done = job.run("-n1", "-N1", "sh", "-c", "kill -SEGV $$")
    assert (done.returncode, done.stderr) == (139, "srun: error: hpccr-0: task 0: Segmentation fault\n")


def test_kill_on_bad_exit_wait_and_time(job: Job) -> None:
    fail = "[ $SLURM_PROCID = 1 ] && exit 5; exec sleep 60"
    done = job.run("-K", "sh", "-c", fail)
    assert done.returncode == 128 + signal.SIGTERM and "task 1: Exited with exit code 5" in done.stderr
    done = job.run("-W1", "sh", "-c", "[ $SLURM_PROCID = 1 ] || exec sleep 60")
    assert done.returncode == 128 + signal.SIGTERM and "the first task has ended" in done.stderr
    done = job.run("-t", "0:01", "sleep", "60")
    assert done.returncode == 128 + signal.SIGTERM and "time limit" in done.stderr


def test_signals_reach_all_tasks(job: Job) -> None:
    process = job.start("sh", "-c", "trap 'echo got; exit 7' USR1; echo up; while :; do sleep 0.1; done")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(4)] == ["up\n"] * 4
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=DEADLINE)
    assert (out, process.returncode) == ("got\n" * 4, 7)


def test_tasks_end_with_their_srun(job: Job) -> None:
    process = job.start("sh", "-c", "echo $$ > pid.$SLURM_PROCID; echo up; exec sleep 60")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(4)] == ["up\n"] * 4
    process.kill()
    process.communicate()
    pids = [int((job.directory / f"pid.{rank}").read_text()) for rank in range(4)]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


# --- several steps at once -------------------------------------------------------------------------------------------


def test_steps_wait_for_cpus(job: Job) -> None:
    gate = job.directory / "gate"
    wait = f"echo $SLURM_STEP_ID; until [ -e {gate} ]; do sleep 0.05; done"
    running = [job.start("-Q", "-n1", "-N1", "--exact", "sh", "-c", wait) for _ in range(8)]
    for process in running:
        assert process.stdout is not None and process.stdout.readline()
    ninth = job.start("-n1", "-N1", "--exact", "sh", "-c", wait)
    assert ninth.stderr is not None and ninth.stdout is not None
    assert ninth.stderr.readline() == (
        "srun: Job 12 step creation temporarily disabled, retrying (Requested nodes are busy)\n"
    )
    assert job.lines("-Q", "-n2", "--overlap", "echo", "beside") == ["beside"] * 2
    last = running.pop()
    last.kill()
    last.communicate(timeout=DEADLINE)
    assert re.fullmatch(r"srun: Step created for StepId=12\.[0-9]+\n", ninth.stderr.readline())
    assert ninth.stdout.readline()
    whole = job.start("-n4", "echo", "whole")
    assert whole.stderr is not None and "temporarily disabled" in whole.stderr.readline()
    gate.touch()
    assert whole.communicate(timeout=DEADLINE)[0] == "whole\n" * 4
    for process in (*running, ninth):
        process.communicate(timeout=DEADLINE)
        assert process.returncode == 0


def test_a_step_that_the_job_has_no_room_for(job: Job) -> None:
    done = job.run("-n9", "true")
    assert done.returncode == 1 and "More processors requested than permitted" in done.stderr
    assert "hint: " in done.stderr
    assert job.run("-n9", "-O", "true").returncode == 0
    assert job.run("-N3", "-n3", "true").returncode == 1
    assert job.run("-w", "node7", "true").stderr.startswith("hpccr: error: srun: node7 is no node of this job\nhint: ")


# --- what is not understood ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "--pty",
        "--het-group=0",
        "--jobid=13",
        "--gres=gpu:1",
        "--gpus=2",
        "--no-such",
        "-y",
        "-m plane=2",
        "--no-allocate",
    ],
)
def test_refused_by_name(job: Job, words: str) -> None:
    done = job.run(*words.split(), "true")
    assert done.returncode == 13 and done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert error.startswith("hpccr: error: srun") and hint.startswith("hint: ")
    assert words.split()[0].partition("=")[0].removeprefix("-m") in error


def test_accepted_without_effect(job: Job) -> None:
    words = "--cpu-bind=cores --mem=1G -p main --gres=none --jobid=12 --mpi=none --exclusive --propagate=ALL"
    done = job.run(*words.split(), "-n2", "echo", "ran")
    assert done.stdout == "ran\nran\n"
    assert done.stderr == "srun: --cpu-bind has no effect inside a checkpointed job\n"


def test_no_program_and_help(job: Job) -> None:
    assert job.run("-n2").stderr == "hpccr: error: srun: fatal: No command given to execute.\n"
    assert "--ntasks-per-node" in job.run("--help").stdout
    done = job.run("-n2", "./missing")
    assert done.returncode == 2 and "./missing" in done.stderr


# --- parts -----------------------------------------------------------------------------------------------------------


def test_options_as_srun_reads_them() -> None:
    options = Options(["-n4", "-lu", "-K1", "--ntasks-per-n", "2", "--kill-on-bad-exit=0", "-c", "3", "app", "-n9"], {})
    assert (options.ntasks, options.ntasks_per_node, options.cpus_per_task) == (4, 2, 3)
    assert options.label and options.unbuffered and options.exact and not options.kill_on_bad_exit
    assert options.command == ["app", "-n9"]
    assert Options(["-N2-4", "x"], {}).nodes_max == 4
    assert Options(["x"], {"SLURM_NTASKS": "6", "SLURM_LABELIO": "0"}).ntasks == 6
    assert [Options(["-t", text, "x"], {}).time for text in ("5", "1:30", "1:0:0", "2-1", "0")] == [
        300,
        90,
        3600,
        176400,
        None,
    ]
    environ = {"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "3"}
    assert [Options(words, environ).ntasks for words in (["x"], ["-N1", "x"], ["-N1", "-n2", "x"])] == [6, None, 2]
    for words in (["-n0", "x"], ["-n", "two", "x"], ["--nt", "3", "x"], ["-N4-2", "x"], ["-n"], ["--label=yes", "x"]):
        with pytest.raises(Usage):
            Options(words, {})


def test_exported_variables() -> None:
    environ = {b"A": b"1", b"SLURM_JOB_ID": b"12", b"HPCCR_X": b"x", b"UCX_TLS": b"tcp", b"PATH": b"/bin"}
    only = exported(Options(["--export=B=2", "x"], {}), environ, ["UCX_TLS"])
    assert only == {key: value for key, value in environ.items() if key != b"A"} | {b"B": b"2"}


def demand(tasks: int, **more: object) -> Demand:
    base: dict[str, object] = {"nodes": 1, "nodes_max": 1, "cpus_per_task": 1, "per_node": 0, "mode": EXACT}
    base |= {"overcommit": False, "candidates": range(3)}
    return Demand(tasks=tasks, **(base | more))  # type: ignore[arg-type]


def test_places() -> None:
    cpus, idle = [4, 2, 4], [0, 0, 0]
    assert layout.place(demand(8, nodes=3, nodes_max=3), cpus, idle) == {0: 3, 1: 2, 2: 3}
    assert layout.place(demand(4), cpus, [1, 0, 0]) == {2: 4}
    assert layout.place(demand(5), cpus, idle) is None
    assert layout.place(demand(5, nodes_max=2), cpus, idle) == {0: 3, 1: 2}
    assert layout.place(demand(2, nodes_max=3), cpus, idle) == {0: 1, 1: 1}
    assert layout.place(demand(3, nodes_max=3), cpus, [4, 2, 0]) == {2: 3}
    assert layout.place(demand(1, mode=WHOLE), cpus, [1, 0, 0]) == {1: 1}
    assert layout.place(demand(1, mode=SHARED), cpus, cpus) == {0: 1}
    assert layout.place(demand(9, overcommit=True), cpus, idle) == {0: 9}
    assert layout.place(demand(4, cpus_per_task=2, nodes=2, nodes_max=2), cpus, idle) == {0: 2, 2: 2}
    assert Demand.decode(demand(5, nodes_max=2).encode()).encode() == demand(5, nodes_max=2).encode()


@given(st.data())
def test_a_ledger_never_gives_more_than_there_is(data: st.DataObject) -> None:
    cpus = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    ledger, steps, answers = Ledger(cpus), [], {}
    for _ in range(data.draw(st.integers(1, 12))):
        wish = demand(
            data.draw(st.integers(1, 6)),
            nodes_max=len(cpus),
            cpus_per_task=data.draw(st.integers(1, 2)),
            mode=data.draw(st.sampled_from([EXACT, WHOLE])),
            candidates=range(len(cpus)),
        )
        if not ledger.possible(wish):
            continue
        number = len(steps)
        step = Step(wish, functools.partial(answers.__setitem__, number))
        steps.append(step)
        ledger.enter(step)
        if data.draw(st.booleans()):
            ledger.leave(data.draw(st.sampled_from(steps)))
        used = [sum(s.taken.get(index, 0) for s in steps if s in ledger._steps) for index in range(len(cpus))]
        assert all(have <= most for have, most in zip(used, cpus, strict=True)) and used == ledger._used
    for step in steps:
        ledger.leave(step)
    for number, step in enumerate(steps):
        if step.running:
            assert sum(decode_answer(answers[number])[1].values()) == step.demand.tasks


def test_lists_of_nodes_and_counts() -> None:
    assert layout.node_list([3, 0, 1]) == "hpccr-[0-1,3]" and layout.node_list([2]) == "hpccr-2"
    assert layout.capsules("hpccr-[0-1,3],hpccr-2", 4) == [0, 1, 2, 3]
    for wrong in ("node1", "hpccr-4", "hpccr-x", "hpccr-[0-9]", "-1"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            layout.capsules(wrong, 4)
    assert layout.expand_counts("4(x2),1") == [4, 4, 1] and layout.compress_counts([4, 4, 1]) == "4(x2),1"
    assert task_ids([3]) == "task 3" and task_ids([2, 0, 1, 5]) == "tasks 0-2,5"


@given(st.lists(st.binary(max_size=6)), st.booleans())
def test_lines_lose_nothing(pieces: list[bytes], unbuffered: bool) -> None:
    text = b"".join(pieces)
    plain = Lines(b"", unbuffered=unbuffered)
    assert b"".join(map(plain.feed, pieces)) + plain.end() == text
    labelled = Lines(b"7: ", unbuffered=unbuffered)
    said = b"".join(map(labelled.feed, pieces)) + labelled.end()
    expected = text.split(b"\n")
    assert said == b"".join(b"7: " + line + b"\n" for line in (expected if expected[-1] else expected[:-1]))


def test_file_name_patterns() -> None:
    assert script.split_pattern("a%3t%%b%q") == [("a", 3, "t"), ("%b%q", 0, "")]
    assert script.split_pattern("\\a%t") == [("a%t", 0, "")]


# --- MPI libraries ---------------------------------------------------------------------------------------------------


def find(*command: str, tasks: int = 2, directory: str = "/", **environ: str) -> str:
    said = library.choose(command, tasks=tasks, mpi="", environ=dict(os.environ) | environ, directory=directory)
    return said.kind if said else ""


def test_the_library_of_a_program() -> None:
    assert find("lmp") == find("nice", "lmp", "-in", "x") == find("sh", "-c", "true && exec lmp") == "openmpi"
    assert find("true") == find("sh", "-c", "echo $HOME") == find("cat", "lmp.txt") == ""
    assert find("true", HPCCR_MPI="mpich") == "mpich" and find("lmp", HPCCR_MPI="none") == ""
    with pytest.raises(Usage):
        find("lmp", HPCCR_MPI="lam")
    assert library.choose(["lmp"], tasks=2, mpi="none", environ=os.environ, directory="/") is None


def test_libraries_of_libraries_by_all_search_paths(tmp_path: Path) -> None:
    """The program has a RPATH, or RUNPATH, or the environment has the place; what uses MPI is a library of it."""

    def link(name: str, *words: str) -> None:
        (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
        command = ["gcc", "-Wl,--no-as-needed", "-o", name, "empty.c", *words]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=DEADLINE)

    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    link("two/libmpi.so.12", "-shared", "-Wl,-soname,libmpi.so.12")
    link("one/libphysics.so", "-shared", "-Wl,-soname,libphysics.so", "two/libmpi.so.12")
    physics = ["one/libphysics.so", "-Wl,--allow-shlib-undefined"]
    old, new = "-Wl,--disable-new-dtags", "-Wl,--enable-new-dtags"
    rpath = "-Wl,-rpath,$ORIGIN/one:$ORIGIN/two"
    link("by-rpath", *physics, old, rpath)
    link("by-runpath", *physics, new, rpath)
    here = str(tmp_path)
    assert find("./by-rpath", directory=here) == "mpich"
    assert find("./by-runpath", directory=here) == "mpich"  # needed by name, wherever the library is
    link("by-environment", *physics)
    assert find("./by-environment", directory=here, LD_LIBRARY_PATH="") == ""
    assert find("./by-environment", directory=here, LD_LIBRARY_PATH=f"/none:{here}/one") == "mpich"
    with (tmp_path / "two" / "libmpi.so.12").open("ab") as file:
        file.write(b"Intel(R) MPI Library 2021")
    assert find("./by-rpath", directory=here) == "intel"
    (tmp_path / "broken").write_bytes(b"\x7fELF\x02\x01" + bytes(range(256)))
    (tmp_path / "broken").chmod(0o755)
    assert find("./broken", directory=here) == ""


def test_the_library_of_a_script(tmp_path: Path) -> None:
    (tmp_path / "wrap").write_text("#!/bin/bash\nexport X=1\nlmp -in in.lj\n")
    (tmp_path / "wrap").chmod(0o755)
    (tmp_path / "with.py").write_text("from mpi4py import MPI\n")
    (tmp_path / "without.py").write_text("print(1)\n")
    assert find("./wrap", directory=str(tmp_path)) == "openmpi"
    assert find("python3", "with.py", directory=str(tmp_path), tasks=1) == "openmpi"
    assert find("python3", "without.py", directory=str(tmp_path), tasks=1) == ""


def test_a_script_that_calls_mpirun_is_one_program(tmp_path: Path) -> None:
    for name, text, kind in (
        ("member", "cd run\nX=1 exec mpirun -n 4 lmp -in in.lj\n", ""),
        ("loop", "for i in 1 2; do mpiexec.hydra lmp; done\n", ""),
        ("spoken", "# not with mpirun\necho 'mpirun is not needed'\nlmp -in in.lj # mpirun\n", "openmpi"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
        assert find(f"./{name}", directory=str(tmp_path)) == kind, name


def test_python_that_may_use_mpi_and_that_does(tmp_path: Path) -> None:
    (tmp_path / "sweep.py").write_text("import sys\n")
    (tmp_path / "solve.py").write_text("from petsc4py import PETSc\n")
    for name, sure in (("sweep.py", False), ("solve.py", True)):
        found = library.choose(["python3", name], tasks=4, mpi="", environ=os.environ, directory=str(tmp_path))
        assert found is not None and (found.kind, found.sure) == ("openmpi", sure)
    flags = mpirun._each_for_itself(library.launcher(found, os.environ), "openmpi")
    done = subprocess.run(
        ["mpirun.openmpi", "--oversubscribe", *flags, "-n", "2", "sh", "-c", "[ $PMIX_RANK = 1 ] || exit 3; echo on"],
        capture_output=True, text=True, timeout=DEADLINE, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout == "on\n", done.stderr


def test_the_standard_abi_and_names_of_the_vendors(tmp_path: Path) -> None:
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    for library_name, mark, kind in (
        ("libmpi_abi.so.1", b"", "mpich"),
        ("libmpi_abi.so.0", b"Intel(R) MPI Library 2021", "intel"),
        ("libmpi_gnu_123.so.12", b"", "mpich"),
    ):
        link = ["gcc", "-Wl,--no-as-needed", "-o"]
        for words in (
            [*link, library_name, "empty.c", "-shared", f"-Wl,-soname,{library_name}"],
            [*link, "app", "empty.c", library_name, "-Wl,-rpath,$ORIGIN"],
        ):
            subprocess.run(words, cwd=tmp_path, check=True, timeout=DEADLINE)
        with (tmp_path / library_name).open("ab") as file:
            file.write(mark)
        assert find("./app", directory=str(tmp_path)) == kind, library_name


def test_who_asks_for_mpi_gets_it_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPCCR_MPI", raising=False)
    with pytest.raises(Usage, match="no MPI library is found") as caught:
        srun._program(Options(["--mpi=pmix", "-n4", "true"], {}))
    assert caught.value.code == 13 and "HPCCR_MPI" in caught.value.hint
    assert srun._program(Options(["--mpi=none", "-n4", "true"], {})) is None
    assert srun._program(Options(["-n4", "true"], {"SLURM_MPI_TYPE": "pmix"})) is None  # a site's default


def test_what_the_user_has_set_for_mpi_is_kept_by_export() -> None:
    environ = {b"UCX_TLS": b"tcp,self", b"OTHER": b"1", b"MINE": b"2"}
    assert exported(Options(["--export=NONE", "true"], {}), environ, []) == {b"UCX_TLS": b"tcp,self"}
    assert b"MINE" in exported(Options(["--export=MINE", "true"], {}), environ, [])


LOST = """
import os, select, socket, struct, sys
sys.path.append({path!r})
from hpccr.capsule.step.tasks import Input, Run, Streams
run = Run(kill_on_bad_exit=False, wait=0, limit=None)
with socket.create_server(("127.0.0.1", 0)) as server:
    near = socket.create_connection(server.getsockname())
    far = server.accept()[0]
far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
far.close()
select.select([near], [], [])
task = run.add(0, "hpccr-0", near, b"request", Streams({{}}, b"", unbuffered=False))
source = Input(run.loop, os.pipe()[0], [task])
sys.exit(bool(source._credit) or run.finish() != 1)
"""


def test_a_task_that_is_lost_at_once_does_not_hold_up_the_input_of_the_others() -> None:
    code = LOST.format(path=str(Path(__file__).parents[2]))
    assert subprocess.run([sys.executable, "-c", code], timeout=DEADLINE, check=False).returncode == 0


def test_a_wait_that_was_stopped_begins_anew() -> None:
    assert client.renewed(100.0, 99.0, 30.0) == client.renewed(100.0, 101.0, 30.0) == 100.0
    assert client.renewed(100.0, 160.0, 30.0) == 190.0


def test_the_mpirun_of_a_library() -> None:
    for kind, name in (("openmpi", "mpirun.openmpi"), ("mpich", "mpiexec.hydra")):
        assert Path(library.launcher(library.Found(kind, ""), os.environ)).name == name
    with pytest.raises(Usage, match="no mpirun"):
        library.launcher(library.Found("intel", ""), os.environ)
