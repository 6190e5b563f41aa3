"""srun in a script that is checkpointed as a whole: its steps are what Slurm's srun makes of them outside, and they are
restored on other nodes in the middle."""

from __future__ import annotations

from jobs import Jobs
from waiting import rounds, wait_for
from workloads import ENOUGH, Workloads, check_counter, counter

FARM = 18
"""Steps of one CPU each; the job has 16."""

STEPS = """\
export OMPI_MCA_mpi_yield_when_idle=1
cat > farm <<'END'
echo "farm $1"
until [ -e gate ]; do sleep 0.2; done
echo $SLURM_STEP_ID >> ids
END
{messages} &
{field} &
cat > counter <<'END'
{counter}
END
srun --overlap --label --ntasks=4 --output=count.txt sh counter &
for i in $(seq {farm}); do
    srun --ntasks=1 --nodes=1 --exact sh farm $i &
done
wait
srun --nodes=2 --ntasks=4 --output=after.%t sh -c 'echo after $SLURM_PROCID; exit $SLURM_PROCID'
echo "ended with $?"
"""


def test_restored_in_the_middle(jobs: Jobs, workloads: Workloads) -> None:
    """At once: a step under MPICH, one under Open MPI, one without MPI, and more steps of one CPU than CPUs."""
    pairs, stencil = workloads.pairs(rounds(300, 2000)), workloads.stencil(rounds(1000, 6000))
    body = STEPS.format(
        messages=f"srun --overlap -n4 -o messages.txt {pairs.partition(' -n 4 ')[2]}",
        field=f"srun --overlap -n4 -o field.txt {stencil.partition(' -n 4 ')[2]}",
        counter=counter(),
        farm=FARM,
    )
    job = jobs.sbatch(body, ["--checkpoint=requeue"], nodes=2, tasks=4)
    files = [job.directory / name for name in ("messages.txt", "field.txt", "count.txt")]
    for file in files:
        wait_for(f"something in {file.name}", lambda file=file: file.exists() and file.stat().st_size)  # type: ignore[misc]
    wait_for("a full job", lambda: job.said().count("farm ") == 16)
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
    assert files[1].read_text() == workloads.twin(stencil)
    assert (job.directory / "residuals.txt").read_text() == workloads.twin(stencil, file="residuals.txt")
    lines = files[2].read_text().splitlines()
    for rank in range(4):
        check_counter("\n".join(line[3:] for line in lines if line.startswith(f"{rank}: ")))
