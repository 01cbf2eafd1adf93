"""Attention of other libraries: called as their signatures want it, with the reference's results; and the choice."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_libraries import FLASH_ATTN_2, FLASH_ATTN_3, FLASHINFER
from cuda_device import DEVICE, ON_GPU
from torch import Tensor

pytest.importorskip("triton")
if ON_GPU:
    pytest.skip("stand-ins are for machines without a GPU", allow_module_level=True)

from test_cuda_attention import SCALE, Batch, make_batch

from nanovllm.errors import ParameterError
from nanovllm.ops import cuda, reference, torch_operators
from nanovllm.ops.cuda import attention, measured
from nanovllm.ops.cuda.attention import DecodePlan, Layer, LongPlan, Tiles, TritonAttention
from nanovllm.ops.cuda.flash_attn import FlashAttention
from nanovllm.ops.cuda.flashinfer import FlashInferAttention, is_ready
from nanovllm.ops.cuda.measured import MeasuredAttention
from nanovllm.ops.operators import AttentionShape

AMPERE, HOPPER = (8, 0), (9, 0)
ROWS = [(20, 1), (3, 1), (9, 4), (0, 7)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "decode_tiles", lambda *_: Tiles(16, 16, 4, 2))
    monkeypatch.setattr(attention, "long_tiles", lambda *_: Tiles(16, 16, 4, 2))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs these libraries, and no others."""

    def install(**libraries: Any) -> None:
        for name in ("flash_attn", "flash_attn_interface", "flashinfer"):
            monkeypatch.setitem(sys.modules, name, libraries.get(name))

    return install


class OwnKernels:
    """Counts what reaches Triton's kernels after all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decodes = self.longs = 0
        decode, long = TritonAttention.decode, TritonAttention.long

        def counted_decode(ops: TritonAttention, layer: Layer, plan: DecodePlan) -> None:
            self.decodes += 1
            decode(ops, layer, plan)

        def counted_long(ops: TritonAttention, layer: Layer, plan: LongPlan) -> None:
            self.longs += 1
            long(ops, layer, plan)

        monkeypatch.setattr(TritonAttention, "decode", counted_decode)
        monkeypatch.setattr(TritonAttention, "long", counted_long)


def check(ops: TritonAttention, batch: Batch, windows: list[int | None]) -> None:
    meta, q, k_cache, v_cache = batch
    ops.prepare_attention(meta, windows, q.dtype)
    for window in windows:
        ours = ops.paged_attention(q, k_cache, v_cache, meta, SCALE, window)
        wanted = reference.paged_attention(q.double(), k_cache.double(), v_cache.double(), meta, SCALE, window)
        torch.testing.assert_close(ours.double(), wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("capability", "block_size", "own"),
    [(HOPPER, 4, (0, 0)), (AMPERE, 256, (0, 0)), (AMPERE, 4, (2, 0))],  # (decodes, longs) that stay with Triton
)
def test_flash_attn(
    capability: tuple[int, int],
    block_size: int,
    own: tuple[int, int],
    installed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(flash_attn=FLASH_ATTN_2, flash_attn_interface=FLASH_ATTN_3)
    kernels = OwnKernels(monkeypatch)
    ops = FlashAttention(3, 100_000, capability)
    check(ops, make_batch(ROWS, block_size=block_size, dtype=torch.float16), [None, 6])
    assert (kernels.decodes, kernels.longs) == own


def test_flashinfer(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(flashinfer=FLASHINFER)
    kernels = OwnKernels(monkeypatch)
    wrapper = FLASHINFER.BatchPrefillWithPagedKVCacheWrapper
    monkeypatch.setattr(wrapper, "plans", 0)
    ops = FlashInferAttention(3, 100_000)
    for seed in (0, 1):  # the next step is planned anew
        batch = make_batch(ROWS, head_dim=64, dtype=torch.float16, seed=seed)
        check(ops, batch, [None, 6, None, 6])
    assert wrapper.plans == 4  # one for each step and window, however many layers
    assert (kernels.decodes, kernels.longs) == (8, 0)


@pytest.mark.parametrize("make", [lambda: FlashAttention(3, 100_000, HOPPER), lambda: FlashInferAttention(3, 100_000)])
def test_what_they_do_not_cover_stays_with_triton(
    make: Callable[[], TritonAttention], installed: Callable[..., None]
) -> None:
    installed(flash_attn_interface=FLASH_ATTN_3, flashinfer=FLASHINFER)
    ops = make()
    check(ops, make_batch(ROWS, head_dim=64), [None])  # float32
    check(ops, make_batch(ROWS, head_dim=20, dtype=torch.float16), [None])
    meta, q, k_cache, v_cache = make_batch(ROWS, head_dim=64, dtype=torch.float16)
    eight = [cache.nan_to_num().to(torch.float8_e4m3fn) for cache in (k_cache, v_cache)]
    ops.prepare_attention(meta, [None], q.dtype)
    ours = ops.paged_attention(q, eight[0], eight[1], meta, SCALE, None)
    wanted = reference.paged_attention(q.float(), eight[0].float(), eight[1].float(), meta, SCALE, None)
    torch.testing.assert_close(ours.float(), wanted, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])
def test_what_is_not_installed_is_refused(name: str, installed: Callable[..., None]) -> None:
    installed()
    with pytest.raises(ParameterError, match="use 'triton'") as caught:
        cuda.operators(torch_operators(), cuda.Hardware(HOPPER, 1, 100_000), name)
    assert (caught.value.parameter, caught.value.value) == ("attention_backend", name)


# ---- the choice ----------------------------------------------------------------------------------------------------

SHAPE = AttentionShape(2, 1, 16, 4, torch.float32, torch.float32, None, rows=3, longest=9)


class Other(TritonAttention):
    """Another implementation of both."""

    off = 0.0

    def decode(self, layer: Layer, plan: DecodePlan) -> None:
        super().decode(layer, plan)
        layer.out += self.off

    def long(self, layer: Layer, plan: LongPlan) -> None:
        super().long(layer, plan)
        layer.out += self.off


class OnlyLong(TritonAttention):
    """Its decodes are Triton's."""

    def long(self, layer: Layer, plan: LongPlan) -> None:
        super().long(layer, plan)


class Clock:
    """Tells the given milliseconds, in the order of the measurements."""

    def __init__(self, *milliseconds: float) -> None:
        self.left = list(milliseconds)

    def __call__(self, work: Callable[[], Tensor]) -> float:
        assert torch.isfinite(work()).all()
        return self.left.pop(0) / 1e3


def choose(
    clock: Clock, folder: Path | None = None, other: type[Other] = Other, device: str = "GPU"
) -> tuple[str, str]:
    candidates = {"triton": TritonAttention(3, 100_000), "other": other(3, 100_000), "long": OnlyLong(3, 100_000)}
    ops = MeasuredAttention(3, 100_000, candidates, device, clock, folder)
    ops.tune(SHAPE, torch.device(DEVICE))
    assert not clock.left
    check(ops, make_batch(ROWS, dtype=torch.float16), [None])
    return ops.decodes_with, ops.long_with


@pytest.mark.parametrize(
    ("milliseconds", "chosen"),
    [  # decodes: triton, other; longer queries: triton, other, long
        ((1.0, 2.0, 3.0, 4.0, 2.0), ("triton", "long")),
        ((1.0, 0.5, 3.0, 2.0, 2.5), ("other", "other")),
        ((1.0, 0.99, 3.0, 2.99, 3.0), ("triton", "triton")),  # not worth it
    ],
)
def test_the_fastest_is_chosen(
    milliseconds: tuple[float, ...], chosen: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nanovllm"):
        assert choose(Clock(*milliseconds)) == chosen
    assert f"decodes {chosen[0]} (" in caplog.text and f"longer queries {chosen[1]} (" in caplog.text


def test_the_choice_is_kept_for_this_gpu_and_shape(tmp_path: Path) -> None:
    assert choose(Clock(1.0, 0.5, 3.0, 2.0, 2.5), tmp_path) == ("other", "other")
    assert choose(Clock(), tmp_path) == ("other", "other")
    assert choose(Clock(1.0, 2.0, 3.0, 4.0, 2.0), tmp_path, device="another") == ("triton", "long")
    (tmp_path / "attention.json").write_text("no JSON")
    assert choose(Clock(1.0, 2.0, 3.0, 4.0, 5.0), tmp_path) == ("triton", "triton")
    assert choose(Clock(), tmp_path) == ("triton", "triton")


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert choose(Clock(1.0, 2.0, 3.0, 4.0, 2.0), tmp_path / "file") == ("triton", "long")


def test_who_computes_something_else_or_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Other):
        off = 0.5

    class Failing(Other):
        def long(self, layer: Layer, plan: LongPlan) -> None:
            raise RuntimeError("no kernel image is available")

    candidates = {"triton": TritonAttention(3, 100_000), "wrong": Wrong(3, 100_000), "failing": Failing(3, 100_000)}
    clock = Clock(1.0, 0.1, 1.0)  # of decodes triton and failing, of longer queries triton
    ops = MeasuredAttention(3, 100_000, candidates, "GPU", clock, None)
    ops.tune(SHAPE, torch.device(DEVICE))
    assert (ops.decodes_with, ops.long_with) == ("failing", "triton") and not clock.left
    assert "wrong is not used, its results are off by 0.5" in caplog.text
    assert "failing is not used, it does not run here: no kernel image" in caplog.text


def test_without_memory_to_measure_it_is_triton(caplog: pytest.LogCaptureFixture) -> None:
    class Large(Other):
        def decode(self, layer: Layer, plan: DecodePlan) -> None:
            raise torch.OutOfMemoryError("full")

    candidates = {"triton": TritonAttention(3, 100_000), "large": Large(3, 100_000)}
    ops = MeasuredAttention(3, 100_000, candidates, "GPU", Clock(1.0), None)
    ops.tune(SHAPE, torch.device(DEVICE))
    assert (ops.decodes_with, ops.long_with) == ("triton", "triton") and "no memory" in caplog.text


def test_what_is_installed_is_measured(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer only with compiled kernels: compiling them would hold up the start."""
    made: list[SimpleNamespace] = []

    def make(*args: Any) -> Any:
        made.append(SimpleNamespace(candidates=list(args[2]), tune=args))
        return made[-1]

    monkeypatch.setattr(measured, "MeasuredAttention", make)
    monkeypatch.setattr(cuda, "_record", None)
    hardware = cuda.Hardware(HOPPER, 1, 100_000, "GPU")
    installed(flash_attn=FLASH_ATTN_2, flashinfer=FLASHINFER)
    for ready in (False, True):
        monkeypatch.setattr("nanovllm.ops.cuda.flashinfer.is_ready", lambda ready=ready: ready)
        cuda._measured(hardware)
    installed()
    cuda._measured(hardware)
    for one, libraries in zip(made, (["flash_attn"], ["flash_attn", "flashinfer"], []), strict=True):
        assert [name for name in one.candidates if name != "torch_varlen"] == ["triton", *libraries]
    assert isinstance(is_ready(), bool)


def test_by_name_nothing_is_measured() -> None:
    ops = cuda.operators(torch_operators(), cuda.Hardware(HOPPER, 1, 100_000), "triton")
    assert ops.tune is None
    assert cuda.operators(torch_operators(), cuda.Hardware(HOPPER, 1, 100_000)).tune is not None
