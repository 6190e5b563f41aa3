"""How long the phases of a boot or a checkpoint may take."""

from __future__ import annotations

import math

from hpccr.config import Config
from hpccr.coordinator.plan import Phase

BARRIER_TIMEOUT = 60.0
"""Seconds for the phases that let go (resume, unhold), and for the manifest before a release that kills."""
RELEASE_TIMEOUT = 360.0
"""Seconds for a release: the end of killed tasks may wait for a file server, or for a great deal of memory to be given
back. More than hpccrd has for it, which knows how it went."""
ABORT_TIMEOUT = 720.0
"""Seconds to give a checkpoint up. CRIU can be told so at its barriers only, which a large dump is far from, and hpccrd
knows better than we when that has failed: more than noded.lease.ABORT_TIMEOUT. Dead nodes are noticed by silence."""
SLOW = 15.0
"""Seconds in a phase after which it is told which nodes are waited for."""


def timeout(phase: Phase, config: Config, patience: float) -> float:
    """Seconds that all capsules together have to answer a phase's request. patience: with ranks at a safe point."""
    limits = config.checkpoint
    match phase:
        case Phase.CREATING | Phase.CONNECTING | Phase.STARTING:
            return limits.create_timeout
        case Phase.FETCHING:
            return math.inf  # hpccrd gives one up that makes no progress, and a node that is gone is silent
        case Phase.ROLLING_BACK | Phase.RESTORING:
            return limits.restore_timeout
        case Phase.ASKING:
            return limits.prepare_timeout
        case Phase.PREPARING:
            # Files are written out and trees copied, which takes the time that a dump may take.
            return limits.prepare_timeout + limits.dump_timeout
        case Phase.ARRIVING | Phase.FINISHING:
            return patience + limits.prepare_timeout
        case Phase.FREEZING | Phase.SURVEYING:
            return limits.freeze_timeout
        case Phase.DUMPING:
            return limits.dump_timeout
        case Phase.RELEASING:
            return RELEASE_TIMEOUT
        case Phase.ABORTING:
            return ABORT_TIMEOUT
        case _:
            return BARRIER_TIMEOUT
