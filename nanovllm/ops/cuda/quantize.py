"""Weights as small integers or 8-bit floats: how they are rounded, and how they are read back. Plain torch.

The rounding is that of the CPU's kernels (csrc/quantized.cpp): a weight is q * scale with the scale in bfloat16; 8-bit
weights have one scale per output, 4-bit ones one per 64 inputs, where the largest weight becomes -8, the side with one
more step. ``fp8`` is e4m3 with one scale per output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INT4_GROUP = 64  # inputs of a 4-bit weight that share a scale
FP8_LARGEST = 448.0  # of e4m3
FORMATS = ("int8", "int4", "w8a8", "fp8")


@dataclass(slots=True)
class QuantizedWeight:
    """A weight [outputs, inputs].

    Attributes:
        kind: one of ``FORMATS``.
        values: int8 or float8_e4m3fn [outputs, inputs]; for int4 uint8 [outputs, inputs / 2]: of each group of 64
            inputs, byte j holds input j in its low half and input j + 32 in its high half, both + 8.
        scales: [outputs, groups], bfloat16 (fp8: float32).
        dtype: of the weight before, and of the products.
    """

    kind: str
    values: Tensor
    scales: Tensor
    inputs: int
    dtype: torch.dtype


def quantize(weight: Tensor, kind: str) -> QuantizedWeight:
    """Round ``weight`` [outputs, inputs] to ``kind``; inputs are a multiple of 64 for int4."""
    inputs = weight.shape[1]
    groups = weight.float().unflatten(1, (-1, INT4_GROUP if kind == "int4" else inputs))  # [outputs, groups, size]
    largest = groups.abs().amax(-1, keepdim=True)
    if kind == "fp8":
        scale = (largest / FP8_LARGEST).clamp(min=1e-12)
        values = (groups / scale).flatten(1).to(torch.float8_e4m3fn)
        return QuantizedWeight(kind, values, scale.flatten(1), inputs, weight.dtype)
    if kind == "int4":
        above, below = groups.amax(-1, keepdim=True), -groups.amin(-1, keepdim=True)
        scale = (torch.where(above > below, -above, below) / 8.0).bfloat16()
        low, high = -8, 7
    else:
        scale = (largest / 127.0).bfloat16()
        low, high = -127, 127
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    whole = (groups * inverse).round().clamp(low, high)
    if kind == "int4":
        halves = (whole + 8).to(torch.uint8).unflatten(-1, (2, INT4_GROUP // 2))
        values = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
    else:
        values = whole.flatten(1).to(torch.int8)
    return QuantizedWeight(kind, values, scale.flatten(1), inputs, weight.dtype)


def dequantize(weight: QuantizedWeight, rows: Tensor | None = None) -> Tensor:
    """The weight as its products see it, or some of its rows (int64 [T]), in ``weight.dtype``."""
    values, scales = weight.values, weight.scales
    if rows is not None:  # indexing 8-bit floats is not implemented everywhere: as bytes
        values = values.view(torch.uint8).index_select(0, rows).view(values.dtype)
        scales = scales.index_select(0, rows)
    if weight.kind == "int4":
        halves = values.unflatten(1, (-1, INT4_GROUP // 2))
        whole = torch.stack([halves & 15, halves >> 4], 2).flatten(2).float() - 8.0
    else:
        whole = values.float().unflatten(1, (-1, weight.inputs))
    return (whole * scales.float().unsqueeze(-1)).flatten(1).to(weight.dtype)
