"""What every unit test starts from."""

from __future__ import annotations

import signal

# A shell ignores these for what it puts into the background, and programs inherit that: the tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
