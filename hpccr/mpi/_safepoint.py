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
    OUTCOME,
    PENDING,
    RANK,
    SIZE_OF_GROUP,
    STATE,
    TARGET,
    TARGETED,
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
        self.page, self.entry = layout.claim(_page)
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

    def stop(self, count: int) -> Outcome:
        """A question is open. Stand still if this is the safe point that was agreed on."""
        page, entry = self.page, self.entry
        turn = 0
        while (asked := page[ASKED]) != _handled[0]:
            # Which safe point it is to be is decided in a moment, without waiting for any rank.
            page[entry + WAITING] = asked
            if page[ENDED] >= asked:
                _handled[0] = asked
                continue
            if page[TARGETED] == asked:
                break
            turn = self._pause(turn)
        if asked == _handled[0] or page[entry + TARGET] != count:
            return Outcome.NOTHING
        page[entry + ARRIVED] = asked
        turn = 0
        while True:
            # In this order: `go` comes before `ended`, and all take part in what follows or none.
            ended = page[ENDED]
            if page[GO] == asked:
                break
            if ended >= asked:
                _handled[0] = asked
                return Outcome(page[OUTCOME])
            turn = self._pause(turn)
        page[entry + PENDING] = _drain(self.own)
        errors = _call(interface._quiesce_hooks)
        page[entry + FINISHED] = asked
        while page[ENDED] < asked:
            time.sleep(0.001)
        outcome = Outcome(page[OUTCOME])
        _handled[0] = asked
        restarted = outcome is Outcome.RESTARTED
        errors += _call(interface._restart_hooks if restarted else interface._resume_hooks)
        if errors:
            raise errors[0]
        return outcome

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
_fence = threading.Lock()


def enter(comm: MPI.Comm) -> Callable[[], Outcome]:
    """First call on a communicator, all its ranks are here: what the safe points on it call from now on."""
    group = _group_of(comm)
    page, word = group.page, group.entry + COUNT
    current, handled, fence, nothing = _current, _handled, _fence, Outcome.NOTHING

    def point() -> Outcome:
        if current[0] is not group:
            group.come()
        count = page[word] + 1
        page[word] = count
        # First the count, then the look, a memory fence between them: whoever is not seen here is counted there.
        with fence:
            pass
        if page[ASKED] == handled[0]:
            return nothing
        return group.stop(count)

    point.__dict__["comm"] = comm  # it lives on, so that no other object gets its id
    interface._points[id(comm)] = point
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
        atexit.register(_leave)
    _groups.append(group)
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


def _drain(own: MPI.Intracomm) -> int:
    """Wait for all ranks, and with libhpccr_mpi preloaded for what is under way between them; messages not received."""
    try:
        drain = ctypes.CDLL(None).hpccr_drain_at
    except AttributeError:
        own.Barrier()
        return 0
    drain.argtypes = (ctypes.c_void_p,)
    drain.restype = ctypes.c_uint64
    return int(drain(MPI._addressof(own)))
