"""What tests on the emulated Ascend import: torch_npu, if this process is on it, and helpers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

torch_npu: Any = None
if os.environ.get("NANOVLLM_NPU_EMULATED") == "1":
    import torch_npu  # noqa: F401

DEVICE = "npu:0"


def npu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the emulated device."""
    return tensor.to(DEVICE)


@contextlib.contextmanager
def refused(pattern: str) -> Iterator[None]:
    """The block must raise an error of the emulated device that matches."""
    with pytest.raises(RuntimeError, match=rf"(?s)\[emulated Ascend\].*{pattern}"):
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers on the CPU, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
