"""Prints numbered lines without pause until there is a file: `mpirun -n N python3 printer.py GATE`.

Each rank numbers its own, on stdout and on stderr. All have 64 bytes, so that a launcher that passes on what it reads
from a pipe in pieces passes on whole lines. At the end each rank says how many there were.
"""

import os
import sys
import time

rank = os.environ.get("PMI_RANK", "0")
number = 0


def line(text: str) -> bytes:
    return text.ljust(63, ".").encode() + b"\n"


while not os.path.exists(sys.argv[1]):
    lines = []
    for _ in range(40):
        number += 1
        lines.append(line(f"rank {rank} line {number} "))
    os.write(1, b"".join(lines))
    os.write(2, line(f"rank {rank} error {number} "))
    time.sleep(0.01)
os.write(1, line(f"rank {rank} printed {number} "))
