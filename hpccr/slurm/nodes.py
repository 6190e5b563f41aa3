"""Which nodes Slurm has, and whether a job could run there now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from hpccr.slurm.commands import run_command
from hpccr.slurm.query import SlurmError

_ABSENT = frozenset({"FUTURE", "POWERED_DOWN", "POWERING_DOWN", "POWERING_UP", "POWER_DOWN"})
_UNUSABLE = frozenset(
    {
        "DOWN",
        "DRAIN",
        "ERROR",
        "FAIL",
        "INVALID",
        "INVALID_REG",
        "MAINTENANCE",
        "NOT_RESPONDING",
        "REBOOT_ISSUED",
        "REBOOT_REQUESTED",
        "UNKNOWN",
    }
)


@dataclass(frozen=True)
class NodeInfo:
    """A node as Slurm sees it. states: base state and flags, as scontrol(1) lists them for `show node`."""

    name: str
    states: frozenset[str]
    partitions: tuple[str, ...]
    reason: str

    @property
    def present(self) -> bool:
        """Not one that is switched off until it is needed, or only planned."""
        return not self.states & _ABSENT

    @property
    def usable(self) -> bool:
        """Slurm would start a job there."""
        return self.present and not self.states & _UNUSABLE and bool(self.partitions)


def nodes(*, timeout: float = 30.0) -> list[NodeInfo]:
    """All nodes of the cluster, in Slurm's order. Raises SlurmError."""
    output = run_command(["scontrol", "show", "nodes", "--json"], timeout=timeout)
    try:
        return [_node(node) for node in msgspec.json.decode(output, type=dict[str, Any])["nodes"]]
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as error:
        raise SlurmError(f"cannot understand what Slurm says of its nodes: {type(error).__name__}: {error}") from None


def _node(node: dict[str, Any]) -> NodeInfo:
    state = node["state"]
    return NodeInfo(
        name=node["name"],
        states=frozenset([state] if isinstance(state, str) else state),
        partitions=tuple(node.get("partitions") or ()),
        reason=node.get("reason") or "",
    )
