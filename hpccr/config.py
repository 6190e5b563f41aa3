"""Configuration: defaults, then /etc/hpccr/hpccr.toml, then HPCCR_ variables, then the command line.

hpccrd reads the file only (its environment is the administrator's, but a user's must never reach it).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from hpccr.errors import UsageError

DEFAULT_FILE = "/etc/hpccr/hpccr.toml"

Seconds = Annotated[float, msgspec.Meta(gt=0)]


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dir: str = "~/.hpccr"
    """Where checkpoints go: on shared storage, the user's own. ~ is the user's home."""
    keep: Annotated[int, msgspec.Meta(ge=1)] = 2
    """Complete checkpoints kept per step."""
    level: Annotated[int, msgspec.Meta(ge=1, le=19)] = 1
    """Of zstd."""
    share: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    """Checkpoints that may rest on the same stored data; 1: each is whole by itself."""


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    socket: str = "/run/hpccr/hpccrd.sock"
    run: str = "/run/hpccr"
    """Runtime directory of hpccrd (root, 0755)."""
    key: str = "/etc/hpccr/key"
    """The site key: 64 hex digits, mode 0600, the same on all nodes."""
    spool: str = "/var/spool/hpccr"
    """Node-local directory for images on their way to and from the store (root, 0700)."""
    spool_reserve: Annotated[int, msgspec.Meta(ge=0)] = 256 << 20
    """Bytes that must stay free in the spool after a dump."""
    spool_size: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Bytes that images may take in the spool, kept ones too; 0: all of its file system, kept ones half of it."""
    spool_keep: Annotated[float, msgspec.Meta(ge=0)] = 86400.0
    """Seconds that the newest durable images stay in the spool for a restore on this node; 0: they do not."""
    flush_nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 10
    """Niceness of a flush beside a job that runs on; with 0 its I/O priority stays as it is too."""
    criu: str = "criu"


class NetworkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    strategy: str = "vxlan"
    subnet: str = "10.90.0.0/16"
    """Addresses inside capsule networks; may be used by every step at once. Must not be one the site routes."""
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8473
    """UDP port of VXLAN on the nodes."""
    underlay: str = ""
    """This node's interface or address for VXLAN; empty: the address of the interface with the default route."""
    uplink: bool = True
    """Whether jobs reach the world outside their capsule (masqueraded through the node)."""
    uplink_pool: str = "169.254.96.0/19"
    """Link-local addresses of the uplinks on this node, four per capsule."""


class CapsuleConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    private: tuple[str, ...] = ("/tmp",)  # noqa: S108 - the job's own tmpfs, not ours
    """Directories that are each capsule's own, beside /dev/shm; saved with the checkpoint."""
    private_limit: Annotated[int, msgspec.Meta(ge=0)] = 16 << 30
    """Bytes that one of them may hold at a checkpoint; with more it is refused."""
    first_pid: Annotated[int, msgspec.Meta(ge=2, le=32000)] = 300
    """Pids below stay free for the tools that work inside a capsule."""


class CheckpointConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prepare_timeout: Seconds = 30.0
    freeze_timeout: Seconds = 15.0
    dump_timeout: Seconds = 1800.0
    restore_timeout: Seconds = 1800.0
    create_timeout: Seconds = 60.0
    agent_timeout: Seconds = 60.0
    """For all agents of a step to join."""
    silence_timeout: Annotated[float, msgspec.Meta(ge=10)] = 60.0
    """Without a word from a node, until it is taken for gone. Storage that hangs can stop a healthy one for a while."""
    ghost_limit: int = 1 << 30
    """Bytes; deleted files that are still open are saved up to this size each."""
    interval: str = "none"
    """Time between checkpoints: "30m", "2h", "HH:MM:SS", minutes, "auto" (by cost and node_mtbf) or "none"."""
    backlog: Literal["skip", "wait"] = "skip"
    """What a checkpoint by interval does while the one before is not in the store yet: it is left out, or waits."""
    at_limit: Literal["requeue", "none"] = "requeue"
    """Before a job's time limit: checkpoint and requeue it, or nothing."""
    node_mtbf: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Mean time between failures of one node, for the interval "auto"; 0: estimated from Slurm's node records."""
    outside: str = "allow"
    """Connections to outside the capsule: allow (they are reset after a restore) or refuse (in prepare)."""


class FilesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    trees: tuple[str, ...] = ()
    """Directories whose state belongs to the job: saved with each checkpoint and put back at a restore."""
    snapshot_limit: Annotated[int, msgspec.Meta(ge=0)] = 16 << 30
    """Bytes; a larger file that the job can write to (not only append to) is refused."""


class QuiesceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: Literal["prefer", "require", "off"] = "prefer"
    """Whether MPI ranks that call safe points are stopped there: if they come in time, or no checkpoint, or never."""
    timeout: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 10.0
    """Seconds for all ranks to come to the safe point; the same again for their traffic and hooks."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    store: StoreConfig = StoreConfig()
    node: NodeConfig = NodeConfig()
    network: NetworkConfig = NetworkConfig()
    capsule: CapsuleConfig = CapsuleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    files: FilesConfig = FilesConfig()
    quiesce: QuiesceConfig = QuiesceConfig()


def load(path: str | os.PathLike[str] | None = None, *, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration: file (DEFAULT_FILE unless named; only a named one must exist), then HPCCR_SECTION_KEY
    variables of `environ` (None: no environment, as hpccrd wants it).

    Raises UsageError naming the file or variable and the key.
    """
    name = Path(path or DEFAULT_FILE)
    data: dict[str, dict[str, Any]] = {}
    try:
        data = tomllib.loads(name.read_text())
    except FileNotFoundError:
        if path is not None:
            raise UsageError(f"no configuration file {name}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read {name}: {error}") from None
    try:
        config = msgspec.convert(data, Config)
    except msgspec.ValidationError as error:
        raise UsageError(f"{name}: {error}", hint="hpccr.toml(5) lists sections, keys and values") from None
    return _with_environment(config, environ) if environ else config


def _with_environment(config: Config, environ: Mapping[str, str]) -> Config:
    data = msgspec.to_builtins(config)
    for section, keys in data.items():
        for key in keys:
            variable = f"HPCCR_{section}_{key}".upper()
            if variable not in environ:
                continue
            # A list is written as in PATH.
            listed = isinstance(keys[key], list | tuple)
            keys[key] = [part for part in environ[variable].split(":") if part] if listed else environ[variable]
            try:
                # strict=False: text becomes the number or truth value the key wants
                msgspec.convert(data, Config, strict=False)
            except msgspec.ValidationError as error:
                raise UsageError(f"{variable}={environ[variable]!r}: {error}") from None
    return msgspec.convert(data, Config, strict=False)
