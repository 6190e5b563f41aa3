"""Where ranks stand still: the agreement as a pure function, its stages in the plan, and the page's layout."""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccr.coordinator import plan, quiesce
from hpccr.coordinator.plan import Phase
from hpccr.errors import LockedError
from hpccr.mpi import page as layout
from hpccr.noded import quiesce as init_side
from hpccr.noded.control import Identity
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
        # What takes long, or may be refused, comes before the ranks stand still.
        assert self.state.phase is Phase.PREPARING
        self.answer(m.Prepared(1), m.Prepared(1))

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
    assert machine.actions[-2:] == [plan.AllQuiesced(2), plan.Request(Phase.FREEZING, (0, 1))]


def test_ranks_without_the_library_are_told_apart() -> None:
    machine = Machine("require")
    machine.stand(at(0, 4), at(1, 4))
    machine.stand(at(0, 5, arrived=True), at(1, 5, arrived=True))
    machine.stand(at(0, 5, arrived=True, finished=True, uncounted=True), at(1, 5, arrived=True, finished=True))
    assert machine.actions[-2] == plan.AllQuiesced(2, uncounted=1)


def test_a_rank_that_does_not_arrive_is_named() -> None:
    for mode in ("prefer", "require"):
        machine = Machine(mode)
        machine.stand(at(0, 4), at(1, 5))
        machine.stand(at(0, 6, arrived=True), at(1, 5))
        if mode == "prefer":
            why, request = machine.actions[-2:]
            assert isinstance(why, plan.NotQuiesced) and "rank 1 (pid 301 on node1), at 5 of 6" in why.why
            assert "rank 0" not in why.why and request == plan.Request(Phase.FREEZING, (0, 1))
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
    assert machine.actions[-1] == plan.Request(Phase.FREEZING, (0, 1))
    assert not any(isinstance(action, plan.NotQuiesced) for action in machine.actions)
    machine = Machine("require")
    machine.answer(m.Quiesced(()), m.Quiesced(()))
    assert machine.state.failure is not None and "no rank" in machine.state.failure.message
    assert Machine("off").state.phase is Phase.FREEZING


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
    names = ("CLAIMED", "ASKED", "ENDED", "OUTCOMES", "TARGETED", "GO", "RESTARTS", "PATIENCE")
    words = [getattr(layout, name) for name in names]
    theirs = [getattr(init_side, f"_{name}") for name in names]
    assert [8 * word for word in words] == theirs
    assert (8 * layout.ENTRIES, 8 * layout.ENTRY, 8 * layout.TARGET, 8 * layout.COUNT) == (
        init_side._ENTRIES, init_side._ENTRY, init_side._TARGET, init_side._COUNT,
    )  # fmt: skip
    assert init_side._RANK.size == 8 * layout.ENTRY
    assert layout.UNCOUNTED == init_side._UNCOUNTED


class Capsule:
    """A page with one rank, this process, and the init that serves it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.fd, layout.SIZE)
        self.page = memoryview(mmap.mmap(self.fd, layout.SIZE)).cast("Q")
        self.page[layout.MAGIC_WORD] = layout.MAGIC
        self.page[layout.CLAIMED] = 1
        halves = self.page.cast("B").cast("I")
        for half, value in ((layout.PID, os.getpid()), (layout.SIZE_OF_GROUP, 1), (layout.STATE, layout.ACTIVE)):
            halves[2 * layout.ENTRIES + layout.HALVES + half] = value
        self.page[layout.ENTRIES + layout.GROUP] = 5
        self.init = init_side.Ranks(Identity(os.getuid(), os.getgid(), (), 0o022, (), (), 0))

    def open(self) -> init_side.Ranks:
        self.init._fd = os.dup(self.fd)  # a helper with the user's ids does that, which only root can start
        return self.init

    def stage(self, name: Literal["ask", "arrive", "finish"], *targets: tuple[int, int]) -> tuple[m.RankAt, ...]:
        return asyncio.run(self.init.stage(m.Quiesce(name, 0, targets))).ranks


def test_every_restart_is_told_asked_or_not(tmp_path: Path) -> None:
    capsule = Capsule(tmp_path / "page")
    capsule.open().end(init_side.Outcome.RESTARTED)
    assert (capsule.page[layout.RESTARTS], capsule.page[layout.ENDED]) == (1, 0)
    for question, outcome in ((1, init_side.Outcome.ABANDONED), (2, init_side.Outcome.RESTARTED)):
        capsule.page[layout.ASKED] = question
        capsule.open().end(outcome)
    # A rank that has not looked yet still finds how the question before ended.
    assert capsule.page[layout.OUTCOMES + 1] == init_side.Outcome.ABANDONED
    assert (capsule.page[layout.OUTCOMES], capsule.page[layout.RESTARTS]) == (init_side.Outcome.RESTARTED, 2)
    capsule.open().end(init_side.Outcome.RESUMED)
    assert (capsule.page[layout.OUTCOMES], capsule.page[layout.RESTARTS]) == (init_side.Outcome.RESTARTED, 2)


def test_a_page_that_was_removed_is_no_page_of_the_checkpoint(tmp_path: Path) -> None:
    capsule = Capsule(tmp_path / "page")
    capsule.open()
    capsule.page[layout.ASKED] = 1
    capsule.stage("arrive", (5, 3))
    capsule.path.unlink()
    with pytest.raises(LockedError, match="was removed"):  # which is tried again
        capsule.stage("finish", (5, 3))


def test_a_process_with_the_number_of_a_dead_rank_is_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capsule = Capsule(tmp_path / "page")
    monkeypatch.setattr(init_side, "PATH", str(capsule.path))
    assert init_side._maps_page(os.getpid())
    assert not init_side._maps_page(os.getppid())


def test_the_first_claim_of_a_process_ends_those_of_one_before_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capsule = Capsule(tmp_path / "page")
    monkeypatch.setenv("HPCCR_CAPSULE", "0")
    monkeypatch.setattr(layout, "in_capsule", lambda: True)
    assert layout.claim(capsule.page, first=True)[1] == layout.ENTRIES
    assert layout.claim(capsule.page, first=False)[1] == layout.ENTRIES + layout.ENTRY


def test_wishes_of_all_ranks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"\0hpccr-test-{os.getpid()}"
    monkeypatch.setattr(init_side, "WISHES", name)
    monkeypatch.setattr(init_side, "WISH_PAUSE", 0.05)

    async def run() -> None:
        heard: list[asyncio.Future[None]] = [asyncio.Future(), asyncio.Future()]
        count = iter(heard)
        wishes = init_side.Wishes(lambda: next(count).set_result(None))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as rank:
            rank.sendto(b"c", name)
            await heard[0]
            for _ in range(3):
                rank.sendto(b"c", name)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(heard[1]), 0.3)
            rank.sendto(b"c", name)
            await asyncio.wait_for(heard[1], 10)
        wishes.close()

    asyncio.run(run())


def test_outside_of_a_capsule_nothing_is_asked() -> None:
    page = layout.attach()
    assert page[layout.ASKED] == 0
    assert layout.claim(page, first=True)[1] == layout.ENTRIES


def test_importing_it_does_not_import_mpi4py() -> None:
    code = "import sys, hpccr.mpi; hpccr.mpi.request_checkpoint(); sys.exit('mpi4py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_rank_hears_of_every_restart(tmp_path: Path) -> None:
    script = str(Path(__file__).parent / "mpi" / "restarts.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=environment, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
