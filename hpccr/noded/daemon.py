"""hpccrd: the node daemon. Parses its command line, prepares the node, serves until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import fcntl
import logging
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

import hpccr
from hpccr import config as configuration
from hpccr.config import Config
from hpccr.errors import ExitCode, HpccrError, LockedError, UsageError
from hpccr.noded import leftovers, probe, seal
from hpccr.noded.network import Plumber
from hpccr.noded.node import Node
from hpccr.noded.probe import Prober
from hpccr.noded.service import BACKLOG, Service
from hpccr.noded.spawned import watch
from hpccr.noded.spool import RUNTIME, Area, Limits, Spool

log = logging.getLogger("hpccrd")

DESCRIPTORS = 16384
"""Descriptors wanted: some ten per capsule, a few per connection."""

EXPIRE = 60.0
"""Seconds between two looks for images that were kept long enough, and for what a transfer left that outlived the
hpccrd which started it."""


def parser() -> argparse.ArgumentParser:
    codes = "Exit status: 0 after SIGTERM or SIGINT, 1 failure, 2 wrong configuration, 11 another hpccrd runs here."
    result = argparse.ArgumentParser(prog="hpccrd", description="The node daemon of hpccr.", epilog=codes)
    result.add_argument("--config", metavar="FILE", help=f"configuration file (default {configuration.DEFAULT_FILE})")
    result.add_argument("--socket", metavar="PATH", help="listen here instead of node.socket")
    result.add_argument("--run", metavar="DIR", help="runtime directory instead of node.run")
    result.add_argument("--spool", metavar="DIR", help="spool directory instead of node.spool")
    result.add_argument("--key", metavar="FILE", help="site key instead of node.key")
    result.add_argument("--embedded", action="store_true", help="for one `hpccr run`: make the key, share the node")
    result.add_argument("--exit-with-parent", action="store_true", help="end when the starting process ends")
    result.add_argument("-v", "--verbose", action="store_true", help="log what is done in detail")
    result.add_argument("--version", action="version", version=f"hpccrd {hpccr.__version__}")
    return result


def configured(options: argparse.Namespace) -> Config:
    """The file's configuration with the command line's over it. Raises UsageError."""
    config = configuration.load(options.config)
    changes = {name: getattr(options, name) for name in ("socket", "run", "spool", "key") if getattr(options, name)}
    if options.embedded:
        changes["spool_keep"] = 0.0  # nobody would be there to remove them
    return msgspec.structs.replace(config, node=msgspec.structs.replace(config.node, **changes))


def notify(state: str) -> None:
    """Tell systemd, if it asked to be told (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(state.encode(), path if path[0] == "/" else "\0" + path[1:])


def listen(path: str) -> socket.socket:
    """The socket everybody may connect to. The caller holds the runtime lock, so what is there is a dead one's."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass  # the first start since boot
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(path)
        os.chmod(path, 0o666)  # noqa: S103 - everybody may ask; the kernel says who does
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {path}: {error.strerror}", hint="set node.socket") from None
    return listener


def lock(run: str) -> int:
    """Make the runtime directory and be the only hpccrd in it. Raises LockedError."""
    os.makedirs(run, mode=0o755, exist_ok=True)
    fd = os.open(os.path.join(run, "lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise LockedError(f"another hpccrd runs with the runtime directory {run}") from None
    return fd


def prepare_process() -> None:
    """Whatever started us may have left us its own settings; capsules must not inherit them."""
    os.umask(0o022)
    os.chdir("/")
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0]), hard))


def die_with_parent() -> int:
    """SIGTERM to us when the parent ends; gives a pidfd of it. Raises HpccrError if it has ended already."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        raise HpccrError("the starting process has ended already") from None
    if os.getppid() != parent:
        raise HpccrError("the starting process has ended already")
    return pidfd


async def serve(config: Config, key: seal.SiteKey, parent: int | None) -> None:
    """From start to stop, on a prepared node."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # The death signal follows the thread that started us, the pidfd the process: either may come.
    watching = watch(parent) if parent is not None else None
    if watching is not None:
        watching.add_done_callback(lambda _: stop.set())
    runtime = Area(os.path.join(config.node.run, RUNTIME))
    spool = Spool(Limits(config.node.spool, config.node.spool_reserve, config.node.spool_size))
    plumber = Plumber(config.network, config.node.run)
    runtime.prepare()
    spool.prepare()
    await loop.run_in_executor(plumber.executor, leftovers.sweep, runtime, spool, plumber)
    node = Node(
        config=config,
        key=key,
        name=probe.host_name(),
        cpu_flags=probe.cpu_flags(Path("/proc/cpuinfo").read_text()),
        plumber=plumber,
        spool=spool,
        runtime=runtime,
        criu_ready=asyncio.Event(),
    )
    service = Service(node, Prober(config, config.node.key, spool))
    with listen(config.node.socket) as listener:
        tasks = [asyncio.create_task(service.serve(listener)), asyncio.create_task(_first_check(node))]
        if parent is None:
            tasks.append(asyncio.create_task(_expire(node)))
        notify("READY=1")
        log.info("hpccrd %s serves on %s", hpccr.__version__, config.node.socket)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({tasks[0], stopping}, return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        for task in [*tasks, stopping]:
            task.cancel()
        os.unlink(config.node.socket)
    await service.stop()
    await node.begin_all()
    if node.flushes:
        log.info("%d flushes go on without hpccrd", len(node.flushes))
    log.info("hpccrd has ended")


def tidy(spool: Spool, keep: float) -> list[str]:
    """Remove images that were kept for longer than `keep` seconds, and what no process owns; what it was. Blocks."""
    removed = [f"{name}: it was kept for node.spool_keep" for name in spool.expire(keep)]
    for directory in spool.leftovers():
        removed.append(f"{directory.path}: its transfer has ended without success")
        directory.remove()
    return removed


async def _expire(node: Node) -> None:
    """Remove images that were kept long enough and what nobody owns any more; forever."""
    while True:
        try:
            for removed in await asyncio.to_thread(tidy, node.spool, node.config.node.spool_keep):
                log.info("removed %s", removed)
        except OSError as error:
            log.warning("the spool cannot be looked through: %s", error)
        await asyncio.sleep(EXPIRE)


async def _first_check(node: Node) -> None:
    """Before the first hold: CRIU's probe of the kernel needs loopback, and caches what it finds."""
    try:
        check = await asyncio.to_thread(probe.check_criu, node.config.node.criu)
        if not check.ok:
            log.warning("criu check: %s (%s)", check.detail, check.hint)
    finally:
        node.criu_ready.set()


def run(arguments: Sequence[str]) -> None:
    """Raises HpccrError for anything that keeps it from serving."""
    options = parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if options.verbose else logging.INFO,
        # The journal has its own time and name.
        format="%(levelname)s %(message)s"
        if "JOURNAL_STREAM" in os.environ
        else "%(asctime)s hpccrd[%(process)d] %(levelname)s %(message)s",
    )
    for chatty in ("asyncio", "pyroute2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    config = configured(options)
    if os.geteuid() != 0:
        raise UsageError("hpccrd must be run by root", hint="systemctl start hpccrd")
    parent = die_with_parent() if options.exit_with_parent else None
    prepare_process()
    key = seal.load(config.node.key, generate=options.embedded)
    if options.embedded:
        # Several may run at once: what each has is in locked directories of its own.
        asyncio.run(serve(config, key, parent))
        # Its parent removes it too, but may have been killed.
        shutil.rmtree(os.path.dirname(config.node.socket), ignore_errors=True)
        return
    held = lock(config.node.run)
    try:
        asyncio.run(serve(config, key, parent))
    finally:
        os.close(held)


def entry() -> None:
    """The `hpccrd` command."""
    try:
        run(sys.argv[1:])
    except HpccrError as error:
        print(f"hpccrd: error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(int(error.code))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.FAILED))


if __name__ == "__main__":
    entry()
