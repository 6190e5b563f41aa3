"""HPC Challenge as Debian ships it: Linpack, matrix transposition, random access, FFT and more, which all check their
results."""

from __future__ import annotations

import re

from jobs import Job, Jobs
from mpis import LIBRARIES
from waiting import wait_for
from workloads import SOURCES

DEBIAN = LIBRARIES[0]


def test_hpcc(jobs: Jobs) -> None:
    """Restored on other nodes in the middle of it: every part ends, and none finds its result wrong."""
    job = jobs.submit(DEBIAN.command("hpcc"), environment=DEBIAN.variables, before=f"cp {SOURCES}/hpccinf.txt .")
    job.wait_event("started")
    begun(job, "MPIRandomAccess")
    job.requeue("hpccr")
    job.wait_success()
    text = (job.directory / "hpccoutf.txt").read_text()
    assert re.findall(r"^Success=(\d+)$", text, re.MULTILINE) == ["1"], text[-2000:]
    assert "FAILED" not in text
    parts = re.findall(r"^Begin of (.*) section\.$", text, re.MULTILINE)
    assert len(parts) >= 10 and re.findall(r"^End of (.*) section\.$", text, re.MULTILINE) == parts
    assert re.search(r"^ +1 tests completed and passed residual checks", text, re.MULTILINE)


def begun(job: Job, part: str) -> None:
    path = job.directory / "hpccoutf.txt"
    wait_for(f"{part} of job {job.id}", lambda: path.exists() and f"Begin of {part}" in path.read_text())
