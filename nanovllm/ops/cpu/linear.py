"""Linear layers on weights packed for the C++ kernel (csrc/linear.cpp)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.ops.cpu.library import DTYPES, Library, LinearArguments
from nanovllm.ops.operators import Operators


@dataclass(slots=True)
class PackedWeight:
    """A weight in the kernel's own layout, and a call that lacks only the tensors."""

    data: Tensor  # uint8
    outputs: int
    inputs: int
    dtype: torch.dtype
    call: LinearArguments


class CpuLinear:
    """The operators ``pack_linear`` and ``linear``."""

    def __init__(self, library: Library, base: Operators) -> None:
        self._library = library
        self._run = library.linear
        self._base = base

    def pack_linear(self, weight: Tensor) -> PackedWeight | Tensor:
        """A packed copy of ``weight`` [out, in]; number formats the kernel lacks go to the base operators."""
        if weight.dtype not in (torch.float32, torch.bfloat16) or weight.stride(1) != 1:
            return self._base.pack_linear(weight)
        outputs, inputs = weight.shape
        if weight.dtype == torch.bfloat16 and (inputs % 2 or weight.stride(0) % 2 or weight.data_ptr() % 4):
            return self._base.pack_linear(weight)
        dtype = DTYPES[weight.dtype]
        data = torch.empty(self._library.packed_bytes(outputs, inputs, dtype), dtype=torch.uint8)
        self._library.pack_linear(weight.data_ptr(), outputs, inputs, weight.stride(0), data.data_ptr(), dtype)
        call = LinearArguments(packed=data.data_ptr(), inputs=inputs, outputs=outputs, dtype=dtype)
        return PackedWeight(data, outputs, inputs, weight.dtype, call)

    def linear(self, x: Tensor, packed: PackedWeight | Tensor, bias: Tensor | None) -> Tensor:
        """See ``reference.linear``; a row of the result does not depend on the other rows of x."""
        if not isinstance(packed, PackedWeight):
            return self._base.linear(x, packed, bias)
        rows, inputs = x.shape
        if not x.is_contiguous() or x.data_ptr() % 4:
            x = x.clone(memory_format=torch.contiguous_format)
        out = torch.empty((rows, packed.outputs), dtype=packed.dtype)
        call = packed.call
        call.x, call.out, call.rows, call.x_stride = x.data_ptr(), out.data_ptr(), rows, inputs
        call.bias = None if bias is None else bias.data_ptr()
        self._run(call)
        return out
