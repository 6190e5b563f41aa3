"""`sbatch --checkpoint`: options are checked at submission, and the whole batch script goes on where it was, unchanged.

A script is run with and without the option; what both print must be the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from jobs import Job, Jobs
from nodes import Cluster
from waiting import rounds, soak, wait_for
from workloads import SOURCES, Workloads

CONFIGURATION = "/etc/slurm/plugstack.conf.d/hpccr.conf"
SOCKET = "/run/hpccr/hpccrd.sock"


def sbatch(
    jobs: Jobs,
    body: str,
    lines: Sequence[str] = (),
    *,
    nodes: int = 1,
    tasks: int = 1,
    options: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    arguments: Sequence[str] = (),
    interpreter: str = "/bin/bash",
) -> Job:
    """Submit a script with `lines` behind #SBATCH, `options` on the command line, `environment` set for sbatch."""
    cluster, user = jobs.cluster, "user1"
    directory = cluster.home(user) / jobs.name / f"script-{len(jobs.all)}"
    header = [f"--nodes={nodes} --ntasks={tasks} --ntasks-per-node={tasks // nodes}", "--output=out.txt", *lines]
    text = "\n".join([f"#!{interpreter}", *(f"#SBATCH {line}" for line in header), body, ""])
    script = cluster.there(cluster.write(directory / "script", text, user))
    variables = [f"{name}={value}" for name, value in (environment or {}).items()]
    command = ["sbatch", "--parsable", f"--chdir={cluster.there(directory)}", *options, script, *arguments]
    job = Job(cluster, user, directory, int(cluster.check("ctl", "env", *variables, *command, user=user)))
    jobs.all.append(job)
    return job


def refusal(cluster: Cluster, *command: str) -> str:
    """What a submission that has to be refused says."""
    done = cluster.run("ctl", *command, user="user1")
    assert done.returncode != 0 and not done.stdout, f"{' '.join(command)}: {done.stdout}"
    return done.stderr


def show(job: Job) -> dict[str, object]:
    (found,) = json.loads(job.cluster.check("ctl", "scontrol", "show", "job", str(job.id), "--json"))["jobs"]
    return found  # type: ignore[no-any-return]


def variables(job: Job) -> dict[str, str]:
    """The environment that a job of `env` has printed."""
    return dict(line.split("=", 1) for line in job.said().splitlines() if "=" in line)


@contextmanager
def plugin(cluster: Cluster, line: str) -> Iterator[None]:
    """Another line for the plugin in every node's plugstack.conf.d."""
    files = [cluster.root(node) / CONFIGURATION[1:] for node in ("ctl", *cluster.nodes)]
    before = files[0].read_text()
    for file in files:
        file.write_text(line)
    try:
        yield
    finally:
        for file in files:
            file.write_text(before)


def undrained(cluster: Cluster) -> bool:
    return "drain" not in cluster.check("ctl", "sinfo", "-h", "-N", "-o", "%T")


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("checkpoint", "soon", "is not an interval"),
        ("checkpoint", "0", "is less than 10 s"),
        ("checkpoint", "1:75:00", "is not an interval"),
        ("checkpoint-dir", "scratch/me", "is not an absolute path"),
        ("checkpoint-keep", "none", "is not a count"),
    ],
)
def test_a_bad_value_is_refused_at_submission(jobs: Jobs, option: str, value: str, reason: str) -> None:
    cluster = jobs.cluster
    variable = "SBATCH_" + option.upper().replace("-", "_")
    script = jobs.cluster.write(
        cluster.home("user1") / jobs.name / "script", f"#!/bin/sh\n#SBATCH --{option}={value}\ntrue\n", "user1"
    )
    for said in (
        refusal(cluster, "sbatch", f"--{option}={value}", "--wrap=true"),
        refusal(cluster, "sbatch", f"--hpccr-{option}", value, "--wrap=true"),
        refusal(cluster, "env", f"{variable}={value}", "sbatch", "--wrap=true"),
        refusal(cluster, "sbatch", cluster.there(script)),
        refusal(cluster, "salloc", "-n1", f"--{option}={value}", "true"),
    ):
        assert f'hpccr: --{option}: "{value}" {reason}' in said
    (cluster.home("user1") / jobs.name / "script").unlink()
    (cluster.home("user1") / jobs.name).rmdir()


def test_values_reach_the_job(jobs: Jobs) -> None:
    """From each place that sbatch takes options from; the command line wins over variables, those over the script."""
    home = "/shared/home/user1"
    submitted = {
        ("30", home + "/.hpccr", None): sbatch(jobs, "env", ["--checkpoint 30"]),
        ("none", home + "/there", "3"): sbatch(
            jobs,
            "env",
            ["--checkpoint=none", "--checkpoint-dir=~/there --hpccr-checkpoint-keep=5"],
            options=["--checkpoint-keep=3"],
        ),
        ("2h", home + "/.hpccr", "4"): sbatch(
            jobs, "env", ["--checkpoint=none"], environment={"SBATCH_CHECKPOINT": "2h", "SBATCH_CHECKPOINT_KEEP": "4"}
        ),
        ("01:30:00", home + "/.hpccr", None): sbatch(
            jobs, "env", options=["--hpccr-checkpoint=01:30:00"], environment={"SBATCH_CHECKPOINT": "2h"}
        ),
        # Nothing of the environment is exported, and no interval is given: the site's default.
        ("auto", home + "/.hpccr", "7"): sbatch(jobs, "env", ["--export=NONE", "--checkpoint-keep=7"]),
    }
    try:
        for (interval, store, keep), job in submitted.items():
            job.options["store"] = store
            job.wait_success()
            found = variables(job)
            assert (found["HPCCR_CHECKPOINT_INTERVAL"], found.get("HPCCR_STORE_KEEP")) == (interval, keep)
            assert found["HPCCR_CAPSULE"] == "0" and job.events("finished")
    finally:
        for job in submitted.values():
            job.wait_over()


def test_output_is_appended_to_and_the_job_may_be_requeued(jobs: Jobs) -> None:
    """... unless the user says otherwise, wherever."""
    plain = sbatch(jobs, "env")
    checkpointed = sbatch(jobs, "env", ["--checkpoint=none"])
    by_command_line = sbatch(jobs, "env", options=["--checkpoint=none"])
    chosen = sbatch(jobs, "env", ["--open-mode=truncate", "--no-requeue", "--checkpoint=none"])
    for job in (plain, checkpointed, by_command_line, chosen):
        job.wait_success()
    modes = [variables(job).get("SLURM_OPEN_MODE") for job in (plain, checkpointed, by_command_line, chosen)]
    assert modes == [None, "a", "a", "t"]
    assert [show(job)["requeue"] for job in (plain, checkpointed, by_command_line, chosen)] == [True, True, True, False]


def test_salloc_sets_the_variables_only(jobs: Jobs) -> None:
    said = jobs.cluster.check(
        "ctl",
        "env",
        "SALLOC_CHECKPOINT_KEEP=4",
        "salloc",
        "-n1",
        "--checkpoint=45m",
        "--checkpoint-dir=/shared/there",
        "env",
        user="user1",
    )
    assert {
        "HPCCR_CHECKPOINT_INTERVAL=45m",
        "HPCCR_STORE_DIR=/shared/there",
        "HPCCR_STORE_KEEP=4",
    } <= set(said.splitlines())
    assert "HPCCR_CAPSULE" not in said


# --- others' jobs, broken nodes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "",
        "optional /usr/local/lib/slurm/spank_hpccr.so hpccr=here interval=never frobnicate\n",
        "optional /usr/local/lib/slurm/not_there.so\n",
        "required /usr/local/lib/slurm/spank_hpccr.so hpccr=/not/there\n",
    ],
    ids=["none", "arguments", "missing", "required"],
)
def test_a_job_without_the_option_is_untouched(jobs: Jobs, line: str) -> None:
    body = "env\nexit 4"
    with_plugin = sbatch(jobs, body)
    assert with_plugin.wait_over().code == 4
    with plugin(jobs.cluster, line):
        other = sbatch(jobs, body)
        assert other.wait_over().code == 4
    assert variables(with_plugin).keys() == variables(other).keys()
    assert with_plugin.said().count("\n") == other.said().count("\n")
    assert not [name for name in variables(other) if "HPCCR" in name.upper()]
    assert not other.store.exists() and undrained(jobs.cluster)


def test_refused_where_hpccr_is_missing(jobs: Jobs) -> None:
    with plugin(jobs.cluster, "optional /usr/local/lib/slurm/spank_hpccr.so hpccr=/not/there/hpccr\n"):
        job = sbatch(jobs, "echo unprotected", ["--checkpoint=30m"])
        assert job.wait_over().code == 13
    assert "this node has no /not/there/hpccr" in job.said() and "hint: " in job.said()
    assert "unprotected" not in job.said() and undrained(jobs.cluster)


def test_refused_where_hpccrd_is_missing(jobs: Jobs) -> None:
    cluster = jobs.cluster
    for node in cluster.nodes:
        cluster.check(node, "mv", SOCKET, f"{SOCKET}.away")
    try:
        job = sbatch(jobs, "echo unprotected", ["--checkpoint=30m"])
        assert job.wait_over().code == 13
    finally:
        for node in cluster.nodes:
            cluster.check(node, "mv", f"{SOCKET}.away", SOCKET)
    assert "no hpccrd on" in job.said() and "hint: " in job.said()
    assert "unprotected" not in job.said() and undrained(cluster)


# --- the whole script is the step -------------------------------------------------------------------------------------

LOOP = """\
total=0
for turn in 1 2 3 4 5; do
    echo "turn $turn begins"
    {mpirun}
    total=$((total + turn * turn))
    echo "turn $turn ends, total $total" | tee -a turns.txt
    echo "$turn" >> /tmp/turns
done
sort -r /tmp/turns
rm /tmp/turns
"""


def test_a_loop_of_mpiruns_is_requeued_in_several_of_its_turns(jobs: Jobs, workloads: Workloads) -> None:
    """Its variables, its place in the loop, its files in /tmp: all go on. Each time on other nodes."""
    body = LOOP.format(mpirun=workloads.pairs(rounds(40, 200), max_bytes=1 << 20))
    twin = sbatch(jobs, body, nodes=2, tasks=4)
    job = sbatch(jobs, body, ["--checkpoint=none"], nodes=2, tasks=4)
    turns = (1, 2, 3, 4, 5) if soak() else (2, 4)
    for turn in turns:
        job.wait_output(f"turn {turn} begins")
        assert not set(job.slurm().nodes) & set(job.requeue("scontrol"))
    job.wait_success()
    twin.wait_success()
    assert job.slurm().restarts == len(turns)
    assert job.said() == twin.said()
    assert (job.directory / "turns.txt").read_text() == (twin.directory / "turns.txt").read_text()


PIPELINE = """\
set -o pipefail
counts=(0 0 0)
tally() {{ while read -r number digest; do
    counts[$((number % 3))]=$((counts[number % 3] + number))
    echo "$number $digest ${{counts[*]}}"
done; }}
(sleep 3 && echo background > background.txt) &
seq {lines} | while read -r number; do
    echo "$number $(echo "$number" | sha256sum | cut -c 1-8)"
done | tally | tee copy.txt
echo "pipeline: ${{PIPESTATUS[*]}}"
wait
cat background.txt
exit 6
"""


@pytest.mark.parametrize("how", ["scontrol", "hpccr"])
def test_a_pipeline(jobs: Jobs, how: str) -> None:
    """Neither mpirun nor MPI; and the exit code is the script's."""
    body = PIPELINE.format(lines=rounds(800, 4000))
    twin = sbatch(jobs, body)
    job = sbatch(jobs, body, ["--checkpoint=none"])
    job.wait_output("\n50 ")
    job.requeue(how)
    assert job.wait_over().code == twin.wait_over().code == 6
    assert job.said() == twin.said()
    assert (job.directory / "copy.txt").read_text() == (twin.directory / "copy.txt").read_text()


def test_a_python_script_with_arguments(jobs: Jobs) -> None:
    program = jobs.cluster.check("ctl", "cat", f"{SOURCES}/threads.py")
    given = ["--rounds", str(rounds(500, 2000)), "--work", "20000", "--log", "threads.log"]
    twin = sbatch(jobs, program, interpreter="/usr/bin/python3", arguments=given)
    job = sbatch(jobs, program, ["--checkpoint=none"], interpreter="/usr/bin/python3", arguments=given)
    wait_for("output", lambda: job.output.exists() and job.output.stat().st_size)
    job.requeue("scontrol")
    job.wait_success()
    twin.wait_success()
    assert job.said() == twin.said()


INSIDE = """\
hpccr run --dir /not/there sh -c 'echo "in capsule $HPCCR_CAPSULE"'
srun -n2 hostname
echo "srun: $?"
squeue --noheader --job "$SLURM_JOB_ID" --format "squeue: %i %T"
scontrol show job "$SLURM_JOB_ID" | grep --only-matching 'JobId=[0-9]*'
hpccr checkpoint "$SLURM_JOB_ID" > checkpoint.txt && echo checkpointed
sbatch --parsable --output=nested.txt --chdir="$PWD" nested > nested.id
"""
NESTED = "#!/bin/sh\nenv\nmpirun.mpich -n 2 sh -c 'echo rank $PMI_RANK'\n"


def test_commands_inside(jobs: Jobs) -> None:
    """hpccr and Slurm in a script that is checkpointed as a whole; and a job submitted from there is a plain one."""
    cluster = jobs.cluster
    job = sbatch(jobs, f"cat > nested <<'END'\n{NESTED}END\n{INSIDE}", ["--checkpoint=none"])
    job.wait_success()
    nested = Job(cluster, job.user, job.directory, int((job.directory / "nested.id").read_text()))
    jobs.all.append(nested)
    nested.wait_success()
    lines = job.said().splitlines()
    assert lines[0] == "in capsule 0"
    assert "srun inside a checkpointed job is not supported" in lines[1] and lines[2].startswith("hint: ")
    assert lines[3:] == ["srun: 13", f"squeue: {job.id} RUNNING", f"JobId={job.id}", "checkpointed"]
    assert len(job.events("released")) == 1
    said = (job.directory / "nested.txt").read_text()
    assert "rank 0" in said and "rank 1" in said
    assert not re.search(r"^(UCX_|PRTE_MCA_plm=|HYDRA_LAUNCHER=|HPCCR_STEP|HPCCR_CAPSULE)", said, re.MULTILINE)
    assert not re.search(r"^PATH=.*/capsule/bin", said, re.MULTILINE)


TRAPS = """\
trap 'echo "got USR2"' USR2
trap 'echo "got TERM"; exit 9' TERM
echo ready
while true; do sleep 0.1; done
"""


def test_signals_reach_the_script(jobs: Jobs) -> None:
    job = sbatch(jobs, TRAPS, ["--checkpoint=none"])
    job.wait_output("ready")
    job.requeue()
    job.signal("USR2", "--batch")
    job.wait_output("got USR2")
    job.cluster.check("ctl", "scancel", str(job.id), user=job.user)
    # KillWait is 30 s: it ended by itself.
    assert job.wait_over(within=20).states == {"CANCELLED"}
    said = [line for line in job.said().splitlines() if not line.startswith("slurmstepd-")]
    assert said == ["ready", "got USR2", "got TERM"]


# --- when -------------------------------------------------------------------------------------------------------------

COUNT = 'for number in $(seq {count}); do echo "$number"; sleep 0.1; done'


def test_by_interval_and_by_signal(jobs: Jobs) -> None:
    job = sbatch(jobs, COUNT.format(count=100000), ["--checkpoint=10s"])
    job.wait_event("durable", 2)
    assert [event["reason"] for event in job.events("released")] == ["interval", "interval"]
    job.signal("USR1", "--batch")
    job.wait_event("released", 3)
    assert job.events("released")[2]["reason"] == "signal"
    job.requeue()
    job.cancel()
    # Slurm's own line says that it was cancelled, and comes where the output was then.
    lines = [line for line in job.said().splitlines() if not line.startswith("slurmstepd-")]
    assert lines[: len(lines) - 1] == [str(number + 1) for number in range(len(lines) - 1)]


def test_a_job_that_is_longer_than_its_time_limit(jobs: Jobs) -> None:
    count = rounds(650, 3000)
    job = sbatch(jobs, COUNT.format(count=count), ["--checkpoint=none", "--time=1"])
    ended = job.wait_over(within=200)
    assert ended.states == {"COMPLETED"} and ended.restarts >= 1
    assert job.said() == "".join(f"{number + 1}\n" for number in range(count))
