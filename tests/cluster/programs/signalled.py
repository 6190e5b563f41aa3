"""A batch script that asks, when it is signalled, why; with helpers that outlive the signal on every node.

The argument says how it asks: "commands" or "pyslurm".

Writes signalled.json: per signal the cause that hpccr.slurm finds. Helpers write helper-NODE.txt: what happens to them.
"""

import json
import os
import signal
import subprocess
import sys
import time

from hpccr.slurm.commands import CommandQuery
from hpccr.slurm.env import Allocation
from hpccr.slurm.library import PyslurmQuery
from hpccr.slurm.steps import agent_step_command, agent_step_environment

HELPER = """
import os, signal, sys, time
log = os.open("helper-%s.txt" % os.environ["SLURMD_NODENAME"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
signal.signal(signal.SIGTERM, lambda *_: os.write(log, b"TERM %f\\n" % time.time()))
os.write(log, b"start\\n")
while True:
    time.sleep(0.25)
    os.write(log, b"alive %f\\n" % time.time())
"""


def main() -> None:
    allocation = Allocation.from_environ(os.environ)
    assert allocation is not None
    if allocation.restarts:
        return
    with open("helpers.out", "w") as out:
        helpers = subprocess.Popen(
            agent_step_command(allocation.nodes, [sys.executable, "-c", HELPER]),
            env=agent_step_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    query = PyslurmQuery() if sys.argv[1] == "pyslurm" else CommandQuery()
    signals = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    print("waiting", flush=True)
    found = []
    while True:
        number = signal.sigwait(signals)
        cause = query.why_signalled(allocation.job, allocation.restarts)
        found.append({"signal": number, "cause": cause, "time": time.time(), "helpers": helpers.poll()})
        with open("signalled.tmp", "w") as file:
            json.dump(found, file)
        os.rename("signalled.tmp", "signalled.json")


main()
