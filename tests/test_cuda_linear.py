"""Products with quantised weights: Triton kernels against the dequantised weight in float64."""

from __future__ import annotations

import pytest
import torch
from cuda_device import DEVICE, HALF_DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from nanovllm.errors import ParameterError
from nanovllm.ops import operator_table, torch_operators
from nanovllm.ops.cuda.linear import CudaLinear
from nanovllm.ops.cuda.quantize import QuantizedWeight, dequantize, quantize

BASE = torch_operators()
HOPPER = (9, 0)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@settings(max_examples=25)
@given(
    kind=st.sampled_from(["int8", "int4", "w8a8"]),
    rows=st.sampled_from([0, 1, 3, 16, 21]),
    inputs=st.sampled_from([64, 128, 320]),
    outputs=st.sampled_from([16, 80]),
    bias=st.booleans(),
    multiprocessors=st.sampled_from([1, 8]),
    dtype=st.sampled_from([torch.float32, *HALF_DTYPES]),
    seed=st.integers(0, 99),
)
def test_products_with_quantised_weights(
    kind: str, rows: int, inputs: int, outputs: int, bias: bool, multiprocessors: int, dtype: torch.dtype, seed: int
) -> None:
    ops = CudaLinear(BASE, kind, multiprocessors, HOPPER)
    x, weight = draw(rows, inputs, seed=seed, dtype=dtype), draw(outputs, inputs, seed=seed + 1, dtype=dtype)
    b = draw(outputs, seed=seed + 2, dtype=dtype) if bias else None
    packed = ops.pack_linear(weight)
    assert isinstance(packed, QuantizedWeight)
    packed.dtype = torch.float64  # so that dequantize does not round
    exact = x.double() @ dequantize(packed).T + (0 if b is None else b.double())
    packed.dtype = dtype
    ours = ops.linear(x, packed, b)
    assert ours.dtype == dtype
    # Activations of w8a8 are off by half a step of their row's largest number; errors add up like a random walk.
    rounding = 0.5 / 127 * 4 * inputs**0.5 * 4 if kind == "w8a8" else 0.0
    tolerance = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4}[dtype]
    torch.testing.assert_close(ours.double(), exact, atol=tolerance + rounding, rtol=1e-3)


def test_whole_activations_are_multiplied_exactly() -> None:
    """Integers with 127 among them are their own quantisation: then w8a8 differs by the last rounding alone."""
    x = torch.randint(-127, 128, (5, 128), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    x[:, 0] = 127
    ops = CudaLinear(BASE, "w8a8", 4, HOPPER)
    packed = ops.pack_linear(draw(32, 128))
    torch.testing.assert_close(ops.linear(x, packed, None), x @ dequantize(packed).T, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_as_on_the_cpu(kind: str, dtype: torch.dtype) -> None:
    weight = draw(6, 128, dtype=dtype).cpu()
    weight[2] = 0
    cpu = operator_table("cpu", None, kind)
    packed = cpu.pack_linear(weight)
    if isinstance(packed, Tensor):
        pytest.skip("no C++ kernels here")
    assert torch.equal(cpu.weight_rows(packed, torch.arange(6)), dequantize(quantize(weight, kind)))


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.005), ("int4", 0.09), ("fp8", 0.04)])
def test_rows_of_a_packed_weight_stay_near_the_original(kind: str, error: float) -> None:
    ops = CudaLinear(BASE, kind, 4, HOPPER)
    weight = draw(32, 64)
    rows = torch.tensor([31, 0, 0], device=DEVICE)
    found = ops.weight_rows(ops.pack_linear(weight), rows)
    assert ((found - weight[rows]).abs().max() / weight.abs().max()).item() < error


def test_what_does_not_fit_a_format_stays_as_it_is() -> None:
    ops = CudaLinear(BASE, "int4", 4, HOPPER)
    weight = draw(16, 65)
    packed = ops.pack_linear(weight)
    assert packed is weight
    x = draw(2, 65, seed=1)
    torch.testing.assert_close(ops.linear(x, packed, None), x @ weight.T)


def test_fp8_multiplies_rounded_rows_with_rounded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":

        def scaled_mm(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
            return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    ops = CudaLinear(BASE, "fp8", 4, HOPPER)
    x, weight, bias = draw(5, 64), draw(32, 64, seed=1), draw(32, seed=2)
    ours = ops.linear(x, ops.pack_linear(weight), bias)
    exact = x @ weight.T + bias
    assert ((ours - exact).norm() / exact.norm()).item() < 0.05


@pytest.mark.parametrize(("kind", "capability"), [("int3", (9, 0)), ("fp8", (8, 6))])
def test_a_format_that_cannot_be_had_is_named(kind: str, capability: tuple[int, int]) -> None:
    with pytest.raises(ParameterError) as caught:
        CudaLinear(BASE, kind, 4, capability)
    assert (caught.value.parameter, caught.value.value) == ("quantization", kind)
