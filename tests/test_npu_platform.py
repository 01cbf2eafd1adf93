"""Choosing an NPU: what CANN and torch_npu say, and what happens where they are broken."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.errors import ParameterError
from nanovllm.platforms import CpuPlatform, NpuPlatform, get_platform, npu, npu_driver
from nanovllm.platforms.npu import chip_of
from nanovllm.platforms.npu_driver import Cann

A2, A310P = Cann(1, "Ascend910B2"), Cann(2, "Ascend310P3")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a machine with this CANN, torch_npu or none, and no GPU."""

    def make(cann: Cann, installed: bool = True, fails: str | None = None) -> None:
        monkeypatch.setattr(npu, "ask_cann", lambda: cann)
        monkeypatch.setattr(npu, "torch_npu_is_installed", lambda: installed)
        monkeypatch.setattr(npu, "why_torch_npu_fails", lambda: fails)
        monkeypatch.setattr("nanovllm.platforms.cuda.visible_gpus", tuple)
        monkeypatch.setattr(npu.logger, "propagate", True)

    return make


def test_an_npu_is_chosen_where_it_works(machine: Callable[..., None]) -> None:
    machine(A2)
    for device in ("auto", "npu"):
        platform = get_platform(device)
        assert isinstance(platform, NpuPlatform)
        assert (platform.device, platform.block_size, platform.overlap) == ("npu", 128, True)
    assert get_platform("cpu").device == "cpu"


@pytest.mark.parametrize(
    ("cann", "installed", "fails", "warned"),
    [
        (A2, False, None, ""),
        (Cann(failure="libascendcl.so: cannot open"), True, None, ""),
        (Cann(0), True, None, ""),
        (A2, True, "OSError: libhccl.so: cannot open shared object file", "libhccl.so"),
        (Cann(1, "Ascend910A"), True, None, "Ascend910A"),
    ],
)
def test_auto_takes_the_cpu_where_an_npu_cannot_be_used(
    cann: Cann,
    installed: bool,
    fails: str | None,
    warned: str,
    machine: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine(cann, installed, fails)
    assert isinstance(get_platform("auto"), CpuPlatform)
    assert (warned in caplog.text) if warned else not caplog.text


@pytest.mark.parametrize(
    ("cann", "installed", "message"),
    [
        (A2, False, "torch-npu is not installed"),
        (Cann(failure="libascendcl.so: cannot open"), True, r"libascendcl.so: cannot open.*set_env.sh.*doctor"),
        (Cann(0), True, "ASCEND_RT_VISIBLE_DEVICES"),
        (Cann(1, "Ascend910A"), True, "Ascend910A has no operators"),
        (Cann(1, "Ascend910B"), True, "Ascend910B has no operators"),
        (Cann(1, "Ascend310B1"), True, "Ascend310B1 has no operators"),
    ],
)
def test_an_npu_by_name_says_what_is_missing(
    cann: Cann, installed: bool, message: str, machine: Callable[..., None]
) -> None:
    machine(cann, installed)
    with pytest.raises(ParameterError, match=message) as caught:
        get_platform("npu")
    assert (caught.value.parameter, caught.value.value) == ("device", "npu")


@pytest.mark.parametrize(
    ("soc", "is_310p", "known"),
    [
        ("Ascend910B1", False, True),
        ("Ascend910B4-1", False, True),
        ("Ascend910_9391", False, True),
        ("Ascend310P3", True, True),
        ("Ascend950", False, False),
    ],
)
def test_chips(soc: str, is_310p: bool, known: bool, caplog: pytest.LogCaptureFixture, machine: Any) -> None:
    machine(A2)
    assert chip_of(soc).is_310p is is_310p
    assert ("not known" in caplog.text) is not known


@pytest.mark.parametrize(
    ("cann", "asked", "checkpoint", "resolved"),
    [
        (A2, "auto", "bfloat16", "bfloat16"),
        (A2, "auto", "float16", "float16"),
        (A2, "auto", "float32", "bfloat16"),
        (A2, "auto", None, "bfloat16"),
        (A2, "float32", "bfloat16", "float32"),
        (A310P, "auto", "bfloat16", "float16"),
        (A310P, "auto", None, "float16"),
        (A310P, "float16", "bfloat16", "float16"),
    ],
)
def test_dtype(cann: Cann, asked: str, checkpoint: str | None, resolved: str) -> None:
    assert NpuPlatform(chip_of(cann.soc)).resolve_dtype(asked, checkpoint) == resolved


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_310p_refuses_all_but_float16_with_the_remedy(dtype: str) -> None:
    with pytest.raises(ParameterError, match="use float16") as caught:
        NpuPlatform(chip_of("Ascend310P3")).resolve_dtype(dtype, "bfloat16")
    assert (caught.value.parameter, caught.value.value) == ("dtype", dtype)


def test_block_sizes() -> None:
    for soc, good, bad in (("Ascend910B2", (16, 128, 1024), (8, 100, 2048)), ("Ascend310P3", (64, 128), (16, 256))):
        platform = NpuPlatform(chip_of(soc))
        for size in good:
            platform.check_block_size(size)
        for size in bad:
            with pytest.raises(ParameterError, match="128") as caught:
                platform.check_block_size(size)
            assert (caught.value.parameter, caught.value.value) == ("block_size", size)


def test_keys_and_values_have_the_models_dtype() -> None:
    platform = NpuPlatform(chip_of("Ascend910B2"))
    platform.check_cache_dtype("auto")
    with pytest.raises(ParameterError, match="use 'auto'"):
        platform.check_cache_dtype("fp8")


class FakeCann:
    """libascendcl.so with some devices; functions write through their pointers as the real ones do."""

    def __init__(self, count: int = 2, status: int = 0) -> None:
        self.status, self.count = status, count
        self.aclrtGetSocName: Any = SimpleNamespace()

        class SocName:
            restype: Any = None

            def __call__(self) -> bytes:
                assert self.restype is ctypes.c_char_p
                return b"Ascend910B3"

        self.aclrtGetSocName = SocName()

    def aclrtGetDeviceCount(self, count: Any) -> int:
        count._obj.value = self.count
        return self.status


def test_cann_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, answer in (
        (FakeCann(), Cann(2, "Ascend910B3")),
        (FakeCann(0), Cann(0, "")),
        (FakeCann(status=507033), Cann(failure="aclrtGetDeviceCount gave error 507033")),
    ):
        monkeypatch.setattr(npu_driver.ctypes, "CDLL", lambda name, library=library: library)
        assert npu_driver.ask_cann.__wrapped__() == answer


def test_cann_that_is_not_there_or_not_whole_is_a_failure_with_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failure = npu_driver.ask_cann.__wrapped__().failure
    assert failure is None or "libascendcl.so" in failure  # this machine may have one
    monkeypatch.setattr(npu_driver, "_LIBRARY", "libc.so.6")  # loads, and has none of the functions
    assert "aclrt" in (npu_driver.ask_cann.__wrapped__().failure or "")


# ---- a torch_npu that is installed and broken: in processes of their own -------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """Variables of a process in which torch_npu is installed, loads itself with torch, and fails."""
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text('raise OSError("libhccl.so: cannot open shared object file")\n')
    info = tmp_path / "torch_npu-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    variables = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return {**variables, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}", "OMP_NUM_THREADS": "1"}


def run(code: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)


def test_a_broken_torch_npu_does_not_disturb_the_cpu(broken: dict[str, str]) -> None:
    assert run("import torch", broken).returncode != 0  # so it is without us
    result = run(
        "from nanovllm.platforms import get_platform; print(get_platform('auto').device)\nimport torch", broken
    )
    assert (result.returncode, result.stdout.strip()) == (0, "cpu"), result.stderr
    decided = run("from nanovllm.platforms import get_platform; get_platform('cpu')\nimport torch",
                  {**broken, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"})  # fmt: skip
    assert decided.returncode != 0  # who wants it loaded, gets it


def test_a_broken_torch_npu_is_diagnosed_where_an_npu_is_wanted(broken: dict[str, str]) -> None:
    code = """
from nanovllm.platforms import npu_driver
npu_driver.ask_cann = lambda: npu_driver.Cann(1, "Ascend910B2")
from nanovllm.platforms import get_platform, npu
npu.ask_cann = npu_driver.ask_cann
assert get_platform("auto").device == "cpu"
platform = get_platform("npu")
try:
    platform.load()
except ValueError as error:
    print(error)
import torch
from nanovllm.ops import operator_table
try:
    operator_table("npu")
except ValueError as error:
    print(error)
"""
    result = run(code, broken)
    assert result.returncode == 0, result.stderr
    loaded, table = result.stdout.strip().splitlines()
    assert (
        "libhccl.so: cannot open shared object file" in loaded and "nanovllm doctor" in loaded and "set_env" in loaded
    )
    assert "libhccl.so" in table
    assert "it cannot be used: OSError: libhccl.so" in result.stderr  # what "auto" has to say


def test_nothing_is_changed_where_torch_npu_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os; from nanovllm.platforms import get_platform; get_platform('cpu');"
        "print(os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD'))"
    )
    variables = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    assert run(code, variables).stdout.strip() == "None"
