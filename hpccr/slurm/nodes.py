"""What Slurm's node records say: whether a job could run on a node now, and how often nodes fail. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

YEAR = 365.25 * 86400
USUAL_MTBF = 5 * YEAR
"""Seconds: what a node is taken to run between two failures as long as nothing is known of it."""
TOGETHER = 3600.0
"""Nodes that were booted within so many seconds of the next one, and are many, were booted on purpose."""


@dataclass(frozen=True)
class NodeInfo:
    """A node as Slurm sees it. states: base state and flags, as scontrol(1) lists them for `show node`.

    boot_time: of its kernel; reason_time: when `reason` was set; seconds since the epoch, None if unknown.
    """

    name: str
    states: frozenset[str]
    partitions: tuple[str, ...]
    reason: str
    boot_time: float | None = None
    reason_time: float | None = None

    @property
    def present(self) -> bool:
        """Not one that is switched off until it is needed, or only planned."""
        return not self.states & _ABSENT

    @property
    def usable(self) -> bool:
        """Slurm would start a job there."""
        return self.present and not self.states & _UNUSABLE and bool(self.partitions)

    @property
    def failed(self) -> bool:
        """It is gone, and nobody has asked for that."""
        return self.present and bool(self.states & {"DOWN", "FAIL"}) and "MAINTENANCE" not in self.states


@dataclass(frozen=True)
class FailureRate:
    """mtbf: seconds between two failures of one node. basis: what it rests on, for people."""

    mtbf: float
    basis: str


def estimate_mtbf(nodes: Sequence[NodeInfo], now: float) -> FailureRate:
    """How often a node fails, from the times for which nodes have been up and from those that are down.

    Slurm's records have no history, only each node's last boot. The time since the last failure, looked at from any
    moment, is distributed as the time between failures is; so the mean is the sum of the times up over the number of
    failures. It begins with one failure in USUAL_MTBF, which counts less the more is known.
    """
    up, failures = 0.0, 0
    boots = sorted(node.boot_time for node in nodes if node.present and node.boot_time and not node.failed)
    groups: list[list[float]] = []
    for boot in boots:
        if groups and boot - groups[-1][-1] <= TOGETHER:
            groups[-1].append(boot)
        else:
            groups.append([boot])
    for group in groups:
        up += sum(max(0.0, now - boot) for boot in group)
        if len(group) == 1 or len(group) <= len(boots) / 10:
            failures += len(group)
    for node in nodes:
        if node.failed:
            failures += 1
            up += max(0.0, (node.reason_time or now) - (node.boot_time or node.reason_time or now))
    basis = (
        f"Slurm's records: {failures} failures in {up / YEAR:.1f} node years, "
        f"and one in {USUAL_MTBF / YEAR:.0f} years for what is not known"
    )
    return FailureRate((USUAL_MTBF + up) / (1 + failures), basis)
