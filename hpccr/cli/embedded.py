"""The embedded node service: hpccrd as a child of `hpccr run`, on a machine that has none."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hpccr.config import Config
from hpccr.errors import HpccrError
from hpccr.noded.spool import RUNTIME, Area

READY_TIMEOUT = 30.0
EMBEDDED_KEY = "/var/lib/hpccr/key"
"""Key of a machine without a site key; made at first use."""


@contextlib.contextmanager
def node_service(config: Config) -> Iterator[str]:
    """Run hpccrd until the block ends; the path of its socket. Needs root. Raises HpccrError with its last words."""
    area = Area(os.path.join(config.node.run, RUNTIME))
    os.makedirs(config.node.run, mode=0o755, exist_ok=True)
    area.prepare()
    # Among the capsules' directories and locked like them: what is left when both of us are killed, the next sweeps.
    own = area.create(f"embedded-{secrets.token_hex(4)}")
    key = config.node.key if os.path.exists(config.node.key) else EMBEDDED_KEY
    log = Path(own.path, "hpccrd.log")
    socket = Path(own.path, "hpccrd.sock")
    command = [sys.executable, "-I", "-m", "hpccr.noded.daemon", "--embedded", "--exit-with-parent"]
    command += ["--run", config.node.run, "--spool", config.node.spool, "--socket", str(socket), "--key", key]
    try:
        with log.open("wb") as output:
            # Its own session: a ^C is the job's to handle, not the service's. It holds the directory's lock too.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[own.fd],
            )
        try:
            _wait_ready(process, socket, log)
            yield str(socket)
        finally:
            process.terminate()
            try:
                process.wait(READY_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        own.remove()


def _wait_ready(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            last = log.read_text(errors="replace").strip().splitlines()[-3:]
            raise HpccrError("the node service did not start: " + "; ".join(last), hint="`hpccr doctor` checks why")
        time.sleep(0.02)
