"""srun in a script that is checkpointed as a whole: its steps are what Slurm's srun makes of them outside, and they are
restored on other nodes in the middle."""

from __future__ import annotations

import re

from jobs import Jobs
from waiting import rounds, soak, wait_for
from workloads import ENOUGH, Workloads, check_counter, counter

FARM = 6
"""Steps of four CPUs each; the job has 16."""

STEPS = """\
export MPIR_CVAR_ENABLE_HEAVY_YIELD=1
cat > farm <<'END'
echo "farm $1"
until [ -e gate ]; do sleep 1; done
echo $SLURM_STEP_ID >> ids
END
{messages} &
{field} &
cat > counter <<'END'
{counter}
END
srun --overlap --label --ntasks=4 --output=count.txt sh counter &
for i in $(seq {farm}); do
    srun --ntasks=1 --nodes=1 --cpus-per-task=4 sh farm $i &
done
wait
srun --nodes=2 --ntasks=4 --output=after.%t sh -c 'echo after $SLURM_PROCID; exit $SLURM_PROCID'
echo "ended with $?"
"""

LAYOUTS = """\
who='echo $SLURM_PROCID $SLURM_LOCALID $SLURM_NODEID $SLURM_GTIDS $SLURMD_NODENAME $SLURM_NTASKS $SLURM_NNODES
    $SLURM_TASKS_PER_NODE $SLURM_STEP_TASKS_PER_NODE $SLURM_STEP_NODELIST $SLURM_NODELIST $SLURM_STEP_NUM_TASKS
    $SLURM_CPUS_PER_TASK $SLURM_DISTRIBUTION $SLURM_JOB_NAME'
who=$(echo $who)
srun sh -c "$who" | sort
srun -n5 --distribution=cyclic --label sh -c "$who" 2>/dev/null | sort
srun -n3 -N2 -J other -o 'who.%2t.%n' sh -c "$who"; head who.*; rm who.*
srun -n1 -N1 -r1 sh -c "$who"
srun -N1 sh -c "$who" | sort
srun -N1-2 -n2 -m block:cyclic sh -c "$who" | sort
srun -n2 -N1 -c2 -l sh -c "$who; echo error >&2" 2>&1 | sort
srun -n3 -D sub -e err.%t -o whole.txt sh -c 'pwd; echo error $SLURM_PROCID >&2'; cat whole.txt sub/err.*; rm sub/err.*
srun -n4 -l --multi-prog programs | sort
srun -n2 -i input cat
printf 'x\\ny\\n' | srun -n2 -i0 sh -c 'echo $SLURM_PROCID $(cat)' | sort
OLD=1 srun -n2 --export=ALL,NEW=2 sh -c 'echo $OLD $NEW'
srun -n1 -N1 program 'a  b' '*' "it's"
srun -n3 sh -c 'exit $((SLURM_PROCID == 1 ? 7 : 0))' 2>/dev/null; echo "exit code $?"
srun -n2 -N2 sh -c 'kill -KILL $$' 2>/dev/null; echo "exit code $?"
"""
SURROUNDINGS = """\
mkdir sub
printf '0-1 echo first %%t %%o\\n* echo rest %%t %%o\\n' > programs
printf 'from a file\\n' > input
printf '#!/bin/sh\\nfor word; do echo "($word)"; done\\n' > program
chmod +x program
"""


def test_steps_are_as_slurms_own(jobs: Jobs) -> None:
    """The same commands outside of a capsule, by Slurm, and inside, by each of the launchers."""
    kinds = ("none", "openmpi", "mpich", "intel")
    twin = jobs.sbatch(f"{SURROUNDINGS}\n{LAYOUTS}", ["--job-name=name"], nodes=2, tasks=4)
    loop = f"for HPCCR_MPI in {' '.join(kinds)}; do (\n{LAYOUTS}) > out.$HPCCR_MPI; done"
    body = f"{SURROUNDINGS}\nexport HPCCR_MPI PATH=$PATH:/opt/mpi/impi/bin\n{loop}"
    job = jobs.sbatch(body, ["--job-name=name", "--checkpoint=requeue"], nodes=2, tasks=4)
    twin.wait_success()
    job.wait_success()
    nodes = twin.slurm().nodes
    short = jobs.cluster.check("ctl", "scontrol", "show", "hostlist", ",".join(nodes)).strip()
    # Slurm's may find the step before not quite gone yet, and then says so.
    said = re.sub(r"^srun: (Step created|Job [0-9]+ step creation) .*\n", "", twin.said(), flags=re.MULTILINE)
    expected = said.replace(short, "hpccr-[0-1]").replace(twin.directory.name, job.directory.name)
    for index, node in enumerate(nodes):
        expected = expected.replace(node, f"hpccr-{index}")
    assert "exit code 7" in expected and "4: 4 2 0 0,2,4 " in expected
    for kind in kinds:
        assert (job.directory / f"out.{kind}").read_text() == expected, kind


RANKS = """\
from mpi4py import MPI
import os
ranks = MPI.COMM_WORLD.gather((os.environ["SLURM_PROCID"], os.environ["SLURM_LOCALID"], os.uname().nodename))
if ranks:
    print(MPI.Get_library_version().split()[0], *map("/".join, ranks))
"""


def test_the_library_of_a_program_is_found(jobs: Jobs) -> None:
    """mpi4py with each of the libraries that the nodes have, and a program that runs a program."""
    environments = {"openmpi": "Open", "mpich": "MPICH", "impi": "Intel(R)"}
    pythons = {f"/opt/mpi/{name}/bin/python3": library for name, library in environments.items()}
    pythons |= {"python3": "Open", "nice python3": "Open"}
    steps = "\n".join(f"srun {python} ranks.py" for python in pythons)
    body = f"cat > ranks.py <<'END'\n{RANKS}END\n{steps}"
    job = jobs.sbatch(body, ["--checkpoint=requeue"], nodes=2, tasks=3, options=["--ntasks-per-node=2"])
    job.wait_success()
    ranks = "0/0/hpccr-0 1/1/hpccr-0 2/0/hpccr-1"
    assert job.said().splitlines() == [f"{library} {ranks}" for library in pythons.values()]


def test_restored_in_the_middle(jobs: Jobs, workloads: Workloads) -> None:
    """At once: a step under MPICH, one under Open MPI, one without MPI, and more steps than there are CPUs for."""
    pairs, stencil = workloads.pairs(rounds(60, 2000)), workloads.stencil(rounds(300, 6000))
    body = STEPS.format(
        messages=f"srun --overlap -n4 -o messages.txt {pairs.partition(' -n 4 ')[2]}",
        field=f"srun --overlap -n4 -l -o field.txt -e field.err {stencil.partition(' -n 4 ')[2]}",
        counter=counter(),
        farm=FARM,
    )
    job = jobs.sbatch(body, ["--checkpoint=requeue"], nodes=2, tasks=4)
    files = [job.directory / name for name in ("messages.txt", "field.txt", "count.txt")]
    for file in files:
        wait_for(f"something in {file.name}", lambda file=file: file.exists() and file.stat().st_size)  # type: ignore[misc]
    wait_for("a full job", lambda: job.said().count("farm ") == 4)
    job.requeue("scontrol")
    for name in ("gate", ENOUGH):
        jobs.cluster.write(job.directory / name, "", job.user)
    job.wait_success()
    said = job.said().splitlines()
    assert sorted(line for line in said if line.startswith("farm ")) == sorted(f"farm {n + 1}" for n in range(FARM))
    assert len(set((job.directory / "ids").read_text().split())) == FARM
    assert said[-1] == "ended with 3"
    assert [(job.directory / f"after.{rank}").read_text() for rank in range(4)] == [f"after {r}\n" for r in range(4)]
    assert files[0].read_text() == workloads.twin(pairs)
    assert files[1].read_text() == re.sub(r"^", "0: ", workloads.twin(stencil).rstrip("\n"), flags=re.MULTILINE) + "\n"
    assert (job.directory / "residuals.txt").read_text() == workloads.twin(stencil, file="residuals.txt")
    lines = files[2].read_text().splitlines()
    for rank in range(4):
        check_counter("\n".join(line[3:] for line in lines if line.startswith(f"{rank}: ")))


COME_AND_GO = """\
for i in $(seq {steps}); do
    for HPCCR_MPI in none mpich openmpi; do
        srun --label --ntasks=4 echo "step $i" >> $HPCCR_MPI.txt || echo "step $i with $HPCCR_MPI: exit code $?"
    done
done
echo "all done"
"""


def test_checkpoints_while_steps_come_and_go(jobs: Jobs) -> None:
    """Whatever a step is doing at the moment, starting, ending, or between two: it prints each line once."""
    steps = rounds(10, 60)
    body = f"export HPCCR_MPI\n{COME_AND_GO.format(steps=steps)}"
    job = jobs.sbatch(body, ["--checkpoint=requeue"], nodes=2, tasks=4)
    job.wait_event("started")
    made = 0
    while "all done" not in job.said():
        done = job.hpccr("checkpoint", "--no-wait")
        made += done.returncode == 0  # one that fails must do no harm either
        if soak() and made % 10 == 9 and len((job.directory / "none.txt").read_text().splitlines()) < 2 * steps:
            job.requeue("hpccr", avoid=False)
    job.wait_success()
    assert job.said() == "all done\n" and made > 2
    expected = sorted(f"{rank}: step {number + 1}" for number in range(steps) for rank in range(4))
    for launcher in ("none", "mpich", "openmpi"):
        assert sorted((job.directory / f"{launcher}.txt").read_text().splitlines()) == expected
