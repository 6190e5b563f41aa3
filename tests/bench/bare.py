"""One bare `criu dump` of a capsule's tasks, which go on: bare.py PID-OF-INIT, as root on the capsule's node.

Says "ready", waits for a line, dumps, and prints JSON: began and ended (seconds, CLOCK_MONOTONIC), frozen (seconds,
from CRIU's stats-dump: freezing_time + frozen_time), bytes (of the images).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ENTERED = os.CLONE_NEWPID | os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWUTS
OPTIONS = [
    "--leave-running",
    "--tcp-established",
    "--ext-unix-sk",
    "--file-locks",
    "--link-remap",
    "--network-lock",
    "skip",
    "--manage-cgroups=ignore",
    "--cpu-cap=fpu,ins",
    "--ghost-limit",
    "1073741824",
    "-v4",
]


def main(init: int) -> None:
    from pycriu import images

    root, uid, gid = _job_of(init)
    place = Path(tempfile.mkdtemp(prefix="bare-", dir="/var/spool"))
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    pidfd = os.pidfd_open(init)
    try:
        ready, go = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setns(pidfd, _ENTERED)
            if (child := os.fork()) == 0:
                os.write(ready[1], b"1")
                os.read(go[0], 1)
                # As hpccr does: prlimit compares the caller's real ids with the task's.
                os.setresgid(gid, 0, 0)
                os.setresuid(uid, 0, 0)
                null = os.open(os.devnull, os.O_RDWR)
                for fd in (0, 1):
                    os.dup2(null, fd)
                os.set_inheritable(directory, True)
                where = f"/proc/self/fd/{directory}"
                os.execvp("criu", ["criu", "dump", "-t", str(root), "-D", where, "-o", "dump.log", *OPTIONS])
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
        os.read(ready[0], 1)
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        os.write(go[1], b"1")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended = time.monotonic()
        if code:
            log = place / "dump.log"
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            sys.exit(f"criu dump: exit {code}\n" + "\n".join(line for line in lines if "Error" in line)[-2000:])
        with (place / "stats-dump").open("rb") as file:
            (entry,) = images.load(file)["entries"]
        frozen = (int(entry["dump"]["freezing_time"]) + int(entry["dump"]["frozen_time"])) / 1e6
        size = sum(path.stat().st_size for path in place.iterdir() if path.suffix == ".img")
        print(json.dumps({"began": began, "ended": ended, "frozen": frozen, "bytes": size}))
    finally:
        shutil.rmtree(place)


def _job_of(init: int) -> tuple[int, int, int]:
    """The launch root's pid inside the capsule, and the job's ids."""
    for line in subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(init)], stdout=subprocess.PIPE, text=True
    ).stdout.split():
        command = Path(f"/proc/{line}/cmdline").read_bytes().split(b"\0")
        if any(word.endswith(b"/capsule/launch.py") for word in command):
            status = dict(
                row.split(":\t", 1) for row in Path(f"/proc/{line}/status").read_text().splitlines() if ":\t" in row
            )
            return int(status["NSpid"].split()[-1]), int(status["Uid"].split()[0]), int(status["Gid"].split()[0])
    raise SystemExit(f"process {init} has no launch root: is it a capsule's init?")


if __name__ == "__main__":
    main(int(sys.argv[1]))
