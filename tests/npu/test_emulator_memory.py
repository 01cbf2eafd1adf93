"""The real wheel loads and finds devices; memory is counted, poisoned and guarded."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch
from on_npu import DEVICE, npu, refused, torch_npu

from tests.npu.emulator.environment import TORCH_NPU

pytestmark = pytest.mark.emulated


def test_the_wheel_is_the_published_one() -> None:
    assert importlib.metadata.version("torch-npu") == TORCH_NPU
    assert torch_npu.__version__.startswith(TORCH_NPU)


def test_the_main_environment_stays_without_it() -> None:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch_npu') is not None)"
    clean = {"PATH": "/usr/bin:/bin"}
    assert subprocess.run([sys.executable, "-c", code], env=clean, check=False).returncode == 0


def test_devices_have_the_products_name() -> None:
    assert torch.npu.is_available()
    assert torch.npu.device_count() == 2
    assert torch.npu.get_device_name(0) == "Ascend910B2"


def test_tensors_go_to_the_device_and_back() -> None:
    x = torch.arange(12.0).view(3, 4)
    there = x.to(DEVICE)
    assert there.device == torch.device(DEVICE)
    assert torch.equal(there.cpu(), x)
    assert torch.equal(there.T.cpu(), x.T)
    assert torch.equal(x.pin_memory().to(DEVICE, non_blocking=True).cpu(), x)


def test_a_second_device_has_its_own_memory() -> None:
    before = torch.npu.mem_get_info(1)[0]
    x = torch.zeros(1 << 20, device="npu:1")
    assert torch.npu.mem_get_info(1)[0] < before
    assert x.to("npu:0").sum().item() == 0


def test_memory_is_counted() -> None:
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    assert total == 2048 << 20
    held = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)
    assert free - torch.npu.mem_get_info()[0] >= 64 << 20
    del held
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] == free


def test_too_much_memory_is_torchs_own_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(4 << 30, dtype=torch.uint8, device=DEVICE)
    assert torch.empty(1 << 20, dtype=torch.uint8, device=DEVICE).numel() == 1 << 20


def test_new_memory_is_poisoned() -> None:
    torch.npu.empty_cache()
    fresh = torch.empty(32 << 20, dtype=torch.uint8, device=DEVICE).cpu()
    assert (fresh == 0xCB).all()


def test_an_operator_without_kernel_says_what_it_was_called_with() -> None:
    with refused(r"aclnnErfinv is not emulated .*Tensor\[3\], Tensor\[3\]"):
        torch.erfinv(npu(torch.zeros(3)))
