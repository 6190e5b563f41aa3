"""Looking at a private directory while its tasks run."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

from hpccr.noded import private


def test_a_file_that_goes_meanwhile_is_passed_over(tmp_path: Path) -> None:
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            (tmp_path / "comes").touch()
            (tmp_path / "comes").unlink()

    for number in range(200):
        (tmp_path / f"rests-{number}").touch()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "socket"))
    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(100):
            (found,) = private.sockets_in(str(tmp_path))
            assert found.path == os.fsencode(tmp_path / "socket")
    finally:
        ended.set()
        thread.join()
