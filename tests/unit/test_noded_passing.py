"""Where somebody who is kept out is kept out."""

import subprocess
from pathlib import Path

from hpccr.noded import passing


def test_the_first_directory_that_cannot_be_passed(tmp_path: Path) -> None:
    here = tmp_path / "one" / "two" / "three"
    here.mkdir(parents=True)
    with subprocess.Popen(["cat"], cwd=here, stdin=subprocess.PIPE) as asker:
        start = f"/proc/{asker.pid}/cwd"
        assert passing.kept_out(start, 64) == -1
        (tmp_path / "one").chmod(0o600)
        # The asker got there before, or is another user.
        assert passing.kept_out(start, 64) == 2
        assert passing.kept_out(start, 2) == -1
        (tmp_path / "one").chmod(0o700)
        here.chmod(0o600)
        assert passing.kept_out(start, 64) == 0
        here.chmod(0o700)
        assert asker.stdin is not None
        asker.stdin.close()
    assert passing.kept_out(start, 1) == 0
