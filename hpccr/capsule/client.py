"""hpccr-rsh: what mpirun takes for ssh. Runs a command in another capsule of the job and stays until it ends.

    hpccr-rsh [OPTION...] HOST COMMAND...

`sh -c COMMAND` runs on HOST (hpccr-K, its address, or localhost) with this environment, working directory, umask and
soft limits; stdin, stdout, stderr and the exit code are passed, as are signals. Options of ssh are accepted; only -n
and -o ConnectTimeout=SECONDS mean something. Exit code 255 and a message if the command could not be run or was lost.
"""

from __future__ import annotations

import _socket
import os
import select
import time

from hpccr.capsule import link

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    import signal
    from typing import NoReturn
else:
    import _signal as signal

HOSTS_FILE = "/etc/hosts"
"""Holds the names of all capsules of the step, and is the capsule's own."""
CONNECT_TIMEOUT = 30.0
"""Seconds for the other launch root to come up and answer; it may be just starting, or held for a checkpoint."""
RETRY_PAUSE = 0.1
STOPPED = 2.0
"""Seconds by which no wait overruns unless this process stood still: for a checkpoint, or `scontrol suspend`."""
PIECE = 4096
"""PIPE_BUF: what stdout and stderr, which other processes may share, take without blocking once poll says so."""
LOST = 255

WITH_VALUE = "BbcDEeFIiJLlmOopQRSWw"
"""ssh's options that are followed by a value."""
PASSED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Failure(Exception):
    """The command could not be run, or it is not known how it ended."""


class Invocation:
    """The command line: host, command, null_input (-n), connect_timeout (seconds). Raises Failure."""

    def __init__(self, argv: list[str]) -> None:
        self.null_input = False
        self.connect_timeout = CONNECT_TIMEOUT
        rest = self._options(argv)
        if not rest:
            raise Failure("usage: hpccr-rsh [OPTION...] HOST COMMAND...")
        host, rest = rest[0], self._options(rest[1:])
        self.host = host.rpartition("@")[2]
        if not rest:
            raise Failure(f"no command for {self.host}: there are no interactive shells")
        self.command = " ".join(rest)

    def _options(self, words: list[str]) -> list[str]:
        """Read options up to the first other word or after `--`; the words that are left."""
        words = list(words)
        while words and words[0].startswith("-") and words[0] != "-":
            word = words.pop(0)
            if word == "--":
                break
            if word.startswith("--"):
                continue  # no option of ssh, but Slurm has Hydra pass --external-launcher
            for position, letter in enumerate(word[1:], 2):
                if letter == "n":
                    self.null_input = True
                elif letter in WITH_VALUE:
                    value = word[position:] or (words.pop(0) if words else "")
                    self._value(letter, value)
                    break
        return words

    def _value(self, letter: str, value: str) -> None:
        name, _, number = value.replace("=", " ").partition(" ")
        if letter == "o" and name.lower() == "connecttimeout":
            try:
                self.connect_timeout = float(number)
            except ValueError:
                raise Failure(f"-o {value}: not a number of seconds") from None


def find_address(hosts: str, host: str, own_name: str) -> str:
    """The IPv4 address of `host` by the text of a hosts(5) file; localhost is this capsule. Raises Failure."""
    wanted = own_name if host == "localhost" else host
    for line in hosts.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if ":" not in address and address and wanted in (address, *names):
            return address
    if host == "localhost" or host.startswith("127."):
        return "127.0.0.1" if host == "localhost" else host
    raise Failure(f"{host} is no capsule of this job: it is not in {HOSTS_FILE}")


def read_hosts() -> str:
    """The text of the capsule's hosts(5); "" where there is none."""
    try:
        with open(HOSTS_FILE, "rb") as file:
            return file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def connect(address: str, port: int, secret: bytes, timeout: float) -> _socket.socket:
    """A connection on which both sides have proved that they know the secret. Raises Failure.

    Tried again until the time is over as long as the other side has not refused: nothing has been asked for yet.
    """
    deadline = time.monotonic() + timeout
    pause = RETRY_PAUSE
    while True:
        remaining = deadline - time.monotonic()
        sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        try:
            sock.settimeout(max(0.1, remaining))
            sock.connect((address, port))
            _handshake(sock, secret)
        except OSError as error:
            sock.close()
            deadline = renewed(deadline, time.monotonic(), timeout)
            if deadline - time.monotonic() <= pause:
                raise Failure(f"no answer from {address} port {port} within {timeout:g} s: {error}") from None
        except BaseException:
            sock.close()
            raise
        else:
            return sock
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def renewed(deadline: float, now: float, timeout: float) -> float:
    """The deadline of a wait that should have ended by then: a new one if this process stood still meanwhile."""
    return now + timeout if now - deadline > STOPPED else deadline


def _handshake(sock: _socket.socket, secret: bytes) -> None:
    greeting = _exactly(sock, len(link.MAGIC) + link.NONCE)
    if not greeting.startswith(link.MAGIC):
        raise Failure("what answers there is not a launch root of this version")
    peer, own = greeting[len(link.MAGIC) :], os.urandom(link.NONCE)
    sock.sendall(link.MAGIC + own + link.proof(secret, b"client", own, peer))
    answer = _exactly(sock, link.DIGEST)
    if link.same(answer, link.REFUSED):
        raise Failure(f"the launch root does not accept this job's {link.SECRET_VARIABLE}")
    if not link.same(answer, link.proof(secret, b"server", peer, own)):
        raise Failure(f"what answers there does not know this job's {link.SECRET_VARIABLE}")


def _exactly(sock: _socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionResetError("connection closed")
        data += piece
    return data


def request(command: str, environ: dict[bytes, bytes]) -> bytes:
    """The payload of a REQUEST frame; see spawn.Request."""
    import resource

    umask = os.umask(0)
    os.umask(umask)
    limits = [
        f"{n}={resource.getrlimit(n)[0]}" for n in sorted({getattr(resource, x) for x in dir(resource) if _limit(x)})
    ]
    try:
        directory = os.getcwdb()
    except OSError:
        directory = b"/"
    words = [key + b"=" + value for key, value in environ.items()]
    parts = [os.fsencode(command), directory, b"%o" % umask, ",".join(limits).encode(), *words]
    return b"\0".join(parts)


def _limit(name: str) -> bool:
    return name.startswith("RLIMIT_")


class Client:
    """The running command, as seen from here."""

    def __init__(self, wire: link.Wire, *, null_input: bool) -> None:
        self._loop = link.Loop()
        self._wire = wire
        self._fd = wire.sock.fileno()
        self._null_input = null_input
        self._signals = link.SignalPipe({n for n in PASSED if signal.getsignal(n) is not signal.SIG_IGN})
        self._loop.watch(self._signals.fd, select.POLLIN, self._on_signals)
        self._stdin: link.Source | None = None
        self._outputs = {
            link.STDOUT: link.Sink(self._loop, wire, link.STDOUT, link.STDOUT, PIECE),
            link.STDERR: link.Sink(self._loop, wire, link.STDERR, link.STDERR, PIECE),
        }
        self._code: int | None = None

    def run(self, payload: bytes) -> int:
        """Have the command run; its exit code (128 + n if signal n ended it). Raises Failure, OSError."""
        self._wire.post(link.REQUEST, 0, payload)
        while self._code is None or any(sink.open for sink in self._outputs.values()):
            if self._code is None:
                self._wire.flush()
                events = select.POLLIN | (select.POLLOUT if self._wire.outgoing else 0)
                self._loop.watch(self._fd, events, self._ready)
            self._loop.turn(None)
        return self._code

    def _ready(self, events: int) -> None:
        if events & ~select.POLLOUT and not self._wire.fill():
            raise Failure("the connection ended before the command did")
        while self._code is None and (frame := self._wire.frame()) is not None:
            self._handle(*frame)

    def _handle(self, kind: int, stream: int, payload: bytes) -> None:
        if kind == link.DATA and stream in self._outputs:
            self._outputs[stream].feed(payload)
        elif kind == link.EOF and stream in self._outputs:
            self._outputs[stream].end()
        elif kind == link.CREDIT and self._stdin is not None:
            self._stdin.grant(int.from_bytes(payload, "big"))
        elif kind == link.CLOSED and self._stdin is not None:
            self._stdin.close()
        elif kind == link.STARTED:
            # Not before: what another process could still read from a shared stdin is left to it if nothing runs.
            self._start_input()
        elif kind == link.ERROR:
            raise Failure(payload.decode("utf-8", "replace"))
        elif kind == link.EXIT:
            self._code = int.from_bytes(payload, "big")
            self._loop.forget(self._fd)
            self._wire.sock.close()
            if self._stdin is not None:
                self._stdin.close()
            for sink in self._outputs.values():
                sink.end()
        else:
            raise link.ProtocolError(f"frame {kind} of stream {stream} out of place")

    def _start_input(self) -> None:
        if self._null_input:
            self._wire.post(link.EOF, link.STDIN)
        else:
            self._stdin = link.Source(self._loop, self._wire, link.STDIN, link.STDIN)

    def _on_signals(self, _events: int) -> None:
        for number in set(self._signals.numbers()):
            if self._code is not None:
                os._exit(128 + number)  # only the reader of our output is still waited for
            self._wire.post_number(link.SIGNAL, 0, number)


def main(argv: list[str]) -> NoReturn:
    """The command hpccr-rsh; `argv` without the program's name."""
    link.fill_standard_descriptors()
    host, code, parent = "", LOST, os.getppid()
    try:
        invocation = Invocation(argv)
        host = f"{invocation.host}: "
        secret = os.environ.get(link.SECRET_VARIABLE, "")
        if not secret:
            raise Failure(f"{link.SECRET_VARIABLE} is not set: this works only inside a job run by hpccr")
        port = int(os.environ.get(link.PORT_VARIABLE, link.DEFAULT_PORT))
        address = find_address(read_hosts(), invocation.host, os.uname().nodename)
        sock = connect(address, port, secret.encode(), invocation.connect_timeout)
        client = Client(link.Wire(sock), null_input=invocation.null_input)
        code = client.run(request(invocation.command, link.original_environment()))
    except (Failure, link.ProtocolError, OSError, ValueError) as error:
        # PRRTE ends without waiting for its daemons' connections; then the job is over and this is no error of it.
        if os.getppid() == parent:
            link.warn(f"hpccr-rsh: {host}{error}")
    os._exit(code)
