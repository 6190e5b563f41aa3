"""events.jsonl: what happened to a step, one JSON object per line, only ever appended to.

Every object has "time" (seconds since the epoch) and "event" (a word); the rest depends on the event.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec

from hpccr.errors import CorruptError, encodable
from hpccr.store.publish import append_line


def append(path: Path, event: str, **details: Any) -> None:
    """Add one event, by one write, so that lines of several writers on one host do not mix. Raises OSError."""
    texts = {name: encodable(value) if isinstance(value, str) else value for name, value in details.items()}
    append_line(path, msgspec.json.encode({"time": time.time(), "event": event, **texts}))


def read(path: Path) -> list[dict[str, Any]]:
    """All events, oldest first; [] if there is no file. A torn last line (a writer that died) is left out.

    A torn line in the middle (the writer after that one started on the same line) is left out as well.
    Raises CorruptError if not even one line of several is an event; OSError.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    events = []
    for line in lines:
        try:
            event = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(event.get("time"), int | float) and isinstance(event.get("event"), str):
            events.append(event)
    if not events and len(lines) > 2:
        raise CorruptError(f"{path} holds no event", hint="it is only a record: it can be removed")
    return events
