"""The store worker: copies one capsule's fragment into or out of the store, with the user's ids and no privileges.

Started by hpccrd's transfer process (noded/storeworker.py) as `python -I -m hpccr.store.worker MODE UID GID GROUP...`,
MODE being flush, fetch or mark, as root: it takes the user's ids itself, before it hears or opens anything. A process
that has changed its ids without an exec is not dumpable: the user cannot trace it, and so cannot make it stay on the
node, outside of any job.
Descriptor 3 is a SOCK_STREAM unix socket to it; frames are a 4-byte big-endian length and a msgpack map, at most 4 MiB.

flush, root -> worker: {"t":"open","directory":str,"total":int,"level":int,"share":int}; then per file
  {"t":"file","name":str,"size":int} with a descriptor of the file, open for reading (SCM_RIGHTS), in the order of their
  names (so that a pagemap comes before its pages); at last {"t":"publish","fragment":bytes}, the text of fragment.json.
  worker -> root: {"t":"ok"} after open (moved with zeros before it, while it reads packs again that it is to refer to)
  and after publish; in between {"t":"moved","done":int,"files":int}, the bytes
  and the files taken over so far, at least after every file; or {"t":"error","message":str,"hint":str,"code":int}.
  The worker makes the capsule's directory, stores the files as blocks (store.blocks) under temporary names, syncs,
  writes the index, syncs the directory, rewrites flush.json (model.FlushProgress) at least every 2 s, publishes
  fragment.json last and removes flush.json. On any error (the socket's end included) it removes what it wrote, never
  an already published fragment, and answers error. Root's own digests of the files are what is sealed.

fetch, root -> worker: {"t":"open","directory":str}; worker -> root: {"t":"fragment","fragment":bytes}; then
  root -> worker: {"t":"get","name":str}; worker -> root: {"t":"data","data":bytes<=1MiB}... {"t":"end"}; or error
  (no fragment: code 10; a file it should have is missing or damaged: code 12). {"t":"lane"} brings another socket
  (SCM_RIGHTS), over which files are asked for and sent at the same time. The end of the first socket ends it.

mark, root -> worker: {"t":"mark","directory":str,"what":str}: the checkpoint of that capsule's directory was found
  damaged (store.damage); worker -> root: {"t":"ok"}, or error.

An error ends the worker, and it may come at any time: after a send that failed (EPIPE, ECONNRESET), read the socket
once more. Exit status: 0 after a finished transfer, 1 after an error.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import msgspec

from hpccr.errors import CorruptError, ExitCode, HpccrError, LockedError, NoCheckpointError
from hpccr.model import FRAGMENT_NAME, FlushProgress, Name, Size
from hpccr.store import damage, index, lineage, pagemap, privileges, publish
from hpccr.store.blocks import Reader, Writer
from hpccr.store.layout import FLUSH_NAME
from hpccr.store.verify import check_fragment

DESCRIPTOR = 3
HEADER = struct.Struct("!I")
MAX_FRAME = 4 << 20
MAX_DATA = 1 << 20
MAX_LANES = 16
MAX_PAGEMAP = 64 << 20
"""Bytes of pagemap images whose pages have not come yet; what is more is not looked at."""
MOVED_INTERVAL = 0.5
"""Seconds between two messages about progress within a file."""
INTACT = "`hpccr status JOB` shows the checkpoints there are, `hpccr verify JOB SEQ` whether one is whole"
REACHABLE = "is the store on a file system with room left for you, mounted on this node?"
BROKEN = "is the storage below it well? its administrator should know; later checkpoints are tried again"
PROGRESS_INTERVAL = 1.5
"""Seconds between two writes of flush.json, somewhat less than the format's limit (model.FlushProgress)."""


_DATA = b"\x82\xa1t\xa4data\xa4data\xc6"
"""msgpack of {"t":"data","data":...} up to the length of a bin 32."""
_BIN32 = struct.Struct("!I")


class FlushOpen(msgspec.Struct, frozen=True, tag_field="t", tag="open"):
    directory: str
    total: Size
    level: Annotated[int, msgspec.Meta(ge=1, le=19)] = 1
    share: Annotated[int, msgspec.Meta(ge=1, le=100)] = lineage.SHARE


class FlushFile(msgspec.Struct, frozen=True, tag_field="t", tag="file"):
    name: Name
    size: Size


class End(msgspec.Struct, frozen=True, tag_field="t", tag="end"):
    pass


class FlushPublish(msgspec.Struct, frozen=True, tag_field="t", tag="publish"):
    fragment: bytes


class Mark(msgspec.Struct, frozen=True, tag_field="t", tag="mark"):
    directory: str
    what: str


class FetchOpen(msgspec.Struct, frozen=True, tag_field="t", tag="open"):
    directory: str


class FetchFragment(msgspec.Struct, frozen=True, tag_field="t", tag="fragment"):
    fragment: bytes


class FetchGet(msgspec.Struct, frozen=True, tag_field="t", tag="get"):
    name: Name


class FetchLane(msgspec.Struct, frozen=True, tag_field="t", tag="lane"):
    pass


class Ok(msgspec.Struct, frozen=True, tag_field="t", tag="ok"):
    pass


class Moved(msgspec.Struct, frozen=True, tag_field="t", tag="moved"):
    done: int
    files: int


class Error(msgspec.Struct, frozen=True, tag_field="t", tag="error"):
    message: str
    hint: str
    code: int


FlushRequest = FlushOpen | FlushFile | FlushPublish
FetchRequest = FetchOpen | FetchGet | FetchLane


class ProtocolError(HpccrError):
    """hpccrd sent something that has no place here."""


class Link:
    """Frames over a blocking stream socket, some with a descriptor."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._descriptors: list[int] = []

    def send(self, message: msgspec.Struct) -> None:
        """Raises OSError when the peer is gone."""
        body = msgspec.msgpack.encode(message)
        if len(body) > MAX_FRAME:
            raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes exceeds the limit of {MAX_FRAME}")
        self._socket.sendall(HEADER.pack(len(body)) + body)

    def send_data(self, data: memoryview) -> None:
        """Send a Data message without copying what is in it. Raises OSError when the peer is gone."""
        head = _DATA + _BIN32.pack(len(data))
        parts = [memoryview(HEADER.pack(len(head) + len(data)) + head), data]
        while parts:
            sent = self._socket.sendmsg(parts)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][sent:]

    def ready(self) -> bool:
        """Whether something has come (or the end)."""
        return bool(self._poll.poll(0))

    def receive(self) -> bytes | None:
        """The body of the next frame; None at a clean end. Raises ProtocolError, OSError."""
        header = self._read(HEADER.size)
        if not header:
            return None
        if len(header) < HEADER.size:
            raise ProtocolError("the connection to hpccrd ended inside a frame")
        (length,) = HEADER.unpack(header)
        if length > MAX_FRAME:
            raise ProtocolError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME}")
        body = self._read(length)
        if len(body) < length:
            raise ProtocolError("the connection to hpccrd ended inside a frame")
        return body

    def descriptor(self) -> int:
        """The descriptor that came with the last frame; the caller's from now on. Raises ProtocolError."""
        if len(self._descriptors) != 1:
            raise ProtocolError(f"{len(self._descriptors)} descriptors came with a file")
        return self._descriptors.pop()

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            received, descriptors, _, _ = socket.recv_fds(self._socket, count - len(data), 4)
            self._descriptors += descriptors
            if not received:
                break
            data += received
        return bytes(data)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


class Progress:
    """Keeps flush.json fresh from a thread of its own, so that a slow sync of a large file does not make it stale."""

    def __init__(self, directory: Path, total: int) -> None:
        self._path = directory / FLUSH_NAME
        self._total = total
        self._done = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flush-progress", daemon=True)

    def add(self, count: int) -> None:
        self._done += count

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        publish.remove(self._path)

    def _run(self) -> None:
        while not self._stop.wait(PROGRESS_INTERVAL):
            try:
                self._write()
            except OSError:
                pass  # the store is full or gone: the transfer itself meets that too, and reports it

    def _write(self) -> None:
        # After a crash nobody misses it, and a metadata server has better things to sync.
        record = FlushProgress(done=self._done, total=self._total, updated=time.time())
        publish.publish(self._path, record, durable=False)


def flush(link: Link) -> None:
    """Serve one flush. Raises HpccrError or OSError after having removed what it wrote."""
    decoder: msgspec.msgpack.Decoder[FlushRequest] = msgspec.msgpack.Decoder(FlushRequest)

    def receive() -> FlushRequest:
        return _decode(decoder.decode, link.receive())

    request = receive()
    if not isinstance(request, FlushOpen):
        raise ProtocolError(f"a flush began with {type(request).__name__}")
    directory = _absolute(request.directory)
    with _naming(directory):
        publish.make_one_directory(directory)
        if (directory / FRAGMENT_NAME).exists():
            raise LockedError(f"{directory} already holds a published fragment", hint="take the next checkpoint number")
        _clear(directory)
        _flush(link, request, receive, directory)
    link.send(Ok())


@contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """A write or a sync does not say where it failed."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(directory)
        raise


def _flush(link: Link, request: FlushOpen, receive: Callable[[], FlushRequest], directory: Path) -> None:
    try:
        with Progress(directory, request.total) as progress, ExitStack() as stack:
            taken = Taken(link, progress)
            inheritance = lineage.inherit(directory, request.total, share=request.share, alive=lambda: taken.add(0))
            writer = stack.enter_context(
                Writer(directory, inheritance, level=request.level, read=taken.add, done=taken.end)
            )
            link.send(Ok())
            cutter = Cutter(writer)
            while True:
                while writer.pending and not link.ready():
                    writer.work()
                following = receive()
                if not isinstance(following, FlushFile):
                    break
                cutter.add(following, link.descriptor())
            if not isinstance(following, FlushPublish):
                raise ProtocolError(f"{type(following).__name__} where a file or the fragment must come")
            writer.finish(following.fragment)
            # All is durable under its name before the fragment says that it is there.
            publish.fsync_directory(directory)
            publish.publish_bytes(directory / FRAGMENT_NAME, following.fragment)
    except BaseException:
        with suppress(OSError):  # what was first is what is told
            if not (directory / FRAGMENT_NAME).exists():
                _clear(directory)
                os.rmdir(directory)
        raise


class Taken:
    """Tells how far it is."""

    def __init__(self, link: Link, progress: Progress) -> None:
        self._link, self._progress = link, progress
        self._done = self._files = 0
        self._last = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        self._progress.add(count)
        if time.monotonic() - self._last >= MOVED_INTERVAL:
            self._tell()

    def end(self) -> None:
        self._files += 1
        self._tell()

    def _tell(self) -> None:
        self._last = time.monotonic()
        self._link.send(Moved(done=self._done, files=self._files))


class Cutter:
    """Gives files to a writer, page images with the cuts that their pagemaps say."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._names: set[str] = set()
        self._cuts: dict[str, array[int]] = {}
        self._room = MAX_PAGEMAP

    def add(self, file: FlushFile, fd: int) -> None:
        """Takes the descriptor. Raises ProtocolError, and as Writer.add()."""
        try:
            status = os.fstat(fd)
            if file.name in self._names:
                raise ProtocolError(f"{file.name} comes twice")
            self._names.add(file.name)
            if not stat.S_ISREG(status.st_mode) or status.st_size != file.size:
                raise ProtocolError(f"{file.name} has {status.st_size} bytes and was to have {file.size}")
            ends = self._cuts.pop(file.name, None)
            if file.name.startswith(pagemap.PREFIX) and file.size <= self._room:
                self._look(os.pread(fd, file.size, 0))
        except BaseException:
            os.close(fd)
            raise
        self._writer.add(file.name, fd, file.size, ends if ends and ends[-1] == file.size else None)

    def _look(self, image: bytes) -> None:
        self._room -= len(image)
        try:
            pages, ends = pagemap.cuts(image, self._writer.block)
        except (ImportError, ValueError):
            return  # then the pages are cut by offset: only less is found again
        self._cuts[pagemap.pages_name(pages)] = ends


def fetch(link: Link) -> int:
    """Serve one fetch until hpccrd closes the socket. Returns the exit status. Raises HpccrError, OSError."""
    decoder: msgspec.msgpack.Decoder[FetchRequest] = msgspec.msgpack.Decoder(FetchRequest)
    request = _decode(decoder.decode, link.receive())
    if not isinstance(request, FetchOpen):
        raise ProtocolError(f"a fetch began with {type(request).__name__}")
    directory = _absolute(request.directory)
    try:
        text = (directory / FRAGMENT_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NoCheckpointError(
            f"there is no {FRAGMENT_NAME} in {directory}", hint="`hpccr status JOB` shows the checkpoints there are"
        ) from None
    link.send(FetchFragment(fragment=text))
    found = index.read_index(directory)
    try:
        check_fragment(directory / FRAGMENT_NAME, text, found)
    except CorruptError as error:
        # Root looks at the seal, and cannot tell this from one that another site made.
        damage.mark(directory.parent, error.message)
        raise
    lanes: list[threading.Thread] = []
    with Reader(directory, found) as reader:
        try:
            # An error is told here, before the wait for the lanes: they end when hpccrd, which knows then, closes them.
            return _act("fetch", link, lambda one: _main_lane(one, reader, lanes))
        finally:
            for thread in lanes:
                thread.join()


def mark(link: Link) -> None:
    """Serve one mark. Raises HpccrError, OSError."""
    request = _decode(msgspec.msgpack.Decoder(Mark).decode, link.receive())
    damage.mark(_absolute(request.directory).parent, request.what)
    link.send(Ok())


def _main_lane(link: Link, reader: Reader, lanes: list[threading.Thread]) -> None:
    decoder: msgspec.msgpack.Decoder[FetchRequest] = msgspec.msgpack.Decoder(FetchRequest)
    while (body := link.receive()) is not None:
        request = _decode(decoder.decode, body)
        if isinstance(request, FetchLane) and len(lanes) < MAX_LANES:
            lane = socket.socket(fileno=link.descriptor())
            lanes.append(threading.Thread(target=_serve, args=("lane", lane, lambda one: _lane(one, reader))))
            lanes[-1].start()
        elif isinstance(request, FetchGet):
            _send_file(link, reader, request.name)
        else:
            raise ProtocolError(f"{type(request).__name__} where a request for a file must come")


def _lane(link: Link, reader: Reader) -> None:
    decoder = msgspec.msgpack.Decoder(FetchGet)
    while (body := link.receive()) is not None:
        _send_file(link, reader, _decode(decoder.decode, body).name)


def _send_file(link: Link, reader: Reader, name: str) -> None:
    for piece in reader.stream(name):
        view = memoryview(piece)
        for start in range(0, len(piece), MAX_DATA):
            link.send_data(view[start : start + MAX_DATA])
    link.send(End())


def _absolute(directory: str) -> Path:
    path = Path(directory)
    if not path.is_absolute() or ".." in path.parts:
        raise ProtocolError(f"{directory!r} is not an absolute path of a capsule's directory")
    return path


def _clear(directory: Path) -> None:
    """Remove everything in a capsule's directory: leftovers of a worker that was killed, or what this one wrote."""
    for entry in list(directory.iterdir()):
        publish.remove(entry)


def _decode[T](decode: Callable[[bytes], T], body: bytes | None) -> T:
    if body is None:
        raise ProtocolError("hpccrd closed the connection in the middle of the transfer")
    try:
        return decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ProtocolError(f"not a message of this protocol: {error}") from None


def serve(mode: str, sock: socket.socket) -> int:
    """Run one transfer over `sock`, report an error to the peer and close `sock`. Returns the exit status."""
    return _serve(mode, sock, MODES[mode])


MODES: dict[str, Callable[[Link], int | None]] = {"flush": flush, "fetch": fetch, "mark": mark}


def _serve(mode: str, sock: socket.socket, act: Callable[[Link], int | None]) -> int:
    with sock:
        link = Link(sock)
        try:
            return _act(mode, link, act)
        finally:
            link.close()


def _act(mode: str, link: Link, act: Callable[[Link], int | None]) -> int:
    try:
        return act(link) or 0
    except HpccrError as error:
        # The many ways in which a fragment can be damaged have one remedy.
        hint = error.hint or (INTACT if isinstance(error, CorruptError) else "")
        failure = Error(message=error.message, hint=hint, code=int(error.code))
    except OSError as error:
        where = f" {error.filename}:" if error.filename else ""
        failure = Error(
            message=f"the {mode} failed:{where} {error.strerror or error}",
            hint=BROKEN if error.errno == errno.EIO else REACHABLE,
            code=int(ExitCode.FAILED),
        )
    try:
        link.send(failure)
    except OSError:
        pass  # the peer is gone; nobody is left to tell
    return 1


def main() -> int:
    mode, *ids = sys.argv[1:] or [""]
    if mode not in MODES or len(ids) < 2 or not all(map(str.isdecimal, ids)):
        print("usage: python -I -m hpccr.store.worker MODE UID GID GROUP... (started by hpccrd)", file=sys.stderr)
        return int(ExitCode.USAGE)
    uid, gid, *groups = map(int, ids)
    privileges.take(uid, gid, groups)
    # hpccrd ends a worker by closing the socket, so that the files are removed; a stray signal must not leave them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0o077)
    return serve(mode, socket.socket(fileno=DESCRIPTOR))


if __name__ == "__main__":
    sys.exit(main())
