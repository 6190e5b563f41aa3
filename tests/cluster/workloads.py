"""What the tests' jobs run, and what an undisturbed run of it without hpccr prints (its twin)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from jobs import Jobs
from nodes import Cluster
from waiting import soak

ENDLESS = 1_000_000_000
"""Steps of a job that runs until it is cancelled."""
RATE = 50
"""Steps per second of such a job, which has to be there and not to be quick."""
SOURCES = "/src/tests/cluster/programs"
ENOUGH = "enough"
"""The file in a counter's directory that ends it."""
# There are more ranks than processors: one that waits must sleep for a moment. For Open MPI the site's configuration
# says so (testbed/siteconf.py, which tells why sched_yield() is not enough); MPICH has none.
OPEN_MPI = "mpirun.openmpi --map-by ppr:{each}:node -n {ranks}"
MPICH = "mpirun.mpich -genv MPIR_CVAR_ENABLE_HEAVY_YIELD 1 -n {ranks}"
NICE = "nice"
"""Before a rank's program: on a real node Slurm and hpccr would have a processor of their own."""


class Workloads:
    """Command lines, with the compiled programs in /shared/programs."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self.seed = seed
        self._twins: dict[str, str] = {}
        self._longest = ""
        place = cluster.shared / "programs"
        place.mkdir(exist_ok=True)
        node = cluster.nodes[0]
        cluster.check(
            node, "mpicc.mpich", "-O2", "-Wall", "-Werror", "-o", "/shared/programs/pairs", f"{SOURCES}/pairs.c"
        )

    def melt(self, steps: int, *, ranks: int = 4, nodes: int = 2, gate: str = "/dev/null") -> str:
        """LAMMPS's Lennard-Jones melt of 4000 atoms under Open MPI; thermodynamic output goes to melt.log as well.
        gate: a file that its last steps wait for; the default is always there, for the twin."""
        mpirun = OPEN_MPI.format(each=ranks // nodes, ranks=ranks)
        variables = f"-var size 10 -var steps {steps} -var every 10 -var gate {gate}"
        return f"{mpirun} {NICE} lmp -in {SOURCES}/melt.in {variables} -log melt.log"

    def pairs(
        self,
        rounds: int,
        *,
        ranks: int = 4,
        max_bytes: int = 4 << 20,
        seed: int | None = None,
        pause: int = 0,
        gate: str = "",
    ) -> str:
        """The program that checks every byte and order of random messages, under MPICH. gate: a file that its end waits
        for; pause: ms between rounds until then. It prints the same without."""
        mpirun, seed = f"{MPICH.format(ranks=ranks)} {NICE}", seed or self.seed
        return f"{mpirun} /shared/programs/pairs {seed} {rounds} 10 {max_bytes} {pause} {gate}".rstrip()

    def stencil(
        self,
        steps: int = ENDLESS,
        *,
        size: int = 300,
        ranks: int = 4,
        nodes: int = 2,
        rate: int = 0,
        gate: str = "",
    ) -> str:
        """The halo exchange in mpi4py, which also appends to residuals.txt. gate: a file that its end waits for; rate:
        steps per second at most until then. It prints the same without."""
        mpirun = OPEN_MPI.format(each=ranks // nodes, ranks=ranks)
        rate = rate or (RATE if steps == ENDLESS else 0)
        program = f"python3 {SOURCES}/stencil.py --size {size} --steps {steps} --log residuals.txt"
        options = (f" --rate {rate}" if rate else "") + (f" --gate {gate}" if gate else "")
        return f"{mpirun} {NICE} {program}{options}"

    def ticker(self, *, hold: int = 8, ranks: int = 4, nodes: int = 2) -> str:
        """Endless, and known without a twin (check_ticks); takes next to no processor time."""
        mpirun = OPEN_MPI.format(each=ranks // nodes, ranks=ranks)
        return f"{mpirun} python3 {SOURCES}/ticker.py --hold {hold}"

    def check_ticks(self, said: str, *, ranks: int = 4) -> None:
        """All lines of a ticker so far, in their order, none missing and none twice."""
        lines = [line for line in said.splitlines(keepends=True) if line.startswith("tick ")]
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        total = ranks * (ranks + 1) // 2
        assert lines == [f"tick {step} {step * total}\n" for step in range(1, len(lines) + 1)]
        assert lines, "it has printed nothing"

    def check_endless(self, said: str) -> None:
        """What an endless stencil of the standard size has printed so far is what an undisturbed one prints first.

        The residual in each line follows from the whole field, so a wrong value anywhere would show in all later lines.
        """
        lines = said.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        assert lines, "it has printed nothing"
        if self._longest.count("\n") <= len(lines):
            self._longest = self.twin(self.stencil(len(lines) * 3 // 2 + 200))
        assert "".join(lines) == "".join(self._longest.splitlines(keepends=True)[: len(lines)])

    def twin(self, command: str, *, nodes: int = 2, tasks: int = 4, file: str = "out.txt") -> str:
        """What the file of that name has after an undisturbed run without hpccr; each command runs once per session."""
        if command not in self._twins:
            jobs = Jobs(self._cluster, "twin-" + hashlib.sha256(command.encode()).hexdigest()[:12])
            try:
                job = jobs.submit(command, nodes=nodes, tasks=tasks, plain=True)
                job.wait_success(within=600 if soak() else 180)
                for path in job.directory.iterdir():
                    self._twins[f"{command} > {path.name}"] = path.read_text(errors="replace")
                self._twins[command] = ""
            finally:
                jobs.clear()
        return self._twins[f"{command} > {file}"]


def counter() -> str:
    """Lines of a shell script that counts until its working directory has the file ENOUGH; check_counter() knows it."""
    return f"""\
number=0 sum=0
until [ -e {ENOUGH} ]; do
    number=$((number + 1)) sum=$(((sum * 31 + number) % 1000003))
    echo "$number $sum"
    sleep 0.1
done
echo "counted to $number"
"""


def check_counter(said: str) -> None:
    """What a counter has printed is what an undisturbed one prints: each number once, and its end."""
    lines = said.splitlines()
    count = len(lines) - 1
    expected, total = [], 0
    for number in range(1, count + 1):
        total = (total * 31 + number) % 1000003
        expected.append(f"{number} {total}")
    expected.append(f"counted to {count}")
    both = enumerate(zip(lines, expected, strict=False))
    wrong = [f"line {at + 1}: {found!r}, not {line!r}" for at, (found, line) in both if found != line]
    assert lines == expected and count > 0, "; ".join(wrong[:3])


def thermo(text: str) -> str:
    """The thermodynamic output of LAMMPS: what follows are times, and differs in every run."""
    runs = text.split("   Step ")[1:]
    assert runs and all("Loop time" in run for run in runs), f"LAMMPS did not finish: {text[-400:]}"
    return "".join(run.partition("Loop time")[0] for run in runs)


def thermo_file(path: Path) -> str:
    return thermo(path.read_text())
