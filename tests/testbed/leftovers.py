"""What a node holds besides its files: compared before and after a test, it shows what the test left behind.

Run as a program inside a node (as root), it prints the node's snapshot as JSON; `testbed leftovers` does so on all.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# Kind of thing -> one line for each, the same for two things that cannot be told apart across pids and indices.
Snapshot = dict[str, list[str]]

_WATCHED = ("/run/hpccr", "/tmp", "/dev/shm")
# Things that ought to stay: their absence is reported too.
_PERMANENT = ("process", "mount", "link", "route")
_ZOMBIE = " (zombie)"


def snapshot() -> Snapshot:
    """What the node this runs on holds now."""
    return {
        "process": _processes(),
        "mount": _mounts(),
        "network namespace": _network_namespaces(),
        "link": _links(),
        "route": [
            json.dumps(route, sort_keys=True) for route in _json("ip", "-4", "-json", "route", "show", "table", "all")
        ],
        "nft": _nft(),
        "control group": _cgroups(),
        "SysV IPC object": _sysv(),
        "file": _files(),
    }


def diff(before: dict[str, Snapshot], after: dict[str, Snapshot]) -> list[str]:
    """What is there after and was not before, per node, and what ought to be there and is gone; a line for each."""
    lines = []
    for node, was in before.items():
        now = after.get(node)
        if now is None:
            lines.append(f"{node}: is off")
            continue
        for kind in now:
            old, new = Counter(was[kind]), Counter(now[kind])
            lines += [f"{node}: {kind} left: {item}" for item in (new - old).elements()]
            if kind in _PERMANENT:
                gone = [item for item in (old - new).elements() if not item.endswith(_ZOMBIE)]
                lines += [f"{node}: {kind} gone: {item}" for item in gone]
    return lines


def _processes() -> list[str]:
    ours = {os.getpid()}
    found = []
    for pid in _pids():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        if pid in ours or int(fields["PPid"]) in ours:
            continue
        state = _ZOMBIE if fields["State"].startswith("Z") else ""
        found.append(f"{_user(int(fields['Uid'].split()[0]))} {command or fields['Name']}{state}")
    return sorted(found)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _mounts() -> list[str]:
    """As pid 1 sees them: source, type and place; mounts of other namespaces last as long as their processes."""
    found = []
    for line in Path("/proc/1/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        fstype, source = after.split()[:2]
        found.append(f"{fstype} {source} {before.split()[3]} on {before.split()[4]}")
    return sorted(found)


def _network_namespaces() -> list[str]:
    """The names given to some, and those of processes other than the node's own, by the processes in them."""
    named = Path("/run/netns")
    found = [f"named {entry.name}" for entry in named.iterdir()] if named.is_dir() else []
    own = os.readlink("/proc/1/ns/net")
    holders: dict[str, set[str]] = {}
    for pid in _pids():
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/net")
            if namespace != own:
                holders.setdefault(namespace, set()).add(Path(f"/proc/{pid}/comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found + [f"of {', '.join(sorted(names))}" for names in holders.values()])


def _links() -> list[str]:
    links = _json("ip", "-json", "-details", "link", "show")
    return sorted(
        f"{link['ifname']} ({link.get('linkinfo', {}).get('info_kind', link['link_type'])})" for link in links
    )


def _nft() -> list[str]:
    ruleset = _json("nft", "-json", "list", "ruleset")["nftables"]
    found = []
    for entry in ruleset:
        for kind, what in entry.items():
            if kind in ("table", "chain", "set", "map"):
                found.append(" ".join(filter(None, [kind, what["family"], what.get("table"), what["name"]])))
            elif kind == "rule":
                found.append(f"rule in {what['family']} {what['table']} {what['chain']}: {json.dumps(what['expr'])}")
    return sorted(found)


def _cgroups() -> list[str]:
    """All groups but the ones that Slurm makes once and keeps (they are above the jobs')."""
    found = []
    for top in Path("/sys/fs/cgroup").iterdir():
        for directory, names, _ in os.walk(top):
            for name in names:
                path = Path(directory, name)
                if not _is_slurms_own(path.relative_to(top).parts):
                    found.append(str(path))
    return sorted(found)


def _is_slurms_own(parts: tuple[str, ...]) -> bool:
    return parts[0].startswith(("slurm", "system")) and not any(part.startswith(("job_", "step_")) for part in parts)


def _sysv() -> list[str]:
    found = []
    for kind in ("shm", "sem", "msg"):
        for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]:
            key, identifier, mode = line.split()[:3]
            found.append(f"{kind} key {key} id {identifier} mode {mode}")
    return found


def _files() -> list[str]:
    found = []
    for top in _WATCHED:
        for directory, directories, files in os.walk(top):
            found += [str(Path(directory, name)) for name in [*directories, *files]]
    return sorted(found)


def _json(*command: str) -> Any:
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout or "[]")


if __name__ == "__main__":
    json.dump(snapshot(), sys.stdout)
