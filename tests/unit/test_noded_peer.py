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
