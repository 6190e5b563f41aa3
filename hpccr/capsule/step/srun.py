"""srun inside of a capsule: what `srun PROGRAM` does in a script that is checkpointed as a whole.

It asks the launch root of capsule 0 for a place (ledger.py), which says which tasks go where. A program that uses MPI
is started by the mpirun of its library, any other by the launch roots themselves; either way each task begins as the
same small script (script.py), which gives it srun's environment.
"""

from __future__ import annotations

import _socket
import os
import sys

from hpccr.capsule import link
from hpccr.capsule.client import CONNECT_TIMEOUT, Failure, connect, find_address, read_hosts, request
from hpccr.capsule.step import layout, library, script
from hpccr.capsule.step.ledger import decode_answer, job_cpus
from hpccr.capsule.step.mpirun import run_mpi
from hpccr.capsule.step.options import SAID, Options, Usage, exported
from hpccr.capsule.step.streams import open_input, open_outputs
from hpccr.capsule.step.tasks import Input, Run, Streams

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    from typing import NoReturn

HOME = layout.NAME + "0"
"""Whose launch root keeps the ledger."""
PATIENCE = 10.0
"""Seconds that a step waits for its CPUs without a word."""
MANUAL = """\
Usage: srun [OPTION...] PROGRAM [ARGUMENT...]
Starts tasks on the nodes of this checkpointed job, as part of it. Options as of Slurm's srun: {}.
MPI programs are started by the mpirun of their library (HPCCR_MPI=openmpi|mpich|intel|none overrides what is found).
"""


class Place:
    """A step's place in the job; it is given back when the connection is closed, however this process ends."""

    def __init__(self, sock: _socket.socket, number: int, counts: dict[int, int]) -> None:
        self._sock, self.number, self.counts = sock, number, counts

    def give_back(self) -> None:
        """Returns when that is done, so that the script's next step does not find the place taken."""
        self._sock.settimeout(CONNECT_TIMEOUT)
        try:
            self._sock.shutdown(_socket.SHUT_WR)
            while self._sock.recv(64):
                pass
        except OSError:
            pass  # the launch root is gone, or will find out


def main(argv: list[str]) -> NoReturn:
    """The command srun; `argv` without the program's name."""
    link.fill_standard_descriptors()
    code = 1
    try:
        code = _srun(argv)
    except Usage as error:
        link.warn(f"hpccr: error: {error}")
        if error.hint:
            link.warn(f"hint: {error.hint}")
        code = error.code
    except (Failure, link.ProtocolError, OSError) as error:
        link.warn(f"hpccr: error: srun: {error}")
    except KeyboardInterrupt:
        code = 128 + 2  # while it waits for its place; later the tasks get the signal
    os._exit(code)


def _srun(argv: list[str]) -> int:
    options = Options(argv, os.environ)
    if options.version:
        _become_slurms(argv)
    if options.help:
        os.write(1, MANUAL.format(", ".join(sorted(f"--{name}" for name in options_with_effect()))).encode())
        return 0
    if not options.command:
        raise Usage("srun: fatal: No command given to execute.")
    secret = os.environ.get(link.SECRET_VARIABLE, "")
    if not secret:
        raise Usage(f"srun: {link.SECRET_VARIABLE} is not set: this one works only inside a job run by hpccr")
    if not options.quiet:
        for name in options.said:
            link.warn(f"srun: --{name} has no effect inside a checkpointed job")
    hosts = read_hosts()
    found = _programs(options) if options.multi_prog else _program(options)
    demand = _demand(options, len(job_cpus(link.original_environment())))
    place = _reserve(options, demand, hosts, secret)
    here = find_address(hosts, "localhost", os.uname().nodename)
    plan = script.Plan(options, place.number, place.counts, os.environ, here)
    environ = exported(options, link.original_environment(), os.environ.get("HPCCR_OWN", "").split())
    environ = {name: value for name, value in environ.items() if not script.is_left_over(os.fsdecode(name))}
    try:
        return run_mpi(found, plan, environ) if found is not None else _run_tasks(plan, environ, hosts, secret)
    finally:
        place.give_back()


def options_with_effect() -> list[str]:
    from hpccr.capsule.step.options import EFFECT

    return [name for name in EFFECT if name not in SAID]


def _become_slurms(argv: list[str]) -> None:
    """Slurm's own srun answers for its version."""
    shims = os.path.join(os.path.dirname(os.path.dirname(__file__)), "bin")
    for place in os.environ.get("PATH", "").split(":"):
        path = os.path.join(place, "srun")
        if os.access(path, os.X_OK) and not os.path.samefile(place or ".", shims):
            os.execv(path, ["srun", *argv])  # noqa: S606 - becoming it is the point
    raise Usage("srun: Slurm's own srun is not on the PATH")


# --- what is asked for ----------------------------------------------------------------------------------------------


def _program(options: Options) -> library.Found | None:
    """The program's MPI library; and its full name becomes the command's first word, as srun(1) resolves it."""
    directory = os.path.join(os.getcwd(), options.chdir)
    path = library.Search(os.environ, directory).program(options.command[0])
    if path is None:
        raise Usage(f"srun: cannot run {options.command[0]}: there is no such program", code=2)
    if "/" not in options.command[0]:
        options.command[0] = os.path.normpath(path)
    tasks = options.ntasks or (options.ntasks_per_node or 1) * (options.nodes or 1)
    found = library.choose(options.command, tasks=tasks, mpi=options.mpi, environ=os.environ, directory=directory)
    _check_wish(options, found)
    return found


def _check_wish(options: Options, found: library.Found | None) -> None:
    """Who asks for an MPI must not get as many programs that know nothing of each other. Raises Usage."""
    said = os.environ.get(library.VARIABLE, "").lower() == library.NONE
    if found is None and "mpi" in options.given and options.mpi != library.NONE and not said:
        raise Usage(
            f"srun: --mpi={options.mpi}, and no MPI library is found in {options.command[0]}",
            f"say which one it uses: {library.VARIABLE}=openmpi|mpich|intel; or that it uses none: --mpi=none",
            13,
        )


def _programs(options: Options) -> library.Found | None:
    """The MPI library of the first program in the configuration of --multi-prog that uses one."""
    try:
        with open(options.command[0], encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    except OSError as error:
        raise Usage(f"srun: cannot read {options.command[0]}: {error.strerror}") from None
    for line in text.replace("\\\n", " ").splitlines():
        words = line.split()
        if len(words) > 1 and not words[0].startswith("#"):
            directory = os.path.join(os.getcwd(), options.chdir)
            found = library.choose(words[1:], tasks=2, mpi=options.mpi, environ=os.environ, directory=directory)
            if found is not None:
                return found
    _check_wish(options, None)
    return None


def _demand(options: Options, count: int) -> layout.Demand:
    """count: the job's nodes. Raises Usage."""
    candidates = list(range(count))
    nodes, nodes_max = options.nodes, options.nodes_max
    try:
        if options.nodelist:
            candidates = layout.capsules(options.nodelist, count)
            if "nodes" not in options.given:
                nodes = nodes_max = len(candidates)
        if options.exclude:
            without = layout.capsules(options.exclude, count)
            candidates = [index for index in candidates if index not in without]
            if "nodes" not in options.given:
                nodes = nodes_max = len(candidates)
    except ValueError as error:
        raise Usage(
            f"srun: {error} is no node of this job",
            f"inside a checkpointed job the nodes are {layout.node_list(range(count))} (SLURM_JOB_NODELIST)",
        ) from None
    if options.relative is not None:
        candidates = candidates[options.relative :]
    nodes = nodes or count
    nodes_max = nodes_max or nodes
    tasks = options.ntasks
    if tasks is None:
        tasks = nodes * (options.ntasks_per_node or 1)
    if tasks < nodes:
        if not options.quiet:
            link.warn(f"srun: warning: can't run {tasks} processes on {nodes} nodes, setting nnodes to {tasks}")
        nodes = nodes_max = tasks
    per_node = options.ntasks_per_node or 0
    if per_node and tasks > per_node * nodes_max:
        if not options.quiet:
            link.warn(
                f"srun: warning: can't honor --ntasks-per-node set to {per_node} which doesn't match the requested "
                f"tasks {tasks} with the maximum number of requested nodes {nodes_max}. Ignoring --ntasks-per-node."
            )
        per_node = 0
    if not candidates or nodes > len(candidates):
        raise Usage(
            f"srun: Unable to create step: {nodes} nodes are needed, {len(candidates)} are there",
            "ask for fewer with --nodes",
        )
    mode = layout.SHARED if options.overlap else layout.EXACT if options.exact else layout.WHOLE
    return layout.Demand(
        tasks=tasks,
        nodes=nodes,
        nodes_max=nodes_max,
        cpus_per_task=options.cpus_per_task or 1,
        per_node=per_node,
        mode=mode,
        overcommit=options.overcommit,
        candidates=candidates,
    )


def _reserve(options: Options, demand: layout.Demand, hosts: str, secret: str) -> Place:
    """Wait for a place in the job. Raises Usage if there cannot be one, Failure."""
    sock = _connect(HOME, hosts, secret)
    wire = link.Wire(sock)
    sock.setblocking(True)
    wire.post(link.RESERVE, 0, demand.encode())
    job = os.environ.get("SLURM_JOB_ID", "")
    waited = False
    while True:
        wire.flush()
        frame = wire.frame()
        if frame is None:
            try:
                if not wire.fill():
                    raise Failure("the launch root of capsule 0 is gone")
            except TimeoutError:
                sock.settimeout(None)
                if not options.quiet:
                    link.warn(
                        f"srun: Job {job} step creation temporarily disabled, retrying (Requested nodes are busy)"
                    )
            continue
        kind, _, payload = frame
        if kind == link.WAIT:
            waited = True
            sock.settimeout(PATIENCE)
        elif kind == link.PLACE:
            number, counts = decode_answer(payload)
            if waited and not options.quiet:
                link.warn(f"srun: Step created for StepId={job}.{number}")
            return Place(sock, number, counts)
        elif kind == link.ERROR:
            raise Usage(
                f"srun: Unable to create step for job {job}: {payload.decode('utf-8', 'replace')}",
                "ask for fewer tasks, or let several share a CPU with --overcommit",
            )
        else:
            raise link.ProtocolError(f"frame {kind} out of place")


def _connect(name: str, hosts: str, secret: str) -> _socket.socket:
    port = int(os.environ.get(link.PORT_VARIABLE, link.DEFAULT_PORT))
    address = find_address(hosts, name, os.uname().nodename)
    return connect(address, port, secret.encode(), CONNECT_TIMEOUT)


# --- without MPI ----------------------------------------------------------------------------------------------------


def _run_tasks(plan: script.Plan, environ: dict[bytes, bytes], hosts: str, secret: str) -> int:
    options = plan.options
    outputs = open_outputs(plan)
    fd, only = open_input(plan)
    if options.chdir:
        os.chdir(options.chdir)
    text = plan.script()
    words = " ".join(script.quote(word) for word in ([] if options.multi_prog else options.command))
    requests = {
        rank: request(f"set -- {rank} {layout.NAME}{index} {words}\n{text}", environ) for rank, index in plan.order()
    }
    _raise_limit()
    run = Run(kill_on_bad_exit=options.kill_on_bad_exit, wait=options.wait, limit=options.time)
    receivers = []
    for rank, index in plan.order():
        name = f"{layout.NAME}{index}"
        label = f"{rank:{plan.width()}d}: ".encode() if options.label else b""
        sinks = {stream: run.output(where) for stream, where in outputs.of(rank).items()}
        sock = _connect(name, hosts, secret)
        task = run.add(rank, name, sock, requests.pop(rank), Streams(sinks, label, unbuffered=options.unbuffered))
        if only is None or only == rank:
            receivers.append(task)
        else:
            task.wire.post(link.EOF, link.STDIN)
            task.settle()
    source = Input(run.loop, fd, receivers)
    for task in receivers:
        task.input = source
    return run.finish()


def _raise_limit() -> None:
    """Of open files, for a connection to each task; the tasks have the caller's, as their requests say."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main(sys.argv[1:])
