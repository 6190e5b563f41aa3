"""What the kernel tells about the other end of a socket."""

import os
import resource
import socket

import pytest

from hpccr.errors import UnsupportedError
from hpccr.noded import peer

LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max stack size            8388608              unlimited            bytes
Max processes             96365                96366                processes
Max nice priority         0                    0
Max realtime timeout      unlimited            unlimited            us
Max something new         1                    2                    things
"""


def test_limits_are_read_by_number() -> None:
    assert peer.parse_limits(LIMITS) == (
        (resource.RLIMIT_CPU, -1, -1),
        (resource.RLIMIT_STACK, 8388608, -1),
        (resource.RLIMIT_NPROC, 96365, 96366),
        (resource.RLIMIT_NICE, 0, 0),
        (resource.RLIMIT_RTTIME, -1, -1),
    )


def test_all_limits_of_a_real_process_are_known() -> None:
    with open("/proc/self/limits") as file:
        found = {number: (soft, hard) for number, soft, hard in peer.parse_limits(file.read())}
    names = [name for name in dir(resource) if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"]
    for number in {getattr(resource, name) for name in names}:
        assert found[number] == resource.getrlimit(number)


def test_credentials_are_this_processes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        who = peer.credentials(ours)
    assert (who.pid, who.uid, who.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert who.groups is None or set(who.groups) == set(os.getgroups())


def test_changed_ids_are_refused() -> None:
    who = peer.Credentials(pid=1, uid=1001, gid=1001, groups=())
    same = {"Uid": "1001\t1001\t1001\t1001", "Gid": "1001\t1001\t1001\t1001"}
    peer._check_ids(who, same)
    for name in ("Uid", "Gid"):
        with pytest.raises(UnsupportedError, match="mixed or changed ids"):
            peer._check_ids(who, same | {name: "1001\t0\t0\t0"})
    with pytest.raises(UnsupportedError, match="mixed or changed ids"):
        peer._check_ids(who, {"Uid": "0\t0\t0\t0", "Gid": same["Gid"]})


OWN = """\
22 1 0:50 / / rw - overlay overlay rw
23 22 8:1 / /usr ro shared:1 - ext4 /dev/sda1 ro
24 22 0:5 / /dev rw - devtmpfs dev rw
25 22 0:60 / /tmp rw - tmpfs tmp rw
"""


@pytest.mark.parametrize(
    ("line", "foreign"),
    [
        ("30 25 0:50 /jobs/7/.tmp /tmp rw - overlay overlay rw", False),
        ("30 24 0:70 / /dev/shm rw - tmpfs tmp rw", False),
        ("30 22 0:80 /apps /opt/apps rw - nfs4 server:/apps rw", False),
        ("30 22 8:1 / /usr rw - ext4 /dev/sda1 ro", False),
        ("30 23 0:50 /home/user1/bin /usr/local/sbin rw - overlay overlay rw", True),
        ("30 22 0:50 /home/user1/usr /usr rw - overlay overlay rw", True),
        ("30 1 0:50 /home/user1/root / rw - overlay overlay rw", True),
        ("30 22 0:90 / /etc rw - tmpfs tmpfs rw", True),
        ("30 22 0:50 /home/user1/dev /dev rw - overlay overlay rw", True),
        ("30 22 0:50 /home/user1/opt /opt rw - overlay overlay rw", True),
        ("30 22 0:50 /home/user1/criu /opt/criu/sbin rw - overlay overlay rw", True),
        ("30 22 0:50 /home/user1/run /run rw - overlay overlay rw", True),
    ],
)
def test_what_a_user_may_have_mounted_elsewhere(line: str, foreign: bool) -> None:
    """A private /tmp, /dev/shm or more shared storage; nothing that root trusts."""
    places = peer.trusted_places("/opt/criu/sbin/criu")
    found = peer.foreign_mounts(OWN + line + "\n", OWN, places)
    # /opt lies above CRIU's directory, /opt/apps beside it.
    assert bool(found) == foreign
