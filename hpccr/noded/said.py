"""What users and their processes say, made fit for a log."""

from __future__ import annotations

MAX_LOGGED = 300


def printable(text: str, most: int = MAX_LOGGED) -> str:
    """The first `most` characters, without any that could start another line or steer a terminal."""
    short = text if len(text) <= most else text[:most] + "..."
    return "".join(c if c.isprintable() else "?" for c in short)
