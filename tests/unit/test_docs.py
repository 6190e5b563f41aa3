"""The manual says what the code has: every verb and option, every configuration key with its default."""

import argparse
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpccr import __version__
from hpccr.capsule.step import options
from hpccr.cli import main
from hpccr.config import Config

ROOT = Path(__file__).parents[2]
MAN = ROOT / "docs" / "man"


def plain(name: str) -> str:
    """A manual page without its markup."""
    text = (MAN / name).read_text()
    text = re.sub(r"\\f[A-Z]", "", text)
    text = re.sub(r"^\.[A-Z]+ ?", "", text, flags=re.MULTILINE)
    return text.replace(r"\-", "-").replace(r"\(dq", '"').replace(r"\e", "\\")


def verbs() -> dict[str, argparse.ArgumentParser]:
    parser = main._parser([])
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(subparsers.choices)


@pytest.mark.parametrize("verb", [verb for verb in main.VERBS if verb != "agent"])
def test_the_manual_has_every_option(verb: str) -> None:
    page = plain("hpccr.1")
    assert re.search(rf"^{verb}\b", page, re.MULTILINE)
    options = [
        option
        for action in verbs()[verb]._actions
        if action.help != argparse.SUPPRESS
        for option in action.option_strings
        if option not in ("-h", "--help", "--wait")
    ]
    assert [option for option in options if option not in page] == []


def test_the_manual_and_the_shipped_file_have_every_key_and_default() -> None:
    defaults: dict[str, dict[str, Any]] = msgspec.to_builtins(Config())
    shipped = tomllib.loads((ROOT / "hpccr" / "noded" / "dist" / "hpccr.toml").read_text())
    assert msgspec.to_builtins(msgspec.convert(shipped, Config)) == defaults
    assert {section: set(keys) for section, keys in shipped.items()} == {s: set(keys) for s, keys in defaults.items()}
    page = plain("hpccr.toml.5")
    for section, keys in defaults.items():
        part = page.partition(f"SECTION [{section}]")[2].partition("SECTION [")[0]
        for key, value in keys.items():
            (written,) = re.findall(rf'^{key} " = (.*)"$', part, re.MULTILINE)
            assert tomllib.loads(f"x = {written}")["x"] == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("page", ["hpccr.1", "hpccrd.8", "hpccr.toml.5", "spank_hpccr.8"])
def test_the_manual_is_of_this_version(page: str) -> None:
    assert f'"hpccr {__version__}"' in (MAN / page).read_text().splitlines()[0]


def test_the_manual_has_every_option_of_the_plugin() -> None:
    names = re.findall(r'^\t{ "([a-z-]+)", "', (ROOT / "slurm_plugin" / "request.c").read_text(), re.MULTILINE)
    assert len(names) == 6
    page = plain("spank_hpccr.8")
    assert [name for name in names if not name.startswith("hpccr-") and f"--{name}=" not in page] == []


def test_the_manual_has_every_option_of_srun_inside_a_job() -> None:
    page = plain("spank_hpccr.8")
    words = set(re.findall(r"--?[A-Za-z][a-z-]*", page.partition("\nsrun\n")[2].partition("\nSIGUSR1\n")[0]))
    known = {name: letter for name, (letter, _) in options.EFFECT.items() if name not in ("help", "usage", "version")}
    assert [name for name, letter in known.items() if {f"--{name}", *([f"-{letter}"] if letter else [])} - words] == []
    assert [name for name in options.SAID if f"--{name}" not in words] == []
