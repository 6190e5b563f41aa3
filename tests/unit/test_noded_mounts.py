"""The mount plan as data: what is mounted, and in which order."""

from __future__ import annotations

import pytest

from hpccr.errors import HpccrError
from hpccr.noded import mounts
from hpccr.noded.control import Build, Identity

IDENTITY = Identity(uid=1, gid=1, groups=(), umask=0, rlimits=(), cpus=(), nice=0)


def build(*private: str) -> Build:
    return Build(
        hostname="hpccr-0", boot_id="id", hosts="hosts", private=private, first_pid=300, criu="criu", identity=IDENTITY
    )


def test_everything_is_private_before_anything_is_mounted() -> None:
    first, *rest = mounts.plan(build("/tmp"))
    assert first.describe() == "make all mounts private"
    assert any("tmpfs on /tmp" in operation.describe() for operation in rest)


def test_files_are_written_before_the_fresh_proc_covers_them() -> None:
    lines = [operation.describe() for operation in mounts.plan(build())]
    proc = next(number for number, line in enumerate(lines) if "fresh proc" in line)
    assert "/proc/sys/kernel/random/boot_id" in lines[proc]
    for name in ("boot_id", "hosts"):
        assert next(number for number, line in enumerate(lines) if f"write /proc/{name}" in line) < proc


def test_the_cgroup_tree_stays_below_the_fresh_sysfs() -> None:
    (line,) = [line for operation in mounts.plan(build()) if "sysfs" in (line := operation.describe())]
    assert line == "mount a fresh sysfs on /sys, then bind the earlier /sys/fs/cgroup on /sys/fs/cgroup"


@pytest.mark.parametrize(
    ("private", "places"),
    [
        ((), ("/dev/shm",)),
        (("/tmp",), ("/dev/shm", "/tmp")),
        (("/tmp/", "/tmp", "/dev/shm"), ("/dev/shm", "/tmp")),
        (("/var/tmp/x", "/var/tmp"), ("/dev/shm", "/var/tmp", "/var/tmp/x")),
    ],
)
def test_outer_places_come_first_and_each_once(private: tuple[str, ...], places: tuple[str, ...]) -> None:
    assert mounts.places(private) == places


def test_a_failure_names_the_operation_and_the_remedy() -> None:
    with pytest.raises(HpccrError, match="cannot mount a fresh tmpfs on /nowhere") as caught:
        mounts.execute([mounts.Mount("tmpfs", "/nowhere")])
    assert "capsule.private" in caught.value.hint
