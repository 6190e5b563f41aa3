"""What a user's requests must look like before anything is done with them. Pure but for check_stdio."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence

from hpccr.errors import UnsupportedError, UsageError
from hpccr.noded.channel import Descriptors
from hpccr.wire import messages as m

MAX_PATH = 4096
MAX_CAPSULES = 4096
"""Of a step: more than their names and addresses fit into a packet to capsule init for."""
MAX_VARIABLES = 16384
"""Of a job's environment: each takes hpccrd twenty times the memory that a short one takes in the request."""
MAX_EXCLUDED = 64
"""Paths of a run's own: a store and a few output files."""
_SECRET = re.compile(r"^[0-9a-f]{64}$")


def check_create(request: m.Create, node: str) -> None:
    """Raises UnsupportedError (another version) or UsageError."""
    if request.protocol != m.PROTOCOL:
        raise UnsupportedError(
            f"hpccrd on {node} speaks protocol {m.PROTOCOL}, the request {request.protocol}",
            hint="install the same version of hpccr on all nodes and restart hpccrd",
        )
    if request.capsules > MAX_CAPSULES:
        raise UnsupportedError(f"a step of {request.capsules} capsules: there can be {MAX_CAPSULES}")
    if request.capsule >= request.capsules:
        raise UsageError(f"there is no capsule {request.capsule} of {request.capsules}")
    if not _SECRET.match(request.secret):
        raise UsageError("the step's secret is not 64 hex digits")


def check_command(request: m.Start) -> None:
    """Raises UsageError for what execve(2) could not take, or a relative working directory."""
    if not request.cwd.startswith(b"/") or b"\0" in request.cwd or len(request.cwd) > MAX_PATH:
        raise UsageError(f"the working directory {os.fsdecode(request.cwd[:100])!r} is not an absolute path")
    if len(request.env) > MAX_VARIABLES:
        raise UsageError(f"the environment has {len(request.env)} variables, more than {MAX_VARIABLES}")
    if any(b"\0" in argument for argument in request.argv):
        raise UsageError("the command has an argument with a zero byte")
    for name, value in request.env.items():
        if not name or b"=" in name or b"\0" in name or b"\0" in value:
            raise UsageError(f"the environment has an impossible variable {os.fsdecode(name[:100])!r}")


def check_stdio(stdin: str, merged: bool, descriptors: Descriptors) -> None:
    """Raises UsageError unless the descriptors are the pipes that stdin and merged announce."""
    if stdin not in ("pipe", "null"):
        raise UsageError(f"stdin is {stdin[:100]!r}, neither pipe nor null")
    wanted = (stdin == "pipe") + (1 if merged else 2)
    if len(descriptors) != wanted:
        raise UsageError(f"{wanted} descriptors are due for stdio ({stdin=}, {merged=}), {len(descriptors)} came")
    if not descriptors.are_pipes():
        raise UsageError("the job's stdio must be anonymous pipes: nothing else can be given to a restored job")


def check_directory(directory: str) -> str:
    """The directory in the store, which only the user's own worker will open. Raises UsageError."""
    if not directory.startswith("/") or "\0" in directory or len(directory) > MAX_PATH:
        raise UsageError(f"the store directory {directory[:100]!r} is not an absolute path")
    return directory


def check_excluded(paths: Sequence[bytes]) -> None:
    """What is not the job's of its files; only a helper with the user's ids compares names with these. Raises
    UsageError."""
    if len(paths) > MAX_EXCLUDED:
        raise UsageError(f"{len(paths)} paths are excluded from the job's files, more than {MAX_EXCLUDED}")
    for path in paths:
        if not path.startswith(b"/") or b"\0" in path or len(path) > MAX_PATH:
            raise UsageError(f"the excluded {path[:100]!r} is not an absolute path")


def check_signal(signum: int) -> bool:
    return 1 <= signum < signal.NSIG
