"""Files of tensors in the safetensors format: https://huggingface.co/docs/safetensors.

    8 bytes: length of the header | header: JSON, name -> dtype, shape, where its bytes are | bytes of all tensors

A tensor is read straight into the memory where it is to stay. Nothing is mapped: pages of a mapped file count as memory
of the process, and cost a fault each.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.errors import ModelError

_LARGEST_HEADER = 100_000_000  # as in the library of the format
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes begin in its file, and what they are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


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
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            self.tensors = self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.close()
            size = path.stat().st_size
            raise ModelError(f"{path} is damaged or incomplete ({size} bytes: {error}); download it again") from error

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        begin = 8 + length
        if size < 8 or begin > size or length > _LARGEST_HEADER:
            raise ValueError(f"its header should have {length} bytes")
        found = {}
        for name, entry in json.loads(os.pread(self._descriptor, length, 8)).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), begin + start, begin + end)
            if not 0 <= start <= end <= size - begin:
                raise ValueError(f"{name} should end at byte {begin + end}")
            if tensor.dtype in _DTYPES and end - start != math.prod(tensor.shape) * _DTYPES[tensor.dtype].itemsize:
                raise ValueError(f"{name} should not have {end - start} bytes")
            found[name] = tensor
        return found

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
