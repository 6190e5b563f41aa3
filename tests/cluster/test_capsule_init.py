"""Capsule init with real CRIU on one node: each case of capsule_*_checks.py is a test here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nodes import Cluster

CASES = {
    case: checks.name
    for checks in sorted(Path(__file__).parent.glob("capsule_*_checks.py"))
    for case in re.findall(r"^@case\ndef (\w+)", checks.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("case", CASES)
def test_case(cluster: Cluster, untouched: None, case: str) -> None:
    cluster.check(cluster.nodes[0], "/opt/hpccr/bin/python", f"/src/tests/cluster/{CASES[case]}", case, timeout=180)
