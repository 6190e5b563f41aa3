"""What a checkpoint needs of the node that restores it."""

from __future__ import annotations

import pytest

from hpccr.errors import UnsupportedError
from hpccr.model import CapsuleImage, Stdio
from hpccr.noded import compatible

OLD = ("fpu", "sse2", "avx2", "md_clear")
NEW = ("fpu", "sse2", "avx2", "avx512f", "amx_tile", "ibpb_exit_to_user")


def image(flags: tuple[str, ...], criu: int = 40201) -> CapsuleImage:
    return CapsuleImage(root_pid=300, max_pid=300, tasks=1, stdio=Stdio(0, 1, 2), criu_version=criu, cpu_flags=flags)


def test_a_processor_with_less_is_named_with_what_it_lacks() -> None:
    with pytest.raises(UnsupportedError, match=r"old1 .* lacks amx_tile, avx512f$"):
        compatible.check(image(NEW), node="old1", cpu_flags=OLD, criu=40201)


def test_a_processor_with_more_and_another_kernels_flags_will_do() -> None:
    compatible.check(image(OLD), node="new1", cpu_flags=NEW, criu=40201)


def test_flags_of_an_arm_are_all_instructions() -> None:
    assert compatible.missing_features(("asimd", "sve"), ("asimd",)) == ("sve",)


def test_an_older_criu_is_named_and_a_newer_or_unknown_one_will_do() -> None:
    with pytest.raises(UnsupportedError, match=r"node1 has CRIU 4\.2, .* with 4\.3"):
        compatible.check(image(OLD, 40300), node="node1", cpu_flags=OLD, criu=40201)
    for criu in (0, 40300, 50000):
        compatible.check(image(OLD, 40300), node="node1", cpu_flags=OLD, criu=criu)
