# Every target does its own set-up: a fresh Debian machine, root and cgroup v1 are all that is needed.
#
#   make demo     checkpoint and restart a job on a four-node cluster made of namespaces
#   make test     lint, unit tests, cluster tests (what .ci/run calls)
#   make soak     the same, with the long form of the randomised tests
#   make bench    measure; see tests/bench
#   make mpi-table    write the table in docs/user/mpi.md: every MPI library, every feature
#   make lint | unit | cluster    one part of `make test`; `make cluster ARGS="-k requeue"` passes ARGS to pytest
#   make clean    remove the cluster of this name and what tools left in the checkout
#
# HPCCR_TESTBED names the cluster, so that one made by hand (default name: tb) is not replaced by a test's.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup build demo test soak bench mpi-table lint unit cluster clean

HPCCR_TESTBED ?= tests
export HPCCR_TESTBED

ARGS ?=
TESTBED := tests/testbed/testbed
CHROOT := $(TESTBED) chroot --
PYTEST := /usr/bin/python3 -m pytest
PACKAGES := debian-archive-keyring iproute2 mmdebstrap nftables python3 python3-pytest python3-pytest-xdist util-linux
# Clusters that the cluster tests run on side by side: most of a test's time is spent waiting.
CLUSTERS ?= 3
# Every cluster of this name, and those that tests made beside it, whether or not they were taken down.
TAKE_DOWN = for name in $$(ls /run/hpccr-testbed /var/lib/hpccr-testbed 2>/dev/null | sort -u | \
    grep -xE '$(HPCCR_TESTBED)(-[a-z0-9-]+)?'); do HPCCR_TESTBED=$$name $(TESTBED) down; done

setup:
	@[ "$$(id -u)" = 0 ] || { echo "make: error: namespaces, Slurm and CRIU need root: run this as root" >&2; exit 1; }
	@grep -q ' - cgroup [^ ]* [^ ]*freezer' /proc/self/mountinfo || { \
	    echo "make: error: no cgroup v1 freezer hierarchy is mounted, which Slurm's proctrack/cgroup needs inside a node;" >&2; \
	    echo "make: hint: boot with systemd.unified_cgroup_hierarchy=0, or use another machine" >&2; exit 1; }
	@missing=(); for package in $(PACKAGES); do \
	    [ "$$(dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null)" = installed ] || missing+=($$package); \
	done; \
	if [ $${#missing[@]} != 0 ]; then \
	    echo "installing $${missing[*]}"; \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get -qq update; \
	    apt-get -qq install --yes --no-install-recommends "$${missing[@]}" >/dev/null; \
	fi

build: setup
	@$(TESTBED) build >/dev/null

# A cluster of its own: a test's may be running.
demo: export HPCCR_TESTBED := demo
demo: build
	$(TESTBED) demo

# The parts in this order, one after another whatever -j says, so that the cluster tests' summary is the last thing seen.
test: build
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory cluster

soak: export HPCCR_SOAK := 1
soak: test

lint: build
	$(CHROOT) ruff check . $(TESTBED)
	$(CHROOT) ruff format --check . $(TESTBED)
	$(CHROOT) mypy
	@# The testbed runs with the machine's Python, which may be older than the nodes'.
	$(CHROOT) sh -c 'cd tests/testbed && MYPYPATH=../cluster mypy --config-file= --strict --follow-imports=silent --python-version 3.11 *.py testbed'
	@if grep -q '^\[tool.importlinter' pyproject.toml; then set -x; $(CHROOT) lint-imports --no-cache; fi

unit: build
	$(CHROOT) python -m pytest $(if $(ARGS),$(ARGS),tests/unit)

# The tests need a cluster to look at from outside, so they run on this machine with its own Python.
cluster: build
	@take_down() { $(TAKE_DOWN); }; trap take_down EXIT; \
	set -x; $(PYTEST) -n $(CLUSTERS) --dist loadgroup --durations 10 tests/cluster $(ARGS)

bench: build
	@trap '$(TESTBED) down' EXIT; set -x; $(TESTBED) up; /usr/bin/python3 tests/bench/run.py $(ARGS)

mpi-table: export HPCCR_SOAK := 1
mpi-table: build
	@trap '$(TESTBED) down' EXIT; set -x; $(TESTBED) up; $(PYTEST) tests/cluster/test_mpi_features.py --mpi-table $(ARGS)

clean:
	@$(TAKE_DOWN)
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
