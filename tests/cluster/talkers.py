"""A program for jobs of which checkpoints are made and given up."""

from __future__ import annotations

TALKERS = """
    import os, socket, sys, time
    listening = socket.create_server(("127.0.0.1", 0))
    if os.fork() == 0:
        peer = socket.create_connection(listening.getsockname())
        while data := peer.recv(100):
            peer.sendall(data)
        os._exit(0)
    talk, _ = listening.accept()
    print("ready", flush=True)
    for line in sys.stdin:
        talk.sendall(line.encode())
        print("echo", talk.recv(100).decode(), end="", flush=True)
"""
"""A job that sends each line of its stdin to a child and back, over TCP."""
