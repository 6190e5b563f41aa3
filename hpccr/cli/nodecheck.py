"""What `hpccr doctor` finds out on one node, and what it compares between nodes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

import hpccr
from hpccr.agent.lease import Lease
from hpccr.cli.embedded import node_service
from hpccr.config import Config
from hpccr.errors import HpccrError, encodable
from hpccr.slurm.commands import has_plugin
from hpccr.slurm.query import SlurmError
from hpccr.store import publish
from hpccr.wire import messages as m
from hpccr.wire.messages import Check

PATIENCE = 2.0
"""Seconds for hpccrd to take a connection: it may be starting again, or have many to take."""
PROBE_TIMEOUT = 180.0
"""Seconds for hpccrd to look: `criu check` alone may take minutes the first time on a large node."""

MAX_LEVELS = 64
"""Directories of one place that hpccrd looks at."""

PLUGIN = "sbatch --checkpoint"
EQUAL = ("criu", "site key")
"""Checks of hpccrd whose findings must be the same on all nodes."""


class NodeReport(msgspec.Struct, frozen=True):
    """One node's findings: `hpccr doctor --local --json`."""

    node: str
    version: str
    """Of the hpccr that ran there; empty if none did."""
    checks: tuple[Check, ...]
    cpu_flags: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def examine(config: Config, store: Path, *, token: str = "", embedded: bool = False) -> NodeReport:
    """Look at this node. token: a file that must be in the store. embedded: start hpccrd if none runs."""
    checks = check_daemon(config, embedded=embedded)
    shared = check_token(store, token) if token else None
    if shared is not None:
        checks.append(shared)
    if shared is None or shared.ok:  # else it would only be made, where nobody wants it
        checks.append(check_store(store))
    if (plugin := check_plugin()) is not None:
        checks.append(plugin)
    from hpccr.noded.probe import cpu_flags  # pulls in the netlink library, which no other verb needs

    try:
        flags = cpu_flags(Path("/proc/cpuinfo").read_text())
    except OSError:
        flags = ()
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    return NodeReport(node=node, version=hpccr.__version__, checks=tuple(checks), cpu_flags=flags)


def check_daemon(config: Config, *, embedded: bool) -> list[Check]:
    """That hpccrd runs, is of our version, and what it says of its node."""
    path = config.node.socket
    try:
        if embedded and not os.path.exists(path):
            with node_service(config) as own:
                return [Check("hpccrd", True, "none is running; `hpccr run` starts its own"), *_probe(own)]
        return _probe(path)
    except (HpccrError, OSError) as error:
        what = error.message if isinstance(error, HpccrError) else f"{path}: {error.strerror or error}"
        hint = error.hint if isinstance(error, HpccrError) else ""
        return [Check("hpccrd", False, what, hint or "start it on the node: systemctl enable --now hpccrd")]


def _probe(path: str) -> list[Check]:
    probed = asyncio.run(_ask(path))
    if probed.version != hpccr.__version__:
        mine = Check(
            "hpccrd",
            False,
            f"hpccrd is version {probed.version}, hpccr is {hpccr.__version__}",
            "install the same version of both and restart hpccrd",
        )
    else:
        mine = Check("hpccrd", True, f"version {probed.version} at {path}")
    return [mine, *probed.checks, check_passing(path)]


def check_passing(path: str) -> Check:
    """That root gets to the user's home and working directory, as CRIU must to what jobs have open there.

    path: hpccrd's socket. It is told no path, but looks from where this process is.
    """
    name = "passing"
    places = []
    for place in dict.fromkeys((os.path.expanduser("~"), os.getcwd())):
        try:
            with contextlib.chdir(place):
                here = Path.cwd()
                levels = [here, *here.parents][:MAX_LEVELS]
                kept_out = asyncio.run(_ask(path, len(levels))).kept_out
        except HpccrError as error:
            return Check(name, False, f"{encodable(place)}: {error.message}", error.hint)
        except OSError:
            continue  # not there: no job is either
        if kept_out >= 0:
            return Check(
                name,
                False,
                f"root on this node cannot pass {encodable(str(levels[kept_out]))}",
                "what jobs have open below it cannot be checkpointed; its file system keeps root out (NFS: "
                "root_squash; FUSE: no allow_root): let others pass it (chmod o+x), or have it exported with "
                "no_root_squash",
            )
        places.append(encodable(str(here)))
    return Check(name, True, f"root gets to {', '.join(dict.fromkeys(places)) or 'what there is'}")


async def _ask(path: str, levels: int = 0) -> m.Probed:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            lease = await Lease.open(path, patience=PATIENCE)
            try:
                await lease.send(m.Probe(m.PROTOCOL, levels))
                answer = await lease.receive()
            finally:
                await lease.close()
    except TimeoutError:
        raise HpccrError(f"hpccrd at {path} did not answer within {PROBE_TIMEOUT:.0f} s") from None
    if isinstance(answer, m.Probed):
        return answer
    if isinstance(answer, m.Failed):
        raise HpccrError(answer.message, hint=answer.hint)
    raise HpccrError(f"hpccrd at {path} ended the connection", hint="its log says why: journalctl -u hpccrd")


def check_store(root: Path) -> Check:
    """That the caller can write the store, and that others cannot read it."""
    name = "store"
    try:
        publish.make_directory(root)
        probe = root / f".doctor-{secrets.token_hex(4)}"
        publish.publish_bytes(probe, b"")
        publish.remove(probe)
        found = root.stat()
    except OSError as error:
        hint = "name a directory that you may write, on shared storage, with --dir or HPCCR_STORE_DIR"
        return Check(name, False, f"{error.filename or root}: {error.strerror}", hint)
    except HpccrError as error:
        return Check(name, False, error.message, error.hint)
    if found.st_uid != os.geteuid():
        return Check(name, False, f"{root} belongs to uid {found.st_uid}", "use a directory of your own")
    if found.st_mode & 0o077:
        return Check(name, False, f"{root} may be entered by others", f"chmod 700 {root}")
    return Check(name, True, f"{root} can be written")


def check_plugin() -> Check | None:
    """Whether Slurm loads spank_hpccr here; sites may do without, but not on some nodes only. None without Slurm."""
    if shutil.which("sbatch") is None:
        return None
    try:
        return Check(PLUGIN, True, "there" if has_plugin() else "not there")
    except SlurmError as error:
        return Check(PLUGIN, False, error.message, error.hint)


def check_token(root: Path, token: str) -> Check:
    """That the store is the one in which another node has put the file `token`."""
    try:
        os.listdir(root)  # makes NFS look again
        if (root / token).exists():
            return Check("shared store", True, f"{root} is the same directory as on the asking node")
        detail = f"{root} is not the same directory as on the asking node"
    except OSError as error:
        detail = f"{root}: {error.strerror}"
    return Check("shared store", False, detail, "the store must be on storage that all nodes share")


def compare(reports: Sequence[NodeReport], asking: NodeReport | None = None) -> list[Check]:
    """What must be the same on all nodes, so that a job can be restored on any of them. [] for less than two nodes.

    asking: the login node that the nodes are asked from.
    """
    reports = [report for report in reports if report.version]
    plugged = [*([asking] if asking else []), *reports]
    if len(plugged) < 2:
        return []

    def finding(name: str) -> Callable[[NodeReport], str]:
        return lambda report: next((check.detail for check in report.checks if check.name == name and check.ok), "")

    plugin = _same(
        PLUGIN,
        plugged,
        finding(PLUGIN),
        "a job that was submitted with --checkpoint runs unprotected where the plugin is missing: "
        "spank_hpccr.so and its line in plugstack.conf must be on all nodes",
    )
    if len(reports) < 2:
        return [plugin]
    checks = [
        plugin,
        _same("hpccr version", reports, lambda report: report.version, "install the same version everywhere"),
    ]
    checks += [_same(f"same {name}", reports, finding(name), "install the same everywhere") for name in EQUAL]
    common = set.intersection(*(set(report.cpu_flags) for report in reports))
    more = [
        f"{report.node} has {', '.join(sorted(extra)[:8])}{' ...' if len(extra) > 8 else ''}"
        for report in reports
        if (extra := set(report.cpu_flags) - common)
    ]
    checks.append(
        Check(
            "same CPU features",
            not more,
            "; ".join(more) if more else f"{len(common)} features",
            "a job can only be restored on nodes with the features of those it ran on: "
            "keep jobs on nodes of one kind with --constraint"
            if more
            else "",
        )
    )
    return checks


def _same(name: str, reports: Sequence[NodeReport], value: Callable[[NodeReport], str], hint: str) -> Check:
    groups: dict[str, list[str]] = {}
    for report in reports:
        if found := value(report):
            groups.setdefault(found, []).append(report.node)
    if len(groups) <= 1:
        return Check(name, True, next(iter(groups), "unknown"))
    return Check(name, False, "; ".join(f"{', '.join(nodes)}: {found}" for found, nodes in groups.items()), hint)
