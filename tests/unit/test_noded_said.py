"""Words of users in logs and messages."""

from __future__ import annotations

import os

import msgspec

from hpccr.errors import HpccrError
from hpccr.noded import said
from hpccr.noded.init import failed


def test_no_line_can_be_forged_and_none_is_long() -> None:
    text = said.printable("tag\nhpccrd: all is well\x1b[2J" + "x" * 10**6)
    assert text.startswith("tag?hpccrd: all is well?[2J") and len(text) == said.MAX_LOGGED + 3
    assert said.printable("short") == "short"


def test_a_refusal_names_a_file_whose_name_is_no_text() -> None:
    reply = failed(HpccrError(f"cannot save {os.fsdecode(bytes([255]))}"))
    assert rb"cannot save \udcff" in msgspec.msgpack.encode(reply)
