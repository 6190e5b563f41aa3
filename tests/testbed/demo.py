"""The demonstration: an MPI job is checkpointed, loses its nodes, goes on elsewhere and prints what it would have.

Everything is made for it and taken down at its end. Exit code 0 only if every claim it prints has been checked.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))

from jobs import Job, Jobs
from nodes import Cluster
from waiting import wait_for
from workloads import OPEN_MPI, SOURCES, thermo

STEPS = 3000
LAMMPS = f"lmp -in {SOURCES}/melt.in -var size 10 -var steps {STEPS} -var every 10 -log none"
BEGAN = time.monotonic()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name = os.environ.get("HPCCR_TESTBED") or "demo"
    say("Booting a Slurm cluster: a login node and four compute nodes, each a set of namespaces with its own slurmd")
    say("and hpccrd (the first time ever, its root file system is built before: one and a half minutes more).")
    cluster = Cluster.up(name)
    jobs = Jobs(cluster, "demo")
    try:
        demonstrate(cluster, jobs)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(f"\nNOT as claimed: {type(error).__name__}: {error}\n{jobs.report(cluster.nodes)}", file=sys.stderr)
        return 1
    finally:
        say("Taking everything down.")
        cluster.down()
    say("Done: everything is as claimed.")
    return 0


def demonstrate(cluster: Cluster, jobs: Jobs) -> None:
    mpirun = OPEN_MPI.format(each=2, ranks=4)
    job = jobs.submit(f"{mpirun} {LAMMPS}")
    job.wait_event("started")
    twin = jobs.submit(f"{mpirun} {LAMMPS}", plain=True)
    say(f"user1 has submitted LAMMPS's Lennard-Jones melt, 4 ranks on 2 nodes, Open MPI: job {job.id}. Its script:")
    show((job.directory / "script").read_text())
    say(f"Job {twin.id} beside it is the same without hpccr and is left alone.")

    steps = wait_for("the first steps of the run", lambda: printed(job) if printed(job) > 20 else None)
    old = job.slurm().nodes
    say(f"Job {job.id} runs on {' and '.join(old)} and has printed {steps} lines of thermodynamic output.")

    say(f"$ hpccr checkpoint {job.id}")
    show(job.hpccr_ok("checkpoint"))
    more = wait_for("more output", lambda: printed(job) if printed(job) > steps else None)
    say(f"It goes on: {more} lines by now.")

    say(f"Now {' and '.join(old)} are drained, and the job is requeued.")
    cluster.drain(*old)
    say(f"$ hpccr requeue {job.id}")
    show(job.hpccr_ok("requeue"))
    restored = job.wait_event("restored")
    new = tuple(dict.fromkeys(restored["nodes"]))
    claim(f"job {job.id} is on other nodes, {' and '.join(new)}", not set(new) & set(old))
    claim("it is the same job to Slurm, restarted once", job.slurm().restarts == 1)

    say("Waiting for both jobs to end.")
    job.wait_success()
    twin.wait_success()
    table = thermo(job.output.read_text())
    lines = len(table.splitlines()) - 1
    claim(f"all {STEPS // 10 + 1} lines of thermodynamic output are there, none twice", lines == STEPS // 10 + 1)
    claim("they are identical to the undisturbed run's to the last digit", table == thermo(twin.output.read_text()))
    show("\n".join([*table.splitlines()[:3], "         ...", *table.splitlines()[-2:]]))
    timeline(job.events())


def printed(job: Job) -> int:
    """Lines of thermodynamic output so far."""
    if not job.output.exists():
        return 0
    return max(0, len(job.output.read_text().partition("   Step ")[2].splitlines()) - 1)


def timeline(events: list[dict[str, Any]]) -> None:
    """What hpccr recorded, in events.jsonl of the step."""
    say("The step's events, seconds since it started:")
    start = events[0]["time"]
    tell: dict[str, Callable[[dict[str, Any]], str]] = {
        "started": lambda event: f"started on {' '.join(event['nodes'])}",
        "checkpoint": lambda event: f"checkpoint {event['sequence']} asked for ({event['reason']})",
        "released": lambda event: (
            f"checkpoint {event['sequence']} made: frozen for {event['freeze_seconds'] * 1e3:.0f} ms "
            f"(CRIU's part {event['criu_freeze_seconds'] * 1e3:.0f} ms), images {event['bytes'] / 1e6:.1f} MB"
        ),
        "durable": lambda event: f"checkpoint {event['sequence']} is in the store, on shared storage",
        "requeued": lambda event: "put back into Slurm's queue",
        "boot": lambda event: f"{'has new' if event['sequence'] else 'has'} nodes: {' '.join(event['nodes'])}",
        "restored": lambda event: (
            f"checkpoint {event['sequence']} restored: "
            + ", ".join(
                f"{node} fetch {fetch * 1e3:.0f} ms, restore {restore * 1e3:.0f} ms"
                for node, fetch, restore in zip(
                    event["nodes"], event["fetch_seconds"], event["restore_seconds"], strict=True
                )
            )
        ),
        "finished": lambda event: f"finished with exit code {event['exit_code']}",
    }
    for event in events:
        if event["event"] in tell:
            text = tell[event["event"]](event)
            show(f"{event['time'] - start:7.2f}  {text}")
    claim("it was restored, and it was frozen", any(event["event"] == "restored" for event in events))


def claim(text: str, true: bool) -> None:
    """Print a claim that has been checked. Raises AssertionError if it does not hold."""
    if not true:
        raise AssertionError(text)
    say(f"Checked: {text}.")


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:5.1f} s] {text}", flush=True)


def show(text: str) -> None:
    print("\n".join(f"          | {line}" for line in text.rstrip().splitlines()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
