"""The coordinator's log: in order, by another thread, and never in the job's output."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import pytest

from hpccr.cli.run import _log_to

log = logging.getLogger("hpccr.test")


def test_lines_are_there_when_the_command_ends(tmp_path: Path) -> None:
    with ExitStack() as stack:
        _log_to(tmp_path / "hpccr.log", logging.INFO, stack)
        for number in range(100):
            log.info("line %d", number)
    lines = (tmp_path / "hpccr.log").read_text().splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == [str(number) for number in range(100)]
    assert not logging.getLogger("hpccr").handlers


def test_a_log_that_cannot_be_written_is_not_the_jobs_concern(capfd: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as stack:
        _log_to(Path("/dev/full"), logging.INFO, stack)
        log.warning("no room for this")
    assert capfd.readouterr() == ("", "")
