"""Where this machine gets its Debian packages from, taken from its own apt configuration."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paths import TestbedError

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@dataclass(frozen=True)
class Mirror:
    url: str
    keyring: str


@dataclass(frozen=True)
class _Entry:
    uris: list[str]
    suites: list[str]
    components: list[str]
    keyring: str = ""


def find_mirror() -> Mirror:
    """The first Debian archive among apt's sources; raises TestbedError when there is none.

    HPCCR_TESTBED_MIRROR (a URL) comes before all, for a machine that is no Debian.
    """
    if url := os.environ.get("HPCCR_TESTBED_MIRROR"):
        return Mirror(url, _KEYRING)
    release = _os_release()
    wanted = {release.get("VERSION_CODENAME", ""), "stable", "testing", "unstable", "sid"} - {""}
    if release.get("ID") == "debian":
        for entry in _entries():
            urls = [uri for uri in entry.uris if uri.startswith(("http://", "https://"))]
            if urls and "main" in entry.components and wanted & set(entry.suites):
                keyring = entry.keyring if Path(entry.keyring).is_file() else _KEYRING
                return Mirror(urls[0].rstrip("/"), keyring)
    raise TestbedError(
        "no Debian archive among this machine's apt sources",
        "set HPCCR_TESTBED_MIRROR to the address of one and install debian-archive-keyring",
    )


def apt_options() -> list[str]:
    """This machine's apt settings for reaching its mirror (proxies, retries, date checks), as lines of apt.conf."""
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    prefixes = ("Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries")
    return [line for line in dump.splitlines() if line.startswith(prefixes) and not line.endswith(' "";')]


def _os_release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    return {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}


def _entries() -> Iterator[_Entry]:
    parts = Path("/etc/apt/sources.list.d")
    for path in sorted(parts.glob("*.sources")):
        yield from _deb822(path.read_text())
    for path in [Path("/etc/apt/sources.list"), *sorted(parts.glob("*.list"))]:
        if path.is_file():
            yield from _one_line(path.read_text())


def _deb822(text: str) -> Iterator[_Entry]:
    """Entries in the format of sources.list(5), "DEB822-STYLE FORMAT"."""
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[key] = fields.get(key, "") + line
            elif ":" in line:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes") != "no":
            names = ("uris", "suites", "components")
            uris, suites, components = (fields.get(name, "").split() for name in names)
            yield _Entry(uris, suites, components, fields.get("signed-by", "").strip())


def _one_line(text: str) -> Iterator[_Entry]:
    """Entries in the format of sources.list(5), "ONE-LINE-STYLE FORMAT"."""
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if words[:1] != ["deb"]:
            continue
        keyring = ""
        if words[1].startswith("["):
            end = next(i for i, word in enumerate(words) if word.endswith("]"))
            for option in " ".join(words[1 : end + 1]).strip("[] ").split():
                if option.startswith("signed-by="):
                    keyring = option.partition("=")[2]
            words = words[:1] + words[end + 1 :]
        if len(words) >= 4:
            yield _Entry([words[1]], [words[2]], words[3:], keyring)
