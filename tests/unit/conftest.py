"""What every unit test starts from."""

from __future__ import annotations

import os
import random
import signal
import warnings

import pytest
from hypothesis import settings

SOAK = os.environ.get("HPCCR_SOAK") == "1"
SEED = int(os.environ.get("HPCCR_SEED") or (random.SystemRandom().randrange(1, 1 << 31) if SOAK else 20261125))
"""Of all that is left to chance: the short form does the same in every run, the long one something else each time."""

# No deadline: the machine may stand still for a while.
settings.register_profile("short", derandomize=True, deadline=None)
settings.register_profile("long", derandomize=False, print_blob=True, deadline=None)
settings.load_profile("long" if SOAK else "short")

# A shell ignores the first two for what it puts into the background, nohup the last, and programs inherit that: the
# tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

with warnings.catch_warnings():
    # Debian's protobuf uses what Python 3.14 will not have any more, and says so when it is first imported.
    warnings.simplefilter("ignore", DeprecationWarning)
    import pycriu.images  # noqa: F401


def pytest_report_header() -> str:
    return f"{'long' if SOAK else 'short'} form (HPCCR_SOAK=1 selects the long one); HPCCR_SEED={SEED}"


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(SEED)
