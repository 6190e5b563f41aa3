"""Latency and bandwidth between ranks 0 and 1, as the OSU benchmarks take them: a message there and back, and windows
of messages that are acknowledged once. Rank 0 prints microseconds one way for 8 bytes, and MB/s for 1 MiB."""

from __future__ import annotations

import time

import numpy as np
from mpi4py import MPI

SMALL, LARGE = 8, 1 << 20
TURNS, WINDOWS, WINDOW = 5000, 40, 16
WARM = 10
"""Part of the turns, one in so many, that comes before and is not timed."""


def latency(comm: MPI.Comm, turns: int) -> float:
    """Microseconds for one way."""
    buffer = np.zeros(SMALL, dtype=np.uint8)
    first, peer = comm.rank == 0, 1 - comm.rank
    comm.Barrier()
    began = time.perf_counter()
    for _ in range(turns):
        if first:
            comm.Send(buffer, peer)
            comm.Recv(buffer, peer)
        else:
            comm.Recv(buffer, peer)
            comm.Send(buffer, peer)
    return (time.perf_counter() - began) / turns / 2 * 1e6


def bandwidth(comm: MPI.Comm, windows: int) -> float:
    """MB/s from rank 0 to rank 1."""
    buffers = [np.zeros(LARGE, dtype=np.uint8) for _ in range(WINDOW)]
    done = np.zeros(1, dtype=np.uint8)
    first, peer = comm.rank == 0, 1 - comm.rank
    comm.Barrier()
    began = time.perf_counter()
    for _ in range(windows):
        transfer = comm.Isend if first else comm.Irecv
        MPI.Request.Waitall([transfer(buffer, peer) for buffer in buffers])
        if first:
            comm.Recv(done, peer)
        else:
            comm.Send(done, peer)
    return windows * WINDOW * LARGE / (time.perf_counter() - began) / 1e6


comm = MPI.COMM_WORLD
latency(comm, TURNS // WARM)
small = latency(comm, TURNS)
bandwidth(comm, WINDOWS // WARM)
large = bandwidth(comm, WINDOWS)
if comm.rank == 0:
    print(f"pingpong {small} {large}")
