"""Where ranks stand still: the agreement as a pure function, its stages in the plan, and the page's layout."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hpccr.coordinator import plan, quiesce
from hpccr.coordinator.plan import Phase
from hpccr.mpi import page as layout
from hpccr.noded import quiesce as init_side
from hpccr.wire import messages as m

ROOT = Path(__file__).parents[2]


def at(rank: int, count: int, *, group: int = 1, size: int = 2, pid: int = 0, **more: bool | int) -> m.RankAt:
    return m.RankAt(group, size, rank, pid or 300 + rank, count, **more)  # type: ignore[arg-type]


# --- the agreement --------------------------------------------------------------------------------------------------


def test_ranks_that_wait_stop_where_they_are_others_at_their_next_point() -> None:
    assert quiesce.agree([[at(0, 7, waiting=True)], [at(1, 7, waiting=True)]]).targets == ((1, 7),)
    assert quiesce.agree([[at(0, 7, waiting=True)], [at(1, 7)]]).targets == ((1, 8),)
    assert quiesce.agree([[at(0, 7, waiting=True)], [at(1, 4, waiting=True)]]).targets == ((1, 7),)


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=20))
def test_no_rank_has_passed_the_target_and_some_rank_could_not_stop_earlier(where: list[tuple[int, bool]]) -> None:
    ranks = [at(k, count, size=len(where), waiting=waiting) for k, (count, waiting) in enumerate(where)]
    ((_, target),) = quiesce.agree([ranks[::2], ranks[1::2]]).targets
    firsts = [count if waiting else count + 1 for count, waiting in where]
    assert all(first <= target for first in firsts) and target in firsts


def test_disjoint_groups_have_targets_of_their_own() -> None:
    first = [at(0, 3, group=5, pid=300), at(1, 3, group=5, pid=301)]
    second = [at(0, 90, group=9, pid=302), at(1, 91, group=9, pid=303)]
    assert quiesce.agree([first, second]).targets == ((5, 4), (9, 92))


def test_of_groups_that_share_ranks_the_larger_one_stops() -> None:
    world = [at(k, 2, group=9, size=4, pid=300 + k) for k in range(4)]
    halves = [at(k % 2, 40, group=1 + k // 2, pid=300 + k) for k in range(4)]
    assert quiesce.agree([[*halves, *world]]).targets == ((9, 3),)
    # The same pid in another capsule is another process.
    assert quiesce.agree([world, [at(k, 1, group=3, pid=300 + k) for k in range(2)]]).targets == ((9, 3), (3, 2))


def test_a_group_that_is_not_called_any_more_does_not_stop() -> None:
    world = [at(k, 9, group=9, size=4, pid=300 + k, left=10) for k in range(4)]
    halves = [at(k % 2, 40, group=1 + k // 2, pid=300 + k) for k in range(4)]
    assert quiesce.agree([[*world, *halves]]).targets == ((1, 41), (2, 41))
    # It is worth waiting for where there have been as many calls between two of its own before.
    world = [at(k, 9, group=9, size=4, pid=300 + k, left=10, gap=40) for k in range(4)]
    assert quiesce.agree([[*world, *halves]]).targets == ((9, 10),)


def test_ranks_that_no_group_covers() -> None:
    three = [at(k, 2, group=9, size=3, pid=300 + k) for k in range(3)]
    two = [at(0, 2, group=1, pid=302, left=2, gap=5), at(1, 2, group=1, pid=303)]
    assert "1 ranks share some" in quiesce.agree([[*three, *two]]).incomplete


def test_nobody_takes_part() -> None:
    assert quiesce.agree([(), ()]) == quiesce.Agreement()
    gone = [at(0, 5, gone=True), at(1, 5, gone=True)]
    assert quiesce.agree([gone]) == quiesce.Agreement()  # a program that has ended before this one


def test_a_group_that_is_not_whole_cannot_stop() -> None:
    for ranks in ([at(0, 5)], [at(0, 5), at(1, 5, gone=True)]):
        found = quiesce.agree([ranks])
        assert not found.targets and "1 of 2 ranks" in found.incomplete


# --- the stages -----------------------------------------------------------------------------------------------------


class Machine:
    def __init__(self, mode: str) -> None:
        self.state = plan.State(2)
        self.actions: list[plan.Action] = []
        self.feed(plan.Boot())
        for kind in (None, m.Connected(), m.Started(300)):
            self.answer(*(kind or m.Created(m.Endpoint(k, "192.0.2.1", k + 1, ""), f"node{k}", ()) for k in range(2)))
        self.feed(plan.Ask(plan.Attempt(7, "0" * 32, kill=False, quiesce=mode)))

    def feed(self, event: plan.Event) -> None:
        self.state, actions = plan.step(self.state, event)
        self.actions += actions

    def answer(self, *messages: m.Message) -> None:
        for capsule, message in enumerate(messages):
            self.feed(plan.Reply(capsule, message))

    def stand(self, first: m.RankAt, second: m.RankAt) -> None:
        self.answer(m.Quiesced((first,)), m.Quiesced((second,)))


def test_all_stages_then_the_checkpoint() -> None:
    machine = Machine("require")
    assert machine.state.phase is Phase.ASKING
    machine.stand(at(0, 4), at(1, 5))
    assert (machine.state.phase, machine.state.targets) == (Phase.ARRIVING, ((1, 6),))
    machine.stand(at(0, 6, arrived=True), at(1, 6, arrived=True))
    assert machine.state.phase is Phase.FINISHING
    machine.stand(at(0, 6, arrived=True, finished=True), at(1, 6, arrived=True, finished=True))
    assert machine.actions[-2:] == [plan.AllQuiesced(2), plan.Request(Phase.PREPARING, (0, 1))]


def test_a_rank_that_does_not_arrive_is_named() -> None:
    for mode in ("prefer", "require"):
        machine = Machine(mode)
        machine.stand(at(0, 4), at(1, 5))
        machine.stand(at(0, 6, arrived=True), at(1, 5))
        if mode == "prefer":
            why, request = machine.actions[-2:]
            assert isinstance(why, plan.NotQuiesced) and "rank 1 (pid 301 on node1), at 5 of 6" in why.why
            assert "rank 0" not in why.why and request == plan.Request(Phase.PREPARING, (0, 1))
        else:
            assert machine.state.phase is Phase.ABORTING
            machine.answer(m.Aborted(), m.Aborted())
            failed = machine.actions[-1]
            assert isinstance(failed, plan.CheckpointFailed) and "rank 1" in failed.failure.message
            assert machine.state.phase is Phase.RUNNING


def test_messages_that_nobody_receives_are_told() -> None:
    machine = Machine("prefer")
    machine.stand(at(0, 4), at(1, 4))
    machine.stand(at(0, 5, arrived=True), at(1, 5, arrived=True))
    machine.stand(at(0, 5, arrived=True, finished=True, pending=3), at(1, 5, arrived=True, finished=True))
    why = machine.actions[-2]
    assert isinstance(why, plan.NotQuiesced) and "rank 0" in why.why and "3 messages" in why.why


def test_nobody_there_is_a_plain_checkpoint_unless_required() -> None:
    machine = Machine("prefer")
    machine.answer(m.Quiesced(()), m.Quiesced(()))
    assert machine.actions[-1] == plan.Request(Phase.PREPARING, (0, 1))
    assert not any(isinstance(action, plan.NotQuiesced) for action in machine.actions)
    machine = Machine("require")
    machine.answer(m.Quiesced(()), m.Quiesced(()))
    assert machine.state.failure is not None and "no rank" in machine.state.failure.message
    assert Machine("off").state.phase is Phase.PREPARING


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_three_sides_have_one_layout() -> None:
    header = (ROOT / "mpi" / "page.h").read_text()

    def number(name: str) -> int:
        (found,) = re.findall(rf"#define {name} (?:UINT64_C\()?(\w+)", header)
        return int(found, 0)

    assert number("HPCCR_MAGIC") == layout.MAGIC == init_side.MAGIC
    assert number("HPCCR_ENTRIES") == layout.MAX_ENTRIES == init_side.MAX_ENTRIES
    assert layout.PATH == init_side.PATH and f'"{layout.PATH}"' in header
    assert layout.WISHES == init_side.WISHES
    words = (layout.CLAIMED, layout.ASKED, layout.ENDED, layout.OUTCOME, layout.TARGETED, layout.GO)
    theirs = (
        init_side._CLAIMED, init_side._ASKED, init_side._ENDED, init_side._OUTCOME, init_side._TARGETED, init_side._GO,
    )  # fmt: skip
    assert tuple(8 * word for word in words) == theirs
    assert (8 * layout.ENTRIES, 8 * layout.ENTRY, 8 * layout.TARGET) == (
        init_side._ENTRIES, init_side._ENTRY, init_side._TARGET,
    )  # fmt: skip
    assert init_side._RANK.size == 8 * layout.ENTRY


def test_outside_of_a_capsule_nothing_is_asked() -> None:
    page = layout.attach()
    assert page[layout.ASKED] == 0
    assert layout.claim(page)[1] == layout.ENTRIES


def test_importing_it_does_not_import_mpi4py() -> None:
    import subprocess
    import sys

    code = "import sys, hpccr.mpi; hpccr.mpi.request_checkpoint(); sys.exit('mpi4py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
