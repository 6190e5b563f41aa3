"""What the launch root and hpccr-rsh have in common: frames on a TCP connection, the handshake, streams, an event loop.

Everything here is dumped with the job, once per node and once per running hpccr-rsh, so it is written against the small
C modules below `socket`, `signal` and `hashlib` (together about 1.5 MiB of private memory per process less).

Conversation: the server says MAGIC and a nonce; the client MAGIC, a nonce and its proof; the server its proof or, to a
client that does not know the secret, REFUSED. Then frames: REQUEST from the client once, STARTED or ERROR from the
server once; DATA, EOF, CREDIT and CLOSED for each stream; SIGNAL from the client; EXIT as the server's last.
A sender has at most WINDOW bytes of each stream on the way: more only as the receiver grants CREDIT for what it has
passed on. So nothing is buffered without bound and no stream blocks another one or a signal.
Or, instead of REQUEST, RESERVE from an srun, WAIT (perhaps) and PLACE or ERROR from the server; the place is srun's
until the connection ends (step/ledger.py).
"""

from __future__ import annotations

import _socket
import os
import select

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from hashlib import sha256
else:
    import _signal as signal
    from _sha2 import sha256

MAGIC = b"hpccrsh\x01"
NONCE = 32
DIGEST = 32
REFUSED = bytes(DIGEST)
HANDSHAKE_TIMEOUT = 10.0
"""Seconds a client has until its request must have arrived."""

REQUEST, STARTED, ERROR, DATA, EOF, CREDIT, CLOSED, SIGNAL, EXIT, RESERVE, WAIT, PLACE = range(1, 13)
STDIN, STDOUT, STDERR = 0, 1, 2

HEADER = 6
"""Bytes before a frame's payload: kind (1), stream (1), length (4, big-endian)."""
MAX_PAYLOAD = 16 << 20
"""A request holds a whole environment, which Linux limits to a quarter of the stack (2 MiB unless raised)."""
WINDOW = 256 << 10
CHUNK = 32 << 10

DEFAULT_PORT = 8474
SECRET_VARIABLE = "HPCCR_STEP_SECRET"  # noqa: S105 - the name of a variable
PORT_VARIABLE = "HPCCR_RSH_PORT"


class ProtocolError(Exception):
    """The peer does not speak this protocol."""


def proof(secret: bytes, role: bytes, own: bytes, peer: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104) under `secret` of a role (b"server" or b"client"), that side's nonce and the other's."""
    key = (sha256(secret).digest() if len(secret) > 64 else secret).ljust(64, b"\0")
    inner = sha256(bytes(b ^ 0x36 for b in key) + role + own + peer).digest()
    return sha256(bytes(b ^ 0x5C for b in key) + inner).digest()


def same(left: bytes, right: bytes) -> bool:
    """Whether two digests are equal, in a time that does not tell where they differ."""
    difference = len(left) ^ len(right)
    for a, b in zip(left, right, strict=False):
        difference |= a ^ b
    return difference == 0


def warn(text: str) -> None:
    """A line on stderr, whole, whatever state the interpreter's own streams are in."""
    try:
        os.write(2, (text + "\n").encode("utf-8", "surrogateescape"))
    except OSError:
        pass  # nobody is left to read it


def original_environment() -> dict[bytes, bytes]:
    """The environment this program was started with; Python adds LC_CTYPE to its own where no locale is set."""
    try:
        with open("/proc/self/environ", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return dict(os.environb)
    return {key: value for key, _, value in (word.partition(b"=") for word in words) if key}


def fill_standard_descriptors() -> None:
    """Open /dev/null in place of a missing 0, 1 or 2, so that no socket or pipe of ours gets such a number."""
    while (fd := os.open("/dev/null", os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def release(fd: int) -> None:
    """Close a descriptor for whoever is at its other end; a standard one stays occupied by /dev/null."""
    if fd > 2:
        os.close(fd)
        return
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, fd)
    os.close(null)


class Loop:
    """Descriptors and who handles their events; level-triggered poll(2), which takes regular files too."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call handler(events) when something happens on `fd`; errors and hang-ups are always among it."""
        known = self._watched.get(fd)
        if known is None or known[0] != events:
            self._poll.register(fd, events)
        self._watched[fd] = (events, handler)

    def forget(self, fd: int) -> None:
        """Stop watching; to be called before the descriptor is closed."""
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def turn(self, timeout: float | None) -> None:
        """Wait up to `timeout` seconds (None: for ever) for events and handle them."""
        for fd, events in self._poll.poll(None if timeout is None else max(0, int(timeout * 1000) + 1)):
            watched = self._watched.get(fd)
            if watched is not None:  # an earlier handler of this turn may have closed it
                watched[1](events)


class SignalPipe:
    """Signals as bytes in a pipe: `numbers()` gives those that came since the last call."""

    def __init__(self, numbers: set[int]) -> None:
        self.fd, write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)

    def numbers(self) -> bytes:
        try:
            return os.read(self.fd, 4096)
        except BlockingIOError:
            return b""


class Wire:
    """Frames over a connected, non-blocking socket. `outgoing` is what is still to be sent."""

    def __init__(self, sock: _socket.socket) -> None:
        self.sock = sock
        self.outgoing = bytearray()
        self.incoming = bytearray()
        sock.setblocking(False)
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)

    def post(self, kind: int, stream: int = 0, payload: bytes = b"") -> None:
        self.outgoing += bytes((kind, stream)) + len(payload).to_bytes(4, "big") + payload

    def post_number(self, kind: int, stream: int, number: int) -> None:
        self.post(kind, stream, number.to_bytes(4, "big"))

    def flush(self) -> None:
        """Send what the socket takes now. Raises OSError if the connection is broken."""
        while self.outgoing:
            try:
                sent = self.sock.send(self.outgoing)
            except BlockingIOError:
                return
            del self.outgoing[:sent]

    def fill(self) -> bool:
        """Read what has come; False at the end of the connection. Raises OSError if it is broken."""
        try:
            data = self.sock.recv(2 * CHUNK)
        except BlockingIOError:
            return True
        self.incoming += data
        return bool(data)

    def take(self, size: int) -> bytes | None:
        """The next `size` bytes, outside any frame; None while they are not there yet."""
        if len(self.incoming) < size:
            return None
        data = bytes(self.incoming[:size])
        del self.incoming[:size]
        return data

    def frame(self) -> tuple[int, int, bytes] | None:
        """The next whole frame (kind, stream, payload), None while there is none. Raises ProtocolError."""
        if len(self.incoming) < HEADER:
            return None
        length = int.from_bytes(self.incoming[2:HEADER], "big")
        if length > MAX_PAYLOAD:
            raise ProtocolError(f"a frame of {length} bytes")
        if len(self.incoming) < HEADER + length:
            return None
        kind, stream = self.incoming[0], self.incoming[1]
        payload = bytes(self.incoming[HEADER : HEADER + length])
        del self.incoming[: HEADER + length]
        return kind, stream, payload


class Source:
    """A local descriptor whose bytes go to the peer as one stream, never more than it gave credit for."""

    def __init__(self, loop: Loop, wire: Wire, stream: int, fd: int) -> None:
        self._loop, self._wire, self._stream, self._fd = loop, wire, stream, fd
        self._credit = WINDOW
        self.open = True
        self._arm()

    def _arm(self) -> None:
        # Not watched without credit: a hang-up, which poll always reports, would make it spin.
        if self._credit:
            self._loop.watch(self._fd, select.POLLIN, self._ready)
        else:
            self._loop.forget(self._fd)

    def _ready(self, _events: int) -> None:
        try:
            data = os.read(self._fd, min(self._credit, CHUNK))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            self._wire.post(EOF, self._stream)
            return
        self._credit -= len(data)
        self._wire.post(DATA, self._stream, data)
        self._arm()

    def grant(self, count: int) -> None:
        self._credit += count
        if self.open:
            self._arm()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._loop.forget(self._fd)
            release(self._fd)


class Sink:
    """A stream of the peer on its way into a local descriptor.

    `piece` bounds one write: PIPE_BUF for a descriptor that blocks and is shared with other processes, since that
    much fits when poll says that a pipe is writable.
    """

    def __init__(self, loop: Loop, wire: Wire, stream: int, fd: int, piece: int) -> None:
        self._loop, self._wire, self._stream, self._fd, self._piece = loop, wire, stream, fd, piece
        self._buffer = bytearray()
        self._ended = False
        self.open = True
        self._arm()

    def _arm(self) -> None:
        # Watched also with nothing to write: poll then tells when the reader is gone.
        self._loop.watch(self._fd, select.POLLOUT if self._buffer else 0, self._ready)

    def _ready(self, events: int) -> None:
        if not events & select.POLLOUT:
            self._broken()
            return
        try:
            written = os.write(self._fd, self._buffer[: self._piece])
        except BlockingIOError:
            return
        except OSError:
            self._broken()
            return
        del self._buffer[:written]
        self._wire.post_number(CREDIT, self._stream, written)
        self._settle()

    def _broken(self) -> None:
        self.close()
        self._wire.post(CLOSED, self._stream)

    def _settle(self) -> None:
        if self._ended and not self._buffer:
            self.close()
        else:
            self._arm()

    def feed(self, data: bytes) -> None:
        """Raises ProtocolError if the peer sent more than it had credit for."""
        if not self.open:
            return  # what was under way when CLOSED was sent
        self._buffer += data
        if len(self._buffer) > WINDOW:
            raise ProtocolError("more data than there was credit for")
        self._arm()

    def end(self) -> None:
        """No more will come: close when everything is written."""
        self._ended = True
        if self.open:
            self._settle()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._buffer.clear()
            self._loop.forget(self._fd)
            release(self._fd)
