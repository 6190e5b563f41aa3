"""Whether this node can run what another one has checkpointed. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hpccr.errors import UnsupportedError
from hpccr.model import CapsuleImage

_X86 = re.compile(
    r"(3dnow|abm$|adx$|aes$|amx|avx|bmi|cldemote|clflushopt|clwb|cmov|cx16|enqcmd|f16c|fma|fsgsbase|fxsr|gfni|hle$"
    r"|lahf_lm|mmx|movbe|movdir|ospke|pclmul|pku|popcnt|rdpid|rdrand|rdseed|rdtscp|rtm$|serialize|sha|sse|ssse|tbm$"
    r"|vaes|vpclmul|waitpkg|xop$|xsave)"
)
"""Of the flags in /proc/cpuinfo of an x86 those of instructions that programs find and use. The others are the
kernel's, and differ between kernels on one processor."""


def missing_features(recorded: Iterable[str], own: Iterable[str]) -> tuple[str, ...]:
    """Instructions that the job may be using and this processor lacks; both as /proc/cpuinfo names them."""
    wanted = set(recorded)
    if "fpu" in wanted:  # an x86; elsewhere all flags are of this kind
        wanted = {flag for flag in wanted if _X86.match(flag)}
    return tuple(sorted(wanted - set(own)))


def check(image: CapsuleImage, *, node: str, cpu_flags: Iterable[str], criu: int) -> None:
    """criu: this node's, as CapsuleImage has it; 0 if it is not known. Raises UnsupportedError naming what is missing
    on `node`."""
    missing = missing_features(image.cpu_flags, cpu_flags)
    if missing:
        raise UnsupportedError(
            f"{node} has another processor than the job was started on: it lacks {', '.join(missing)}",
            hint="have the job run on nodes like the first (sbatch --constraint), or start it on the oldest ones",
        )
    if criu and image.criu_version // 100 > criu // 100:
        raise UnsupportedError(
            f"{node} has CRIU {_text(criu)}, and the checkpoint was made with {_text(image.criu_version)}",
            hint="install the same CRIU on all nodes",
        )


def _text(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}"
