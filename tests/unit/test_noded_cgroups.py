"""From /proc/PID/cgroup and mountinfo to directories, on v1, v2 and hybrid, with and without cgroup namespaces."""

import pytest

from hpccr.errors import UnsupportedError
from hpccr.noded import cgroups

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:10 master:3 - cgroup cgroup rw,memory\n"
    "36 31 0:33 / /sys/fs/cgroup/my\\040freezer rw,relatime - cgroup cgroup rw,freezer\n"
    "40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd\n"
)
HYBRID = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"


def directories(of: str, mountinfo: str, own: str = "") -> list[str]:
    return cgroups.directories(of, own, mountinfo)


def test_v2() -> None:
    text = "0::/system.slice/slurmstepd.scope/job_7/step_batch/user/task_0\n"
    assert directories(text, V2) == ["/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_batch/user/task_0"]
    assert directories("0::/\n", V2) == ["/sys/fs/cgroup"]


def test_v1_has_one_directory_per_hierarchy() -> None:
    text = "4:memory:/slurm/uid_1\n3:freezer:/slurm/job_7\n2:cpu,cpuacct:/slurm\n1:name=systemd:/user.slice\n"
    assert directories(text, V1) == [
        "/sys/fs/cgroup/memory/slurm/uid_1",
        "/sys/fs/cgroup/my freezer/slurm/job_7",
        "/sys/fs/cgroup/cpu,cpuacct/slurm",
        "/sys/fs/cgroup/systemd/user.slice",
    ]


def test_hybrid_has_both_kinds() -> None:
    assert directories("4:memory:/a\n0::/b\n", HYBRID) == ["/sys/fs/cgroup/memory/a", "/sys/fs/cgroup/unified/b"]


def test_a_mount_that_shows_a_part() -> None:
    part = "35 31 0:32 /slurm /jobs rw,relatime - cgroup cgroup rw,memory\n"
    assert directories("4:memory:/slurm/job_7\n", part) == ["/jobs/job_7"]
    assert directories("4:memory:/slurm\n", part) == ["/jobs"]
    with pytest.raises(UnsupportedError, match="not visible"):
        directories("4:memory:/slurmother/job_7\n", part)


def test_seen_from_inside_a_cgroup_namespace() -> None:
    """What is outside of the reader's namespace has a path that begins with "..": never resolved, never escaped to."""
    with pytest.raises(UnsupportedError, match="not visible"):
        directories("0::/../other\n", V2)
    with pytest.raises(UnsupportedError, match="not visible"):
        directories("0::/a/../../b\n", V2)
    above = "30 23 0:26 /.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    assert directories("0::/../other\n", above) == ["/sys/fs/cgroup/other"]
    with pytest.raises(UnsupportedError, match="not visible"):
        directories("0::/here\n", above)


def test_an_unmounted_hierarchy_matters_only_if_the_groups_differ() -> None:
    text = "4:memory:/a\n0::/init.scope\n"
    assert directories(text, V1, own="0::/init.scope\n") == ["/sys/fs/cgroup/memory/a"]
    with pytest.raises(UnsupportedError, match=r"cgroup2:/init\.scope"):
        directories(text, V1, own="0::/system.slice/hpccrd.service\n")


def test_the_topmost_of_two_mounts_counts() -> None:
    twice = (
        V2 + "31 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n31 23 0:26 /x /elsewhere rw - cgroup2 cgroup2 rw\n"
    )
    assert directories("0::/x/y\n", twice) == ["/elsewhere/y"]
    assert directories("0::/z\n", twice) == ["/sys/fs/cgroup/z"]


def test_paths_with_colons_stay_whole() -> None:
    assert directories("0::/a:b/c\n", V2) == ["/sys/fs/cgroup/a:b/c"]


def test_the_files_of_this_process_can_be_read() -> None:
    with open("/proc/self/cgroup") as of, open("/proc/self/mountinfo") as info:
        text = of.read()
        assert len(cgroups.memberships(text)) == len(text.splitlines())
        cgroups.mounts(info.read())
