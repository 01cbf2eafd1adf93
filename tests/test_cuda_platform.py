"""What the CUDA platform makes of the GPUs a driver tells of, on machines that have none."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.errors import ParameterError
from nanovllm.ops import cuda as ops_cuda
from nanovllm.ops import torch_operators
from nanovllm.ops.cuda import Hardware
from nanovllm.platforms import CudaPlatform, cuda, cuda_driver, get_platform
from nanovllm.platforms.cuda_driver import Gpu

HOPPER = Gpu("H", (9, 0), 140 * 2**30, 132)
TURING = Gpu("T", (7, 5), 16 * 2**30, 40)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the driver sees, and whether torch has CUDA."""

    def see(*found: Gpu, built: bool = True) -> None:
        monkeypatch.setattr(cuda, "visible_gpus", lambda: found)
        monkeypatch.setattr(cuda, "torch_is_built_for_cuda", lambda: built)

    return see


def test_auto_takes_a_gpu_that_torch_can_use(gpus: Callable[..., None]) -> None:
    gpus(HOPPER, TURING)
    platform = get_platform("auto")
    assert isinstance(platform, CudaPlatform) and platform.gpu == HOPPER and platform.overlap
    assert get_platform("cpu").device == "cpu"
    gpus(HOPPER, built=False)
    assert get_platform("auto").device == "cpu"
    gpus()
    assert get_platform("auto").device == "cpu"


@pytest.mark.parametrize(("found", "message"), [((), "no NVIDIA GPU is visible"), ((HOPPER,), "has no CUDA")])
def test_cuda_by_name_says_what_is_missing(found: tuple[Gpu, ...], message: str, gpus: Callable[..., None]) -> None:
    gpus(*found, built=False)
    with pytest.raises(ParameterError, match=message) as caught:
        get_platform("cuda")
    assert (caught.value.parameter, caught.value.value) == ("device", "cuda")


@pytest.mark.parametrize(
    ("gpu", "asked", "checkpoint", "resolved"),
    [
        (HOPPER, "auto", "bfloat16", "bfloat16"),
        (HOPPER, "auto", "float16", "float16"),
        (HOPPER, "auto", "float32", "bfloat16"),
        (HOPPER, "auto", None, "bfloat16"),
        (HOPPER, "float32", "bfloat16", "float32"),
        (TURING, "auto", "bfloat16", "float16"),
        (TURING, "auto", None, "float16"),
        (TURING, "float32", "bfloat16", "float32"),
    ],
)
def test_dtype(gpu: Gpu, asked: str, checkpoint: str | None, resolved: str) -> None:
    assert CudaPlatform(gpu).resolve_dtype(asked, checkpoint) == resolved


def test_bfloat16_by_name_is_refused_where_there_is_none() -> None:
    with pytest.raises(ParameterError, match="use float16") as caught:
        CudaPlatform(TURING).resolve_dtype("bfloat16", "bfloat16")
    assert caught.value.parameter == "dtype"


def test_eight_bit_keys_are_refused_where_there_are_none() -> None:
    CudaPlatform(HOPPER).check_cache_dtype("fp8")
    CudaPlatform(TURING).check_cache_dtype("auto")
    for platform in (CudaPlatform(TURING), get_platform("cpu")):
        with pytest.raises(ParameterError, match="use 'auto'") as caught:
            platform.check_cache_dtype("fp8")
        assert (caught.value.parameter, caught.value.value) == ("kv_cache_dtype", "fp8")


@pytest.mark.parametrize(
    ("free", "allocated", "reserved", "utilization", "budget"),
    [
        (98, 1, 2, 0.9, 89.0),  # alone: nine tenths of the whole, less what weights take
        (30, 1, 2, 0.9, 30.75),  # another process holds most of it: what is free, and the allocator's own slack
        (98, 95, 95, 0.9, 0.0),
    ],
)
def test_memory_of_other_processes_is_theirs(
    free: int, allocated: int, reserved: int, utilization: float, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * gib, 100 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated * gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved * gib)
    assert CudaPlatform(HOPPER).memory_budget(utilization) == budget * gib


# ---- GPUs of every age -----------------------------------------------------------------------------------------------

CUDA_12 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 0), CUDA_12, True),
        ((7, 0), CUDA_13, False),
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_12, True),  # machine code of 8.6
        ((9, 0), CUDA_13, True),
        ((10, 0), CUDA_12, False),
        ((10, 3), CUDA_13, True),
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, True),  # compiled from the intermediate code when it is loaded
    ],
)
def test_a_torch_without_code_for_the_gpu_is_told_at_once(
    capability: tuple[int, int], built_for: list[str], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=80, name="G")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if runs:
        assert Hardware.of_current_device() == Hardware(capability, 80, 99 << 10, "G")
        return
    with pytest.raises(ParameterError, match=r"G has compute capability .* is built for sm_7") as caught:
        Hardware.of_current_device()
    assert (caught.value.parameter, caught.value.value) == ("device", "cuda")


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_before_ampere_torchs_operators_run(capability: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    base = torch_operators()
    ops = ops_cuda.operators(base, Hardware(capability, 80, 99 << 10))
    assert ops == base and ops.record(lambda *_: None, 8, 16) is None and ops.choose is ops.penalise is ops.tune is None
    assert "running on torch's operators, which are slower" in caplog.text
    for options in ({"attention_backend": "triton"}, {"quantization": "int8"}):
        with pytest.raises(ParameterError, match=r"does not compile for compute capability 7.*leave it out"):
            ops_cuda.operators(base, Hardware(capability, 80, 99 << 10), **options)


def test_a_gpu_without_triton_runs_on_torchs_operators(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    base, hardware = torch_operators(), Hardware((9, 0), 132, 227 << 10)
    assert ops_cuda.operators(base, hardware) == base
    assert "Triton is not installed: running on torch's operators" in caplog.text
    with pytest.raises(ParameterError, match=r"Triton is not installed.*leave it out") as caught:
        ops_cuda.operators(base, hardware, "flash_attn")
    assert (caught.value.parameter, caught.value.value) == ("attention_backend", "flash_attn")


class FakeDriver:
    """libcuda with two devices; every function writes through its pointers as the real one does."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = 10 + number
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        ctypes.memmove(name, b"GPU %d\0" % device.value, 7)
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> int:
        total._obj.value = device.value << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, which: int, device: Any) -> int:
        value._obj.value = {75: 9, 76: 0, 16: 132}[which]
        return 0


def test_the_driver_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_load_driver", FakeDriver)
    first, second = cuda_driver.visible_gpus.__wrapped__()
    assert first == Gpu("GPU 10", (9, 0), 10 << 30, 132)
    assert second.name == "GPU 11"


@pytest.mark.parametrize("broken", ["cuInit", "cuDeviceGetCount"])
def test_a_driver_that_fails_means_no_gpu(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGetCount=lambda count: 0)
    setattr(driver, broken, lambda *_: 100)
    monkeypatch.setattr(cuda_driver, "_load_driver", lambda: driver)
    assert cuda_driver.visible_gpus.__wrapped__() == ()


def test_choosing_a_device_loads_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from nanovllm.platforms import get_platform; get_platform('auto');"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpu_runs_where_triton_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from nanovllm.ops import operator_table\n"
        "ops = operator_table('cpu'); ops.silu_and_mul(torch.ones(2, 4))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
