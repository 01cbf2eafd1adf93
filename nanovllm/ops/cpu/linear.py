"""Linear layers on weights packed, and possibly quantised, for the C++ kernels (csrc/linear.cpp, quantized.cpp)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.errors import ParameterError
from nanovllm.ops.cpu.library import (
    DTYPES,
    GatherArguments,
    Kernel,
    Library,
    LinearArguments,
    QuantizedArguments,
    QuantizedWeight,
)
from nanovllm.ops.cpu.memory import Arena
from nanovllm.ops.operators import Operators


@dataclass(frozen=True)
class Quantization:
    """How weights are quantised when they are packed.

    Attributes:
        bits: of a weight, 8 or 4.
        group: inputs that share a scale; None: all of them.
        digits: 8-bit digits an activation is rounded to: two hold more than bfloat16 does. 0: it is not rounded.
    """

    bits: int
    group: int | None
    digits: int


QUANTIZATIONS = {
    "int8": Quantization(8, None, 2),
    "int4": Quantization(4, 64, 0),
    "w8a8": Quantization(8, None, 1),
}


@dataclass(slots=True)
class PackedWeight:
    """A weight in a kernel's own layout, and a call that lacks only the tensors: of its product, and of its rows."""

    memory: tuple[Tensor, ...]
    outputs: int
    inputs: int
    dtype: torch.dtype
    call: LinearArguments | QuantizedArguments
    product: Kernel
    rows: Kernel


class CpuLinear:
    """The operators ``allocate_matrix``, ``pack_linear``, ``linear`` and ``weight_rows``.

    ``quantization`` is a name of ``QUANTIZATIONS`` or None.
    """

    def __init__(self, library: Library, base: Operators, quantization: str | None = None) -> None:
        if quantization is not None and quantization not in QUANTIZATIONS:
            raise ParameterError(f"choose one of {', '.join(QUANTIZATIONS)}", "quantization", quantization)
        self._library = library
        self._base = base
        self._arena = Arena()
        self._own: dict[int, Tensor] = {}  # memory of matrices that can be packed where they lie, by address
        self._gather = GatherArguments()
        self._quantization = None if quantization is None else QUANTIZATIONS[quantization]

    def allocate_matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory for a weight. If packing needs no more than that, ``pack_linear`` will do it there, without a copy."""
        size = rows * columns * dtype.itemsize
        if self._quantization is not None or not self._is_packable(dtype, columns):
            return torch.empty((rows, columns), dtype=dtype)
        if not size or self._library.packed_bytes(rows, columns, DTYPES[dtype]) != size:
            return torch.empty((rows, columns), dtype=dtype)
        memory = self._arena.allocate(size)
        self._own[memory.data_ptr()] = memory
        return memory.view(dtype).view(rows, columns)

    @staticmethod
    def _is_packable(dtype: torch.dtype, inputs: int) -> bool:
        """Whether there is a kernel for weights that are not quantised."""
        return dtype == torch.float32 or (dtype == torch.bfloat16 and inputs % 2 == 0)

    def pack_linear(self, weight: Tensor) -> PackedWeight | Tensor:
        """``weight`` [out, in] packed: a copy, or in the memory ``allocate_matrix`` gave it, which then is spent.

        What the kernels cannot take goes to the base operators.
        """
        outputs, inputs = weight.shape
        if weight.dtype not in DTYPES or weight.stride(1) != 1 or inputs == 0:
            return self._base.pack_linear(weight)
        quantization = self._quantization
        if quantization is not None and inputs % (quantization.group or 16) == 0:
            return self._quantize(weight, quantization)
        if not self._is_packable(weight.dtype, inputs):
            return self._base.pack_linear(weight)
        if weight.dtype == torch.bfloat16 and (weight.stride(0) % 2 or weight.data_ptr() % 4):
            return self._base.pack_linear(weight)
        dtype = DTYPES[weight.dtype]
        library = self._library
        memory = self._own.pop(weight.data_ptr(), None)
        if memory is None:
            memory = self._arena.allocate(library.packed_bytes(outputs, inputs, dtype))
        library.pack_linear(weight.data_ptr(), outputs, inputs, weight.stride(0), memory.data_ptr(), dtype)
        call = LinearArguments(packed=memory.data_ptr(), inputs=inputs, outputs=outputs, dtype=dtype)
        return PackedWeight((memory,), outputs, inputs, weight.dtype, call, library.linear, library.unpack_rows)

    def _quantize(self, weight: Tensor, quantization: Quantization) -> PackedWeight:
        outputs, inputs = weight.shape
        group, bits = quantization.group or inputs, quantization.bits
        library = self._library
        memory = self._arena.allocate(library.quantized_bytes(outputs, inputs, bits))
        scales = self._arena.allocate(2 * library.scale_count(outputs, inputs, group))
        packed = QuantizedWeight(memory.data_ptr(), scales.data_ptr(), outputs, inputs, group, bits)
        dtype = DTYPES[weight.dtype]
        library.quantize(packed, weight.data_ptr(), weight.stride(0), dtype)
        call = QuantizedArguments(weight=packed, digits=quantization.digits, dtype=dtype)
        memories = (memory, scales)
        return PackedWeight(
            memories, outputs, inputs, weight.dtype, call, library.quantized_linear, library.dequantize_rows
        )

    def linear(self, x: Tensor, packed: PackedWeight | Tensor, bias: Tensor | None) -> Tensor:
        """See ``reference.linear``; a row of the result has the same bits whatever the other rows of x are."""
        if not isinstance(packed, PackedWeight):
            return self._base.linear(x, packed, bias)
        if not x.is_contiguous() or x.data_ptr() % 4:
            x = x.clone(memory_format=torch.contiguous_format)
        rows = x.shape[0]
        out = torch.empty((rows, packed.outputs), dtype=packed.dtype)
        call = packed.call
        call.x, call.out, call.rows = x.data_ptr(), out.data_ptr(), rows
        call.bias = None if bias is None else bias.data_ptr()
        self._library.call(packed.product, call)
        return out

    def rows(self, packed: PackedWeight | Tensor, indices: Tensor) -> Tensor:
        """Rows ``indices`` (int64 [T]) of a packed weight: [T, in]. So an embedding can share its output head's memory.

        Exactly the rows that were packed; those of a quantised weight as its products see them, rounded to the dtype.
        """
        indices = indices.contiguous()
        if not isinstance(packed, PackedWeight):
            return self._gather_rows(packed, indices)
        out = torch.empty((indices.shape[0], packed.inputs), dtype=packed.dtype)
        call = packed.call
        call.x, call.out, call.rows = indices.data_ptr(), out.data_ptr(), indices.shape[0]
        self._library.call(packed.rows, call)
        return out

    def _gather_rows(self, weight: Tensor, indices: Tensor) -> Tensor:
        if not weight.is_contiguous():
            return self._base.weight_rows(weight, indices)
        out = torch.empty((indices.shape[0], weight.shape[1]), dtype=weight.dtype)
        call = self._gather
        call.indices, call.source, call.out = indices.data_ptr(), weight.data_ptr(), out.data_ptr()
        call.rows, call.row_bytes = indices.shape[0], weight.shape[1] * weight.itemsize
        self._library.call(self._library.gather_rows, call)
        return out
