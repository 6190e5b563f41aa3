"""The files an administrator installs say what the code does."""

import os
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import msgspec
import pytest

from hpccr import config
from hpccr.noded import daemon

DIST = resources.files("hpccr.noded") / "dist"


def test_documented_toml_has_every_key_with_its_default() -> None:
    documented = tomllib.loads((DIST / "hpccr.toml").read_text())
    assert documented == msgspec.json.decode(msgspec.json.encode(config.Config()))
    assert msgspec.convert(documented, config.Config) == config.Config()


def test_every_key_of_the_toml_is_explained() -> None:
    explained = False
    for line in (DIST / "hpccr.toml").read_text().splitlines():
        if "_timeout" in line:
            continue  # one comment explains them together
        if "=" in line and not line.startswith("#"):
            assert explained, line
        explained = line.startswith("#")


def test_unit_and_tmpfiles_name_the_default_directories() -> None:
    node = config.NodeConfig()
    tmpfiles = (DIST / "hpccr.tmpfiles").read_text().splitlines()
    assert f"d {node.run} 0755 root root -" in tmpfiles
    assert f"d {node.spool} 0700 root root -" in tmpfiles


def test_unit_has_what_the_daemon_relies_on() -> None:
    unit = (DIST / "hpccrd.service").read_text().splitlines()
    for line in ("Type=notify", "Delegate=yes", "KillMode=process", f"LimitNOFILE={daemon.DESCRIPTORS}"):
        assert line in unit


@pytest.mark.parametrize("name", ["hpccr", "hpccrd"])
def test_the_commands_see_nothing_of_the_users_python(tmp_path: Path, name: str) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit('the wrong msgspec')\n")
    interpreter, *lines = (DIST / name).read_text().splitlines(keepends=True)
    assert interpreter == "#!/opt/hpccr/bin/python3 -I\n"
    command = tmp_path / name
    command.write_text("".join([interpreter.replace("/opt/hpccr/bin/python3", sys.executable), *lines]))
    command.chmod(0o755)
    environment = os.environ | {"PYTHONHOME": "/nonexistent", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([command, "--help"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: {name} "), done
