"""Where the tasks of a step go, and which CPUs of the job it takes while it runs: pure functions over counts.

A capsule is known by its index; what there is for each is a number of CPUs, as Slurm granted them.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NAME = "hpccr-"

EXACT, WHOLE, SHARED = "exact", "whole", "shared"
"""What a step takes: its tasks' CPUs; all of its nodes; nothing, it runs beside others."""


class Demand:
    """What a step needs. candidates: capsules that may be used, in the order of preference."""

    def __init__(
        self,
        *,
        tasks: int,
        nodes: int,
        nodes_max: int,
        cpus_per_task: int,
        per_node: int,
        mode: str,
        overcommit: bool,
        candidates: Sequence[int],
    ) -> None:
        """per_node: tasks on a node at most, 0: as many as fit. nodes, nodes_max: how many nodes it is spread over."""
        self.tasks, self.nodes, self.nodes_max = tasks, nodes, nodes_max
        self.cpus_per_task, self.per_node = cpus_per_task, per_node
        self.mode, self.overcommit, self.candidates = mode, overcommit, tuple(candidates)

    def encode(self) -> bytes:
        numbers = (self.tasks, self.nodes, self.nodes_max, self.cpus_per_task, self.per_node, int(self.overcommit))
        words = [self.mode, *map(str, numbers), ",".join(map(str, self.candidates))]
        return " ".join(words).encode()

    @classmethod
    def decode(cls, data: bytes) -> Demand:
        """Raises ValueError."""
        mode, tasks, nodes, most, cpus, each, overcommit, candidates = data.decode("ascii").split(" ")
        if mode not in (EXACT, WHOLE, SHARED):
            raise ValueError(mode)
        return cls(
            tasks=int(tasks),
            nodes=int(nodes),
            nodes_max=int(most),
            cpus_per_task=int(cpus),
            per_node=int(each),
            mode=mode,
            overcommit=overcommit == "1",
            candidates=[int(index) for index in candidates.split(",")],
        )


def place(demand: Demand, cpus: Sequence[int], used: Sequence[int]) -> dict[int, int] | None:
    """Tasks per capsule, in the order of capsules; None if there is no room.

    cpus, used: of every capsule of the job. With `used` all zero, None means that there never will be room.
    """
    room: dict[int, int] = {}
    for index in demand.candidates:
        free = cpus[index] if demand.mode == SHARED else cpus[index] - used[index]
        if demand.mode == WHOLE and used[index]:
            continue
        fits = free // demand.cpus_per_task
        if demand.overcommit and free > 0:
            fits = demand.tasks
        if demand.per_node:
            fits = min(fits, demand.per_node)
        if fits > 0:
            room[index] = fits
    for count in range(min(demand.nodes_max, demand.tasks, len(room)), demand.nodes - 1, -1):
        first = list(room)[:count]
        roomy = sorted(room, key=lambda index: -room[index])[:count]
        for chosen in (first, roomy):
            if sum(room[index] for index in chosen) >= demand.tasks:
                return _spread(demand.tasks, {index: room[index] for index in sorted(chosen)})
    return None


def _spread(tasks: int, room: dict[int, int]) -> dict[int, int]:
    """As Slurm has it: round after round one for each node that has room, whatever the distribution is."""
    counts = dict.fromkeys(room, 0)
    left = tasks
    while left:
        for index, most in room.items():
            if left and counts[index] < most:
                counts[index] += 1
                left -= 1
    return counts


def taken(demand: Demand, counts: dict[int, int], cpus: Sequence[int]) -> dict[int, int]:
    """CPUs that the step occupies on each of its capsules."""
    if demand.mode == SHARED:
        return {}
    if demand.mode == WHOLE:
        return {index: cpus[index] for index in counts}
    return {index: min(cpus[index], count * demand.cpus_per_task) for index, count in counts.items()}


def ranks(counts: dict[int, int], *, cyclic: bool) -> dict[int, list[int]]:
    """The task ids on each capsule."""
    result: dict[int, list[int]] = {index: [] for index in counts}
    if not cyclic:
        rank = 0
        for index, count in counts.items():
            result[index] = list(range(rank, rank + count))
            rank += count
        return result
    rank, total = 0, sum(counts.values())
    while rank < total:
        for index, count in counts.items():
            if len(result[index]) < count:
                result[index].append(rank)
                rank += 1
    return result


def expand_counts(text: str) -> list[int]:
    """Slurm's "4(x2),1" as one number per node. Raises ValueError."""
    counts: list[int] = []
    for term in text.split(","):
        number, _, repeat = term.partition("(x")
        counts += [int(number)] * int(repeat.removesuffix(")") or 1)
    return counts


def compress_counts(counts: Iterable[int]) -> str:
    """The inverse of expand_counts."""
    terms: list[list[int]] = []
    for count in counts:
        if terms and terms[-1][0] == count:
            terms[-1][1] += 1
        else:
            terms.append([count, 1])
    return ",".join(f"{count}(x{repeat})" if repeat > 1 else str(count) for count, repeat in terms)


def node_list(indices: Iterable[int]) -> str:
    """The capsules' names as Slurm writes them."""
    terms = runs(sorted(indices))
    if len(terms) == 1 and "-" not in terms[0]:
        return NAME + terms[0]
    return f"{NAME}[{','.join(terms)}]"


def runs(numbers: Sequence[int]) -> list[str]:
    """The sorted numbers in short: ["0-2", "5"]."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] + 1 == number:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]


def numbers(text: str) -> list[int]:
    """[0, 1, 2, 5] for "0-2,5". Raises ValueError."""
    result: list[int] = []
    for term in text.split(","):
        first, dash, last = term.partition("-")
        result += range(int(first), int(last if dash else first) + 1)
    return result


def capsules(text: str, count: int) -> list[int]:
    """The indices in a host list of capsule names ("hpccr-[0-2],hpccr-5"), sorted. Raises ValueError with the name
    that is none of the `count` capsules."""
    found: set[int] = set()
    depth, term = 0, ""
    for character in text + ",":
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character != "," or depth:
            term += character
            continue
        inside = term.removeprefix(NAME)
        try:
            indices = numbers(inside.removeprefix("[").removesuffix("]")) if term != inside else []
        except ValueError:
            indices = []
        if not indices or max(indices) >= count:
            raise ValueError(term)
        found.update(indices)
        term = ""
    return sorted(found)
