"""Memory made ready for weights: who gets it, how much it is, and that none is left behind."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanovllm import reserve
from nanovllm.ops.cpu.memory import Arena
from nanovllm.platforms import get_platform
from nanovllm.reserve import matrix_bytes, memory_for_weights, take_reserve

pytestmark = [
    pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages"),
    pytest.mark.skipif(not reserve._KERNELS.is_file(), reason="the C++ kernels are not built"),
]
MIB = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of 96 MiB in matrices of float32, and a few tensors beside them."""
    weights = {
        "model.embed_tokens.weight": torch.zeros(1024, 8 * 1024),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(2048, 8 * 1024),
        "lm_head.weight": torch.zeros(1024, 1024),
        "model.norm.weight": torch.zeros(1024),
        "half": torch.zeros(4, 4, dtype=torch.bfloat16),
    }
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "weights-memory":
            thread.join()


def test_it_is_as_much_as_the_matrices_of_the_dtype(folder: Path, tmp_path: Path) -> None:
    assert matrix_bytes(folder, "F32", tied=True) == 96 * MIB
    assert matrix_bytes(folder, "F32", tied=False) == 100 * MIB
    assert matrix_bytes(folder, "BF16", tied=False) == 32
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert matrix_bytes(folder, "F32", tied=True) == matrix_bytes(tmp_path / "none", "F32", tied=True) == 0


def test_it_is_touched_before_anybody_needs_it_and_weights_lie_in_it(folder: Path) -> None:
    platform = get_platform("cpu")
    before = platform.memory_used_by_process()
    with memory_for_weights(folder, "float32", tied=True):
        wait_for_threads()
        touched = platform.memory_used_by_process() - before
        first, second = (Arena().allocate(64 * MIB) for _ in range(2))
        assert take_reserve() is None
        weights = first.view(torch.float32).fill_(1.5)
    taken = platform.memory_used_by_process() - before
    assert weights.sum() == 16 * MIB * 1.5
    assert second.data_ptr() != first.data_ptr()
    assert 90 * MIB < touched < 110 * MIB
    assert taken < touched + 10 * MIB  # the first was there already, and the second is not written yet


def test_what_nobody_takes_is_given_back_and_later_arenas_find_none(folder: Path) -> None:
    platform = get_platform("cpu")
    before = platform.memory_used_by_process()
    with pytest.raises(ZeroDivisionError), memory_for_weights(folder, "float32", tied=True):
        1 / 0  # noqa: B018
    wait_for_threads()
    assert take_reserve() is None
    assert platform.memory_used_by_process() - before < 20 * MIB
    with memory_for_weights(folder, "float32", tied=True):
        Arena().allocate(200 * MIB)  # more than there is
        assert take_reserve() is None


def test_what_has_been_written_before_the_touch_stays() -> None:
    touch = ctypes.CDLL(str(reserve._KERNELS)).nanovllm_touch
    memory = torch.randint(0, 256, (3 * mmap.PAGESIZE,), dtype=torch.uint8)
    expected, wanted = memory.clone(), ctypes.c_int32(1)
    size = ctypes.c_int64(memory.nbytes)
    touch(ctypes.c_void_p(memory.data_ptr()), size, ctypes.c_int64(64), ctypes.byref(wanted))
    assert torch.equal(memory, expected)


def test_kernels_that_cannot_touch_leave_it_to_the_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "kernels_generic.so"
    other.touch()
    monkeypatch.setattr(reserve, "_KERNELS", other)
    with memory_for_weights(folder, "float32", tied=True):
        wait_for_threads()
        assert Arena().allocate(64 * MIB).zero_().sum() == 0


def test_nothing_is_reserved_where_no_kernel_would_take_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserve, "_KERNELS", tmp_path / "kernels_generic.so")
    with memory_for_weights(folder, "float32", tied=True):
        assert take_reserve() is None


def test_nothing_is_reserved_for_small_models(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(64, 64)}, tmp_path / "model.safetensors")
    with memory_for_weights(tmp_path, "float32", tied=False):
        assert take_reserve() is None


def test_torch_is_not_needed() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, nanovllm.reserve, nanovllm.executor; assert 'torch' not in sys.modules"],
        check=True,
        cwd=Path(reserve.__file__).parents[1],
    )
