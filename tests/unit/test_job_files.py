"""Who saves a file that several capsules have."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccr.coordinator.requests import saved_elsewhere
from hpccr.errors import UnsupportedError
from hpccr.noded import snapshot
from hpccr.noded.jobfiles import network_devices

IDENTITIES = st.lists(st.integers(0, 9).map(lambda n: bytes([n]) * 16), unique=True).map(tuple)


@given(st.dictionaries(st.integers(0, 5), IDENTITIES, max_size=6))
def test_each_file_is_saved_by_exactly_one_that_has_it(found: dict[int, tuple[bytes, ...]]) -> None:
    elsewhere = saved_elsewhere(found)
    savers = [identity for k, files in found.items() for identity in files if identity not in elsewhere.get(k, ())]
    assert sorted(savers) == sorted({identity for files in found.values() for identity in files})
    assert all(set(files) <= set(found[k]) for k, files in elsewhere.items())


def test_network_file_systems_are_known_by_their_type() -> None:
    mountinfo = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:52 / /home rw,relatime shared:9 master:2 - nfs4 server:/home rw,vers=4.2
41 22 0:53 / /mnt/with\\040space rw - fuse.sshfs host:/ rw
42 22 0:54 / /scratch rw - lustre 10.0.0.1@tcp:/scratch rw
43 22 0:55 / /tmp rw - tmpfs tmpfs rw
44 22 0:56 / /mnt/plain rw - fuse host rw
45 22 0:57 / /lus rw - dvs /lus rw
"""
    assert network_devices(mountinfo) == {os.makedev(0, minor) for minor in (52, 53, 54, 56, 57)}


def test_a_file_that_comes_and_goes_is_not_taken_for_unreadable(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_text("")
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            path.rename(other)
            other.rename(path)

    mover = threading.Thread(target=move)
    mover.start()
    try:
        for _ in range(20000):
            snapshot._check_readable(str(path))
    finally:
        stop.set()
        mover.join()
    path.chmod(0)
    with pytest.raises(UnsupportedError, match="cannot read"):
        snapshot._check_readable(str(path))
