"""What helper processes of capsule init may do."""

from __future__ import annotations

import pytest

from hpccr.errors import HpccrError
from hpccr.noded import child


def test_a_helper_does_not_take_all_memory() -> None:
    assert child.call(lambda: len(bytearray(1 << 20))) == 1 << 20
    with pytest.raises(HpccrError, match="more than 4 GiB"):
        child.call(lambda: len(bytearray(child.DATA)))
