"""How long a restore takes from the store, and from the spool, against `cp` of the images and `criu restore`.

A program with half a gigabyte of memory (a quarter zeros, a quarter text, half random numbers) on one node; nothing but
a launch root on a second. In turn: the second one's agent is killed and both are restored in place, once reading the
store and once the images kept in the spool; and by hand, the same program's uncompressed images are copied from the
store's file system to the spool's and restored with CRIU alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

from jobs import Job, Jobs
from nodes import Cluster
from pairs import quartiles, ratio
from waiting import wait_for

SIZE = 512
PROGRAM = f"""import os, time
quarter = {SIZE} << 18
data = [bytearray(quarter), bytearray(b'some text %d ' % 7 * (quarter // 12)), bytearray(os.urandom(2 * quarter))]
print('up', flush=True)
while True:
    time.sleep(0.1)
"""
BY_HAND = """
import json, os, shutil, signal, subprocess, sys, time
place, program, images, copy = sys.argv[1:]
if not os.path.isdir(images):
    with open('/dev/null', 'r+b') as null, open(place + '/up', 'wb') as up:
        command = ['/usr/bin/python3', program]
        job = subprocess.Popen(command, stdin=null, stdout=up, stderr=null, start_new_session=True)
    while not os.path.getsize(place + '/up'):
        time.sleep(0.01)
    os.mkdir(images)
    subprocess.run(['criu', 'dump', '-t', str(job.pid), '-D', images, '-o', 'log'], check=True)
    job.wait()
os.sync()
began = time.monotonic()
shutil.copytree(images, copy)
copied = time.monotonic()
subprocess.run(['criu', 'restore', '-d', '-D', copy, '-o', 'log2', '--pidfile', 'pid'], check=True)
ended = time.monotonic()
os.kill(int(open(copy + '/pid').read()), signal.SIGKILL)
shutil.rmtree(copy)
print(json.dumps((copied - began, ended - copied)))
"""


def measure(cluster: Cluster, repetitions: int) -> None:
    """Print the ratios."""
    jobs = Jobs(cluster, "bench")
    times: dict[str, list[float]] = {"store": [], "spool": [], "cp": [], "criu": []}
    try:
        job = jobs.submit("python3 program.py", nodes=2, tasks=2, files={"program.py": PROGRAM})
        job.wait_output("up")
        nodes = job.slurm().nodes
        for number in range(repetitions + 1):
            job.checkpoint()
            cluster.forget_images()
            samples = {"store": restored(job, cluster, nodes[1], local=False)}
            job.checkpoint()
            samples["spool"] = restored(job, cluster, nodes[1], local=True)
            samples["cp"], samples["criu"] = by_hand(job, cluster, nodes[0])
            if number:  # the first ones fill caches
                for name, taken in samples.items():
                    times[name].append(taken)
    finally:
        jobs.clear()
    hand = [a + b for a, b in zip(times["cp"], times["criu"], strict=True)]
    print(f"\nrestore of {SIZE} MiB on one node, seconds (lower quartile, median, upper quartile):")
    for name, taken in {**times, "cp + criu": hand}.items():
        print(f"  {name:12}" + " ".join(f"{value:7.2f}" for value in quartiles(taken)))
    print(f"time from the store to that of cp and criu restore: {ratio(times['store'], hand)}")
    print(f"time from the spool to that of cp and criu restore: {ratio(times['spool'], hand)}")


def restored(job: Job, cluster: Cluster, node: str, *, local: bool) -> float:
    """Fetch and restore, seconds; the capsule itself is made before."""
    before = len(job.events("restored"))
    (agent,) = agents(cluster, node)
    os.kill(agent, signal.SIGKILL)
    event = job.wait_event("restored", before + 1)
    assert event["local"] == [local] * 2, event
    wait_for("the new agent", lambda: [pid for pid in agents(cluster, node) if pid != agent])
    time.sleep(0.2)  # the command is being told; nothing is measured
    return float(event["fetch_seconds"][0] + event["restore_seconds"][0])


def agents(cluster: Cluster, node: str) -> list[int]:
    return cluster.pids(node, r"-m hpccr agent|/hpccr agent")


def by_hand(job: Job, cluster: Cluster, node: str) -> tuple[float, float]:
    there = cluster.there(job.directory)
    said = cluster.check(
        node, "python3", "-c", BY_HAND, "/var/tmp", f"{there}/program.py", f"{there}/images", "/var/spool/by-hand"
    )
    copied, restored_in = json.loads(said.splitlines()[-1])
    shutil.rmtree(cluster.root(node) / "var/spool/by-hand", ignore_errors=True)
    return copied, restored_in
