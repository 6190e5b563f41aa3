"""Environment, arguments and directories of users as they are: not always text, nor fit for hpccr's Python."""

from __future__ import annotations

import json
import os

from jobs import Jobs

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
