"""Products with weights in 8 bits (WeightQuantBatchMatmul), on Atlas A2, A3 and on the 310P.

A weight is an integer times its output's scale, and is read so in every step; activations stay as they are. Matrices
with more rows or columns than the operator takes, which of most models is the output head, stay in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanovllm.errors import ParameterError
from nanovllm.ops.operators import Operators

QUANTIZATIONS = ("int8",)
_LONGEST = 65535  # rows or columns of a matrix
_LARGEST = 127.0


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight [outputs, inputs] = ``values`` int8 times ``scales`` [outputs], which have the model's dtype."""

    values: Tensor
    scales: Tensor


class NpuLinear:
    """The operators ``pack_linear``, ``linear`` and ``weight_rows`` of weights that are rounded to 8 bits.

    Args:
        library: ``npu_ops``, or what stands for it where there is no NPU.

    Raises:
        ParameterError: a quantization that is none of ``QUANTIZATIONS``.
    """

    def __init__(self, base: Operators, library: Any, quantization: str) -> None:
        if quantization not in QUANTIZATIONS:
            raise ParameterError(f"choose one of {', '.join(QUANTIZATIONS)}", "quantization", quantization)
        self._base, self._library = base, library

    def operators(self) -> Operators:
        """``base`` with these."""
        return replace(self._base, pack_linear=self.pack_linear, linear=self.linear, weight_rows=self.weight_rows)

    def pack_linear(self, weight: Tensor) -> Tensor | Int8Weight:
        """Round to the nearest of 255 numbers of each output; the largest becomes 127.

        The scale is rounded first and the numbers by what it is then: so no error of it is left in them.

        Raises:
            ParameterError: a float32 model, which the operator does not multiply.
        """
        if weight.dtype == torch.float32:
            raise ParameterError(
                "an NPU multiplies 8-bit weights by 16-bit numbers; use float16, or bfloat16 where there is", "dtype",
                "float32",
            )  # fmt: skip
        if max(weight.shape) > _LONGEST:
            return self._base.pack_linear(weight)
        wide = weight.float()
        scales = (wide.abs().amax(1, keepdim=True) / _LARGEST).to(weight.dtype)
        steps = torch.where(scales == 0, 1.0, scales.float())
        values = (wide / steps).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
        return Int8Weight(values, scales.squeeze(1))

    def linear(self, x: Tensor, packed: Tensor | Int8Weight, bias: Tensor | None) -> Tensor:
        """See ``reference.linear``."""
        if not isinstance(packed, Int8Weight):
            return self._base.linear(x, packed, bias)
        if not x.numel():
            return x.new_empty(x.shape[0], len(packed.scales))
        out = self._library.int8_linear(x, packed.values, packed.scales)
        return out if bias is None else out.add_(bias)

    def weight_rows(self, packed: Tensor | Int8Weight, indices: Tensor) -> Tensor:
        """See ``reference.weight_rows``."""
        if not isinstance(packed, Int8Weight):
            return self._base.weight_rows(packed, indices)
        rows, scales = packed.values.index_select(0, indices), packed.scales.index_select(0, indices)
        return rows.to(scales.dtype) * scales.unsqueeze(1)
