"""Messages between hpccrd and a capsule's init (pid 1 of the capsule), over a SEQPACKET socket pair.

One msgpack message per packet, descriptors beside it (SCM_RIGHTS) where a docstring says so. hpccrd has checked what
comes from the user before it goes in here. Requests are strictly one after the other, each answered once (or by
wire.messages.Failed), but for Signal (no answer) and Abort (any time during a checkpoint). wire.messages.Exited is
sent when the launch root ends, wire.messages.Wanted when a process of the job asks for a checkpoint. End of file on
this socket ends init and with it everything in the capsule.

A step of a checkpoint that fails has been undone completely when Failed comes: the tasks run, the hold is off, and what
is in the spool directory is waste; Abort after that is answered Aborted and does nothing. The same holds for an Abort
that comes when Release has been sent: a release is past giving up. A restore that fails leaves no task, but the hold,
and the capsule is of no use any more. Descriptors are init's own copies: hpccrd may close its own at once.

Build -> Built, Network -> NetworkReady, Launch -> Started, Quiesce -> Quiesced, InitPrepare -> Prepared,
Freeze -> Frozen, Survey -> Surveyed, Dump -> InitDumped, Release -> Released, Abort -> Aborted,
InitRollBack -> RolledBack, InitRestore -> Restored, Resume -> Resumed, Unhold -> Unheld.
"""

from __future__ import annotations

from hpccr.model import CapsuleImage, FileRules
from hpccr.wire.messages import (
    Abort,
    Aborted,
    Dump,
    Exited,
    Failed,
    Freeze,
    Frozen,
    Message,
    Prepared,
    Quiesce,
    Quiesced,
    Release,
    Released,
    Restored,
    Resume,
    Resumed,
    RolledBack,
    Signal,
    Started,
    Survey,
    Surveyed,
    Unheld,
    Unhold,
    Wanted,
)

MAX_PACKET = 160 << 10
"""Bytes; below the default socket buffer (net.core.wmem_default 212992), so that a packet is never refused.

What may be longer (the environment) goes as a sealed memfd beside the packet.
"""


class Identity(Message, frozen=True):
    """Whose job it is and with which limits: read from the requesting process by hpccrd, never from its words."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    umask: int
    rlimits: tuple[tuple[int, int, int], ...]
    """(resource number, soft, hard); -1 is infinity."""
    cpus: tuple[int, ...]
    """Affinity of the requesting process."""
    nice: int


class Build(Message, frozen=True):
    """First packet. Descriptors: requester's mount namespace, then one cgroup.procs (O_WRONLY) per hierarchy.

    hostname: hpccr-K. hosts: whole text of /etc/hosts. boot_id: text of boot_id. private: paths that get a tmpfs.
    Reply: Built, after namespaces and mounts are made and lo is up.
    """

    hostname: str
    boot_id: str
    hosts: str
    private: tuple[str, ...]
    first_pid: int
    criu: str
    identity: Identity


class Built(Message, frozen=True):
    """pid of init as hpccrd sees it, so that it can open /proc/PID/ns/net."""

    pid: int


class Peer(Message, frozen=True):
    """One capsule of the step as capsule init must know it."""

    capsule: int
    mac: str
    address: str
    underlay: str
    vni: int


class Network(Message, frozen=True):
    """What the capsule's network is: hpccrd has given the devices their addresses, peers and routes, and init does the
    rest. Reply: NetworkReady.

    device: the VXLAN device (already named); address, prefix: of this capsule on it. uplink: device name or "";
    uplink_address/prefix/gateway on it, outside_source: the constant source address for the default route.
    """

    device: str
    mac: str
    address: str
    prefix: int
    mtu: int
    own: int
    peers: tuple[Peer, ...]
    uplink: str
    uplink_address: str
    uplink_prefix: int
    uplink_gateway: str
    outside_source: str


class NetworkReady(Message, frozen=True):
    pass


class Launch(Message, frozen=True):
    """Start the launch root. Descriptors: memfd with msgpack dict[bytes, bytes] of the environment, then stdin (if
    stdin == "pipe"; else init opens /dev/null inside), stdout, stderr (not if merged).

    argv: the launch root's whole command line, argv[0] an absolute path in the capsule. It starts in the cgroups of
    Build, in a new ipc namespace and session, with the limits of Identity, without any capability and unable to gain
    one, nothing but 0-2 open. Reply: Started; or Failed when any step up to execve does (cwd, program, limits).
    """

    argv: tuple[bytes, ...]
    cwd: bytes
    stdin: str
    merged: bool


class InitPrepare(Message, frozen=True):
    """Check the task tree and start CRIU up to `pre-dump`. Descriptors: the spool directory of this checkpoint.

    outside: config checkpoint.outside. Reply: Prepared; or Failed with code UNSUPPORTED naming process, resource and
    remedy, or FAILED when the dump may need more than `room`.
    """

    freeze_timeout: float
    ghost_limit: int
    outside: str
    room: int
    """Bytes the spool can take."""
    files: FileRules = FileRules()
    private_limit: int = 16 << 30
    """Bytes that a private directory may hold."""


class InitDumped(Message, frozen=True):
    """All images but stats-dump are in the spool directory; tasks still stopped. image.frozen_seconds is 0.

    Besides the images there are dump.log, private-N.tar and, where image.files or image.read is not 0,
    model.FILES_LIST and model.FILES_DATA. With Release(kill=True) stats-dump may never come.
    """

    image: CapsuleImage


class InitRollBack(Message, frozen=True):
    """Put the job's files back, as the user. Descriptors: the spool directory. Reply: RolledBack; or Failed naming the
    file. May be repeated: each file is in its old or in its new state. excluded: as in messages.RollBack."""

    image: CapsuleImage
    excluded: tuple[bytes, ...] = ()


class InitRestore(Message, frozen=True):
    """Restore from the spool directory. Descriptors: spool directory, then stdin (if "pipe"), stdout, stderr (not if
    merged). Installs the hold, extracts private trees, runs CRIU up to `post-restore`, checks every task. Reply:
    Restored (fetch_seconds and bytes 0); or Failed with code CORRUPT when the result would not be the user's own, or
    with the last errors of CRIU's log.

    Resume then lets the tasks run, still under the hold, after aborting their TCP connections to outside the capsules.
    """

    image: CapsuleImage
    stdin: str
    merged: bool
    ghost_limit: int


InitRequest = (
    Build
    | Network
    | Launch
    | Signal
    | Quiesce
    | InitPrepare
    | Freeze
    | Survey
    | Dump
    | Release
    | Abort
    | InitRollBack
    | InitRestore
    | Resume
    | Unhold
)
InitReply = (
    Built
    | NetworkReady
    | Started
    | Quiesced
    | Wanted
    | Prepared
    | Frozen
    | Surveyed
    | InitDumped
    | Released
    | Aborted
    | RolledBack
    | Restored
    | Resumed
    | Unheld
    | Exited
    | Failed
)
