"""Which request may be made in which state."""

import pytest

from hpccr.errors import UsageError
from hpccr.model import StepKey
from hpccr.noded import lifecycle
from hpccr.noded.lifecycle import State
from hpccr.wire import messages as m

KEY = StepKey(cluster="c", job="1", step="0")
CREATE = m.Create(protocol=1, key=KEY, capsule=0, capsules=1, incarnation=0, secret="")
CONNECT = m.Connect(peers=())
START = m.Start(argv=(), env={}, cwd=b"/", stdin="null", merged=True)
PREPARE = m.Prepare(sequence=1, checkpoint="0" * 32)
FETCH = m.Fetch(directory="/", sequence=1, checkpoint="0" * 32)
RESTORE = m.Restore(stdin="null", merged=True)


def walk(*requests: m.Message) -> State:
    state = State.NEW
    for request in requests:
        state = lifecycle.after(state, request)
    return state


def test_a_whole_life() -> None:
    quiesce = (m.Quiesce("ask", 0), m.Quiesce("arrive", 1), m.Quiesce("finish", 1))
    checkpoint = (PREPARE, *quiesce, m.Freeze(), m.Dump(), m.Release(kill=False), m.Flush(directory="/x"))
    assert walk(CREATE, CONNECT, START, *checkpoint, *checkpoint) is State.RUNNING
    assert walk(CREATE, CONNECT, FETCH, m.RollBack(), RESTORE, m.Resume(), m.Unhold(), *checkpoint) is State.RUNNING
    assert walk(CREATE, CONNECT, START, PREPARE, m.Freeze(), m.Dump(), m.Release(kill=True)) is State.ENDED


def test_the_hold_is_lifted_too_where_the_job_has_ended_since_it_went_on() -> None:
    lifecycle.after(State.ENDED, m.Unhold())
    with pytest.raises(UsageError):
        lifecycle.after(State.RESTORED, m.Unhold())


def test_a_killed_job_can_still_be_flushed_but_not_checkpointed() -> None:
    assert lifecycle.after(State.ENDED, m.Flush(directory="/x")) is State.ENDED
    with pytest.raises(UsageError, match="the job has ended"):
        lifecycle.after(State.ENDED, PREPARE)


@pytest.mark.parametrize(
    ("state", "request_"),
    [
        (State.NEW, CONNECT),
        (State.NEW, START),
        (State.CREATED, CREATE),
        (State.CREATED, START),
        (State.CONNECTED, CONNECT),
        (State.CONNECTED, m.Flush(directory="/x")),
        (State.RUNNING, START),
        (State.RUNNING, FETCH),
        (State.CONNECTED, m.RollBack()),
        (State.FETCHED, RESTORE),
        (State.CONNECTED, RESTORE),
        (State.RUNNING, m.Freeze()),
        (State.RUNNING, m.Resume()),
        (State.PREPARED, PREPARE),
        (State.PREPARED, m.Dump()),
        (State.FROZEN, m.Release(kill=False)),
        (State.DUMPED, m.Dump()),
        (State.RESTORED, m.Unhold()),
        (State.RESTORED, PREPARE),
        (State.RESUMED, PREPARE),
        (State.GONE, CREATE),
        (State.GONE, START),
    ],
)
def test_out_of_order(state: State, request_: m.Message) -> None:
    with pytest.raises(UsageError, match=type(request_).__name__):
        lifecycle.after(state, request_)


@pytest.mark.parametrize("request_", [m.Destroyed(), m.Signal(15), m.Ping()])
def test_what_is_no_step_in_a_life(request_: m.Message) -> None:
    with pytest.raises(UsageError, match="not a request"):
        lifecycle.after(State.RUNNING, request_)
