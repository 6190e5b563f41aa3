"""The site key, seals of fragments, tickets of endpoints."""

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccr.errors import CorruptError, UsageError
from hpccr.model import FORMAT, CapsuleImage, FileEntry, Fragment, SealedFragment, Stdio, StepKey
from hpccr.noded import seal
from hpccr.wire.messages import Endpoint

KEY = seal.SiteKey(bytes(range(32)))
STEP = StepKey(cluster="c", job="17", step="0")


def fragment(**changes: object) -> Fragment:
    made = Fragment(
        format=FORMAT,
        key=STEP,
        checkpoint="0" * 32,
        sequence=3,
        capsule=1,
        capsules=2,
        uid=1001,
        gid=1001,
        created=1.5,
        node="node1",
        image=CapsuleImage(root_pid=300, max_pid=301, tasks=2, stdio=Stdio(1, 2, 2)),
        files=(FileEntry(name="pages-1.img", size=4096, digest="0" * 64),),
    )
    return msgspec.structs.replace(made, **changes)


def test_a_sealed_fragment_opens_to_what_it_was() -> None:
    assert KEY.open(msgspec.json.encode(KEY.seal(fragment())), "here") == fragment()


@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_any_changed_bit_is_noticed(position: int, bit: int) -> None:
    text = bytearray(msgspec.json.encode(KEY.seal(fragment())))
    text[position % len(text)] ^= 1 << bit
    with pytest.raises(CorruptError, match="here"):
        KEY.open(bytes(text), "here")


@given(st.binary(max_size=100))
def test_garbage_is_corrupt(text: bytes) -> None:
    with pytest.raises(CorruptError):
        KEY.open(text, "here")


def test_a_seal_of_another_key_or_another_body_is_refused() -> None:
    other = seal.SiteKey(bytes(32))
    with pytest.raises(CorruptError, match="seal"):
        KEY.open(msgspec.json.encode(other.seal(fragment())), "here")
    swapped = SealedFragment(body=KEY.seal(fragment(uid=0)).body, seal=KEY.seal(fragment()).seal)
    with pytest.raises(CorruptError, match="seal"):
        KEY.open(msgspec.json.encode(swapped), "here")


def test_a_ticket_is_no_seal() -> None:
    """The same bytes under another label have another code: nothing of one kind can stand for the other."""
    assert KEY._mac(seal._TICKET, b"x") != KEY._mac(seal._FRAGMENT, b"x")


def endpoint(**changes: object) -> Endpoint:
    ticket = KEY.ticket(capsule=1, address="10.0.0.2", vni=77, key=STEP, uid=1001)
    return msgspec.structs.replace(Endpoint(capsule=1, address="10.0.0.2", vni=77, ticket=ticket), **changes)


def test_a_ticket_admits_its_own_endpoint() -> None:
    assert KEY.admits(endpoint(), STEP, 1001)


@pytest.mark.parametrize(
    "changes", [{"capsule": 0}, {"address": "10.0.0.3"}, {"vni": 78}, {"ticket": "é"}, {"ticket": ""}]
)
def test_a_ticket_admits_nothing_else(changes: dict[str, object]) -> None:
    assert not KEY.admits(endpoint(**changes), STEP, 1001)


def test_a_ticket_is_for_one_user_and_step() -> None:
    assert not KEY.admits(endpoint(), STEP, 1002)
    assert not KEY.admits(endpoint(), msgspec.structs.replace(STEP, job="18"), 1001)


def write(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_key_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "key", bytes(range(32)).hex() + "\n")
    assert seal.load(path, owner=os.geteuid()).secret == bytes(range(32))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_a_key_others_can_get_at_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "key", "0" * 64, mode)
    with pytest.raises(UsageError, match="others") as caught:
        seal.load(path, owner=os.geteuid())
    assert "chmod 0600" in caught.value.hint


def test_a_key_of_another_owner_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "key", "0" * 64)
    with pytest.raises(UsageError, match="others"):
        seal.load(path, owner=os.geteuid() + 1)


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\nx", " " + "0" * 64])
def test_what_is_no_key_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="64 hex digits"):
        seal.load(write(tmp_path / "key", text), owner=os.geteuid())


def test_a_missing_key_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no site key") as caught:
        seal.load(str(tmp_path / "key"))
    assert "openssl rand -hex 32" in caught.value.hint


def test_links_and_fifos_are_no_keys(tmp_path: Path) -> None:
    target = write(tmp_path / "target", "0" * 64)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UsageError, match="cannot open"):
        seal.load(str(tmp_path / "link"), owner=os.geteuid())
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(UsageError, match="regular"):
        seal.load(str(tmp_path / "fifo"), owner=os.geteuid())


def test_a_generated_key_is_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = seal.load(str(path), generate=True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert seal.load(str(path), generate=True, owner=os.geteuid()).secret == made.secret
    assert os.listdir(tmp_path) == ["key"]


def test_a_key_never_shows_itself() -> None:
    assert bytes(range(32)).hex() not in repr(KEY)
    assert KEY.fingerprint not in bytes(range(32)).hex()
