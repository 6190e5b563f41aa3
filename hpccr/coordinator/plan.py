"""The protocols of a step as a pure state machine: (state, event) -> (state, actions). No I/O, no clock.

Boot: create, connect, then start, or fetch, roll back, restore, resume, unhold. Checkpoint: prepare, which may take
long and be refused; ask, arrive, finish (the quiesce, where ranks take part in one); then freeze, survey, dump,
(record,) release, flush.
Each phase sends one request to every capsule and ends when every capsule has answered; the barrier between two
phases is what makes a checkpoint all or nothing. No capsule is released before every capsule is dumped: a message
sent by a released capsule to one not yet dumped would be received twice.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

from hpccr.coordinator import quiesce
from hpccr.errors import ExitCode
from hpccr.wire import messages as m


class Phase(enum.StrEnum):
    CREATING = "creating"
    CONNECTING = "connecting"
    STARTING = "starting"
    FETCHING = "fetching"
    ROLLING_BACK = "rolling back"
    RESTORING = "restoring"
    RESUMING = "resuming"
    UNHOLDING = "unholding"
    RUNNING = "running"
    PREPARING = "preparing"
    ASKING = "asking"
    ARRIVING = "arriving"
    FINISHING = "finishing"
    FREEZING = "freezing"
    SURVEYING = "surveying"
    DUMPING = "dumping"
    RECORDING = "recording"
    """Before a release that kills: what could still keep the checkpoint from being one comes first."""
    RELEASING = "releasing"
    ABORTING = "aborting"
    KILLED = "killed"
    """Released with kill=True: nothing runs any more, flushes may."""
    ENDED = "ended"
    """The step is over: finished, failed to boot, or lost."""


BOOT = (
    Phase.CREATING,
    Phase.CONNECTING,
    Phase.STARTING,
    Phase.FETCHING,
    Phase.ROLLING_BACK,
    Phase.RESTORING,
    Phase.RESUMING,
    Phase.UNHOLDING,
)
QUIESCE = (Phase.ASKING, Phase.ARRIVING, Phase.FINISHING)
UNFROZEN = (Phase.PREPARING, *QUIESCE)
"""Phases of a checkpoint, some of them long, in which nothing stands still yet."""
ABORTABLE = (*UNFROZEN, Phase.FREEZING, Phase.SURVEYING, Phase.DUMPING, Phase.RECORDING)
CHECKPOINT = (*ABORTABLE, Phase.RELEASING, Phase.ABORTING)

_EXPECTED: dict[Phase, type[m.Message]] = {
    Phase.CREATING: m.Created,
    Phase.CONNECTING: m.Connected,
    Phase.STARTING: m.Started,
    Phase.FETCHING: m.Fetched,
    Phase.ROLLING_BACK: m.RolledBack,
    Phase.RESTORING: m.Restored,
    Phase.RESUMING: m.Resumed,
    Phase.UNHOLDING: m.Unheld,
    Phase.PREPARING: m.Prepared,
    Phase.ASKING: m.Quiesced,
    Phase.ARRIVING: m.Quiesced,
    Phase.FINISHING: m.Quiesced,
    Phase.FREEZING: m.Frozen,
    Phase.SURVEYING: m.Surveyed,
    Phase.DUMPING: m.Dumped,
    Phase.RELEASING: m.Released,
    Phase.ABORTING: m.Aborted,
}


@dataclass(frozen=True)
class Source:
    """The checkpoint a boot restores."""

    sequence: int
    checkpoint: str


@dataclass(frozen=True)
class Attempt:
    """The checkpoint being made."""

    sequence: int
    checkpoint: str
    kill: bool
    quiesce: str = "off"
    """prefer, require or off."""


@dataclass(frozen=True)
class State:
    """One boot of a step and all its checkpoints. Replies are kept by capsule for the phase that collects them."""

    capsules: int
    source: Source | None = None
    phase: Phase = Phase.CREATING
    waiting: frozenset[int] = frozenset()
    replies: tuple[tuple[int, m.Message], ...] = ()
    created: tuple[m.Created, ...] = ()
    """In capsule order, once all capsules exist."""
    restored: tuple[m.Restored, ...] = ()
    """In capsule order, once all capsules are restored."""
    dumped: tuple[m.Dumped, ...] = ()
    """Of the newest checkpoint, in capsule order."""
    attempt: Attempt | None = None
    targets: tuple[tuple[int, int], ...] = ()
    """Of the attempt's quiesce: (group of ranks, number of the safe point)."""
    failure: m.Failed | None = None
    """Why the attempt is being aborted."""
    flushing: frozenset[tuple[int, int]] = frozenset()
    """(sequence, capsule) of each flush under way. More than one sequence only when the final checkpoint overtook."""
    unflushed: tuple[tuple[int, m.Failed], ...] = ()
    """(sequence, why) of the first failed flush of each checkpoint whose other flushes are still under way."""
    flush_sequence: int = 0
    """Of the newest checkpoint that was released."""


# --- events -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Boot:
    """All agents have joined."""


@dataclass(frozen=True)
class Reply:
    """A capsule's answer or event."""

    capsule: int
    message: m.Message


@dataclass(frozen=True)
class Lost:
    """The agent of a capsule, or its hpccrd, is gone."""

    capsule: int
    reason: str


@dataclass(frozen=True)
class Deadline:
    """The time for a phase is over. Ignored unless `phase` is still the current one."""

    phase: Phase


@dataclass(frozen=True)
class Ask:
    """Make a checkpoint. Allowed while RUNNING and, unless it is the final one, no flush is under way."""

    attempt: Attempt


@dataclass(frozen=True)
class Cancel:
    """Give the checkpoint under way up, if it still can be."""

    reason: str


@dataclass(frozen=True)
class Recorded:
    """The manifest of the checkpoint under way is in the store, or why it could not be put there."""

    failure: m.Failed | None = None


Event = Boot | Reply | Lost | Deadline | Ask | Cancel | Recorded


# --- actions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Send the request that belongs to `phase` to every capsule in `capsules`; then the phase's deadline runs."""

    phase: Phase
    capsules: tuple[int, ...]


@dataclass(frozen=True)
class Running:
    """The job runs (again) and the network is open. restored: in capsule order, after a restore."""

    restored: tuple[m.Restored, ...] = ()


@dataclass(frozen=True)
class AllQuiesced:
    """That many ranks stand at a safe point, their traffic finished and their hooks run.

    uncounted: those of them whose messages nobody has counted.
    """

    ranks: int
    uncounted: int = 0


@dataclass(frozen=True)
class NotQuiesced:
    """The checkpoint goes on transparently; why, and which ranks were missing."""

    why: str


@dataclass(frozen=True)
class AllFrozen:
    """Every task of the job stands still: record how far its streams have got."""

    replies: tuple[tuple[int, m.Message], ...]


@dataclass(frozen=True)
class AllSurveyed:
    """The files of all capsules are known: decide who saves those that several have."""

    replies: tuple[tuple[int, m.Message], ...]


@dataclass(frozen=True)
class Record:
    """All capsules have dumped and their tasks are about to be killed: publish the manifest, then say Recorded. The
    phase's deadline runs."""

    attempt: Attempt


@dataclass(frozen=True)
class CheckpointReleased:
    """The checkpoint is in the spools of all nodes and the job goes on (or is killed): publish the manifest, unless it
    was Recorded, then flush every capsule."""

    attempt: Attempt
    replies: tuple[tuple[int, m.Message], ...]


@dataclass(frozen=True)
class CheckpointFailed:
    """The checkpoint was given up; the job runs as before."""

    attempt: Attempt
    failure: m.Failed


@dataclass(frozen=True)
class Durable:
    """All fragments of a checkpoint are in the store."""

    sequence: int


@dataclass(frozen=True)
class FlushAgain:
    """A capsule's flush of the checkpoint that the job was killed for failed: it is all that is left of the job, and
    whole in the spool. Flush it again, after a while."""

    sequence: int
    capsule: int
    failure: m.Failed


@dataclass(frozen=True)
class NotDurable:
    """A capsule's flush failed, and no flush of this checkpoint is under way any more: it stays incomplete."""

    sequence: int
    failure: m.Failed


@dataclass(frozen=True)
class Finished:
    """The job's command ended with this exit code, or by signal -code."""

    code: int


@dataclass(frozen=True)
class BootFailed:
    """The job could not be started or restored; nothing of it runs once all capsules are destroyed."""

    phase: Phase
    """Where it failed: from FETCHING on another checkpoint may do better."""
    failure: m.Failed


@dataclass(frozen=True)
class StepLost:
    """A part of the running job is gone, so the rest is of no use."""

    failure: m.Failed


Action = (
    Request
    | Running
    | AllQuiesced
    | NotQuiesced
    | AllFrozen
    | AllSurveyed
    | Record
    | CheckpointReleased
    | CheckpointFailed
    | Durable
    | FlushAgain
    | NotDurable
    | Finished
    | BootFailed
    | StepLost
)


def step(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """The next state and what to do. Events that no longer matter change nothing."""
    if state.phase is Phase.ENDED:
        return state, ()
    match event:
        case Boot():
            return _enter(state, Phase.CREATING)
        case Ask(attempt):
            if state.phase is not Phase.RUNNING or (state.flushing and not attempt.kill):
                raise ValueError(f"a checkpoint cannot begin while {state.phase}, flushing {sorted(state.flushing)}")
            return _enter(dataclasses.replace(state, attempt=attempt, failure=None, targets=()), Phase.PREPARING)
        case Cancel(reason):
            return _abort(state, m.Failed(ExitCode.FAILED, reason)) if state.phase in ABORTABLE else (state, ())
        case Recorded(failure):
            if state.phase is not Phase.RECORDING:
                return state, ()
            return _enter(state, Phase.RELEASING) if failure is None else _abort(state, failure)
        case Deadline(phase):
            return _late(state) if phase is state.phase else (state, ())
        case Lost(capsule, reason):
            return _lost(state, capsule, reason)
        case Reply(capsule, message):
            return _reply(state, capsule, message)


def _enter(state: State, phase: Phase) -> tuple[State, tuple[Action, ...]]:
    everyone = range(state.capsules)
    state = dataclasses.replace(state, phase=phase, waiting=frozenset(everyone), replies=())
    return state, (Request(phase, tuple(everyone)),)


def _reply(state: State, capsule: int, message: m.Message) -> tuple[State, tuple[Action, ...]]:
    match message:
        case m.Exited(code):
            return _exited(state, capsule, code)
        case m.Flushing():
            return state, ()
        case m.Flushed(sequence):
            return _flushed(state, capsule, sequence, None)
        case m.FlushFailed(sequence, text, hint):
            failure = m.Failed(ExitCode.FAILED, text, hint, _node(state, capsule))
            if state.phase is Phase.KILLED and sequence == state.flush_sequence:
                there = (sequence, capsule) in state.flushing
                return state, (FlushAgain(sequence, capsule, failure),) if there else ()
            return _flushed(state, capsule, sequence, failure)
        case m.FlushStarted():
            return state, ()
        case m.Failed():
            return _failed(state, capsule, message)
    expected = _EXPECTED.get(state.phase)
    if expected is None or not isinstance(message, expected) or capsule not in state.waiting:
        # While aborting, capsules may still answer the request that was aborted; any other surprise is a broken peer.
        if state.phase is Phase.ABORTING:
            return state, ()
        return _lost(state, capsule, f"unexpected {type(message).__name__} while {state.phase}")
    state = dataclasses.replace(state, waiting=state.waiting - {capsule}, replies=(*state.replies, (capsule, message)))
    return _advance(state) if not state.waiting else (state, ())


def _advance(state: State) -> tuple[State, tuple[Action, ...]]:
    """Every capsule has answered the phase's request."""
    replies = tuple(sorted(state.replies, key=lambda item: item[0]))
    match state.phase:
        case Phase.CREATING:
            created = tuple(reply for _, reply in replies if isinstance(reply, m.Created))
            return _enter(dataclasses.replace(state, created=created), Phase.CONNECTING)
        case Phase.CONNECTING:
            return _enter(state, Phase.FETCHING if state.source else Phase.STARTING)
        case Phase.FETCHING:
            # No file is touched before all of the checkpoint is known to be whole.
            return _enter(state, Phase.ROLLING_BACK)
        case Phase.ROLLING_BACK:
            # A file may be several capsules', and one of them puts it back.
            return _enter(state, Phase.RESTORING)
        case Phase.STARTING:
            return dataclasses.replace(state, phase=Phase.RUNNING, replies=()), (Running(),)
        case Phase.RESTORING:
            restored = tuple(reply for _, reply in replies if isinstance(reply, m.Restored))
            return _enter(dataclasses.replace(state, restored=restored), Phase.RESUMING)
        case Phase.RESUMING:
            return _enter(state, Phase.UNHOLDING)
        case Phase.UNHOLDING:
            return dataclasses.replace(state, phase=Phase.RUNNING, replies=()), (Running(state.restored),)
        case Phase.ASKING | Phase.ARRIVING | Phase.FINISHING:
            ranks = tuple(reply.ranks for _, reply in replies if isinstance(reply, m.Quiesced))
            return _quiesced(state, ranks)
        case Phase.PREPARING:
            # Ranks stand still only once everything that takes long or may be refused is done.
            assert state.attempt is not None  # noqa: S101 - set by Ask
            return _enter(state, Phase.FREEZING if state.attempt.quiesce == "off" else Phase.ASKING)
        case Phase.FREEZING:
            # What files capsules have in common can be seen only when nobody writes to them any more.
            state, actions = _enter(state, Phase.SURVEYING if state.capsules > 1 else Phase.DUMPING)
            return state, (AllFrozen(replies), *actions)
        case Phase.SURVEYING:
            state, actions = _enter(state, Phase.DUMPING)
            return state, (AllSurveyed(replies), *actions)
        case Phase.DUMPING:
            assert state.attempt is not None  # noqa: S101 - set by Ask, cleared only in RELEASING and ABORTING
            attempt = state.attempt
            dumped = tuple(reply for _, reply in replies if isinstance(reply, m.Dumped))
            state = dataclasses.replace(state, dumped=dumped)
            if attempt.kill:
                return dataclasses.replace(state, phase=Phase.RECORDING, replies=()), (Record(attempt),)
            return _enter(state, Phase.RELEASING)
        case Phase.RELEASING:
            assert state.attempt is not None  # noqa: S101 - as above
            attempt = state.attempt
            state = dataclasses.replace(
                state,
                phase=Phase.KILLED if attempt.kill else Phase.RUNNING,
                attempt=None,
                replies=(),
                flushing=state.flushing | {(attempt.sequence, k) for k in range(state.capsules)},
                flush_sequence=attempt.sequence,
            )
            return state, (CheckpointReleased(attempt, replies),)
        case Phase.ABORTING:
            assert state.attempt is not None and state.failure is not None  # noqa: S101 - set by _abort
            action = CheckpointFailed(state.attempt, state.failure)
            state = dataclasses.replace(state, phase=Phase.RUNNING, attempt=None, failure=None, replies=())
            return state, (action,)
    raise AssertionError(f"nothing to advance from {state.phase}")


def _quiesced(state: State, ranks: tuple[tuple[m.RankAt, ...], ...]) -> tuple[State, tuple[Action, ...]]:
    """Every capsule has answered a stage of the quiesce."""
    nodes = tuple(_node(state, k) for k in range(state.capsules))
    match state.phase:
        case Phase.ASKING:
            agreement = quiesce.agree(ranks)
            if agreement.targets:
                return _enter(dataclasses.replace(state, targets=agreement.targets), Phase.ARRIVING)
            return _transparent(state, agreement.incomplete, "no rank has come to a safe point")
        case Phase.ARRIVING:
            if missing := quiesce.absent(ranks, nodes, state.targets):
                return _transparent(state, f"not at the safe point in time: {quiesce.listed(missing)}")
            return _enter(state, Phase.FINISHING)
    if missing := quiesce.unfinished(ranks, nodes):
        return _transparent(state, f"traffic or hooks not finished in time: {quiesce.listed(missing)}")
    state, actions = _enter(state, Phase.FREEZING)
    uncounted = sum(rank.uncounted for of_capsule in ranks for rank in of_capsule)
    return state, (AllQuiesced(sum(map(len, ranks)), uncounted), *actions)


def _transparent(state: State, why: str, otherwise: str = "") -> tuple[State, tuple[Action, ...]]:
    """The ranks cannot be brought to a stand. why: empty where nobody takes part, which is only told if required."""
    assert state.attempt is not None  # noqa: S101 - set by Ask
    if state.attempt.quiesce == "require":
        failure = m.Failed(
            ExitCode.FAILED,
            f"the ranks are not quiescent: {why or otherwise}",
            "give them more time (quiesce.timeout), or checkpoint them where they are with --quiesce=prefer or off",
        )
        return _abort(state, failure)
    state, actions = _enter(state, Phase.FREEZING)
    return state, ((NotQuiesced(why), *actions) if why else actions)


def _failed(state: State, capsule: int, failure: m.Failed) -> tuple[State, tuple[Action, ...]]:
    if not failure.node:
        failure = m.Failed(failure.code, failure.message, failure.hint, _node(state, capsule))
    if state.phase in BOOT:
        return _end(state, BootFailed(state.phase, failure))
    if state.phase in ABORTABLE:
        return _abort(state, failure)
    if (state.flush_sequence, capsule) in state.flushing and state.phase in (Phase.RUNNING, Phase.KILLED):
        return _flushed(state, capsule, state.flush_sequence, failure)  # its flush could not even begin
    if state.phase is Phase.ABORTING:
        return state, ()  # the answer to the request that the abort overtook
    return _end(state, StepLost(failure))


def _abort(state: State, failure: m.Failed) -> tuple[State, tuple[Action, ...]]:
    return _enter(dataclasses.replace(state, failure=failure), Phase.ABORTING)


def _late(state: State) -> tuple[State, tuple[Action, ...]]:
    names = ", ".join(f"hpccr-{k} on {_node(state, k) or 'its node'}" for k in sorted(state.waiting)) or "the store"
    failure = m.Failed(
        ExitCode.PEER_LOST,
        f"{names}: no answer in time while {state.phase}",
        "is the node hung or overloaded? The limits are checkpoint.*_timeout in hpccr.toml",
    )
    if state.phase in BOOT:
        return _end(state, BootFailed(state.phase, failure))
    if state.phase in ABORTABLE:
        return _abort(state, failure)
    return _end(state, StepLost(failure))


def _lost(state: State, capsule: int, reason: str) -> tuple[State, tuple[Action, ...]]:
    node = _node(state, capsule)
    failure = m.Failed(ExitCode.PEER_LOST, f"hpccr-{capsule} was lost: {reason}", "", node)
    if state.phase in BOOT:
        return _end(state, BootFailed(state.phase, failure))
    if state.phase is Phase.KILLED:
        # Nothing runs there any more and its flush goes on without the agent; we only cannot hear when it is done.
        return _flushed(state, capsule, state.flush_sequence, failure)
    return _end(state, StepLost(failure))


def how_it_ended(code: int) -> str:
    """In words, the code of an m.Exited."""
    return f"has ended with code {code}" if code >= 0 else f"was ended by signal {-code}"


def _exited(state: State, capsule: int, code: int) -> tuple[State, tuple[Action, ...]]:
    if state.phase is Phase.KILLED:
        return state, ()
    if capsule == 0 and state.phase not in BOOT:
        return _end(state, Finished(code))
    if capsule == 0 and state.phase in (Phase.STARTING, Phase.RESUMING, Phase.UNHOLDING):
        # A short command ends before the last capsule has answered.
        return _end(state, Finished(code))
    what = f"the launch root of hpccr-{capsule} {how_it_ended(code)}"
    failure = m.Failed(ExitCode.PEER_LOST, what, "", _node(state, capsule))
    return _end(state, BootFailed(state.phase, failure) if state.phase in BOOT else StepLost(failure))


def _flushed(state: State, capsule: int, sequence: int, failure: m.Failed | None) -> tuple[State, tuple[Action, ...]]:
    if (sequence, capsule) not in state.flushing:
        return state, ()
    before = dict(state.unflushed).get(sequence) or failure
    others = tuple(item for item in state.unflushed if item[0] != sequence)
    state = dataclasses.replace(state, flushing=state.flushing - {(sequence, capsule)}, unflushed=others)
    if any(item[0] == sequence for item in state.flushing):
        # The spools hold one unfinished checkpoint at most: the next one may begin when the last of these has ended.
        return dataclasses.replace(state, unflushed=(*others, (sequence, before))) if before else state, ()
    return state, (Durable(sequence) if before is None else NotDurable(sequence, before),)


def _end(state: State, action: Action) -> tuple[State, tuple[Action, ...]]:
    return dataclasses.replace(state, phase=Phase.ENDED, waiting=frozenset()), (action,)


def _node(state: State, capsule: int) -> str:
    return state.created[capsule].node if capsule < len(state.created) else ""
