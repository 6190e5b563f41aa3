"""What every unit test starts from."""

from __future__ import annotations

import signal
import warnings

# A shell ignores these for what it puts into the background, and programs inherit that: the tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

with warnings.catch_warnings():
    # Debian's protobuf uses what Python 3.14 will not have any more, and says so when it is first imported.
    warnings.simplefilter("ignore", DeprecationWarning)
    import pycriu.images  # noqa: F401
