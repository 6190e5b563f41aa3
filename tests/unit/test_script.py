"""The copy of the batch script that is run in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpccr.coordinator.script import keep_script
from hpccr.model import StepKey
from hpccr.store.layout import Step, Store
from hpccr.store.publish import make_directory


@pytest.fixture
def step(tmp_path: Path) -> Step:
    step = Store.at(str(tmp_path / "store")).step(StepKey("cluster", "7", "0"))
    make_directory(step.path)
    return step


def spooled(tmp_path: Path, node: str, text: str) -> str:
    path = tmp_path / node / "job00007" / "slurm_script"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    path.chmod(0o700)
    return str(path)


def test_the_copy_is_the_same_wherever_the_job_runs(tmp_path: Path, step: Step) -> None:
    first = Path(keep_script(step, spooled(tmp_path, "node1", "#!/bin/sh\n"), resume=False))
    assert first.read_text() == "#!/bin/sh\n" and first.stat().st_mode & 0o777 == 0o700
    assert first.name == "slurm_script"  # for scripts that look at $0
    inode = first.stat().st_ino
    assert keep_script(step, spooled(tmp_path, "node2", "#!/bin/sh\n"), resume=True) == str(first)
    assert first.stat().st_ino == inode


def test_a_fresh_start_runs_what_was_submitted(tmp_path: Path, step: Step) -> None:
    keep_script(step, spooled(tmp_path, "node1", "old"), resume=False)
    assert Path(keep_script(step, spooled(tmp_path, "node2", "new"), resume=False)).read_text() == "new"


def test_a_resumed_step_without_its_copy_gets_one(tmp_path: Path, step: Step) -> None:
    assert Path(keep_script(step, spooled(tmp_path, "node1", "text"), resume=True)).read_text() == "text"


def test_where_nothing_can_be_executed_the_script_stays(
    tmp_path: Path, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = spooled(tmp_path, "node1", "text")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert keep_script(step, script, resume=False) == script
