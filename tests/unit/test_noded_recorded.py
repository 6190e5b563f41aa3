"""The paths of images, looked at with the rights of whoever runs the tests."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pycriu import images

from hpccr.errors import CorruptError
from hpccr.noded import recorded
from hpccr.noded.recorded import File, Recorded

UID = os.getuid()


def file(path: Path, kind: int = stat.S_IFREG, flags: int = os.O_RDWR, *, removed: bool = False) -> File:
    return File(os.fsencode(path), flags, kind, removed)


def check(*files: File, sockets: Iterable[Path] = ()) -> None:
    recorded.check(Recorded(files, tuple(map(os.fsencode, sockets))))


def test_what_is_as_it_was_passes_and_what_is_not_there_is_crius_to_tell(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    check(
        file(tmp_path / "file"),
        file(tmp_path / "none"),
        file(tmp_path / "fifo", stat.S_IFIFO),
        file(tmp_path, stat.S_IFDIR, 0),
        file(Path("/dev/null"), stat.S_IFCHR),
        file(tmp_path / "gone" / "below", removed=True),
        file(Path("/proc/300/mem")),
        sockets=[tmp_path / "service"],
    )


@pytest.mark.parametrize("name", ["link", "place/file", "place/none/gone"])
def test_no_link_is_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("x")
    (tmp_path / "place").symlink_to("real")
    (tmp_path / "link").symlink_to("real/file")
    for flags in (os.O_RDWR, os.O_PATH, 0):
        with pytest.raises(CorruptError, match="symbolic link"):
            check(file(tmp_path / name, flags=flags, removed=name.endswith("gone")))
    with pytest.raises(CorruptError, match="symbolic link"):
        check(sockets=[tmp_path / "place/service"])
    check(file(tmp_path / "link", stat.S_IFLNK, os.O_PATH | os.O_NOFOLLOW))


def test_another_kind_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(CorruptError, match="another kind"):
        check(file(tmp_path / "file"))


def test_what_the_user_may_not_have(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "file").chmod(0o400)
    check(file(tmp_path / "file"), file(Path("/etc/passwd"), flags=os.O_RDONLY | os.O_APPEND))
    with pytest.raises(CorruptError, match="cannot open: Permission denied"):
        check(file(Path("/etc/passwd"), flags=os.O_WRONLY))
    with pytest.raises(CorruptError, match="socket named /etc/service"):
        check(sockets=[Path("/etc/service")])


def image(path: Path, entries: Iterable[Any]) -> None:
    data = b"".join(struct.pack("<I", len(text)) + text for text in (entry.SerializeToString() for entry in entries))
    path.write_bytes(b"magicnum" + data)


def regular(number: int, name: str) -> Any:
    entry = images.pb.file_entry(type=1, id=number)
    entry.reg.id, entry.reg.name, entry.reg.flags, entry.reg.mode, entry.reg.pos = number, name, 2, 0o100600, 0
    entry.reg.fown.uid = entry.reg.fown.euid = entry.reg.fown.signum = entry.reg.fown.pid_type = entry.reg.fown.pid = 0
    return entry


def unix(number: int, name: bytes, place: str = "", uflags: int = 0) -> Any:
    entry = images.pb.file_entry(type=5, id=number)
    usk = entry.usk
    usk.id = usk.ino = number
    usk.type = usk.state = usk.flags = usk.backlog = usk.peer = 0
    usk.uflags, usk.name = uflags, name
    if place:
        usk.name_dir = place
    usk.fown.uid = usk.fown.euid = usk.fown.signum = usk.fown.pid_type = usk.fown.pid = 0
    for field in ("so_sndbuf", "so_rcvbuf", "so_snd_tmo_sec", "so_snd_tmo_usec", "so_rcv_tmo_sec", "so_rcv_tmo_usec"):
        setattr(usk.opts, field, 0)
    return entry


def read(directory: Path) -> Recorded:
    fd = os.open(directory, os.O_RDONLY)
    try:
        return recorded.read(images, fd, UID)
    finally:
        os.close(fd)


def test_images_are_read_with_what_was_removed(tmp_path: Path) -> None:
    link = regular(8, "/home/link_remap.1")
    link.reg.ClearField("mode")
    image(
        tmp_path / "files.img",
        [
            regular(1, "/home/a"),
            regular(2, "/home/gone"),
            link,
            unix(3, b"/home/d/s\0"),
            unix(4, b"s\0", "/home/e"),
            unix(5, b"\0abstract"),
            unix(6, b""),
            unix(7, b"/run/outside\0", uflags=1),
        ],
    )
    remap = images.pb.remap_file_path_entry(orig_id=2, remap_id=10, remap_type=1)
    image(tmp_path / "remap-fpath.img", [remap])
    ghost = images.pb.ghost_file_entry(uid=UID, gid=0, mode=0o104755)
    image(tmp_path / "ghost-file-a.img", [ghost])
    found = read(tmp_path)
    assert found.files == (
        File(b"/home/a", os.O_RDWR, stat.S_IFREG, False),
        File(b"/home/gone", os.O_RDWR, stat.S_IFREG, True),
        File(b"/home/link_remap.1", os.O_RDWR, 0, False),
    )
    assert found.sockets == (b"/home/d/s", b"/home/e/s")
    ghost.uid = UID + 1
    image(tmp_path / "ghost-file-a.img", [ghost])
    with pytest.raises(CorruptError, match="set-id"):
        read(tmp_path)


def test_sockets_behind_a_link_get_their_real_names(tmp_path: Path) -> None:
    real = tmp_path / "real"
    long = tmp_path / ("x" * 120)
    for place in (real, long):
        place.mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "short").symlink_to(long.name)
    link, short = os.fsencode(tmp_path / "link"), os.fsencode(tmp_path / "short")
    entries = [unix(1, link + b"/s\0"), unix(2, short + b"/s\0"), unix(3, b"s\0", str(tmp_path / "link"))]
    image(tmp_path / "files.img", [regular(9, "/home/a"), *entries])
    kept = tmp_path / "kept"
    os.link(tmp_path / "files.img", kept)
    before = kept.read_bytes()
    places = dict(recorded.real_places(read(tmp_path).sockets))
    assert places == {link: os.fsencode(real), short: os.fsencode(long)}
    fd = os.open(tmp_path, os.O_RDONLY)
    recorded.rename_sockets(images, fd, places)
    os.close(fd)
    found = read(tmp_path)
    assert found.sockets == (os.fsencode(real / "s"), os.fsencode(long / "s"))
    assert [one.path for one in found.files] == [b"/home/a"]
    assert kept.read_bytes() == before


def test_a_socket_in_the_place_of_anothers_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "service"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        check(sockets=[path])
    path.unlink()
    path.symlink_to("elsewhere")
    with pytest.raises(CorruptError, match="socket named"):
        check(sockets=[path])
