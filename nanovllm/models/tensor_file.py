"""Files of tensors, in the safetensors format (``model_files.read_tensor_header``).

A tensor is read straight into the memory where it is to stay. Nothing is mapped: pages of a mapped file count as memory
of the process, and cost a fault each.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.errors import ModelError
from nanovllm.model_files import read_tensor_header

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class TensorFile:
    """An open file of tensors. Threads may read from it at the same time.

    Attributes:
        path: the file.
        tensors: what it holds, by name.

    Raises:
        ModelError: the file is damaged or incomplete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = read_tensor_header(path)
        for name, tensor in self.tensors.items():
            size = tensor.end - tensor.start
            if tensor.dtype in _DTYPES and size != math.prod(tensor.shape) * _DTYPES[tensor.dtype].itemsize:
                raise ModelError(f"{path} is damaged: {name} should not have {size} bytes; download it again")
        self._descriptor = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor; ModelError if there is no such dtype in torch."""
        stored = self.tensors[name].dtype
        if stored not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ModelError(f"{name} in {self.path} is stored as {stored}; weights can be {known}")
        return _DTYPES[stored]

    def read(self, name: str, first: int, target: Tensor) -> None:
        """Fill ``target`` (contiguous, in memory of the host, of the tensor's dtype) with the tensor's elements from
        number ``first`` on."""
        if target.numel():
            memory = memoryview(target.view(-1).view(torch.uint8).numpy())
            position = self.tensors[name].start + first * target.itemsize
            while memory:
                count = os.preadv(self._descriptor, [memory], position)
                if not count:
                    raise ModelError(f"{self.path} is incomplete: it ends at byte {position}; download it again")
                memory, position = memory[count:], position + count
