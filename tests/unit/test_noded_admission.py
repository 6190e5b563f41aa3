"""Requests that would cost hpccrd too much, refused before anything is done with them."""

from __future__ import annotations

import time

import pytest

from hpccr.errors import UnsupportedError, UsageError
from hpccr.model import StepKey
from hpccr.noded import admission
from hpccr.wire import messages as m


def create(capsules: int) -> m.Create:
    key = StepKey(cluster="c", job=1, step="0")
    return m.Create(protocol=m.PROTOCOL, key=key, capsule=0, capsules=capsules, incarnation=0, secret="0" * 64)


def test_a_step_of_very_many_capsules_is_refused_at_once() -> None:
    admission.check_create(create(admission.MAX_CAPSULES), "node1")
    started = time.monotonic()
    with pytest.raises(UnsupportedError, match="65500 capsules"):
        admission.check_create(create(65500), "node1")
    assert time.monotonic() - started < 0.05


def test_an_environment_of_very_many_variables_is_refused() -> None:
    def start(count: int) -> m.Start:
        env = {b"V%d" % k: b"" for k in range(count)}
        return m.Start(argv=(b"true",), cwd=b"/", env=env, stdin="null", merged=True)

    admission.check_command(start(admission.MAX_VARIABLES))
    with pytest.raises(UsageError, match="variables"):
        admission.check_command(start(admission.MAX_VARIABLES + 1))


@pytest.mark.parametrize("paths", [(b"/x",) * 65, (b"relative",), (b"",), (b"/zero\0byte",), (b"/" + b"x" * 4096,)])
def test_what_a_rollback_leaves_alone_is_a_few_absolute_paths(paths: tuple[bytes, ...]) -> None:
    admission.check_excluded((b"/home/user/.hpccr", b"/home/user/slurm-17.out"))
    with pytest.raises(UsageError, match="excluded"):
        admission.check_excluded(paths)
