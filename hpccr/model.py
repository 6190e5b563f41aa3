"""The data of hpccr: steps, checkpoints, fragments. Pure; imports nothing of ours.

Sizes are bytes, times are seconds since the epoch (time.time()), durations are seconds unless the name says otherwise.
"""

import re
from typing import Annotated

import msgspec

FORMAT = 1
"""Version of everything that is written to the store."""

FRAGMENT_NAME = "fragment.json"
MANIFEST_NAME = "checkpoint.json"
FILES_LIST = "files.list"
"""File of a fragment: SavedFiles in msgpack."""
FILES_DATA = "files.data"
"""File of a fragment: the contents of the files in FILES_LIST."""

_STEP_DIR = re.compile(r"^(?P<cluster>[A-Za-z0-9_.+-]+)-(?P<job>[A-Za-z0-9_]+)$")

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}$")]
"""A name that is safe as one path component."""
JobName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_]{1,64}$")]
Index = Annotated[int, msgspec.Meta(ge=0, lt=65536)]
Count = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Sequence = Annotated[int, msgspec.Meta(ge=1, lt=1_000_000)]
Size = Annotated[int, msgspec.Meta(ge=0)]
HexDigest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
CheckpointId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]


class StepKey(msgspec.Struct, frozen=True):
    """What is checkpointed: one `hpccr run` of one job. `step` counts the runs of a job from "0"."""

    cluster: Name
    job: JobName
    step: Name

    def __str__(self) -> str:
        return f"{self.cluster}-{self.job}/{self.step}"

    @property
    def job_directory(self) -> str:
        """Name of the job's directory in a store."""
        return f"{self.cluster}-{self.job}"


def parse_job_directory(name: str) -> tuple[str, str] | None:
    """(cluster, job) of a directory name made by StepKey.job_directory; None for any other name."""
    match = _STEP_DIR.match(name)
    return (match["cluster"], match["job"]) if match else None


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a fragment: name within the capsule's directory (no slash), size, BLAKE3 digest of its content."""

    name: Name
    size: Size
    digest: HexDigest


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """Bytes [start, start + length) of a file; `place`: where they lie in the fragment's FILES_DATA."""

    start: int
    length: int
    place: int


class SavedFile(msgspec.Struct, frozen=True):
    """One name that a restore puts back as it was when everything stood still.

    path: absolute, as the capsule sees it, in the file system's own bytes. mode: st_mode; 0: there was nothing at that
    name. mtime: nanoseconds. extents: the content, what lies between them is zeros; None: the content was not saved,
    and the file is only cut back to its size. target: of a symbolic link. same: the path of an entry before this one
    that is the same file (a hard link). keep: programs know it by its inode, so as long as there is a file at the name
    it is written in place and not replaced.
    """

    path: bytes
    mode: int
    size: int = 0
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    extents: tuple[Extent, ...] | None = ()
    target: bytes = b""
    same: bytes = b""
    keep: bool = False
    xattrs: dict[str, bytes] = {}


class Link(msgspec.Struct, frozen=True, array_like=True):
    """A name by which CRIU looks, at a restore, for a file whose own name had been removed; other: one it still had."""

    path: bytes
    other: bytes


class ReadFile(msgspec.Struct, frozen=True, array_like=True):
    """A file that the job has open and only reads, as it was at the checkpoint. It is the user's affair and not put
    back."""

    path: bytes
    inode: int
    size: int


class SavedFiles(msgspec.Struct, frozen=True):
    """FILES_LIST of a fragment. trees: directories that are put back as a whole, but for what is in `excluded`;
    elsewhere: files of this capsule that another capsule of the checkpoint has saved; links: made when all files are
    back, for as long as CRIU restores; read: what has to be there besides."""

    files: tuple[SavedFile, ...] = ()
    trees: tuple[bytes, ...] = ()
    excluded: tuple[bytes, ...] = ()
    elsewhere: tuple[bytes, ...] = ()
    links: tuple[Link, ...] = ()
    read: tuple[ReadFile, ...] = ()


class FileRules(msgspec.Struct, frozen=True):
    """What a checkpoint saves of the job's files. trees: absolute paths of directories whose state is the job's;
    excluded: paths that are not, in them or not; snapshot_limit: bytes of the largest file that is saved."""

    trees: tuple[bytes, ...] = ()
    excluded: tuple[bytes, ...] = ()
    snapshot_limit: Size = 16 << 30


class SocketName(msgspec.Struct, frozen=True, array_like=True):
    """The name of a unix socket in a private directory, which archives do not have. mtime: nanoseconds."""

    path: bytes
    mode: int
    uid: int
    gid: int
    mtime: int


class PrivateTree(msgspec.Struct, frozen=True):
    """A private directory of the capsule, saved in the archive `file` of the fragment (empty: nothing was in it)."""

    path: str
    file: str
    sockets: tuple[SocketName, ...] = ()


class Stdio(msgspec.Struct, frozen=True):
    """Pipe inodes of the job's stdio as the images name them; 0 where that stream is /dev/null (stdin only).

    stdout == stderr when both go into one pipe.
    """

    stdin: int
    stdout: int
    stderr: int


class CapsuleImage(msgspec.Struct, frozen=True):
    """What a restore must know about one capsule's images beside the images: written by capsule init at the dump."""

    root_pid: int
    max_pid: int
    tasks: int
    stdio: Stdio
    private: tuple[PrivateTree, ...] = ()
    files: int = 0
    """Names and links in FILES_LIST: what a restore puts back outside the private directories."""
    read: int = 0
    """Files in FILES_LIST that the job only reads."""
    hung_up: tuple[int, ...] = ()
    """Pseudo-terminals, by their number, whose slave had been open and was not any more."""
    criu_version: int = 0
    """As CRIU reports it over RPC: major * 10000 + minor * 100 + sublevel."""
    kernel: str = ""
    cpu_flags: tuple[str, ...] = ()
    """Flags of /proc/cpuinfo on the dumping node."""
    frozen_seconds: float = 0.0
    """From the moment the first task was stopped until the tasks ran again (or were killed); 0 while unknown."""


class Fragment(msgspec.Struct, frozen=True):
    """One capsule's part of a checkpoint. Sealed as a whole by hpccrd (see SealedFragment)."""

    format: int
    key: StepKey
    checkpoint: CheckpointId
    sequence: Sequence
    capsule: Index
    capsules: Count
    uid: int
    gid: int
    created: float
    node: str
    image: CapsuleImage
    files: tuple[FileEntry, ...]

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.files)


class SealedFragment(msgspec.Struct, frozen=True):
    """fragment.json: `body` is the JSON text of a Fragment, `seal` the keyed BLAKE3 of exactly those bytes.

    Only hpccrd, which holds the site key, makes and checks seals.
    """

    body: str
    seal: HexDigest


class Stream(msgspec.Struct, frozen=True):
    """How far a stream of the job had got at the freeze.

    position: end of the job's own output in the regular file behind its stdout or stderr (None: not a regular file,
    cannot be cut back); for stdin the bytes the job has consumed. foreign: (offset, length) of what others wrote into
    the file between the job's own output: Slurm's notices, but also the script's other commands. inode, path:
    which file that was (the path is encodable()); another one is not cut.
    """

    position: int | None
    foreign: tuple[tuple[int, int], ...] = ()
    inode: int = 0
    path: str = ""


class Manifest(msgspec.Struct, frozen=True):
    """checkpoint.json: which fragments a checkpoint consists of; written by the coordinator at release."""

    format: int
    key: StepKey
    checkpoint: CheckpointId
    sequence: Sequence
    capsules: Count
    created: float
    stdin: Stream
    stdout: Stream
    stderr: Stream
    freeze_seconds: float = 0.0
    """Longest time any capsule was frozen."""
    reason: str = ""
    """Why it was made: command, requeue, interval, signal ..."""
    digest: str = ""
    """In the file: BLAKE3 of the record's JSON text with this one empty. In memory: empty."""


class StepRecord(msgspec.Struct, frozen=True):
    """step.json: the step's command and state; rewritten by the coordinator at each change of state.

    argv: for people to read, encodable() as all that may not be text. exit_code: of the finished step, else None.
    stdout_base/stderr_base: where the job's output began in the files behind its stdout and stderr when the step first
    started: a start from the beginning goes back to there.
    """

    format: int
    key: StepKey
    argv: tuple[str, ...]
    state: str
    started: float
    capsules: Count
    nodes: tuple[str, ...]
    incarnation: int = 0
    exit_code: int | None = None
    updated: float = 0.0
    due: float | None = None
    """When the next checkpoint by the clock begins, while there is one."""
    trees: tuple[str, ...] = ()
    """FileRules.trees, for `hpccr restore`; as in a URL, since names of directories need not be text."""
    batch: bool = False
    """The command is the whole batch script."""
    stdout_base: Stream | None = None
    stderr_base: Stream | None = None


class EndpointRecord(msgspec.Struct, frozen=True):
    """endpoint.json: where the running coordinator of a step listens, and the step's secret (file mode 0600)."""

    format: int
    key: StepKey
    hosts: tuple[str, ...]
    port: int
    secret: str
    """64 hex digits; see wire.handshake."""
    pid: int
    host: str


class FlushProgress(msgspec.Struct, frozen=True):
    """flush.json in a capsule's directory while its flush is going on: rewritten at least every 2 s."""

    done: Size
    total: Size
    updated: float
