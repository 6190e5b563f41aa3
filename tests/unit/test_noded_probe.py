"""Findings of `hpccr doctor` that need no particular node."""

from pathlib import Path

import pytest

from hpccr.noded import probe
from hpccr.noded.spool import Limits, Spool


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("version", "ok"), [("4.2", True), ("4.2.1", True), ("4.10", True), ("5.0", True), ("4.1.1", False)]
)
def test_criu_must_be_new_enough(tmp_path: Path, version: str, ok: bool) -> None:
    check = probe.check_criu_version(program(tmp_path / "criu", f"echo Version: {version}"))
    assert check.ok == ok
    assert version in check.detail
    assert ok or "4.2 or newer" in check.hint


def test_criu_that_is_missing_or_strange(tmp_path: Path) -> None:
    missing = probe.check_criu_version(str(tmp_path / "none"))
    assert not missing.ok
    assert "No such file" in missing.detail
    assert not probe.check_criu_version(program(tmp_path / "criu", "echo hello")).ok


def test_criu_check_tells_the_errors(tmp_path: Path) -> None:
    text = "echo '(00.001) Warn nothing'; echo 'Error (criu/x.c:1): no such luck'; exit 1"
    check = probe.check_criu(program(tmp_path / "criu", text))
    assert not check.ok
    assert check.detail == "Error (criu/x.c:1): no such luck"
    assert probe.check_criu(program(tmp_path / "criu", "exit 0")).ok


@pytest.mark.parametrize(("scope", "ok"), [(None, True), ("0", True), ("1", True), ("2", True), ("3", False)])
def test_ptrace_scope(scope: str | None, ok: bool) -> None:
    assert probe.check_ptrace(scope).ok == ok


@pytest.mark.parametrize(("first", "ok"), [(None, True), ("1024", True), ("80", False), ("0", False)])
def test_privileged_ports(first: str | None, ok: bool) -> None:
    assert probe.check_ports(first).ok == ok


def test_key_and_spool_findings_name_the_remedy(tmp_path: Path) -> None:
    assert "openssl" in probe.check_key(str(tmp_path / "key")).hint
    (tmp_path / "key").write_text("0" * 64)
    (tmp_path / "key").chmod(0o600)
    found = probe.check_key(str(tmp_path / "key"))
    assert found.ok
    assert "0" * 64 not in found.detail
    assert probe.check_spool(Spool(Limits(str(tmp_path))), 0).ok
    assert "free space" in probe.check_spool(Spool(Limits(str(tmp_path), 1 << 60)), 1 << 60).hint
    assert not probe.check_spool(Spool(Limits(str(tmp_path / "none"))), 0).ok


@pytest.mark.parametrize("name", ["flags\t\t", "Features\t"])
def test_cpu_flags(name: str) -> None:
    assert probe.cpu_flags(f"processor\t: 0\n{name}: sse2 fpu\n\nprocessor\t: 1\n{name}: fpu\n") == ("fpu", "sse2")
    assert probe.cpu_flags("") == ()
