"""As slowly.h, for an example in Python: python3 slowly.py EXAMPLE arguments"""

import os
import runpy
import sys
import time
from typing import Any

import hpccr.mpi

at_once = hpccr.mpi.safe_point


def slowly(comm: Any) -> hpccr.mpi.Outcome:
    if not os.path.exists("gate"):
        time.sleep(0.1)
    return at_once(comm)


hpccr.mpi.safe_point = slowly
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
