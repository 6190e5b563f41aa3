"""What the coordinator asks Slurm, and what it makes of the answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from test_slurm import BATCH, JOB, META, Fake, info

from hpccr.coordinator import checkpoints
from hpccr.coordinator.checkpoints import FRESH, requeued, safe
from hpccr.coordinator.site import SlurmSite, check_requeue
from hpccr.errors import UnsupportedError
from hpccr.slurm.env import Allocation


@pytest.fixture
def slurm(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def site(slurm: Fake) -> SlurmSite:
    allocation = Allocation.from_environ(BATCH)
    assert allocation is not None
    return SlurmSite(allocation, slurm.query, allocation.nodes[0], quick=slurm.query)


def test_what_slurm_does_not_requeue_is_refused_before_anything_is_killed() -> None:
    check_requeue(info())
    with pytest.raises(UnsupportedError, match="interactive"):
        check_requeue(info(batch=False))
    with pytest.raises(UnsupportedError, match="may not be requeued"):
        check_requeue(info(requeue=False))


def test_only_a_batch_job_is_saved_from_its_time_limit(slurm: Fake) -> None:
    slurm.answers({"jobs": [JOB], "meta": META})
    assert site(slurm).end_time() == 1795425050
    slurm.answers({"jobs": [JOB | {"batch_flag": False}], "meta": META})
    assert site(slurm).end_time() is None


def test_a_job_that_is_on_its_way_is_not_requeued_again(slurm: Fake) -> None:
    slurm.answers({"jobs": [JOB | {"restart_cnt": 1, "job_state": ["PENDING"]}], "meta": META})
    site(slurm).ensure_requeued()
    assert "requeue" not in slurm.calls.read_text()
    slurm.answers({"jobs": [JOB | {"restart_cnt": 0}], "meta": META})
    site(slurm).ensure_requeued()
    assert "scontrol requeue 17" in slurm.calls.read_text()


def test_a_task_that_has_its_arrays_id_is_named_as_a_task(slurm: Fake) -> None:
    task = {"array_job_id": {"set": True, "number": 17}, "array_task_id": {"set": True, "number": 3}}
    slurm.answers({"jobs": [JOB | task | {"job_id": 16, "array_task_id": {"set": True, "number": 1}}, JOB | task]})
    site(slurm).ensure_requeued()
    site(slurm).show("text")  # the comment is the user's, so it goes into Extra
    acts = [call for call in slurm.called() if not call.endswith("show job 17 --json")]
    assert acts == [
        "scontrol requeue 17_3",
        "scontrol show job 17_3 --json",
        "scontrol update JobId=17_3 Extra=hpccr: text",
    ]


def test_slurm_is_asked_until_it_requeues(slurm: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PAUSES", (0.0, 0.1))
    told: list[str] = []

    async def run() -> None:
        slurm.answers("", code=1, complaint="slurm_load_jobs error: Unable to contact slurm controller")
        waiting = asyncio.create_task(requeued(site(slurm).ensure_requeued, told.append))
        async with asyncio.timeout(20):
            while len(slurm.calls.read_text().splitlines() if slurm.calls.exists() else ()) < 3:
                await asyncio.sleep(0)
            assert not waiting.done()
            slurm.answers({"jobs": [JOB | {"restart_cnt": 0}], "meta": META})
            await waiting
        assert "scontrol requeue 17" in slurm.calls.read_text()

    asyncio.run(run())
    assert len(told) == 1 and "Unable to contact" in told[0]


def test_a_job_is_not_killed_for_a_checkpoint_that_may_be_its_only_one() -> None:
    assert safe(100, began=0, durable=None)
    assert not safe(FRESH + 1, began=0, durable=None)
    assert safe(FRESH + 1, began=0, durable=10)
    assert not safe(2 * FRESH + 11, began=0, durable=10)
