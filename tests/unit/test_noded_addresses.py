"""Names and addresses inside capsule networks."""

import ipaddress
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccr.errors import UnsupportedError, UsageError
from hpccr.model import StepKey
from hpccr.noded import addresses

SUBNET = addresses.subnet("10.90.0.0/16")
STEP = StepKey(cluster="c", job="17", step="0")


def test_the_first_capsules() -> None:
    assert addresses.address(SUBNET, 0) == "10.90.0.10"
    assert addresses.mac(0) == "02:68:70:00:00:00"
    assert addresses.hostname(0) == "hpccr-0"
    assert addresses.hosts(SUBNET, 2).splitlines()[2:] == ["10.90.0.10\thpccr-0", "10.90.0.11\thpccr-1"]


def test_the_nodes_own_names_come_last() -> None:
    """What is found first counts: a node's file cannot move a capsule."""
    text = addresses.hosts(SUBNET, 1, "10.0.0.1 login\n10.0.0.2 hpccr-0\n")
    assert text.splitlines()[2:] == ["10.90.0.10\thpccr-0", "10.0.0.1 login", "10.0.0.2 hpccr-0"]


@given(st.integers(0, 65000), st.integers(0, 65000))
def test_no_two_capsules_share_anything(one: int, other: int) -> None:
    for function in (lambda k: addresses.address(SUBNET, k), addresses.mac, addresses.hostname):
        assert (function(one) == function(other)) == (one == other)
    assert ipaddress.ip_address(addresses.address(SUBNET, one)) in SUBNET


def test_a_full_subnet_says_so() -> None:
    small = addresses.subnet("192.0.2.0/28")
    assert addresses.address(small, 4) == "192.0.2.14"
    assert addresses.fits(small, 5)
    assert not addresses.fits(small, 6)
    with pytest.raises(UnsupportedError, match="capsule 5 "):
        addresses.address(small, 5)
    with pytest.raises(UnsupportedError):
        addresses.hosts(small, 6)


@pytest.mark.parametrize("text", ["10.90.0.1/16", "fd00::/64", "x", ""])
def test_what_is_no_subnet(text: str) -> None:
    with pytest.raises(UsageError, match=r"network\.subnet"):
        addresses.subnet(text)


def test_boot_id_is_a_uuid_that_lasts() -> None:
    one = addresses.boot_id(STEP, 1001, 0)
    assert str(uuid.UUID(one.strip())) + "\n" == one
    assert one == addresses.boot_id(STEP, 1001, 0)
    assert one != addresses.boot_id(STEP, 1001, 1)
    assert one != addresses.boot_id(STEP, 1002, 0)


def test_uplinks_avoid_what_exists() -> None:
    pool = "169.254.96.0/29"
    assert str(addresses.first_free_uplink(pool, {"10.0.0.1"})) == "169.254.96.0/30"
    assert str(addresses.first_free_uplink(pool, {"169.254.96.1"})) == "169.254.96.4/30"
    assert str(addresses.first_free_uplink(pool, {"169.254.96.2", "127.0.0.1"})) == "169.254.96.4/30"
    with pytest.raises(UnsupportedError, match="in use"):
        addresses.first_free_uplink(pool, {"169.254.96.3", "169.254.96.7"})


@pytest.mark.parametrize("pool", ["169.254.96.0/31", "nonsense"])
def test_what_is_no_pool(pool: str) -> None:
    with pytest.raises(UsageError, match="uplink_pool"):
        addresses.first_free_uplink(pool, set())
