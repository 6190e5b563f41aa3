"""Devices that the tasks of a job may have open: which of them CRIU brings back, and how a job does without the others.

Mostly it is MPI that opens them; the hints name the variables that keep its libraries from it.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

RDMA_HINT = (
    "let MPI use TCP and shared memory: UCX_TLS=tcp,posix,sysv,self (MPICH, Open MPI with UCX), OMPI_MCA_pml=ob1 "
    "OMPI_MCA_btl=tcp,self,sm (Open MPI), FI_PROVIDER=tcp (libfabric), I_MPI_OFI_PROVIDER=tcp (Intel MPI)"
)
_SINGLE_COPY_HINT = (
    "let MPI copy by shared memory: OMPI_MCA_smsc=^cma,knem,xpmem (Open MPI 5), "
    "OMPI_MCA_btl_vader_single_copy_mechanism=none (Open MPI 4), MPIR_CVAR_CH4_XPMEM_ENABLE=0 (MPICH), "
    "UCX_TLS=tcp,posix,sysv,self (UCX)"
)
_GPU_HINT = (
    "run without it: CUDA_VISIBLE_DEVICES= (NVIDIA), ROCR_VISIBLE_DEVICES= (AMD), ZE_AFFINITY_MASK= (Intel); where MPI "
    "opened it: OMPI_MCA_accelerator=null (Open MPI 5), MPIR_CVAR_ENABLE_GPU=0 (MPICH), I_MPI_OFFLOAD=0 (Intel MPI)"
)
_OTHER_HINT = "what a device (GPU, accelerator, disk) holds is not part of a checkpoint: run without it"

_KNOWN = {
    ("/dev/infiniband/", "/dev/hfi1", "/dev/cxi"): ("RDMA device", RDMA_HINT),
    ("/dev/xpmem", "/dev/knem"): ("single-copy device", _SINGLE_COPY_HINT),
    ("/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/gdrdrv", "/dev/dxg"): ("GPU device", _GPU_HINT),
}
"""By what the names begin with."""

_PLAIN = frozenset((1, minor) for minor in (3, 5, 7, 8, 9, 11))
"""Character devices CRIU restores by their number alone: null, zero, full, random, urandom, kmsg."""
_TTY_MAJORS = frozenset({4, 5, *range(136, 144)})
_TUN = (10, 200)


@dataclass(frozen=True)
class Refusal:
    """what: the device, with its name; hint: how a job does without it."""

    what: str
    hint: str


def known(path: str) -> Refusal | None:
    """A device whose name says that it cannot be dumped."""
    for prefixes, (kind, hint) in _KNOWN.items():
        if path.startswith(prefixes):
            return Refusal(f"the {kind} {path}", hint)
    return None


def refusal(path: str, status: os.stat_result) -> Refusal | None:
    """None for what is no device, and for a device that comes back. path: as the task opened it."""
    if not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        return None
    number = (os.major(status.st_rdev), os.minor(status.st_rdev))
    if stat.S_ISCHR(status.st_mode) and (number in _PLAIN or number[0] in _TTY_MAJORS or number == _TUN):
        return None
    return known(path) or Refusal(f"the device {path}", _OTHER_HINT)
