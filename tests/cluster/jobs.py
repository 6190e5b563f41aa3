"""Slurm jobs under hpccr as a user sees them: submitted on the login node, watched through their files and `squeue`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodes import Cluster, Failure, last_lines
from waiting import Late, wait_for

OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
STORE = ".hpccr"


@dataclass(frozen=True)
class Slurm:
    """What Slurm says of a job."""

    states: frozenset[str]
    nodes: tuple[str, ...]
    restarts: int
    code: int
    signal: int
    reason: str

    @property
    def over(self) -> bool:
        return bool(self.states & OVER) and "COMPLETING" not in self.states


@dataclass
class Job:
    """A job of `user`, its working directory `directory` (as this machine sees it) and its files there."""

    cluster: Cluster
    user: str
    directory: Path
    id: int
    options: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        """The job's directory in the store."""
        root = self.options.get("store")
        base = self.cluster.here(root) if root else self.cluster.home(self.user) / STORE
        return base / f"{self.cluster.name}-{self.id}"

    def step(self, number: int = 0) -> Path:
        return self.store / str(number)

    @property
    def output(self) -> Path:
        return self.directory / "out.txt"

    def said(self) -> str:
        """Its output so far, without a warning of PRRTE's own: where it starts agents (ssh, hpccr-rsh), parent and
        child both name the child's process group, and a child that is executing already makes the parent complain."""
        lines = self.output.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if "plm:ssh: Warning: setpgid(" not in line)

    @property
    def errors(self) -> Path:
        return self.directory / "err.txt"

    # --- what happens to it -------------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """Slurm's record of it; of an array's id those of all its tasks."""

        def look() -> list[dict[str, Any]]:
            found = self.cluster.check("ctl", "scontrol", "show", "job", str(self.id), "--json")
            return json.loads(found)["jobs"]  # type: ignore[no-any-return]

        # The job is known for longer than any test lasts (MinJobAge): an empty list, with exit code 0, is what scontrol
        # gives when slurmctld has not answered within MessageTimeout.
        return wait_for(f"Slurm's word on job {self.id}", look, within=30)

    def slurm(self) -> Slurm:
        """Slurm's view of it now."""
        (job,) = (job for job in self.records() if job["job_id"] == self.id)
        listed = job["job_resources"].get("nodes", {}) if job.get("job_resources") else {}
        nodes = tuple(node["name"] for node in listed.get("allocation", ()))
        code = job["exit_code"]
        return Slurm(
            states=frozenset(job["job_state"]),
            nodes=nodes,
            restarts=job["restart_cnt"],
            code=code["return_code"]["number"] if code["return_code"]["set"] else 0,
            signal=code["signal"]["id"]["number"] if code["signal"]["id"]["set"] else 0,
            reason=job["state_reason"],
        )

    def accounted(self) -> list[tuple[str, str, str]]:
        """State, exit code and derived exit code of each run of it in the log of completed jobs."""
        log = self.cluster.check("ctl", "grep", f"^JobId={self.id} ", "/var/log/slurm/jobcomp.log")
        found = []
        for line in log.splitlines():
            values = dict(word.split("=", 1) for word in line.split() if "=" in word)
            found.append((values["JobState"], values["ExitCode"], values["DerivedExitCode"]))
        return found

    def mails(self, count: int) -> list[str]:
        """What Slurm has written to its user, "Began", "Ended" ..., once there are so many mails: it sends them a while
        after what they are about."""

        def look() -> list[str] | None:
            log = self.cluster.run("ctl", "grep", f"Job_id={self.id} ", "/var/log/slurm/mail.log").stdout
            found = [line.split(" Name=script ")[1].split(",")[0].split()[0] for line in log.splitlines()]
            return found if len(found) >= count else None

        return wait_for(f"{count} mails about job {self.id}", look)

    def wait_over(self, within: float = 180) -> Slurm:
        """Slurm's view of it once it has ended, epilog and all."""
        return wait_for(f"end of job {self.id}", self._over, within=within, every=0.25)

    def _over(self) -> Slurm | None:
        found = self.slurm()
        return found if found.over else None

    def wait_success(self, within: float = 180) -> None:
        """Returns when it has ended with exit code 0; anything else raises Failure with the job's files."""
        found = self.wait_over(within)
        if "COMPLETED" not in found.states:
            raise Failure(f"job {self.id} ended as {', '.join(found.states)}, code {found.code}")

    def wait_state(self, *states: str, within: float = 60) -> Slurm:
        """Slurm's view of it once it is in one of the states, and in no other (COMPLETING ...)."""

        def look() -> Slurm | None:
            found = self.slurm()
            return found if found.states and found.states <= set(states) else None

        return wait_for(f"job {self.id} {'|'.join(states)}", look, within=within, every=0.25)

    def events(self, name: str = "", step: int = 0) -> list[dict[str, Any]]:
        """The events of a step so far, oldest first; of one kind if it is named."""
        try:
            lines = (self.step(step) / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # being written
        return [event for event in found if not name or event["event"] == name]

    def wait_event(self, name: str, count: int = 1, *, step: int = 0, within: float = 60) -> dict[str, Any]:
        """The count-th event of that kind; raises Late early when the job has ended before."""
        looks = 0

        def look() -> dict[str, Any] | None:
            nonlocal looks
            looks += 1
            over = looks % 50 == 0 and self.slurm().over
            found = self.events(name, step)
            if len(found) >= count:
                return found[count - 1]
            if over:
                raise Late(f"job {self.id} ended before its event {name} number {count}")
            return None

        return wait_for(f"event {name} number {count} of job {self.id}", look, within=within)

    def wait_output(self, text: str, within: float = 60) -> None:
        """Returns when its output file has `text`."""
        wait_for(
            f"{text!r} in the output of job {self.id}",
            lambda: self.output.exists() and text in self.output.read_text(errors="replace"),
            within=within,
        )

    # --- what is done to it -------------------------------------------------------------------------------------

    def hpccr(
        self, verb: str, *arguments: str, user: str = "", timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """`hpccr VERB JOB arguments` on the login node, whatever its exit code."""
        store = self.options.get("store")
        where = ["env", f"HPCCR_STORE_DIR={store}"] if store else []
        return self.cluster.run(
            "ctl", *where, "hpccr", verb, str(self.id), *arguments, user=user or self.user, timeout=timeout
        )

    def hpccr_ok(self, verb: str, *arguments: str, timeout: float = 120) -> str:
        """The same, and it has to succeed; its standard output."""
        done = self.hpccr(verb, *arguments, timeout=timeout)
        if done.returncode:
            raise Failure(
                f"hpccr {verb} {self.id} {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def status(self) -> dict[str, Any]:
        """`hpccr status --json` of its first step."""
        found = json.loads(self.hpccr_ok("status", "--json"))
        return found[0] if isinstance(found, list) else found  # type: ignore[no-any-return]

    def checkpoint(self) -> dict[str, Any]:
        """Checkpoint it from the login node and wait until that is durable; the event `released`."""
        durable, released = len(self.events("durable")), len(self.events("released"))
        self.hpccr_ok("checkpoint", "--wait")
        self.wait_event("durable", durable + 1)
        return self.wait_event("released", released + 1)

    def requeue(self, how: str = "hpccr", *, avoid: bool = True, within: float = 90) -> tuple[str, ...]:
        """Requeue it, onto other nodes if `avoid`, and wait until it is restored; the new nodes.

        how: "hpccr" (`hpccr requeue`) or "scontrol" (`scontrol requeue`: SIGTERM, and KillWait is running).
        """
        old = self.slurm().nodes
        before = len(self.events("restored"))
        if avoid:
            self.cluster.drain(*old)
        try:
            if how == "hpccr":
                self.hpccr_ok("requeue")
            else:
                self.cluster.check("ctl", "scontrol", "requeue", str(self.id), user=self.user)
            restored = self.wait_event("restored", before + 1, within=within)
        finally:
            if avoid:
                self.cluster.resume()
        nodes = tuple(dict.fromkeys(restored["nodes"]))
        if avoid and set(nodes) & set(old):
            raise Failure(f"job {self.id} was on {old} and is now on {nodes}")
        return nodes

    def requeue_and_hold(self) -> None:
        """Requeue it by `hpccr requeue` and return when it waits in the queue, from which release() lets it go."""
        self.cluster.drain(*self.cluster.nodes)
        self.hpccr_ok("requeue")
        self.wait_state("PENDING")

    def forget_images(self) -> None:
        """What its last checkpoint leaves in the spools goes as soon as it is there, which may be after Slurm has the
        job in its queue again: the restore reads the store."""
        last = self.events("released")[-1]
        end = f"-{last['sequence']:06d}"

        def kept() -> bool:
            return all(any(path.name.endswith(end) for path in self.cluster.kept(node)) for node in last["nodes"])

        wait_for(f"the images {end} to be kept", kept)
        self.cluster.forget_images()

    def release(self) -> None:
        self.cluster.resume()

    def open_gate(self) -> None:
        """Let a program go on that waits for the file `gate` in its directory: it cannot have ended before."""
        self.cluster.write(self.directory / "gate", "", self.user)

    def signal(self, name: str, *options: str) -> None:
        self.cluster.check("ctl", "scancel", f"--signal={name}", *options, str(self.id), user=self.user)

    def cancel(self) -> None:
        """End it, if it has not ended, and wait until nothing of it is left in Slurm."""
        self.cluster.run("ctl", "scancel", str(self.id))
        self.wait_over()

    # --- for reports --------------------------------------------------------------------------------------------

    def report(self) -> str:
        """Ends of its files and of hpccrd's logs."""
        parts = [f"--- job {self.id}: {self.slurm()}"]
        logs = {self.output: 8, self.errors: 8, self.directory / "script": 20}
        for step in sorted(self.store.glob("*")):
            logs |= {step / "events.jsonl": 40, step / "hpccr.log": 40, step / "agents.log": 20}
        parts += [f"--- {path}\n{last_lines(path, count)}" for path, count in logs.items() if path.exists()]
        return "\n".join(parts)


class Jobs:
    """The jobs of one test, in directories of their own, cancelled and removed at its end."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.all: list[Job] = []
        self._count = 0

    def submit(
        self,
        command: str,
        *,
        user: str = "user1",
        nodes: int = 2,
        tasks: int = 4,
        options: Iterable[str] = (),
        environment: dict[str, str] | None = None,
        before: str = "",
        stderr: bool = False,
        files: dict[str, str] | None = None,
        plain: bool = False,
    ) -> Job:
        """Submit a batch script that ends in `exec hpccr run COMMAND`.

        options: #SBATCH lines more; environment: exported in the script (HPCCR_CHECKPOINT_...); before: shell lines;
        stderr: into a file of its own; files: put into the working directory; plain: without hpccr.
        A script that does not exec would die of a requeue's SIGTERM itself and take its step with it.
        """
        self._count += 1
        directory = self.cluster.home(user) / self.name / str(self._count)
        lines = [
            "#!/bin/bash",
            "#SBATCH --open-mode=append",
            f"#SBATCH --nodes={nodes} --ntasks={tasks} --ntasks-per-node={-(-tasks // nodes)}",
            "#SBATCH --output=out.txt",
            *(["#SBATCH --error=err.txt"] if stderr else []),
            *(f"#SBATCH {option}" for option in options),
            *(f"export {key}={value}" for key, value in (environment or {}).items()),
            *([before] if before else []),
            f"exec {'' if plain else 'hpccr run '}{command}",
            "",
        ]
        script = self.cluster.write(directory / "script", "\n".join(lines), user)
        for name, content in (files or {}).items():
            self.cluster.write(directory / name, content, user)
        there = self.cluster.there(directory)
        said = self.cluster.check(
            "ctl", "sbatch", "--parsable", f"--chdir={there}", f"{there}/{script.name}", user=user
        )
        job = Job(self.cluster, user, directory, int(said.split(";")[0]))
        if environment and "HPCCR_STORE_DIR" in environment:
            job.options["store"] = environment["HPCCR_STORE_DIR"]
        self.all.append(job)
        return job

    def sbatch(
        self,
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
        cluster, user = self.cluster, "user1"
        directory = cluster.home(user) / self.name / f"script-{len(self.all)}"
        header = [f"--nodes={nodes} --ntasks={tasks} --ntasks-per-node={tasks // nodes}", "--output=out.txt", *lines]
        text = "\n".join([f"#!{interpreter}", *(f"#SBATCH {line}" for line in header), body, ""])
        script = cluster.there(cluster.write(directory / "script", text, user))
        variables = [f"{name}={value}" for name, value in (environment or {}).items()]
        command = ["sbatch", "--parsable", f"--chdir={cluster.there(directory)}", *options, script, *arguments]
        job = Job(cluster, user, directory, int(cluster.check("ctl", "env", *variables, *command, user=user)))
        self.all.append(job)
        return job

    def clear(self) -> None:
        """End all jobs, let all nodes take jobs again and remove what the test has written."""
        self.cluster.resume()
        for job in self.all:
            job.cancel()
        self.cluster.forget_images()
        for user in {job.user for job in self.all}:
            shutil.rmtree(self.cluster.home(user) / self.name, ignore_errors=True)
            shutil.rmtree(self.cluster.home(user) / STORE / "elsewhere", ignore_errors=True)
        for job in self.all:
            if job.store.exists():
                shutil.rmtree(job.store)
            for place in (job.store.parent, self.cluster.home(job.user) / STORE):
                if place.is_dir() and not os.listdir(place):
                    place.rmdir()

    def report(self, nodes: Sequence[str]) -> str:
        parts = [job.report() for job in self.all]
        logs = {"ctl": ("slurm/slurmctld.log",)} | dict.fromkeys(nodes, ("hpccrd.log", "slurm/slurmd.log"))
        for node, names in logs.items():
            for name in names:
                log = self.cluster.root(node) / "var/log" / name
                if log.exists():
                    parts.append(f"--- {node}: {name}\n{last_lines(log, 25)}")
        parts += [f"--- {node}: processes\n{found}" for node in nodes if (found := self.cluster.activity(node))]
        return "\n".join(parts)
