"""The cluster that the tests run on, and the check after every test that nothing is left on any node."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

import leftovers
from jobs import Jobs
from nodes import Cluster
from waiting import Late, soak, wait_for
from workloads import Workloads

TEST_LIMIT = 3600 if soak() else 240
"""Seconds for one test; every wait in it has a shorter deadline of its own."""
CLEAN_WITHIN = 20.0
"""Seconds for the last trace of a job to go: capsules are taken down after Slurm has forgotten the job."""
SEED = int(os.environ.get("HPCCR_SEED") or (random.SystemRandom().randrange(1, 1 << 31) if soak() else 20261125))
"""Of all that is left to chance: the short form does the same in every run, the long one something else each time."""
os.environ["HPCCR_SEED"] = str(SEED)  # the workers of pytest-xdist use the same


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mpi-table", action="store_true", help="write the table in docs/user/mpi.md from what is found")


def pytest_report_header() -> str:
    form = "long" if soak() else "short"
    return f"cluster: {_name()}; {form} form (HPCCR_SOAK=1 selects the long one); HPCCR_SEED={SEED}"


def _name() -> str:
    """The cluster's; with pytest-xdist every worker has one of its own, named in the Makefile too."""
    name = os.environ.get("HPCCR_TESTBED") or "tests"
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    return f"{name}-{worker}" if worker else name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What one worker has to do in one piece comes first, so that none is left with it alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    def late(signum: int, frame: FrameType | None) -> None:
        raise Late(f"the test is not done after {TEST_LIMIT} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(TEST_LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """To a failure belong the files of the test's jobs and the daemons' logs, and the seed, which -q has not shown."""
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", f"HPCCR_SEED={SEED}"))
    jobs = getattr(item, "funcargs", {}).get("jobs")
    if report.failed and isinstance(jobs, Jobs) and call.when == "call":
        try:
            report.sections.append(("jobs and nodes", jobs.report(jobs.cluster.nodes)))
        except Exception as error:
            report.sections.append(("jobs and nodes", f"no report: {error!r}"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The running cluster that HPCCR_TESTBED names, as it is; or a new one of four nodes, taken down at the end."""
    running = Cluster.running(_name())
    if running is not None:
        yield running
        return
    fresh = Cluster.up(_name())
    try:
        # CRIU's look at the kernel when hpccrd starts, which leaves this file, would be in the first test's `before`.
        wait_for("CRIU's first look", lambda: all(criu_has_looked(fresh, node) for node in fresh.nodes))
        yield fresh
    finally:
        fresh.down()


def criu_has_looked(cluster: Cluster, node: str) -> bool:
    return (cluster.root(node) / "run/criu.kdat").exists() and not cluster.pids(node, "^criu ")


@pytest.fixture(scope="session")
def workloads(cluster: Cluster) -> Workloads:
    return Workloads(cluster, SEED)


def snapshots(cluster: Cluster) -> dict[str, dict[str, list[str]]]:
    """What is on each node."""

    def one(node: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = cluster.call(node, leftovers.snapshot)
        shared = shared_hierarchies()
        found["control group"] = [path for path in found["control group"] if not path.startswith(shared)]
        return found

    return {node: one(node) for node in ("ctl", *cluster.nodes)}


def shared_hierarchies() -> tuple[str, ...]:
    """Where nodes see the control groups of other clusters too: what somebody else manages on this machine is not the
    testbed's to divide (testbed/cgroups.py)."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    return tuple(f"/sys/fs/cgroup/{names}/" for _, names, path in own if path != "/" and "freezer" not in names)


@pytest.fixture
def untouched(cluster: Cluster) -> Iterator[None]:
    """After the test every node is as it was before. First of a test's fixtures, so that it looks last."""

    def settled() -> dict[str, dict[str, list[str]]] | None:
        """Not while a new hpccrd has a first look at CRIU, which would be missed afterwards."""
        found = snapshots(cluster)
        looking = any(re.search(r"\bcriu\b.* check$", line) for node in found.values() for line in node["process"])
        return None if looking else found

    before = wait_for("hpccrd to have looked at CRIU", settled)
    yield
    differences: list[str] = []

    def clean() -> bool:
        after = snapshots(cluster)
        differences[:] = [f"{node}: {line}" for node in before for line in leftovers.added(before[node], after[node])]
        return not differences

    try:
        wait_for("nodes as they were before", clean, within=CLEAN_WITHIN, every=0.5)
    except Late:
        pytest.fail("the test left something behind:\n" + "\n".join(differences), pytrace=False)


@pytest.fixture
def jobs(cluster: Cluster, untouched: None, request: pytest.FixtureRequest) -> Iterator[Jobs]:
    """Where a test submits its jobs."""
    made = Jobs(cluster, re.sub(r"[^A-Za-z0-9_.-]+", "-", request.node.name).strip("-"))
    try:
        yield made
    finally:
        made.clear()
