"""The batch script while it is checkpointed: a copy beside the checkpoints, the same on every node."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from hpccr.store.layout import Step
from hpccr.store.publish import publish_bytes

log = logging.getLogger(__name__)


def keep_script(step: Step, script: str, *, resume: bool) -> str:
    """The path to run in place of `script`, slurmd's own copy. Raises OSError.

    A shell keeps its script open, and a restore opens it again under the path it had. slurmd's copy is in a directory
    that has the node's name in it at some sites (SlurmdSpoolDir with %n) and another job's id after `hpccr restore`.
    resume: a copy that is there is the one which the checkpoint's shell has open.
    """
    copy = step.path / Path(script).name
    if not (resume and copy.exists()):
        publish_bytes(copy, Path(script).read_bytes())
        copy.chmod(0o700)
    if os.access(copy, os.X_OK):
        return str(copy)
    log.warning("no program can be run in %s (mounted noexec?): the script is run from %s", step.path, script)
    return script
