"""The table in docs/user/mpi.md is whole: every library and every feature that the cluster tests know has its cell."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cluster_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "cluster"), *sys.path])


def test_every_library_and_feature_has_a_cell() -> None:
    import mpis
    import mpitable

    table = mpitable.read()
    features = mpis.features()
    assert [*table] == ["version", *features.values(), mpis.FINALIZE]
    for title, row in table.items():
        assert [*row] == [library.title for library in mpis.LIBRARIES], title
        assert all(row.values()), f"an empty cell in the row {title}: make mpi-table"
    # What is not "yes" says why.
    said = {cell for title, row in table.items() if title != "version" for cell in row.values()}
    assert all(cell == mpitable.YES or cell.startswith("not in this library: ") for cell in said)
