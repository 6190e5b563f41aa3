"""Plans of capsule networks: what they say they will do, and that they are undone in reverse."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from hpccr.config import NetworkConfig
from hpccr.errors import HpccrError, UsageError
from hpccr.noded import network
from hpccr.noded.netlink import Underlay
from hpccr.noded.network import AddVxlan, NftTable, Operation, Plan, Plumber, Vxlan

UNDERLAY = Underlay("10.77.0.11", 1500)


def plan(config: NetworkConfig | None = None, taken: set[str] | None = None, underlay: Underlay = UNDERLAY) -> Plan:
    strategy = Vxlan(config or NetworkConfig())
    return strategy.plan(name="00c0ffee", capsule=3, vni=4711, underlay=underlay, taken=taken or set())


def test_the_plan_can_be_read() -> None:
    vxlan, uplink, table = plan().describe()
    assert vxlan == (
        "ip link add hpc0 netns CAPSULE address 02:68:70:00:00:03 mtu 1450 type vxlan id 4711 local 10.77.0.11 "
        "dstport 8473 srcport 512 1023 nolearning nolocalbypass"
    )
    assert uplink == (
        "ip link add hpu00c0ffee mtu 1500 address 02:68:70:01:00:01 type veth "
        "peer hpcu0 mtu 1500 address 02:68:70:01:00:02 netns CAPSULE && ip link set hpu00c0ffee up && "
        "ip route add 169.254.96.2 dev hpu00c0ffee && "
        "ip neighbour add 169.254.96.2 dev hpu00c0ffee lladdr 02:68:70:01:00:02 nud permanent"
    )
    assert table.startswith("nft -f - <<'EOF'\ntable ip hpccr_00c0ffee {\n")
    assert "udp dport 8473 udp sport >= 1024 drop" in table
    assert 'ip saddr 169.254.96.0/30 oifname != "hpu00c0ffee" masquerade' in table
    assert table.count('oifname "hpu00c0ffee" ct state != { established, related } drop') == 2


def test_without_uplink_only_forged_packets_are_filtered() -> None:
    made = plan(NetworkConfig(uplink=False))
    assert [type(operation) for operation in made.operations] == [AddVxlan, NftTable]
    assert made.uplink is None
    assert "masquerade" not in "".join(made.describe())


def test_the_uplink_takes_the_first_free_network() -> None:
    made = plan(taken={"169.254.96.1", "169.254.96.5", "10.77.0.11"})
    assert str(made.uplink) == "169.254.96.8/30"


@pytest.mark.parametrize(("underlay", "mtu"), [(9000, 8950), (65536, 65485), (1500, 1450)])
def test_mtu_leaves_room_for_the_outer_headers(underlay: int, mtu: int) -> None:
    assert plan(underlay=Underlay("127.0.0.1", underlay)).mtu == mtu


def test_device_names_fit_and_differ() -> None:
    # IFNAMSIZ is 16 with the zero byte.
    assert len(network.node_device("00c0ffee")) <= 15
    assert network.node_device("00c0ffee") != network.node_device("00c0ffef")


@pytest.mark.parametrize("config", [NetworkConfig(strategy="pigeons"), NetworkConfig(subnet="10.0.0.1/8")])
def test_an_impossible_configuration_is_refused_at_the_start(config: NetworkConfig) -> None:
    with pytest.raises(UsageError):
        network.strategy(config)


@dataclass
class Recorder:
    """A Context, and the operations that were done and undone in it."""

    done: list[str] = field(default_factory=list)
    node: Any = None
    namespace: int = -1

    @contextmanager
    def inside(self) -> Iterator[Any]:
        yield None


@dataclass(frozen=True)
class Step:
    name: str
    fails: bool = False
    stuck: bool = False

    def describe(self) -> str:
        return self.name

    def execute(self, context: Recorder) -> None:
        if self.fails:
            raise HpccrError(f"{self.name} failed")
        context.done.append(f"+{self.name}")

    def undo(self, context: Recorder) -> None:
        context.done.append(f"-{self.name}")
        if self.stuck:
            raise HpccrError(f"{self.name} is stuck")


def execute(*steps: Step) -> Recorder:
    recorder = Recorder()
    operations: tuple[Operation, ...] = steps
    plumber = Plumber(NetworkConfig(), "/nonexistent")
    plumber._execute(Plan(operations, 1, UNDERLAY, 1450, None), recorder)
    return recorder


def test_a_failure_undoes_all_in_reverse() -> None:
    assert execute(Step("a"), Step("b")).done == ["+a", "+b"]
    recorder = Recorder()
    plumber = Plumber(NetworkConfig(), "/nonexistent")
    with pytest.raises(HpccrError, match="c failed"):
        plumber._execute(Plan((Step("a"), Step("b"), Step("c", fails=True)), 1, UNDERLAY, 1450, None), recorder)
    # The failed one too: it may have got half way.
    assert recorder.done == ["+a", "+b", "-c", "-b", "-a"]


def test_undoing_goes_on_after_a_failure() -> None:
    recorder = Recorder()
    plumber = Plumber(NetworkConfig(), "/nonexistent")
    with pytest.raises(HpccrError, match="b is stuck"):
        plumber._undo((Step("a"), Step("b", stuck=True), Step("c")), recorder)
    assert recorder.done == ["-c", "-b", "-a"]
