"""The protocol state machine: every barrier, every failure in every phase."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccr.coordinator import plan
from hpccr.coordinator.plan import Phase
from hpccr.wire import messages as m

ATTEMPT = plan.Attempt(7, "0" * 32, kill=False)
KILL = plan.Attempt(7, "0" * 32, kill=True)
QUIESCED = plan.Attempt(7, "0" * 32, kill=False, quiesce="prefer")


def created(k: int) -> m.Created:
    return m.Created(m.Endpoint(k, "192.0.2.1", k + 1, ""), f"node{k}", ())


ANSWERS = {
    Phase.CREATING: created,
    Phase.CONNECTING: lambda k: m.Connected(),
    Phase.STARTING: lambda k: m.Started(300),
    Phase.FETCHING: lambda k: m.Fetched(),
    Phase.ROLLING_BACK: lambda k: m.RolledBack(0),
    Phase.RESTORING: lambda k: m.Restored(0.1, 0.2, 10, 2),
    Phase.RESUMING: lambda k: m.Resumed(),
    Phase.UNHOLDING: lambda k: m.Unheld(),
    **dict.fromkeys(
        plan.QUIESCE,
        lambda k: m.Quiesced((m.RankAt(1, 3, k, 300, 4, waiting=True, arrived=True, finished=True),)),
    ),
    Phase.PREPARING: lambda k: m.Prepared(100),
    Phase.FREEZING: lambda k: m.Frozen(3),
    Phase.SURVEYING: lambda k: m.Surveyed((bytes(16),)),
    Phase.DUMPING: lambda k: m.Dumped(50),
    Phase.RELEASING: lambda k: m.Released(0.5),
    Phase.ABORTING: lambda k: m.Aborted(),
}


class Machine:
    """Feeds events and keeps all actions."""

    def __init__(self, capsules: int, source: plan.Source | None = None) -> None:
        self.state = plan.State(capsules, source)
        self.actions: list[plan.Action] = []

    def feed(self, *events: plan.Event) -> None:
        for event in events:
            self.state, actions = plan.step(self.state, event)
            self.actions += actions

    def answer_all(self, order: list[int] | None = None) -> None:
        phase = self.state.phase
        for k in order or range(self.state.capsules):
            assert self.state.phase is phase
            self.feed(plan.Reply(k, ANSWERS[phase](k)))

    def to(self, phase: Phase, attempt: plan.Attempt = ATTEMPT) -> Machine:
        if not self.actions:
            self.feed(plan.Boot())
        while self.state.phase is not phase:
            if self.state.phase is Phase.RUNNING:
                self.feed(plan.Ask(attempt))
            elif self.state.phase is Phase.RECORDING:
                self.feed(plan.Recorded())
            else:
                self.answer_all()
        return self

    def last(self, kind: type) -> plan.Action:
        found = [action for action in self.actions if isinstance(action, kind)]
        assert found, f"no {kind.__name__} in {self.actions}"
        return found[-1]


def requests(machine: Machine) -> list[Phase]:
    return [action.phase for action in machine.actions if isinstance(action, plan.Request)]


def test_start_goes_through_its_phases_in_order() -> None:
    machine = Machine(2).to(Phase.RUNNING)
    assert requests(machine) == [Phase.CREATING, Phase.CONNECTING, Phase.STARTING]
    assert machine.last(plan.Running) == plan.Running()


def test_restore_goes_through_its_phases_and_reports_what_was_restored() -> None:
    machine = Machine(2, plan.Source(3, "1" * 32)).to(Phase.RUNNING)
    phases = [Phase.FETCHING, Phase.ROLLING_BACK, Phase.RESTORING, Phase.RESUMING, Phase.UNHOLDING]
    assert requests(machine)[2:] == phases
    assert len(machine.last(plan.Running).restored) == 2


@given(st.integers(1, 5), st.randoms())
def test_no_phase_ends_before_every_capsule_has_answered(capsules: int, random) -> None:  # type: ignore[no-untyped-def]
    machine = Machine(capsules).to(Phase.PREPARING)
    surveying = [Phase.SURVEYING] if capsules > 1 else []
    for phase in (Phase.PREPARING, Phase.FREEZING, *surveying, Phase.DUMPING, Phase.RELEASING):
        assert machine.state.phase is phase
        order = list(range(capsules))
        random.shuffle(order)
        for k in order[:-1]:
            machine.feed(plan.Reply(k, ANSWERS[phase](k)))
            assert machine.state.phase is phase
        machine.feed(plan.Reply(order[-1], ANSWERS[phase](order[-1])))
    assert machine.state.phase is Phase.RUNNING
    assert machine.last(plan.CheckpointReleased).attempt == ATTEMPT


def test_release_is_never_asked_before_all_are_dumped() -> None:
    machine = Machine(3).to(Phase.DUMPING)
    machine.feed(plan.Reply(0, m.Dumped(1)), plan.Reply(2, m.Dumped(1)))
    assert Phase.RELEASING not in requests(machine)
    machine.feed(plan.Reply(1, m.Dumped(1)))
    assert requests(machine)[-1] is Phase.RELEASING


@pytest.mark.parametrize("phase", plan.ABORTABLE)
@pytest.mark.parametrize("how", ["failed", "deadline", "cancel"])
def test_a_failure_before_the_release_aborts_everywhere_and_the_job_goes_on(phase: Phase, how: str) -> None:
    machine = Machine(3).to(phase, {Phase.RECORDING: KILL}.get(phase, QUIESCED if phase in plan.QUIESCE else ATTEMPT))
    if phase is not Phase.RECORDING:
        machine.feed(plan.Reply(0, ANSWERS[phase](0)))
    event: plan.Event = {
        "failed": plan.Reply(1, m.Failed(13, "io_uring", "do not")),
        "deadline": plan.Deadline(phase),
        "cancel": plan.Cancel("changed my mind"),
    }[how]
    machine.feed(event)
    assert machine.actions[-1] == plan.Request(Phase.ABORTING, (0, 1, 2))
    machine.feed(plan.Reply(2, m.Failed(1, "aborted")))  # the request that the abort overtook
    machine.answer_all()
    assert machine.state.phase is Phase.RUNNING
    failed = machine.last(plan.CheckpointFailed)
    if how == "failed":
        assert (failed.failure.code, failed.failure.node) == (13, "node1")
    machine.feed(plan.Ask(ATTEMPT))
    assert machine.state.phase is Phase.PREPARING


@pytest.mark.parametrize("phase", [p for p in ANSWERS if p in plan.BOOT])
def test_a_failure_while_booting_fails_the_boot(phase: Phase) -> None:
    source = plan.Source(1, "0" * 32) if phase not in (Phase.STARTING,) else None
    machine = Machine(2, source).to(phase)
    machine.feed(plan.Reply(1, m.Failed(12, "bad digest")))
    assert machine.state.phase is Phase.ENDED
    assert machine.last(plan.BootFailed).phase is phase


@pytest.mark.parametrize(
    "phase",
    [Phase.RUNNING, Phase.PREPARING, Phase.FREEZING, Phase.DUMPING, Phase.RECORDING, Phase.RELEASING, Phase.ABORTING],
)
def test_a_lost_agent_ends_the_step(phase: Phase) -> None:
    if phase is Phase.ABORTING:
        machine = Machine(2).to(Phase.FREEZING)
        machine.feed(plan.Cancel("x"))
    else:
        machine = Machine(2).to(phase, KILL if phase is Phase.RECORDING else ATTEMPT)
    machine.feed(plan.Lost(1, "killed"))
    assert machine.state.phase is Phase.ENDED
    assert machine.last(plan.StepLost).failure.code == 14


def test_durable_when_all_have_flushed_and_not_before() -> None:
    machine = Machine(2).to(Phase.RELEASING)
    machine.answer_all()
    machine.feed(plan.Reply(0, m.FlushStarted()), plan.Reply(0, m.Flushed(7, 1, 1.0)))
    assert not any(isinstance(action, plan.Durable) for action in machine.actions)
    with pytest.raises(ValueError, match="flushing"):
        plan.step(machine.state, plan.Ask(ATTEMPT))
    machine.feed(plan.Reply(1, m.Flushed(6, 1, 1.0)))  # of an older checkpoint
    machine.feed(plan.Reply(1, m.Flushed(7, 1, 1.0)))
    assert machine.last(plan.Durable) == plan.Durable(7)


def test_the_final_checkpoint_overtakes_a_flush_and_both_become_durable() -> None:
    machine = Machine(2).to(Phase.RELEASING)
    machine.answer_all()
    machine.feed(plan.Reply(0, m.Flushed(7, 1, 1.0)))
    machine.feed(plan.Ask(plan.Attempt(8, "1" * 32, kill=True)))
    machine.to(Phase.KILLED)
    machine.feed(plan.Reply(0, m.Flushed(8, 1, 1.0)), plan.Reply(1, m.Flushed(8, 1, 1.0)))
    assert machine.last(plan.Durable) == plan.Durable(8)
    machine.feed(plan.Reply(1, m.Flushed(7, 1, 1.0)))
    assert machine.last(plan.Durable) == plan.Durable(7)


FAILURES = [m.FlushFailed(7, "disk full", "make room"), m.Failed(1, "no such directory")]


@pytest.mark.parametrize("message", FAILURES)
def test_a_failed_flush_leaves_the_job_running(message: m.Message) -> None:
    machine = Machine(2).to(Phase.RELEASING)
    machine.answer_all()
    machine.feed(plan.Reply(1, message))
    assert machine.state.phase is Phase.RUNNING
    with pytest.raises(ValueError, match="flushing"):
        plan.step(machine.state, plan.Ask(ATTEMPT))  # the other spool has a checkpoint under way
    machine.feed(plan.Reply(0, m.Flushed(7, 1, 1.0)))
    assert machine.last(plan.NotDurable).failure.node == "node1"
    assert not any(isinstance(action, plan.Durable) for action in machine.actions)
    machine.feed(plan.Ask(ATTEMPT))
    assert machine.state.phase is Phase.PREPARING


def test_killed_at_release_nothing_but_flushes_matters() -> None:
    machine = Machine(2).to(Phase.RELEASING, KILL)
    machine.answer_all()
    assert machine.state.phase is Phase.KILLED
    machine.feed(plan.Reply(0, m.Exited(137)), plan.Reply(0, m.Flushed(7, 1, 1.0)))
    machine.feed(plan.Lost(1, "node died"))
    assert isinstance(machine.actions[-1], plan.NotDurable)


def test_nothing_is_killed_before_the_manifest_is_in_the_store() -> None:
    machine = Machine(2).to(Phase.DUMPING, KILL)
    machine.answer_all()
    assert machine.actions[-1] == plan.Record(KILL)
    assert Phase.RELEASING not in requests(machine)
    machine.feed(plan.Recorded(m.Failed(1, "no space left")))
    assert machine.state.phase is Phase.ABORTING
    machine.answer_all()
    assert machine.state.phase is Phase.RUNNING
    assert machine.last(plan.CheckpointFailed).failure.message == "no space left"
    machine.feed(plan.Recorded())  # a late word on the attempt that was given up
    assert machine.state.phase is Phase.RUNNING
    machine.to(Phase.RECORDING, KILL).feed(plan.Recorded())
    assert machine.actions[-1] == plan.Request(Phase.RELEASING, (0, 1))


def test_what_a_killed_job_has_left_is_flushed_until_that_succeeds() -> None:
    machine = Machine(2).to(Phase.KILLED, KILL)
    machine.feed(plan.Reply(0, m.Flushed(7, 1, 1.0)))
    for _ in range(3):
        machine.feed(plan.Reply(1, FAILURES[0]))
        again = machine.last(plan.FlushAgain)
        assert (again.sequence, again.capsule, again.failure.node) == (7, 1, "node1")
    assert not any(isinstance(action, plan.NotDurable) for action in machine.actions)
    machine.feed(plan.Reply(1, m.Flushed(7, 1, 1.0)))
    assert machine.actions[-1] == plan.Durable(7)


def test_a_failed_flush_that_the_final_checkpoint_overtook_is_not_repeated() -> None:
    machine = Machine(1).to(Phase.RELEASING)
    machine.answer_all()
    machine.to(Phase.KILLED, plan.Attempt(8, "1" * 32, kill=True))
    machine.feed(plan.Reply(0, FAILURES[0]))
    assert machine.last(plan.NotDurable).sequence == 7
    machine.feed(plan.Reply(0, m.FlushFailed(8, "disk full", "")))
    assert machine.last(plan.FlushAgain).sequence == 8


def test_the_commands_end_is_the_steps_end_also_during_a_checkpoint() -> None:
    for phase in (Phase.RUNNING, Phase.PREPARING, Phase.FREEZING):
        machine = Machine(2).to(phase)
        machine.feed(plan.Reply(0, m.Exited(3)))
        assert machine.last(plan.Finished) == plan.Finished(3)
        state, actions = plan.step(machine.state, plan.Lost(1, "late"))
        assert (state, actions) == (machine.state, ())


def test_another_launch_roots_end_loses_the_step() -> None:
    machine = Machine(2).to(Phase.RUNNING)
    machine.feed(plan.Reply(1, m.Exited(0)))
    assert "hpccr-1" in machine.last(plan.StepLost).failure.message


def test_a_late_deadline_changes_nothing() -> None:
    machine = Machine(1).to(Phase.DUMPING)
    before = machine.state
    machine.feed(plan.Deadline(Phase.FREEZING))
    assert machine.state == before


@given(st.data())
def test_whatever_happens_no_release_without_all_dumps(data: st.DataObject) -> None:
    """Random events in any order: a release is asked for only in a state where every capsule has dumped."""
    machine = Machine(data.draw(st.integers(1, 3)))
    machine.feed(plan.Boot())
    dumped: set[int] = set()
    for _ in range(data.draw(st.integers(1, 60))):
        if machine.state.phase is Phase.ENDED:
            break
        phase, k = machine.state.phase, data.draw(st.integers(0, machine.state.capsules - 1))
        options: list[plan.Event] = [plan.Deadline(phase), plan.Cancel("x"), plan.Lost(k, "x")]
        if phase in ANSWERS:
            options += [plan.Reply(k, ANSWERS[phase](k))] * 12 + [plan.Reply(k, m.Failed(1, "x"))]
        if phase is Phase.RUNNING:
            options += [plan.Reply(j, m.Flushed(7, 1, 1.0)) for _, j in machine.state.flushing] * 4
            if not machine.state.flushing:
                options += [plan.Ask(ATTEMPT)] * 12
        event = data.draw(st.sampled_from(options))
        if isinstance(event, plan.Ask):
            dumped = set()
        if isinstance(event, plan.Reply) and isinstance(event.message, m.Dumped):
            dumped.add(event.capsule)
        seen = len(machine.actions)
        machine.feed(event)
        for action in itertools.islice(machine.actions, seen, None):
            if isinstance(action, plan.Request) and action.phase is Phase.RELEASING:
                assert dumped == set(range(machine.state.capsules))
