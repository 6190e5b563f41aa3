"""What a lease may do when: requests and states. Pure."""

from __future__ import annotations

import enum

from hpccr.errors import UsageError
from hpccr.wire import messages as m


class State(enum.Enum):
    """Of a capsule, as hpccrd sees it."""

    NEW = "new"
    CREATED = "created"
    CONNECTED = "connected"
    FETCHED = "fetched"
    ROLLED_BACK = "rolled back"
    RUNNING = "running"
    PREPARED = "prepared"
    FROZEN = "frozen"
    DUMPED = "dumped"
    RESTORED = "restored"
    RESUMED = "resumed"
    ENDED = "ended"
    """The job's processes have ended, or were killed at a release."""
    GONE = "gone"
    """Nothing of the capsule is left."""


# request -> (states it may be made in, state after its success; None: unchanged)
_TRANSITIONS: dict[type[m.Message], tuple[frozenset[State], State | None]] = {
    m.Create: (frozenset({State.NEW}), State.CREATED),
    m.Connect: (frozenset({State.CREATED}), State.CONNECTED),
    m.Start: (frozenset({State.CONNECTED}), State.RUNNING),
    m.Fetch: (frozenset({State.CONNECTED}), State.FETCHED),
    m.RollBack: (frozenset({State.FETCHED}), State.ROLLED_BACK),
    m.Restore: (frozenset({State.ROLLED_BACK}), State.RESTORED),
    m.Resume: (frozenset({State.RESTORED}), State.RESUMED),
    # What runs since Resume may have come to its end.
    m.Unhold: (frozenset({State.RESUMED, State.ENDED}), State.RUNNING),
    m.Prepare: (frozenset({State.RUNNING}), State.PREPARED),
    m.Quiesce: (frozenset({State.PREPARED}), None),
    m.Freeze: (frozenset({State.PREPARED}), State.FROZEN),
    m.Survey: (frozenset({State.FROZEN}), None),
    m.Dump: (frozenset({State.FROZEN}), State.DUMPED),
    m.Release: (frozenset({State.DUMPED}), State.RUNNING),
    m.Flush: (frozenset({State.RUNNING, State.PREPARED, State.FROZEN, State.DUMPED, State.ENDED}), None),
}

FATAL = (m.Create, m.Connect, m.Start, m.Fetch, m.RollBack, m.Restore)
"""Requests after whose failure the capsule is gone: a half made one is of no use."""

CHECKPOINT = (m.Prepare, m.Quiesce, m.Freeze, m.Survey, m.Dump, m.Release)
"""Requests whose failure gives the checkpoint up and leaves the job running."""


def after(state: State, request: m.Message) -> State:
    """The state after `request` has succeeded in `state`. Raises UsageError if it may not be made there."""
    name = type(request).__name__
    if type(request) not in _TRANSITIONS:
        raise UsageError(f"{name} is not a request on a capsule")
    allowed, then = _TRANSITIONS[type(request)]
    if state not in allowed:
        if state is State.ENDED:
            raise UsageError(f"{name} is impossible: the job has ended")
        raise UsageError(
            f"{name} is impossible while the capsule is {state.value}",
            hint=f"{name} is for a capsule that is {' or '.join(sorted(s.value for s in allowed))}",
        )
    if isinstance(request, m.Release) and request.kill:
        return State.ENDED
    return then or state
