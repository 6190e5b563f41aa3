"""At which safe point the ranks stand still, and who is missing there. Pure; see docs/internals/quiesce.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpccr.wire.messages import RankAt

NAMED = 8
"""Ranks that a message names one by one."""


@dataclass(frozen=True)
class Agreement:
    """targets: (group, number of the safe point) for every group that stops as one. incomplete: why it cannot be."""

    targets: tuple[tuple[int, int], ...] = ()
    incomplete: str = ""


def agree(capsules: Sequence[Iterable[RankAt]]) -> Agreement:
    """The next safe point that no rank has passed, for each of the groups that are to stand still.

    Groups in use come first, of those the largest; one that shares a rank with a group chosen before is not asked to
    stop: its ranks stop where the other group does. No group at all: nobody takes part. A rank is a process, known by
    capsule and pid.
    """
    groups: dict[int, list[tuple[tuple[int, int], RankAt]]] = {}
    for capsule, ranks in enumerate(capsules):
        for rank in ranks:
            groups.setdefault(rank.group, []).append(((capsule, rank.pid), rank))
    alive = {group: members for group, members in groups.items() if not all(rank.gone for _, rank in members)}
    come_to: Counter[tuple[int, int]] = Counter()
    for members in groups.values():
        for process, rank in members:
            come_to[process] += rank.count

    def precedence(item: tuple[int, list[tuple[tuple[int, int], RankAt]]]) -> tuple[bool, int, int]:
        group, members = item
        in_use = all(_in_use(rank, come_to[process]) for process, rank in members)
        return not in_use, -members[0][1].size, group

    taken: set[tuple[int, int]] = set()
    targets = []
    problems = []
    for group, members in sorted(alive.items(), key=precedence):
        processes = {process for process, _ in members}
        if processes & taken:
            continue
        taken |= processes
        size = members[0][1].size
        here = sum(not rank.gone for _, rank in members)
        if here < size:
            problems.append(
                f"{size - here} of {size} ranks have ended, not yet come to their first safe point, or found no place "
                "for it (their stderr says so)"
            )
        targets.append((group, max(_next(rank) for _, rank in members)))
    everyone = {process for members in alive.values() for process, rank in members if not rank.gone}
    if everyone - taken:
        problems.append(
            f"{len(everyone - taken)} ranks share some but not all of their communicators with those that stop"
        )
    return Agreement((), "; ".join(problems)) if problems else Agreement(tuple(targets))


def _in_use(rank: RankAt, come_to: int) -> bool:
    """Whether it can be expected at this group's next safe point: not after twice as many others as it ever took.

    come_to: its safe points of all groups.
    """
    since = come_to - (rank.left - 1) if rank.left else 0
    return since <= 2 * rank.gap + 2


def _next(rank: RankAt) -> int:
    """The first safe point at which this rank can still stop."""
    return rank.count if rank.waiting else rank.count + 1


def absent(
    capsules: Sequence[Iterable[RankAt]], nodes: Sequence[str], targets: Sequence[tuple[int, int]]
) -> tuple[str, ...]:
    """Who has not come to its safe point: `rank 3 (pid 312 on node2), at 17 of 18`."""
    wanted = dict(targets)
    return tuple(
        f"{_name(rank, nodes[capsule])}, {'ended' if rank.gone else f'at {rank.count} of {wanted.get(rank.group, 0)}'}"
        for capsule, ranks in enumerate(capsules)
        for rank in ranks
        if not rank.arrived
    )


def unfinished(capsules: Sequence[Iterable[RankAt]], nodes: Sequence[str]) -> tuple[str, ...]:
    """Who stands at its safe point but has not come to an end with its traffic or its hooks."""
    return tuple(
        _name(rank, nodes[capsule]) + ("" if not rank.finished else f", {rank.pending} messages to it are not received")
        for capsule, ranks in enumerate(capsules)
        for rank in ranks
        if not rank.finished or rank.pending
    )


def _name(rank: RankAt, node: str) -> str:
    return f"rank {rank.rank} (pid {rank.pid} on {node})"


def listed(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are."""
    more = len(names) - NAMED
    return "; ".join(names[:NAMED]) + (f"; and {more} more" if more > 0 else "")
