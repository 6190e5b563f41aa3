"""Measurements on the test cluster, as ratios within one run: absolute times of a small virtual machine say nothing.

    run.py [freeze] [flush] [memory] [dedup] [restore] [slowdown] [safepoint] [trees] [overhead] [--repetitions N]

The cluster that HPCCR_TESTBED names must be up (`make bench` does that).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))

import dedup
import freeze
import inside
import overhead
import restore
import safepoint
import slowdown
import trees
from nodes import Cluster

BENCHES = {
    "freeze": freeze.measure,
    "flush": inside.speed,
    "memory": inside.memory,
    "dedup": dedup.measure,
    "restore": restore.measure,
    "slowdown": slowdown.measure,
    "safepoint": safepoint.measure,
    "trees": trees.measure,
    "overhead": overhead.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bench", nargs="*", choices=[*BENCHES, []], help="which (default: all)")
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    cluster = Cluster(os.environ.get("HPCCR_TESTBED") or "tb")
    for name in options.bench or BENCHES:
        BENCHES[name](cluster, options.repetitions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
