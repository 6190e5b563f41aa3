"""Environment, arguments and directories of users as they are: not always text, nor fit for hpccr's Python."""

from __future__ import annotations

import json
import os

from jobs import Job, Jobs

BYTES = """\
import os, sys, time

log = open(b"caf\\xe9.log", "ab", buffering=0)

def show():
    for found in (os.getcwdb(), os.environb[b"PWD"], os.environb[b"X"], os.fsencode(sys.argv[1])):
        print(found, flush=True)
        log.write(found + b"\\n")

show()
while not os.path.exists("gate"):
    time.sleep(0.05)
show()
"""


def test_names_and_variables_that_are_not_text(jobs: Jobs) -> None:
    """A Latin-1 name of the directory, a variable and an argument reach the program as they are, also after a restart;
    and what hpccr records of them can be read."""
    jobs.name += os.fsdecode(b"-caf\xe9")
    job = jobs.submit(
        r"--files=. python3 program.py $'\xfe'", before=r"export X=$'\xff'", tasks=2, files={"program.py": BYTES}
    )
    there = os.fsencode(jobs.cluster.there(job.directory))
    job.wait_output(repr(b"\xfe"))
    job.checkpoint()
    job.requeue()
    job.open_gate()
    job.wait_success()
    lines = [there, there, b"\xff", b"\xfe"]
    assert job.said() == 2 * "".join(f"{line!r}\n" for line in lines)
    assert (job.directory / os.fsdecode(b"caf\xe9.log")).read_bytes() == 2 * b"".join(line + b"\n" for line in lines)
    record = json.loads((job.step() / "step.json").read_text())
    assert record["argv"] == ["python3", "program.py", r"\udcfe"]
    told = json.loads(job.hpccr_ok("inspect", "--json"))
    assert told["trees"] == [os.fsdecode(there).encode(errors="backslashreplace").decode()]
    assert any(file["path"].endswith(r"/caf\udce9.log") for file in told["files"])
    assert any(file["path"].endswith(r"/caf\udce9.log") for file in told["contents"][0]["files"])
    assert r"/caf\udce9.log" in job.hpccr_ok("inspect", "-v")


PYTHON = """\
say() { echo "$1 $SLURM_PROCID $PYTHONHOME $PYTHONPATH"; }
say before
until [ -e gate ]; do sleep 0.05; done
say after
"""


def settings(jobs: Jobs) -> dict[str, str]:
    """Variables for another Python, as a `module load` sets them, with modules that are not for ours."""
    place = jobs.cluster.home("user1") / jobs.name / "modules"
    for name in ("queue", "msgspec", "hpccr"):
        jobs.cluster.write(place / f"{name}.py", f"raise SystemExit('the wrong {name}')\n", "user1")
    return {"PYTHONHOME": "/nonexistent", "PYTHONPATH": jobs.cluster.there(place)}


def go_on(job: Job, variables: dict[str, str]) -> None:
    """Checkpoint and requeue the job, by a user who has the variables set too; what it says in the end is checked."""

    def hpccr(*arguments: str) -> None:
        words = [f"{name}={value}" for name, value in variables.items()]
        done = job.cluster.run("ctl", "env", *words, "hpccr", *arguments, user="user1", timeout=120)
        assert done.returncode == 0, done

    job.wait_output("before 1")
    hpccr("checkpoint", "--wait", str(job.id))
    hpccr("list")
    hpccr("requeue", str(job.id))
    job.wait_event("restored", within=90)
    job.open_gate()
    job.wait_success()
    values = " ".join(variables.values())
    expected = [f"{when} {rank} {values}" for when in ("after", "before") for rank in "01"]
    assert sorted(job.said().splitlines()) == expected


def test_settings_for_another_python_in_the_script(jobs: Jobs) -> None:
    """PYTHONHOME and PYTHONPATH are the program's, and nothing of hpccr sees them."""
    variables = settings(jobs)
    job = jobs.submit("srun sh program.sh", tasks=2, environment=variables, files={"program.sh": PYTHON})
    go_on(job, variables)


def test_settings_for_another_python_at_submission(jobs: Jobs) -> None:
    """The same with `sbatch --checkpoint`."""
    variables = settings(jobs)
    jobs.cluster.write(jobs.cluster.home("user1") / jobs.name / "program.sh", PYTHON, "user1")
    options = ["--checkpoint=requeue", "--open-mode=append"]
    job = jobs.sbatch("srun sh ../program.sh", nodes=2, tasks=2, options=options, environment=variables)
    go_on(job, variables)


def test_doctor_with_settings_for_another_python(jobs: Jobs) -> None:
    variables = [f"{name}={value}" for name, value in settings(jobs).items()]
    done = jobs.cluster.run("ctl", "env", *variables, "hpccr", "doctor", "--json", user="user1", timeout=120)
    assert done.returncode == 0, done
