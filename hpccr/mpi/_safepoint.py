"""The protocol of safe points on the side of an mpi4py rank, as in mpi/safepoint.c; see docs/internals/quiesce.md."""

from __future__ import annotations

import atexit
import ctypes
import secrets
import threading
import time
from collections.abc import Callable, Iterable

from mpi4py import MPI

import hpccr.mpi as interface
from hpccr.mpi import page as layout
from hpccr.mpi.page import (
    ACTIVE,
    ARRIVED,
    ASKED,
    COUNT,
    ENDED,
    FINISHED,
    GAP,
    GO,
    GONE,
    GROUP,
    HALVES,
    LEFT,
    OUTCOMES,
    PATIENCE,
    PENDING,
    RANK,
    RESTARTS,
    SIZE_OF_GROUP,
    STATE,
    TARGET,
    TARGETED,
    UNCOUNTED,
    WAITING,
    WORLD,
)

Outcome = interface.Outcome


class Group:
    """Ranks that call together, whichever of their communicators they do it on."""

    def __init__(self, own: MPI.Intracomm) -> None:
        """own: an intra-communicator of all of them, for nobody but us. Collective."""
        self.own = own
        self.ranks = own.Get_group()
        name = own.bcast(secrets.randbits(64))
        # The entry's, which is another one where there was no place left.
        self.page, self.entry = layout.claim(_page, first=not _groups)
        self.halves = self.page.cast("B").cast("I")
        self.page[self.entry + GROUP] = name
        for half, value in ((SIZE_OF_GROUP, own.size), (RANK, own.rank), (WORLD, MPI.COMM_WORLD.rank), (STATE, ACTIVE)):
            self.halves[2 * self.entry + HALVES + half] = value

    def come(self) -> None:
        """The safe point before was another group's."""
        page, entry = self.page, self.entry
        everything = 1 + sum(group.page[group.entry + COUNT] for group in _groups)
        if page[entry + LEFT]:
            page[entry + GAP] = max(page[entry + GAP], everything - page[entry + LEFT])
        page[entry + LEFT] = 0
        for group in _groups:
            if group is not self and not group.page[group.entry + LEFT]:
                group.page[group.entry + LEFT] = everything
        _current[0] = self

    def answer(self, count: int) -> Outcome:
        """Something has been asked, or the program was restored."""
        outcome, quiesced = Outcome.NOTHING, False
        errors: list[Exception] = []
        if _page[ASKED] != _handled[0]:
            outcome, quiesced = self._stop(count, errors)
        # Every rank hears of every restart, wherever it was at the checkpoint.
        if (known := _page[RESTARTS]) != _restarts[0]:
            _restarts[0] = known
            outcome = Outcome.RESTARTED
            errors += _call(interface._restart_hooks)
        elif quiesced:
            errors += _call(interface._resume_hooks)
        if errors:
            raise errors[0]
        return outcome

    def _stop(self, count: int, errors: list[Exception]) -> tuple[Outcome, bool]:
        """Stand still until there is an answer, and if this is the safe point that was agreed on, until it is over.

        Gives what became of the checkpoint, NOTHING if this rank did not stand meanwhile, and whether the hooks of
        on_quiesce have run; what they raise goes into `errors`.
        """
        page, entry = self.page, self.entry
        turn = 0
        outcome = Outcome.NOTHING
        while (asked := _page[ASKED]) != _handled[0]:
            # Which safe point it is to be is decided in a moment, without waiting for any rank.
            page[entry + WAITING] = asked
            if _page[ENDED] >= asked:
                _handled[0] = asked
                outcome = self._outcome(asked) if turn else Outcome.NOTHING
                continue
            if _page[TARGETED] == asked:
                break
            turn = self._pause(turn)
        if asked == _handled[0] or page[entry + TARGET] != count:
            return outcome, False
        page[entry + ARRIVED] = asked
        turn = 0
        while True:
            # In this order: `go` comes before `ended`, and all take part in what follows or none.
            ended = _page[ENDED]
            if _page[GO] == asked:
                break
            if ended >= asked:
                _handled[0] = asked
                return self._outcome(asked), False
            turn = self._pause(turn)
        page[entry + PENDING] = _drain(self.own, _page[PATIENCE])
        errors += _call(interface._quiesce_hooks)
        page[entry + FINISHED] = asked
        while _page[ENDED] < asked:
            time.sleep(0.001)
        _handled[0] = asked
        return self._outcome(asked), True

    def _outcome(self, question: int) -> Outcome:
        return Outcome(_page[OUTCOMES + question % 2])

    def _pause(self, turn: int) -> int:
        # Lets MPI work on what is under way: peers on their way to the safe point may wait for it.
        self.own.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)
        time.sleep(0.0001 if turn < 20 else 0.001)
        return turn + 1


_page = layout.attach()
_groups: list[Group] = []
_current: list[Group | None] = [None]
_handled = [0]
"""The newest question that this process is done with."""
_restarts = [0]
"""Those it has heard of."""
_fence = threading.Lock()
_points: list[Callable[[], Outcome]] = []
_key = MPI.KEYVAL_INVALID


def enter(comm: MPI.Comm) -> Callable[[], Outcome]:
    """What a safe point on the communicator calls, whichever Python object it is. If it is the first one, all its ranks
    are here.

    Kept by MPI with the communicator (as the number of the point: no Python is called when it is freed).
    """
    global _key
    if _key == MPI.KEYVAL_INVALID:
        _key = MPI.Comm.Create_keyval(nopython=True)
    number = comm.Get_attr(_key)
    if number is None:
        group = _group_of(comm)
        number = _groups.index(group)
        comm.Set_attr(_key, number)
    return _points[number]


def _point(group: Group) -> Callable[[], Outcome]:
    header, page, word = _page, group.page, group.entry + COUNT
    current, handled, restarts, fence, nothing = _current, _handled, _restarts, _fence, Outcome.NOTHING

    def point() -> Outcome:
        if current[0] is not group:
            group.come()
        count = page[word] + 1
        page[word] = count
        # First the count, then the look, a memory fence between them: whoever is not seen here is counted there.
        with fence:
            pass
        if header[ASKED] == handled[0] and header[RESTARTS] == restarts[0]:
            return nothing
        return group.answer(count)

    return point


def _group_of(comm: MPI.Comm) -> Group:
    own = comm.Merge(False) if isinstance(comm, MPI.Intercomm) else None
    ranks = (own or comm).Get_group()
    try:
        for group in _groups:
            if MPI.Group.Compare(group.ranks, ranks) in (MPI.IDENT, MPI.SIMILAR):
                if own is not None:
                    own.Free()
                return group
    finally:
        ranks.Free()
    if own is None:
        assert isinstance(comm, MPI.Intracomm)  # noqa: S101 - there is no third kind
        own = comm.Dup()
    group = Group(own)
    if not _groups:
        # After the entry is active: a question from now on finds it.
        _handled[0] = _page[ENDED]
        _restarts[0] = _page[RESTARTS]
        atexit.register(_leave)
    _groups.append(group)
    _points.append(_point(group))
    return group


def _leave() -> None:
    for group in _groups:
        group.halves[2 * group.entry + HALVES + STATE] = GONE


def _call(hooks: Iterable[Callable[[], object]]) -> list[Exception]:
    """All of them, whatever one raises: the other ranks count on it."""
    errors = []
    for hook in hooks:
        try:
            hook()
        except Exception as error:
            errors.append(error)
    return errors


def _drain(own: MPI.Intracomm, patience: int) -> int:
    """Wait for all ranks, and with libhpccr_mpi preloaded for what is under way between them.

    Gives the messages not received; UNCOUNTED without the library.
    """
    try:
        drain = ctypes.CDLL(None).hpccr_drain_at
    except AttributeError:
        own.Barrier()
        return UNCOUNTED
    drain.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
    drain.restype = ctypes.c_uint64
    return int(drain(MPI._addressof(own), patience))
