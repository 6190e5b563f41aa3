"""All messages of hpccr.

Three conversations use them, each message in one msgpack frame (wire.frames):
- coordinator <-> agent, TCP, after wire.handshake
- agent <-> hpccrd, unix stream socket, descriptors beside the frame where a docstring says so. The agent passes the
  coordinator's requests on and the answers back, adding the descriptors and draining stdio: so both conversations
  use the same requests and replies.
- client (`hpccr checkpoint|status`) <-> coordinator, TCP, after wire.handshake.

Requests on one capsule are strictly one after the other: each gets exactly one reply (the class named in its
docstring, or Failed), except Signal (none), Abort (may be sent while another request is under way: that one then
answers Failed and Abort answers Aborted) and Destroy. Exited, Wanted, Flushing, Flushed and FlushFailed are events and
come at any time after what caused them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from hpccr.model import CheckpointId, Count, FileRules, Index, Sequence, StepKey

PROTOCOL = 1


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the class name is the tag."""


class Endpoint(msgspec.Struct, frozen=True):
    """How capsule `capsule` is reached on its node: underlay address, VXLAN network identifier.

    ticket: keyed BLAKE3 (site key) over the other fields, step key and uid, made by the hpccrd that owns the capsule
    and checked by the ones that connect to it: a user can only join capsules of its own.
    """

    capsule: Index
    address: str
    vni: int
    ticket: str


# --- requests on a capsule --------------------------------------------------------------------------------------


class Create(Message, frozen=True):
    """Make capsule number `capsule` of `capsules`. First request on a lease. Reply: Created.

    incarnation counts the starts and restores of the step; secret (hex) is the step's.
    """

    protocol: int
    key: StepKey
    capsule: Index
    capsules: Count
    incarnation: int
    secret: str


class Connect(Message, frozen=True):
    """Join the capsule to its peers (one Endpoint per capsule of the step, its own included). Reply: Connected."""

    peers: tuple[Endpoint, ...]


class Start(Message, frozen=True):
    """Start the launch root. Descriptors to hpccrd: stdin (only if stdin == "pipe"), stdout, stderr (not if merged).

    argv: the user's command, empty in capsules other than 0. env: whole environment. cwd: absolute. All
    three in the bytes that the system has, which need not be text.
    merged: stdout and stderr are one pipe. Limits, umask, CPU affinity and ids come from the requesting process.
    Reply: Started.
    """

    argv: tuple[bytes, ...]
    env: dict[bytes, bytes]
    cwd: bytes
    stdin: str
    merged: bool


class Signal(Message, frozen=True):
    """Send a signal to the launch root, which passes it to the command. No reply."""

    signum: int


class RankAt(msgspec.Struct, frozen=True, array_like=True):
    """Where a rank is among the safe points of a group of ranks; see docs/internals/quiesce.md.

    group: the ranks that call together, `size` of them; rank: its number among them; count: safe points it has come to.
    """

    group: int
    size: int
    rank: int
    pid: int
    """In its capsule."""
    count: int
    waiting: bool = False
    """It has seen the question and stands at safe point `count`; else it has passed it."""
    arrived: bool = False
    finished: bool = False
    """Its traffic is finished and its hooks have run."""
    pending: int = 0
    """Messages sent to it that it has not received."""
    uncounted: bool = False
    """Nobody has looked for such messages: libhpccr_mpi is not loaded."""
    gone: bool = False
    left: int = 0
    """0 while this is the group of its newest safe point; else 1 + the safe points, of all its groups, it had come to
    when it called one of another group."""
    gap: int = 0
    """The most safe points of other groups that it has come to between two of this one."""


class Quiesce(Message, frozen=True):
    """One stage of bringing the ranks to a stand at a safe point, once the capsule is prepared.

    Reply: Quiesced, after `timeout_ms` at most.

    ask: let every rank stop at its next safe point for an answer; gives where they are, none if nobody takes part.
    arrive: targets are (group, number of the safe point to stand at); waits until the ranks of these groups are there.
    finish: everyone is there: finish the traffic, run the hooks; waits until that is done.
    It ends with Release or Abort, or after a restore with Unhold: the ranks are told which.
    """

    stage: Literal["ask", "arrive", "finish"]
    timeout_ms: Annotated[int, msgspec.Meta(ge=0, le=86_400_000)]
    targets: tuple[tuple[int, int], ...] = ()


class Prepare(Message, frozen=True):
    """Check that the capsule can be dumped and start CRIU up to the freeze. Reply: Prepared."""

    sequence: Sequence
    checkpoint: CheckpointId
    files: FileRules = FileRules()


class Freeze(Message, frozen=True):
    """Stop all tasks and hold the network. Reply: Frozen."""


class Survey(Message, frozen=True):
    """Every task of the job stands still: say which files there are to save. Reply: Surveyed.

    Not needed where there is one capsule only.
    """


class Dump(Message, frozen=True):
    """Write the images to the spool. Reply: Dumped.

    elsewhere: of Surveyed.files, those that another capsule saves.
    """

    elsewhere: tuple[bytes, ...] = ()


class Release(Message, frozen=True):
    """Let the tasks run again (kill=False) or kill them (kill=True). Reply: Released."""

    kill: bool


class Abort(Message, frozen=True):
    """Give the checkpoint under way up: tasks go on, the hold comes off, the spool is emptied. Reply: Aborted."""

    reason: str


class Flush(Message, frozen=True):
    """Copy the released checkpoint to `directory` (the capsule's directory in the store; made by the user's worker).

    Reply: FlushStarted; later Flushing events, then Flushed or FlushFailed. The flush goes on when the lease ends.
    level: of zstd. share: checkpoints that may rest on the same stored data.
    """

    directory: str
    level: Annotated[int, msgspec.Meta(ge=1, le=19)] = 1
    share: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20


class Fetch(Message, frozen=True):
    """Fetch the fragment in `directory` into the spool and verify it. Reply: Fetched."""

    directory: str
    sequence: Sequence
    checkpoint: CheckpointId


class RollBack(Message, frozen=True):
    """Put the files of the fetched fragment back, once all capsules have theirs. Reply: RolledBack.

    excluded: FileRules.excluded of this run, whose output and store may be elsewhere than at the checkpoint.
    """

    excluded: tuple[bytes, ...] = ()


class Restore(Message, frozen=True):
    """Restore the tasks of the fetched fragment up to the point before they run, once all files are back.

    Instead of Start. Descriptors as Start; `stdin` and `merged` must be as they were at the first start.
    Reply: Restored, all tasks stopped and the network held.
    """

    stdin: str
    merged: bool


class Resume(Message, frozen=True):
    """Let the restored tasks run; the hold stays. Reply: Resumed."""


class Unhold(Message, frozen=True):
    """Take the hold off. Reply: Unheld."""


class Destroy(Message, frozen=True):
    """Kill the capsule and end the lease. Reply: Destroyed, when nothing of it is left.

    over: the step is over, and the images kept in the node's spool are of no use any more.
    """

    over: bool = False


# --- replies and events -----------------------------------------------------------------------------------------


class Created(Message, frozen=True):
    endpoint: Endpoint
    node: str
    cpu_flags: tuple[str, ...]


class Connected(Message, frozen=True):
    pass


class Started(Message, frozen=True):
    pid: int
    """Of the launch root, inside the capsule."""


class Quiesced(Message, frozen=True):
    """The ranks of this capsule that the stage was about, wherever they have got to by then."""

    ranks: tuple[RankAt, ...]


class Wanted(Message, frozen=True):
    """Event: a process of the job asks for a checkpoint."""


class Prepared(Message, frozen=True):
    estimate: int
    """Bytes the dump may take, at most."""


class Frozen(Message, frozen=True):
    """All tasks are stopped. On its way to the coordinator the agent drains stdout and stderr first (Output comes
    before) and fills in stdin_consumed: bytes of Input that the job has read since this start or restore."""

    stdin_consumed: int = 0


class Surveyed(Message, frozen=True):
    """files: identities (16 bytes each) of the files and trees that are about to be saved. Equal ones of two capsules
    are one file on shared storage."""

    files: tuple[bytes, ...]


class Dumped(Message, frozen=True):
    bytes: int


class Released(Message, frozen=True):
    """frozen_seconds: how long the tasks were stopped. With kill=True no Exited follows."""

    frozen_seconds: float
    criu_freeze_seconds: float = 0.0
    """CRIU's own figure (stats-dump: freezing_time + frozen_time)."""


class Aborted(Message, frozen=True):
    pass


class FlushStarted(Message, frozen=True):
    pass


class Flushing(Message, frozen=True):
    sequence: int
    done: int
    total: int


class Flushed(Message, frozen=True):
    """The fragment is published in the store."""

    sequence: int
    bytes: int
    seconds: float


class FlushFailed(Message, frozen=True):
    sequence: int
    message: str
    hint: str = ""


class Fetched(Message, frozen=True):
    pass


class RolledBack(Message, frozen=True):
    changed: int
    """Names that were not as they were at the checkpoint."""


class Restored(Message, frozen=True):
    """local: the images were still in the node's spool, and nothing was read from the store."""

    fetch_seconds: float
    restore_seconds: float
    bytes: int
    tasks: int
    local: bool = False


class Resumed(Message, frozen=True):
    pass


class Unheld(Message, frozen=True):
    pass


class Destroyed(Message, frozen=True):
    pass


class Exited(Message, frozen=True):
    """The launch root ended as its command did: with exit code `code`, or by signal -code if that is negative."""

    code: int


class Failed(Message, frozen=True):
    """The request failed; see errors.HpccrError. The capsule is as it was before the request, except after Create,
    Connect, Start, Fetch, RollBack and Restore, when it is gone."""

    code: int
    message: str
    hint: str = ""
    node: str = ""


# --- coordinator <-> agent only ---------------------------------------------------------------------------------


class Join(Message, frozen=True):
    """First message of an agent: the node it runs on, its rank in the helper step."""

    node: str
    rank: int
    pid: int


class Assign(Message, frozen=True):
    """The coordinator's answer to Join."""

    capsule: Index


class Output(Message, frozen=True):
    """Bytes the job wrote to stdout (1) or stderr (2)."""

    stream: Annotated[int, msgspec.Meta(ge=1, le=2)]
    data: bytes


class Input(Message, frozen=True):
    """Bytes for the job's stdin; empty: end of input."""

    data: bytes


class InputTaken(Message, frozen=True):
    """The agent has written that many more bytes of Input into the job's stdin: flow control."""

    count: int


class OutputTaken(Message, frozen=True):
    """The coordinator has written that many bytes of Output to the job's stdout or stderr: flow control."""

    count: int


class CloseOutput(Message, frozen=True):
    """Nobody will read the job's stdout (1) or stderr (2) any more: close the pipe's read end, as its reader did.
    1 stands for both where they are merged."""

    stream: Annotated[int, msgspec.Meta(ge=1, le=2)]


class Ping(Message, frozen=True):
    """Heartbeat, both ways; answered by nothing."""


class Call(Message, frozen=True):
    """Is the agent there? It answers Here at once; more than one need not be answered each."""


class Here(Message, frozen=True):
    """The answer to Call."""


class Signalled(Message, frozen=True):
    """The agent got a signal from Slurm: SIGTERM goes to the processes of helper steps when a job is preempted with
    GraceTime, and does not reach the batch script."""

    signum: int


class Log(Message, frozen=True):
    """A line for the step's log, from an agent."""

    level: str
    text: str


# --- probe (hpccr doctor -> hpccrd) -----------------------------------------------------------------------------


class Probe(Message, frozen=True):
    """Ask hpccrd what its node can do. First and only request on a connection. Reply: Probed.

    levels: how many directories, the one that the asker is in and those above it, are looked at for kept_out.
    """

    protocol: int
    levels: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0


class Check(msgspec.Struct, frozen=True):
    """One finding: ok, or what is wrong and what to do about it."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


class Probed(Message, frozen=True):
    node: str
    version: str
    checks: tuple[Check, ...]
    leases: int
    """Capsules of the asking user on this node."""
    kept_out: int = -1
    """How many directories above the asker's the first is that root cannot pass; -1: none of those asked for."""


# --- client <-> coordinator -------------------------------------------------------------------------------------


class CheckpointRequest(Message, frozen=True):
    """Make a checkpoint now. requeue: kill the tasks at release and requeue the job. wait: until it is durable.

    Replies: Progress events, then CheckpointReply or Failed.
    """

    requeue: bool
    wait: bool
    reason: str
    quiesce: Literal["", "prefer", "require", "off"] = ""
    """Of this one; "": as configured for the job."""


class Progress(Message, frozen=True):
    phase: str
    done: int
    total: int


class CheckpointReply(Message, frozen=True):
    sequence: int
    freeze_seconds: float
    total_seconds: float
    """From the request to the release of the tasks."""
    bytes: int
    durable: bool


class Leaving(Message, frozen=True):
    """Before a CheckpointReply to a request that requeues: the checkpoint is made, and Slurm is asked to requeue the
    job. It may do so and kill the coordinator before that can answer."""

    reply: CheckpointReply


class StatusRequest(Message, frozen=True):
    """Reply: StatusReply."""


class StatusReply(Message, frozen=True):
    """status: JSON text of coordinator.status.StepStatus."""

    status: str


NodeRequest = (
    Create
    | Connect
    | Start
    | Signal
    | Quiesce
    | Prepare
    | Freeze
    | Survey
    | Dump
    | Release
    | Abort
    | Flush
    | Fetch
    | RollBack
    | Restore
    | Resume
    | Unhold
    | Destroy
    | Probe
)
"""What hpccrd accepts."""

NodeReply = (
    Created
    | Connected
    | Started
    | Quiesced
    | Wanted
    | Prepared
    | Frozen
    | Surveyed
    | Dumped
    | Released
    | Aborted
    | FlushStarted
    | Flushing
    | Flushed
    | FlushFailed
    | Fetched
    | RolledBack
    | Restored
    | Resumed
    | Unheld
    | Destroyed
    | Exited
    | Failed
    | Probed
)
"""What hpccrd sends."""

AgentMessage = NodeReply | Join | Output | InputTaken | Ping | Here | Log | Signalled
"""What an agent sends to the coordinator."""

CoordinatorMessage = NodeRequest | Assign | Input | OutputTaken | CloseOutput | Ping | Call
"""What the coordinator sends to an agent."""

ClientMessage = CheckpointRequest | StatusRequest
ClientReply = Progress | Leaving | CheckpointReply | StatusReply | Failed
FirstMessage = Join | CheckpointRequest | StatusRequest
"""What the coordinator accepts first on a connection."""
