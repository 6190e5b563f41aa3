"""Devices: what comes back, what does not, and which variable keeps MPI from it."""

import os
import stat

import pytest

from hpccr.noded import devices

CHARACTER, BLOCK = stat.S_IFCHR, stat.S_IFBLK


def device(kind: int, major: int, minor: int) -> os.stat_result:
    return os.stat_result((kind | 0o666, 1, 1, 1, 0, 0, 0, 0, 0, 0), {"st_rdev": os.makedev(major, minor)})


@pytest.mark.parametrize(("major", "minor"), [(1, 3), (1, 5), (1, 9), (5, 0), (5, 2), (136, 4), (10, 200)])
def test_what_criu_restores_passes(major: int, minor: int) -> None:
    assert devices.refusal("/dev/any", device(CHARACTER, major, minor)) is None


def test_what_is_no_device_passes() -> None:
    assert devices.refusal("/dev/shm/nvidia0", os.stat("/")) is None


@pytest.mark.parametrize(
    ("path", "variables"),
    [
        ("/dev/infiniband/uverbs0", ("UCX_TLS=", "OMPI_MCA_pml=", "FI_PROVIDER=", "I_MPI_OFI_PROVIDER=")),
        ("/dev/cxi0", ("FI_PROVIDER=",)),
        ("/dev/xpmem", ("MPIR_CVAR_CH4_XPMEM_ENABLE=0", "OMPI_MCA_smsc=^", "UCX_TLS=")),
        ("/dev/knem", ("OMPI_MCA_smsc=^", "OMPI_MCA_btl_vader_single_copy_mechanism=none")),
        ("/dev/nvidiactl", ("CUDA_VISIBLE_DEVICES=", "OMPI_MCA_accelerator=null", "MPIR_CVAR_ENABLE_GPU=0")),
        ("/dev/kfd", ("ROCR_VISIBLE_DEVICES=",)),
    ],
)
def test_the_hint_names_the_variable(path: str, variables: tuple[str, ...]) -> None:
    found = devices.refusal(path, device(CHARACTER, 511, 0))
    assert found is not None and path in found.what
    assert [name for name in variables if name not in found.hint] == []


def test_other_devices_are_refused_too() -> None:
    found = devices.refusal("/dev/sda", device(BLOCK, 8, 0))
    assert found is not None and "/dev/sda" in found.what and found.hint
