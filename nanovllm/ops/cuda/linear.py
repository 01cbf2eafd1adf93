"""Linear layers: plain weights through torch's products, quantised ones through Triton kernels or ``_scaled_mm``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.errors import ParameterError
from nanovllm.ops.cuda.quantize import FORMATS, FP8_LARGEST, INT4_GROUP, QuantizedWeight, dequantize, quantize
from nanovllm.ops.operators import Operators

_FP8_CAPABILITY = (8, 9)  # Ada and Hopper multiply 8-bit floats


@triton.jit(do_not_specialize=["rows", "steps_per_split"])
def _product(
    x, x_scales, weight, scales, bias, out, rows, steps_per_split,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
    PARTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of x [rows, K] @ weight[N, K].T, over some steps of BLOCK_K inputs; PARTIAL: one float32 sum per split.

    Integers become the dtype of x without rounding, so that only the sums are rounded (w8a8: not even those). A group's
    scale of a 4-bit weight multiplies the group's sum. Loops count steps, not inputs: the compiler sees that a step
    begins at a multiple of BLOCK_K, and loads 16 bytes at a time, ahead of their use. Otherwise it would load single
    numbers.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    first = split * steps_per_split
    end = tl.minimum(first + steps_per_split, tl.cdiv(K, BLOCK_K))
    inside_m, inside_n = (m < rows)[:, None], (n < N)[None, :]
    line = x + m.to(tl.int64)[:, None] * K
    if KIND == "w8a8":
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if KIND == "int4":
        half = tl.arange(0, GROUP // 2)
        column = weight + n.to(tl.int64)[None, :] * (K // 2)
        for group in range(first, end):  # BLOCK_K is GROUP
            low_x = tl.load(line + group * GROUP + half[None, :], mask=inside_m, other=0.0)
            high_x = tl.load(line + group * GROUP + GROUP // 2 + half[None, :], mask=inside_m, other=0.0)
            packed = tl.load(column + group * (GROUP // 2) + half[:, None], mask=inside_n, other=0)
            low, high = (packed & 15).to(x.dtype.element_ty) - 8, (packed >> 4).to(x.dtype.element_ty) - 8
            part = tl.dot(low_x, low.to(x.dtype.element_ty), input_precision="ieee")
            part = tl.dot(high_x, high.to(x.dtype.element_ty), part, input_precision="ieee")
            scale = tl.load(scales + n * (K // GROUP) + group, mask=n < N, other=0.0).to(tl.float32)
            total += part * scale[None, :]
    else:
        depth = tl.arange(0, BLOCK_K)
        column = weight + n.to(tl.int64)[None, :] * K
        for step in range(first, end):
            k = step * BLOCK_K
            inside_k = k + depth < K
            tile_x = tl.load(line + k + depth[None, :], mask=inside_m & inside_k[None, :], other=0)
            tile_w = tl.load(column + k + depth[:, None], mask=inside_n & inside_k[:, None], other=0)
            if KIND == "w8a8":
                total = tl.dot(tile_x, tile_w, total, out_dtype=tl.int32)
            else:
                total = tl.dot(tile_x, tile_w.to(x.dtype.element_ty), total, input_precision="ieee")
        scale = tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)
        total = total.to(tl.float32) * scale[None, :]
        if KIND == "w8a8":
            total *= tl.load(x_scales + m, mask=m < rows, other=0.0)[:, None]
    if BIAS:  # noqa: SIM102 (decided when compiled; the other when run)
        if split == 0:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    if PARTIAL:
        place += split.to(tl.int64) * rows * N
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside_m & inside_n)


@triton.jit
def _quantize_rows(x, values, scales, largest, N: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Row ``program_id(0)`` of x [T, N] divided by a scale that makes its largest number ``largest``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * N + column, mask=column < N, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(value), 0)
    value = value * tl.where(most > 0, largest / most, 0.0)
    if WHOLE:
        value = tl.floor(value + 0.5)
    tl.store(values + row * N + column, value.to(values.dtype.element_ty), mask=column < N)
    tl.store(scales + row, most / largest)


class CudaLinear:
    """The operators ``pack_linear``, ``linear`` and ``weight_rows``.

    Args:
        quantization: None or one of ``FORMATS``; what cannot be quantised (inputs no multiple of 64) stays as it is.
        multiprocessors, capability: of the GPU.

    Raises:
        ParameterError: an unknown format, or fp8 on a GPU without it.
    """

    def __init__(
        self, base: Operators, quantization: str | None, multiprocessors: int, capability: tuple[int, int]
    ) -> None:
        if quantization not in (None, *FORMATS):
            raise ParameterError(f"choose one of {', '.join(FORMATS)}", "quantization", quantization)
        if quantization == "fp8" and capability < _FP8_CAPABILITY:
            raise ParameterError(
                "this GPU does not multiply 8-bit floats (compute capability 8.9 and later do); use int8 or w8a8",
                "quantization",
                quantization,
            )
        self._base = base
        self._quantization = quantization
        self._multiprocessors = multiprocessors

    def pack_linear(self, weight: Tensor) -> Tensor | QuantizedWeight:
        """See ``reference.pack_linear``."""
        if self._quantization is None or weight.shape[1] % INT4_GROUP or weight.shape[0] % 16:
            return self._base.pack_linear(weight)
        return quantize(weight, self._quantization)

    def linear(self, x: Tensor, packed: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
        """See ``reference.linear``."""
        if not isinstance(packed, QuantizedWeight):
            return self._base.linear(x, packed, bias)
        if not x.shape[0]:
            return x.new_empty((0, packed.values.shape[0]))
        x = x.contiguous()
        if packed.kind == "fp8":
            values, scales = _quantized(x, torch.float8_e4m3fn, FP8_LARGEST)
            out = torch._scaled_mm(
                values, packed.values.t(), scale_a=scales[:, None], scale_b=packed.scales.t(), out_dtype=torch.bfloat16
            ).to(x.dtype)
            return out if bias is None else out + bias
        if packed.kind == "w8a8":
            values, scales = _quantized(x, torch.int8, 127.0)
            return self._multiply(values, scales, packed, bias)
        return self._multiply(x, None, packed, bias)

    def _multiply(self, x: Tensor, x_scales: Tensor | None, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        rows, (inputs, outputs) = x.shape[0], (weight.inputs, weight.values.shape[0])
        # Products in float32 have no matrix units: what is multiplied has to fit into registers.
        in_registers = x.dtype == torch.float32
        block_m = min(32 if in_registers else 128, max(16, triton.next_power_of_2(rows)))
        block_n, block_k = 64, INT4_GROUP if weight.kind == "int4" else 32 if in_registers else 128
        tiles = triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n)
        # Few tiles leave most of the GPU idle: then the inputs are split, and the sums added in a fixed order.
        steps = triton.cdiv(inputs, block_k)
        splits = max(1, min(2 * self._multiprocessors // tiles, steps // 2))
        steps_per_split = triton.cdiv(steps, splits)
        splits = triton.cdiv(steps, steps_per_split)
        shape = (rows, outputs) if splits == 1 else (splits, rows, outputs)
        out = torch.empty(shape, dtype=weight.dtype if splits == 1 else torch.float32, device=x.device)
        _product[(triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n), splits)](
            x, x_scales, weight.values, weight.scales, bias, out, rows, steps_per_split,
            N=outputs, K=inputs, KIND=weight.kind, GROUP=INT4_GROUP, BIAS=bias is not None, PARTIAL=splits > 1,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=8 if block_m == 128 else 4, num_stages=3,
        )  # fmt: skip
        return out if splits == 1 else out.sum(0).to(weight.dtype)

    def weight_rows(self, packed: Tensor | QuantizedWeight, indices: Tensor) -> Tensor:
        """See ``reference.weight_rows``; rows of a quantised weight as its products see them."""
        if isinstance(packed, QuantizedWeight):
            return dequantize(packed, indices)
        return self._base.weight_rows(packed, indices)


def _quantized(x: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """x [T, n] with a scale per row: values of ``dtype`` and float32 [T]."""
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _quantize_rows[(x.shape[0],)](
        x, values, scales, largest, N=x.shape[1], WHOLE=dtype == torch.int8, BLOCK=triton.next_power_of_2(x.shape[1])
    )
    return values, scales
