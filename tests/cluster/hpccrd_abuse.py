"""Cases of hpccrd_checks.py in which a user means harm, or is just wrong: hpccrd says no and goes on for the others."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from hpccr.errors import ExitCode
from hpccr.wire import messages as m
from hpccr.wire.frames import HEADER, encode

from hpccrd_client import (
    DEADLINE,
    SOCKET,
    WAIT,
    Capsule,
    capsule,
    case,
    checkpointed,
    connected,
    create,
    echoes,
    running,
    start,
    step_key,
)


def raw() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(SOCKET)
    sock.settimeout(DEADLINE)
    return sock


def answer(sock: socket.socket) -> m.Failed | None:
    """What hpccrd says before it closes the connection, if anything."""
    data = b""
    try:
        while chunk := sock.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass  # it closed with our bytes unread
    if not data:
        return None
    (length,) = HEADER.unpack(data[:4])
    assert len(data) == 4 + length, data
    return msgspec.msgpack.decode(data[4:], type=m.Failed)


async def well() -> None:
    """hpccrd serves others as if nothing had been."""
    async with capsule() as made:
        await connected(made)
        await made.expect(m.Destroy(), m.Destroyed)


@case
async def garbage() -> None:
    """What is no frame, no message, or no first request: refused with a word, and nothing else."""
    wrong: list[tuple[bytes, str]] = [
        (HEADER.pack(0xFFFFFFFF), "limit"),
        (HEADER.pack((4 << 20) + 1), "limit"),
        (HEADER.pack(0), "not a message"),
        (HEADER.pack(5) + b"hello", "not a message"),
        (HEADER.pack(2) + b"\xa1\xff", "not a message"),
        (HEADER.pack(100_000) + b"\x91" * 100_000, "not a message"),
        (HEADER.pack(7) + msgspec.msgpack.encode({"type": 1})[:7], "not a message"),
        (encode(m.Created(endpoint=m.Endpoint(0, "", 0, ""), node="", cpu_flags=())), "not a message"),
        (encode(m.Freeze()), "not a first request"),
        (encode(m.Destroy()), "not a first request"),
        (b"GET / HTTP/1.1\r\n\r\n", "limit"),
        (HEADER.pack(100) + b"x" * 50, "inside a frame"),
        (b"\0", "inside a frame"),
    ]
    for data, pattern in wrong:
        with raw() as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            failed = answer(sock)
            assert failed is not None, data[:20]
            assert pattern in failed.message, (data[:20], failed)
    for _ in range(200):
        with raw() as sock:
            sock.sendall(secrets.token_bytes(1000))
    await well()


@case
async def wrong_create() -> None:
    """Creates that say something impossible."""
    right = create(step_key())
    for changes, code, pattern in (
        ({"protocol": 99}, ExitCode.UNSUPPORTED, "protocol"),
        ({"capsule": 1}, ExitCode.USAGE, "no capsule 1 of 1"),
        ({"secret": "x"}, ExitCode.USAGE, "secret"),
        ({"secret": "A" * 64}, ExitCode.USAGE, "secret"),
        ({"capsules": 65535}, ExitCode.UNSUPPORTED, "there can be 4096"),
    ):
        async with capsule() as made:
            await made.refused(msgspec.structs.replace(right, **changes), code, pattern)
            await made.expect(m.Destroy(), m.Destroyed)
    for name in ("../x", "", "a/b", "x" * 200, "."):
        with raw() as sock:
            data = msgspec.to_builtins(right)
            data["key"]["cluster"] = name
            body = msgspec.msgpack.encode(data)
            sock.sendall(HEADER.pack(len(body)) + body)
            failed = answer(sock)
            assert failed is not None, name
            assert "not a message" in failed.message, (name, failed)


@case
async def out_of_order() -> None:
    """Requests at the wrong time are refused one by one, and the lease goes on."""
    identifier = "0" * 32
    async with capsule() as made:
        created = await made.expect(create(step_key()), m.Created)
        connect = m.Connect(peers=(created.endpoint,))
        for request in (
            create(step_key()),
            m.Freeze(),
            start("true", stdin="pipe"),
            m.Flush(directory="/x"),
            m.Resume(),
        ):
            await made.refused(request, ExitCode.USAGE, "impossible while the capsule is created")
        await made.refused(m.Probe(protocol=m.PROTOCOL), ExitCode.USAGE, "not a request on a capsule")
        await made.expect(m.Abort(reason="nothing"), m.Aborted)
        await made.lease.send(m.Signal(15))
        await made.expect(connect, m.Connected)
        await made.refused(connect, ExitCode.USAGE, "while the capsule is connected")
        await made.expect(start("sh", "-c", "echo up; while read l; do echo got $l; done", stdin="pipe"), m.Started)
        await made.until("up")
        for request in (m.Freeze(), m.Dump(), m.Release(kill=True), m.Resume(), m.Unhold(), connect, start("true")):
            await made.refused(request, ExitCode.USAGE, "while the capsule is running")
        await made.refused(m.Flush(directory="/x"), ExitCode.USAGE, "no released checkpoint")
        await made.expect(m.Prepare(sequence=1, checkpoint=identifier), m.Prepared)
        await made.refused(m.Dump(), ExitCode.USAGE, "while the capsule is prepared")
        for signum in (0, -1, 65, 1 << 40):
            await made.lease.send(m.Signal(signum))
        await made.expect(m.Abort(reason="enough"), m.Aborted)
        await echoes(made)
        # Two at once: the second is refused at once, the first is answered.
        await made.send_together(m.Prepare(sequence=2, checkpoint=identifier), m.Freeze())
        answers = {type(await made.next()), type(await made.next())}
        assert answers == {m.Failed, m.Prepared}, answers
        await made.expect(m.Destroy(), m.Destroyed)


@case
async def wrong_start() -> None:
    """Commands and descriptors that cannot be; each ends the capsule, as a failed Start does."""
    null = os.open("/dev/null", os.O_RDWR)
    one, two = os.pipe()

    async def refused(request: m.Start, descriptors: Iterable[int], pattern: str) -> None:
        async with capsule() as made:
            await connected(made)
            await made.lease.send(request, list(descriptors))
            failed = await made.next()
            assert isinstance(failed, m.Failed), failed
            assert pattern in failed.message, failed

    right = start("true")
    await refused(right, [], "1 descriptors are due")
    await refused(right, [two, two], "1 descriptors are due")
    await refused(start("true", merged=False), [two], "2 descriptors are due")
    await refused(start("true", stdin="pipe"), [two], "2 descriptors are due")
    await refused(start("true", stdin="tty"), [two], "neither pipe nor null")
    await refused(right, [null], "anonymous pipes")
    with tempfile.TemporaryDirectory() as directory:
        os.mkfifo(f"{directory}/pipe:[1]")
        fifo = os.open(f"{directory}/pipe:[1]", os.O_RDWR)
        await refused(right, [fifo], "anonymous pipes")
        os.close(fifo)
    with socket.socket(socket.AF_UNIX) as sock:
        await refused(right, [sock.fileno()], "anonymous pipes")
    await refused(right, [two] * 4, "descriptors")
    await refused(right, [two] * 200, "descriptors")
    await refused(start("true", cwd="relative"), [two], "absolute")
    await refused(start("true", cwd="/no\0"), [two], "absolute")
    await refused(start("a\0b"), [two], "zero byte")
    await refused(start("true", **{"a=b": "c"}), [two], "impossible variable")
    await refused(start("true", cwd="/no/such/directory"), [two], "/no/such/directory")
    await refused(start("true", cwd="/root"), [two], "/root")
    await refused(start("x" * 200_000), [two], "more than the 163840 that fit")
    for fd in (null, one, two):
        os.close(fd)
    async with capsule() as made:
        await connected(made)
        descriptors = os.pipe()
        await made.lease.send(m.Prepare(sequence=1, checkpoint="0" * 32), list(descriptors))
        failed = await made.next()
        assert isinstance(failed, m.Failed)
        assert "takes none" in failed.message
        assert await made.next() is None
        for fd in descriptors:
            os.close(fd)
    # A large environment is no problem.
    async with capsule() as made:
        await connected(made)
        await made.expect(start("sh", "-c", "exit ${#BIG}", BIG="x" * 100, MORE="y" * 120_000), m.Started)
        assert await made.next() == m.Exited(100)


@case
async def silent(patience: str = "") -> None:
    """Connections that say nothing: only so many, and not for ever (patience: until this hpccrd loses it)."""
    idle = [raw() for _ in range(64)]
    with raw() as sock:
        failed = answer(sock)
        assert failed is not None
        assert "ask for nothing" in failed.message, failed
    for sock in idle:
        if patience:
            failed = answer(sock)
            assert failed is not None
            assert "no request came within" in failed.message, failed
        sock.close()
    async with asyncio.timeout(DEADLINE):
        while True:
            async with capsule() as made:
                if isinstance(await made.ask(create(step_key())), m.Created):
                    return


@case
async def unread() -> None:
    """A client that asks and asks and never reads is cut off; it has cost hpccrd no more than its limit."""
    sock = raw()
    sock.sendall(encode(create(step_key())))
    bad = encode(m.Freeze()) * 1000
    total = 0
    try:
        while total < 1 << 28:
            sock.sendall(bad)
            total += len(bad)
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert total < 1 << 28, "hpccrd went on listening"
    sock.close()
    await well()


@case
async def many_leases() -> None:
    """A user has a limit of leases."""
    made: list[Capsule] = []
    sockets = []
    # Creates that fail keep their lease until the connection ends, and are cheap.
    wrong = msgspec.structs.replace(create(step_key()), protocol=99)
    for _ in range(64):
        sock = raw()
        sock.sendall(encode(wrong))
        (length,) = HEADER.unpack(sock.recv(4, socket.MSG_WAITALL))
        sock.recv(length, socket.MSG_WAITALL)
        sockets.append(sock)
    with raw() as sock:
        sock.sendall(encode(create(step_key())))
        failed = answer(sock)
        assert failed is not None
        assert "capsules on" in failed.message, failed
    for sock in sockets:
        sock.close()
    assert not made
    async with asyncio.timeout(DEADLINE):
        while True:
            async with capsule() as again:
                if isinstance(await again.ask(create(step_key())), m.Created):
                    return


@case
async def offer_tickets(path: str) -> None:
    """Create capsule 0 of 2 and write its endpoint to a file; wait for the end of stdin."""
    key = step_key()
    async with capsule() as made:
        created = await made.expect(create(key, 0, 2), m.Created)
        Path(path).write_bytes(msgspec.json.encode((key, created.endpoint)))
        print("offered", flush=True)
        await asyncio.to_thread(sys.stdin.read)


@case
async def use_tickets(path: str) -> None:
    """Another user with the same step key cannot join the capsule in that file."""
    key, theirs = msgspec.json.decode(Path(path).read_bytes(), type=tuple[m.StepKey, m.Endpoint])
    async with capsule() as made:
        created = await made.expect(create(key, 1, 2), m.Created)
        await made.refused(m.Connect(peers=(theirs, created.endpoint)), ExitCode.USAGE, "ticket of capsule 0")


@case
async def forged_tickets() -> None:
    """Endpoints that were changed, left out or doubled."""
    for change in ({"vni": 5}, {"address": "10.0.0.1"}, {"ticket": "0" * 64}, {"ticket": ""}):
        async with capsule() as made:
            created = await made.expect(create(step_key()), m.Created)
            forged = msgspec.structs.replace(created.endpoint, **change)
            await made.refused(m.Connect(peers=(forged,)), ExitCode.USAGE, "ticket of capsule 0")
    async with capsule() as made:
        created = await made.expect(create(step_key(), 0, 2), m.Created)
        await made.refused(m.Connect(peers=(created.endpoint,) * 2), ExitCode.USAGE, "the step has 2")
    async with capsule() as made:
        created = await made.expect(create(step_key(), 0, 2), m.Created)
        await made.refused(m.Connect(peers=()), ExitCode.USAGE, "the step has 2")


@case
async def foreign_namespaces() -> None:
    """Run by this case in a user namespace of its own: refused, with a hint."""
    if "HPCCR_INSIDE" not in os.environ:
        for flags in ("-Ur", "-Urm", "-Um"):
            subprocess.run(
                ["unshare", flags, sys.executable, sys.argv[0], "foreign-namespaces"],
                env=os.environ | {"HPCCR_INSIDE": "1"},
                check=True,
            )
        return
    async with capsule() as made:
        failed = await made.refused(create(step_key()), ExitCode.UNSUPPORTED, "user namespace")
        assert "container" in failed.hint


@case
async def foreign_mounts() -> None:
    """In a mount namespace as a set-id container runtime makes it, of root's but with the user's choice of mounts:
    refused where root would trust what is there, and welcome with a private /tmp."""
    if (place := os.environ.get("HPCCR_INSIDE")) is None:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as own:
            os.chmod(own, 0o755)
            for target in ("/usr/local/sbin", "/etc", "/tmp"):
                enter = f"mount --bind {own} {target} && exec setpriv --reuid 1001 --regid 1001 --clear-groups "
                subprocess.run(
                    ["unshare", "-m", "sh", "-c", f"{enter} {sys.executable} {sys.argv[0]} foreign-mounts"],
                    env=os.environ | {"HPCCR_INSIDE": target},
                    check=True,
                )
        return
    async with capsule() as made:
        if place == "/tmp":
            assert isinstance(await made.ask(create(step_key())), m.Created)
        else:
            await made.refused(create(step_key()), ExitCode.UNSUPPORTED, place)


@contextmanager
def filled(spool: str) -> Iterator[None]:
    """There is no room in the spool in this block."""
    filler = Path(spool, "filler")
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 120 << 20)
    try:
        yield
    finally:
        filler.unlink()


async def goes_on(made: Capsule, spool: str) -> None:
    """The job does without anything left of its checkpoint, and the next one works. The capsule is gone then."""
    await echoes(made)
    assert os.listdir(spool) == []
    await checkpointed(made, sequence=2)
    await made.expect(m.Destroy(), m.Destroyed)


@case
async def dump_without_room(spool: str) -> None:
    """Run by the case spool-fills."""
    async with capsule() as made:
        await running(made)
        await made.expect(m.Prepare(sequence=1, checkpoint="0" * 32), m.Prepared)
        await made.expect(m.Freeze(), m.Frozen)
        with filled(spool):
            await made.refused(m.Dump(), ExitCode.FAILED, "spool is full")
        await goes_on(made, spool)


@case
async def room_goes_during_a_dump(spool: str) -> None:
    """Run by the case spool-fills. The dump is as long as it has to be: what tar writes of /tmp goes into a pipe."""
    async with capsule() as made:
        await running(made, job=("sh", "-c", f"head -c 1000000 /dev/urandom > /tmp/large; {WAIT[-1]}"))
        await made.expect(m.Prepare(sequence=1, checkpoint="0" * 32), m.Prepared)
        await made.expect(m.Freeze(), m.Frozen)
        (directory,) = Path(spool).iterdir()
        archive = directory / "private-1.tar"
        os.mkfifo(archive, 0o600)
        pipe = os.open(archive, os.O_RDWR)
        await made.lease.send(m.Dump())
        assert await asyncio.to_thread(select.select, [pipe], [], [], DEADLINE) == ([pipe], [], [])
        with filled(spool):
            failed = await made.expect_event(m.Failed)
            assert "spool is full" in failed.message, failed
            os.close(pipe)
        await goes_on(made, spool)


@case
async def given_up_while_room_is_made(spool: str) -> None:
    """Run by the case spool-fills. It takes long to look through a kept image of many files."""
    kept = Path(spool, "kept-0123456789abcdef-000001")
    kept.mkdir(mode=0o700)
    for number in range(30000):
        kept.joinpath(str(number)).touch()
    async with capsule() as made:
        await running(made)
        for milliseconds in range(0, 600, 20):
            await made.lease.send(m.Prepare(sequence=1, checkpoint="0" * 32))
            await asyncio.sleep(milliseconds / 1000)
            await made.lease.send(m.Abort(reason="test"))
            while (answer := await made.next()) != m.Aborted():
                assert isinstance(answer, m.Prepared) or re.search("given up|aborted", answer.message), answer
            await echoes(made)
        await checkpointed(made, sequence=2)
    shutil.rmtree(kept)


LISTEN = (
    "import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('',6000)); print('up',flush=True)\n"
    "while True: print(s.recv(99).decode(),flush=True)"
)


def vxlan(vni: int, payload: bytes) -> bytes:
    """A VXLAN packet (RFC 7348) with a datagram from capsule 1 to port 6000 of capsule 0."""
    udp = struct.pack("!HHHH", 6001, 6000, 8 + len(payload), 0) + payload
    addresses = socket.inet_aton("10.90.0.11") + socket.inet_aton("10.90.0.10")
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    total = sum(struct.unpack("!10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    ip = ip[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + ip[12:]
    ethernet = bytes.fromhex("0268700000000268700000010800")
    return struct.pack("!II", 0x08000000, vni << 8) + ethernet + ip + udp


@case
async def forged_packets() -> None:
    """Who knows a VNI can still not put packets into the capsule network: they would have to come from a port below
    1024, and those are root's (run as root, who shows that the packets themselves are right)."""
    async with capsule() as made:
        created = await made.expect(create(step_key()), m.Created)
        await made.expect(m.Connect(peers=(created.endpoint,)), m.Connected)
        await made.expect(start(sys.executable, "-c", LISTEN), m.Started)
        await made.until("up\n")
        for port, word in ((0, b"from a user"), (1024, b"from a user"), (1023, b"from root")):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(("", port))
                sock.sendto(vxlan(created.endpoint.vni, word), (created.endpoint.address, 8473))
        await made.until("from root\n")
        assert "user" not in (output := made.output.decode()), output


@case
async def no_low_ports() -> None:
    """A user gets no port below 1024, on the node or in a capsule."""
    code = (
        "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ntry: s.bind(('',600))\n"
        "except PermissionError: print('refused')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"refused\n"
    async with capsule() as made:
        await connected(made)
        await made.expect(start(sys.executable, "-c", code), m.Started)
        await made.until("refused\n")
