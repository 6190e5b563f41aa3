"""`sbatch --checkpoint`: options are checked at submission, and the whole batch script goes on where it was, unchanged.

A script is run with and without the option; what both print must be the same.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobs import Job, Jobs
from nodes import Cluster
from test_doctor import ask
from test_preemption import computes, finish
from waiting import rounds, soak, wait_for
from workloads import SOURCES, Workloads, counter

CONFIGURATION = "/etc/slurm/plugstack.conf.d/hpccr.conf"
SOCKET = "/run/hpccr/hpccrd.sock"


def refusal(cluster: Cluster, *command: str) -> str:
    """What a submission that has to be refused says."""
    done = cluster.run("ctl", *command, user="user1")
    assert done.returncode != 0 and not done.stdout, f"{' '.join(command)}: {done.stdout}"
    return done.stderr


def show(job: Job) -> dict[str, object]:
    (found,) = job.records()
    return found


def variables(job: Job) -> dict[str, str]:
    """The environment that a job of `env` has printed."""
    return dict(line.split("=", 1) for line in job.said().splitlines() if "=" in line)


@contextmanager
def plugin(cluster: Cluster, line: str, *nodes: str) -> Iterator[None]:
    """Another line for the plugin in the plugstack.conf.d of these nodes, or of all."""
    files = [cluster.root(node) / CONFIGURATION[1:] for node in nodes or ("ctl", *cluster.nodes)]
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
        ("30", home + "/.hpccr", None): jobs.sbatch("env", ["--checkpoint 30"]),
        ("requeue", home + "/there", "3"): jobs.sbatch(
            "env",
            ["--checkpoint=requeue", "--checkpoint-dir=~/there --hpccr-checkpoint-keep=5"],
            options=["--checkpoint-keep=3"],
        ),
        ("2h", home + "/.hpccr", "4"): jobs.sbatch(
            "env", ["--checkpoint=requeue"], environment={"SBATCH_CHECKPOINT": "2h", "SBATCH_CHECKPOINT_KEEP": "4"}
        ),
        ("01:30:00", home + "/.hpccr", None): jobs.sbatch(
            "env", options=["--hpccr-checkpoint=01:30:00"], environment={"SBATCH_CHECKPOINT": "2h"}
        ),
        # Nothing of the environment is exported, and no interval is given: the site's default.
        ("auto", home + "/.hpccr", "7"): jobs.sbatch("env", ["--export=NONE", "--checkpoint-keep=7"]),
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
    plain = jobs.sbatch("env")
    checkpointed = jobs.sbatch("env", ["--checkpoint=requeue"])
    by_command_line = jobs.sbatch("env", options=["--checkpoint=requeue"])
    chosen = jobs.sbatch("env", ["--open-mode=truncate", "--no-requeue", "--checkpoint=requeue"])
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
    with_plugin = jobs.sbatch(body)
    assert with_plugin.wait_over().code == 4
    with plugin(jobs.cluster, line):
        other = jobs.sbatch(body)
        assert other.wait_over().code == 4
    assert variables(with_plugin).keys() == variables(other).keys()
    assert with_plugin.said().count("\n") == other.said().count("\n")
    assert not [name for name in variables(other) if "HPCCR" in name.upper()]
    assert not other.store.exists() and undrained(jobs.cluster)


def test_refused_where_hpccr_is_missing(jobs: Jobs) -> None:
    with plugin(jobs.cluster, "optional /usr/local/lib/slurm/spank_hpccr.so hpccr=/not/there/hpccr\n"):
        job = jobs.sbatch("echo unprotected", ["--checkpoint=30m"])
        assert job.wait_over().code == 13
    assert "this node has no /not/there/hpccr" in job.said() and "hint: " in job.said()
    assert "unprotected" not in job.said() and undrained(jobs.cluster)


def test_noticed_where_the_plugin_is_missing(jobs: Jobs) -> None:
    """Slurm drops the options there without a word; but the job's comment tells, and `hpccr doctor` compares."""
    cluster = jobs.cluster
    with plugin(cluster, "", cluster.nodes[0]):
        job = jobs.sbatch("echo unprotected", options=["--checkpoint=30m", f"--nodelist={cluster.nodes[0]}"])
        doctor = ask(cluster, "--nodes", ",".join(cluster.nodes[:2]))
        job.wait_success()
    assert job.said() == "unprotected\n" and not job.store.exists()
    assert show(job)["comment"] == "hpccr: waiting to start"
    assert doctor.returncode == 1 and f"{cluster.nodes[0]}: not there" in doctor.stdout
    assert "hint: sbatch --checkpoint: " in doctor.stdout


def test_refused_where_hpccrd_is_missing(jobs: Jobs) -> None:
    cluster = jobs.cluster
    for node in cluster.nodes:
        cluster.check(node, "mv", SOCKET, f"{SOCKET}.away")
    try:
        job = jobs.sbatch("echo unprotected", ["--checkpoint=30m"])
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
    while [ $turn = 5 ] && ! [ -e gate ]; do sleep 0.1; done
    total=$((total + turn * turn))
    echo "turn $turn ends, total $total" | tee -a turns.txt
    echo "$turn" >> /tmp/turns
done
sort -r /tmp/turns
rm /tmp/turns
"""


def test_a_loop_of_mpiruns_is_requeued_in_several_of_its_turns(jobs: Jobs, workloads: Workloads) -> None:
    """Its variables, its place in the loop, its files in /tmp: all go on. Each time on other nodes."""
    body = LOOP.format(mpirun=workloads.pairs(rounds(60, 200), max_bytes=1 << 18))
    twin = jobs.sbatch(body, nodes=2, tasks=4)
    twin.open_gate()
    job = jobs.sbatch(body, ["--checkpoint=requeue"], nodes=2, tasks=4)
    turns = (1, 2, 3, 4, 5) if soak() else (2, 4)
    for turn in turns:
        job.wait_output(f"turn {turn} begins")
        assert not set(job.slurm().nodes) & set(job.requeue("scontrol"))
    job.open_gate()
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
    [ "$number" -lt 700 ] || until [ -e gate ]; do sleep 0.1; done
    echo "$number $(echo "$number" | sha256sum | cut -c 1-8)"
done | tally | tee copy.txt
echo "pipeline: ${{PIPESTATUS[*]}}"
wait
cat background.txt
exit 6
"""


@pytest.mark.parametrize("how", ["scontrol", "hpccr"])
def test_a_pipeline(jobs: Jobs, how: str) -> None:
    """Neither mpirun nor MPI; and exit code, accounting and mail are the script's."""
    body = PIPELINE.format(lines=rounds(800, 4000))
    twin = jobs.sbatch(body, ["--mail-type=ALL"])
    twin.open_gate()
    job = jobs.sbatch(body, ["--checkpoint=requeue", "--mail-type=ALL"])
    job.wait_output("\n50 ")
    job.requeue(how)
    job.open_gate()
    assert job.wait_over().code == twin.wait_over().code == 6
    assert job.said() == twin.said()
    assert (job.directory / "copy.txt").read_text() == (twin.directory / "copy.txt").read_text()
    assert job.accounted() == [("PENDING", "0:0", "0:0"), *twin.accounted()]
    assert twin.accounted() == [("FAILED", "6:0", "0:0")]
    assert job.mails(4) == ["Began", "Requeued", "Began", "Failed"] and twin.mails(2) == ["Began", "Failed"]


def test_a_python_script_with_arguments(jobs: Jobs) -> None:
    program = jobs.cluster.check("ctl", "cat", f"{SOURCES}/threads.py")
    given = ["--rounds", str(rounds(250, 2000)), "--work", "20000", "--log", "threads.log", "--gate", "gate"]
    mail = "--mail-type=END"
    twin = jobs.sbatch(program, [mail], interpreter="/usr/bin/python3", arguments=given)
    job = jobs.sbatch(program, ["--checkpoint=requeue", mail], interpreter="/usr/bin/python3", arguments=given)
    twin.open_gate()
    wait_for("output", lambda: job.output.exists() and job.output.stat().st_size)
    job.requeue("scontrol")
    job.open_gate()
    job.wait_success()
    twin.wait_success()
    assert job.said() == twin.said()
    assert job.mails(1) == twin.mails(1) == ["Ended"]
    assert job.accounted() == [("PENDING", "0:0", "0:0"), *twin.accounted()]


INSIDE = """\
hpccr run --dir /not/there sh -c 'echo "in capsule $HPCCR_CAPSULE"'
srun hostname
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
    job = jobs.sbatch(f"cat > nested <<'END'\n{NESTED}END\n{INSIDE}", ["--checkpoint=requeue"])
    job.wait_success()
    nested = Job(cluster, job.user, job.directory, int((job.directory / "nested.id").read_text()))
    jobs.all.append(nested)
    nested.wait_success()
    lines = job.said().splitlines()
    assert lines[0] == "in capsule 0"
    assert lines[1] == "hpccr-0"
    assert lines[2:] == ["srun: 0", f"squeue: {job.id} RUNNING", f"JobId={job.id}", "checkpointed"]
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
    job = jobs.sbatch(TRAPS, ["--checkpoint=requeue"])
    job.wait_output("ready")
    job.requeue()
    job.signal("USR2", "--batch")
    job.wait_output("got USR2")
    job.cluster.check("ctl", "scancel", str(job.id), user=job.user)
    assert job.wait_over().states == {"CANCELLED"}
    # By itself: SIGKILL, which comes after KillWait, would not have given this code.
    assert [event["exit_code"] for event in job.events("finished")] == [9]
    said = [line for line in job.said().splitlines() if not line.startswith("slurmstepd-")]
    assert said == ["ready", "got USR2", "got TERM"]


# --- when -------------------------------------------------------------------------------------------------------------

COUNT = 'for number in $(seq {count}); do echo "$number"; sleep 0.1; done'


def test_by_interval_and_by_signal(jobs: Jobs) -> None:
    job = jobs.sbatch(COUNT.format(count=100000), ["--checkpoint=10s"])
    job.wait_event("durable", 1)
    (row,) = json.loads(job.cluster.check("ctl", "hpccr", "list", "--json", user=job.user))
    assert row["state"] == "running" and abs(row["due"] - time.time()) <= 15
    job.wait_event("durable", 2)
    wait_for("a comment", lambda: re.match(r"hpccr: checkpoint \d of \S+, \d+ MiB$", str(show(job)["comment"])))
    assert [event["reason"] for event in job.events("released")[:2]] == ["interval", "interval"]
    job.signal("USR1", "--batch")
    wait_for("a checkpoint by signal", lambda: "signal" in [event["reason"] for event in job.events("released")])
    job.requeue()
    job.cancel()
    # Slurm's own line says that it was cancelled, and comes where the output was then.
    lines = [line for line in job.said().splitlines() if not line.startswith("slurmstepd-")]
    assert lines[: len(lines) - 1] == [str(number + 1) for number in range(len(lines) - 1)]


# --- many jobs --------------------------------------------------------------------------------------------------------


def test_an_array_of_six_a_job_that_waits_for_its_end_and_a_time_limit(jobs: Jobs) -> None:
    """Requeued all at once, two by two on a node; what depends on them starts when the last has really ended.

    At the same time one that is longer than its time limit, and one that is to be ended by it.
    """
    steps = rounds(650, 3600)
    lines = [f"--time={rounds(1, 2)}", "--mail-type=END,FAIL"]
    limited = jobs.sbatch(COUNT.format(count=steps), ["--checkpoint=auto", *lines])
    given_up = jobs.sbatch(
        counter(), ["--checkpoint=requeue", *lines], environment={"HPCCR_CHECKPOINT_AT_LIMIT": "none"}
    )
    given_up_twin = jobs.sbatch(counter(), lines)
    given_up.wait_event("started")
    computes(given_up)
    given_up.checkpoint()
    cluster, count = jobs.cluster, rounds(60, 600)
    line = 'echo "task $SLURM_ARRAY_TASK_ID: $number $(echo $SLURM_ARRAY_TASK_ID.$number | sha256sum | cut -c 1-8)"'
    held = f"[ $number -lt {count - 5} ] || until [ -e gate ]; do sleep 0.1; done"
    body = f"for number in $(seq {count}); do {held}; {line}; sleep 0.1; done"
    array = ["--array=1-6", "--output=out-%a.txt"]
    twin = jobs.sbatch(body, array)
    twin.open_gate()
    job = jobs.sbatch(body, ["--checkpoint=requeue", *array])
    after = jobs.sbatch("date +%s.%N", options=[f"--dependency=afterok:{job.id}"])
    outputs = [job.directory / f"out-{task}.txt" for task in range(1, 7)]
    wait_for("output of all tasks", lambda: all(path.exists() and path.stat().st_size for path in outputs))
    # One by its name in the array, by a command of hpccr; and all the others by one of Slurm's.
    assert "checkpoint 1 of" in cluster.check("ctl", "hpccr", "checkpoint", f"{job.id}_3", user=job.user)
    cluster.check("ctl", "scontrol", "requeue", str(job.id), user=job.user)
    parts = {found["job_id"]: Job(cluster, job.user, job.directory, found["job_id"]) for found in job.records()}
    assert len(parts) == 6
    jobs.all += [part for number, part in parts.items() if number != job.id]
    for part in parts.values():
        part.wait_event("restored", within=90)
    # Not before: scontrol returns before anything of them is frozen.
    job.open_gate()
    after.wait_success()
    for found in job.records():
        part, task = parts[found["job_id"]], found["array_task_id"]["number"]
        assert found["job_state"] == ["COMPLETED"] and found["restart_cnt"] == 1
        assert len(part.events("restored")) == 1
        assert float(after.said()) > part.events("finished")[0]["time"]
        assert (job.directory / f"out-{task}.txt").read_text() == (twin.directory / f"out-{task}.txt").read_text()
    ended = limited.wait_over(within=rounds(200, 800))
    assert ended.states == {"COMPLETED"} and ended.restarts >= rounds(1, 3)
    assert "time limit" in [event["reason"] for event in limited.events("released")]
    assert limited.events("interval")[0]["text"].startswith("auto: a checkpoint every ")
    assert "Slurm's records" in limited.events("interval")[0]["text"]
    assert limited.said() == "".join(f"{number + 1}\n" for number in range(steps))
    assert limited.mails(1) == ["Ended"]
    assert limited.accounted() == [("PENDING", "0:0", "0:0")] * ended.restarts + [("COMPLETED", "0:0", "0:0")]
    ends_at_its_limit(given_up, given_up_twin)
    wait_for("the twin's end", lambda: not cluster.check("ctl", "squeue", "-h", "-j", str(twin.id)).strip())


def ends_at_its_limit(job: Job, twin: Job) -> None:
    """As without hpccr; and who wants it to go on requeues it."""
    ended, as_ever = job.wait_over(), twin.wait_over()
    assert ended.states == as_ever.states == {"TIMEOUT"} and ended.restarts == 0
    assert job.accounted() == twin.accounted() and job.mails(1) == twin.mails(1) == ["Failed"]
    assert [event["reason"] for event in job.events("released")] == ["command"]
    job.requeue("scontrol", avoid=False)
    finish(job)


def test_not_wrapped_at_all(jobs: Jobs) -> None:
    """`none` takes back what the script, a variable or another spelling has said."""
    lines = ["--checkpoint=30m", "--hpccr-checkpoint=2h", "--checkpoint-keep=3"]
    variable = {"SBATCH_CHECKPOINT": "1h"}
    submitted = [
        jobs.sbatch("env", lines, options=["--checkpoint=none"], environment=variable),
        jobs.sbatch("env", lines, options=["--hpccr-checkpoint=none"], environment=variable),
        jobs.sbatch("env", environment={"SBATCH_CHECKPOINT": "none"}),
    ]
    for job in submitted:
        job.wait_success()
        found = variables(job)
        assert not [name for name in found if name.startswith("HPCCR_")]
        assert "SLURM_OPEN_MODE" not in found and not job.store.exists() and not show(job)["comment"]
