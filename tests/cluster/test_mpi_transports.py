"""What MPI talks over: chosen by hpccr unless the user has chosen, refused before the freeze if it cannot be dumped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs import Job, Jobs
from nodes import Cluster
from waiting import wait_for

UNSUPPORTED = 13
XPMEM = "/dev/xpmem"
HARMLESS = ("10", "258")
"""Major and minor number of a device that anybody may open: what counts is the name."""
OPENER = f"""\
import os, time
for name in ("OMPI_MCA_btl", "OMPI_MCA_pml", "UCX_TLS"):
    print(name, os.environ[name], flush=True)
device = os.open({XPMEM!r}, os.O_RDWR)
print("open", flush=True)
while not os.path.exists("gate"):
    time.sleep(0.05)
os.close(device)
print("closed", flush=True)
while not os.path.exists("enough"):
    time.sleep(0.05)
"""


@pytest.fixture
def xpmem(cluster: Cluster, untouched: None) -> Iterator[None]:
    """A device of that name on every node."""
    try:
        for node in cluster.nodes:
            cluster.check(node, "mknod", "-m", "0666", XPMEM, "c", *HARMLESS)
        yield
    finally:
        for node in cluster.nodes:
            cluster.check(node, "rm", "-f", XPMEM)


def test_a_device_is_refused_before_the_freeze(xpmem: None, jobs: Jobs) -> None:
    """With the variables that keep MPI from it; what the user had set is kept, and there was a warning."""
    job = jobs.submit(
        "python3 opener.py",
        nodes=1,
        tasks=1,
        stderr=True,
        environment={"OMPI_MCA_btl": "tcp,openib,self"},
        files={"opener.py": OPENER},
    )
    job.wait_output("open\n")
    assert "OMPI_MCA_btl tcp,openib,self\nOMPI_MCA_pml ob1\nUCX_TLS tcp,posix,sysv,self\n" in job.said()
    assert_warned(job)
    done = job.hpccr("checkpoint")
    assert done.returncode == UNSUPPORTED, done.stderr
    assert f"python3) has the single-copy device {XPMEM} open" in done.stderr
    assert "hint: " in done.stderr and "OMPI_MCA_smsc=^cma,knem,xpmem" in done.stderr
    assert not job.events("released")
    job.open_gate()
    job.wait_output("closed\n")
    job.requeue("hpccr", avoid=False)
    job.cluster.write(job.directory / "enough", "", job.user)
    job.wait_success()
    assert_warned(job)


def assert_warned(job: Job) -> None:
    """Once, however often the job was restarted."""
    (line,) = wait_for("the warning", lambda: job.errors.read_text().splitlines())
    assert line.startswith("hpccr: warning: OMPI_MCA_btl=tcp,openib,self is kept as you set it, but ")
