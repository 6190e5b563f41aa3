"""How long the segments of TCP connections are, to this node and to another one of the job.

segments.py N, for N = 0 on hpccr-0 and N = 1 on hpccr-1: both talk without pause until the file `enough` is there, and
write what they find to segments.N, a line each time that it is another.
"""

import socket
import sys
import time
from pathlib import Path

PIECE = b"x" * 200_000
ENOUGH = Path("enough")


def connect(host: str, port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port))
        except OSError:
            time.sleep(0.1)


def turn(out: socket.socket, back: socket.socket) -> None:
    try:
        out.sendall(PIECE)
        left = len(PIECE)
        while left:
            data = back.recv(left)
            if not data:
                raise ConnectionResetError("the other one has ended")
            left -= len(data)
    except ConnectionError:
        if ENOUGH.exists():
            sys.exit()  # the other one has seen it first
        raise


def main() -> None:
    own = int(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = socket.create_connection(listening.getsockname()), listening.accept()[0]
    other = socket.create_server(("", 7200)).accept()[0] if own == 0 else connect("hpccr-0", 7200)
    for sock in (*here, other):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * len(PIECE))
    before = None
    with open(f"segments.{own}", "a", buffering=1, encoding="ascii") as log:
        while not ENOUGH.exists():
            turn(here[0], here[1])
            turn(here[1], here[0])
            turn(other, other)
            found = [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) for sock in (*here, other)]
            if found != before:
                log.write(f"{found}\n")
            before = found


main()
