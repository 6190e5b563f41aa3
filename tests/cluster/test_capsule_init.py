"""Capsule init with real CRIU on one node: each case of capsule_init_checks.py is a test here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nodes import Cluster

CHECKS = Path(__file__).with_name("capsule_init_checks.py")
CASES = re.findall(r"^@case\ndef (\w+)", CHECKS.read_text(), re.MULTILINE)


@pytest.mark.parametrize("case", CASES)
def test_case(cluster: Cluster, untouched: None, case: str) -> None:
    cluster.check(
        cluster.nodes[0], "/opt/hpccr/bin/python", "-P", f"/src/tests/cluster/{CHECKS.name}", case, timeout=180
    )
