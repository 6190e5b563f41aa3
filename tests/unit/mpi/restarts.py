"""Safe points of a singleton whose page this process itself writes, as init would. Exits with 0 if all is well."""

import sys

from mpi4py import MPI

import hpccr.mpi
from hpccr.mpi import Outcome

said = []
hpccr.mpi.on_quiesce(lambda: said.append("quiesce"))
hpccr.mpi.on_resume(lambda: said.append("resume"))
hpccr.mpi.on_restart(lambda: said.append("restart"))
world = MPI.COMM_WORLD

assert hpccr.mpi.safe_point(world) is Outcome.NOTHING

from hpccr.mpi import _safepoint as inside  # noqa: E402 - imports mpi4py, after the first safe point as in a program
from hpccr.mpi.page import ASKED, ENDED, OUTCOMES, RESTARTS  # noqa: E402

page = inside._page
# A checkpoint that nobody was asked for, and a restart from it: all ranks hear of that, once.
page[RESTARTS] += 1
assert hpccr.mpi.safe_point(world) is Outcome.RESTARTED
assert hpccr.mpi.safe_point(world) is Outcome.NOTHING
assert said == ["restart"], said
# One that was asked and is over before this rank has come by: it did not stand there.
page[OUTCOMES + 1] = Outcome.RESUMED
page[ASKED] = page[ENDED] = 1
assert hpccr.mpi.safe_point(world) is Outcome.NOTHING
# The same, and restored from it.
page[OUTCOMES] = Outcome.RESTARTED
page[RESTARTS] += 1
page[ASKED] = page[ENDED] = 2
assert hpccr.mpi.safe_point(world) is Outcome.RESTARTED
assert said == ["restart", "restart"], said

# The same communicator by new objects, as some libraries hand it out: nothing is kept of them, and it is no first call.
for _ in range(3):
    again = MPI.Comm.fromhandle(world.handle)
    hpccr.mpi.safe_point(again)
    hpccr.mpi.safe_point(world)
    assert sys.getrefcount(again) == 2
twin = world.Dup()
hpccr.mpi.safe_point(twin)
twin.Free()
hpccr.mpi.safe_point(world.Dup())
assert len(inside._points) == 1
