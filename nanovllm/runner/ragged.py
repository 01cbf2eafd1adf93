"""Index arithmetic on rows of different lengths, without a Python loop over tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def ragged_ranges(starts: Array, lengths: Array) -> Array:
    """``concatenate([arange(s, s + n) for s, n in zip(starts, lengths)])`` as int64 [sum(lengths)]."""
    total = int(lengths.sum())
    # Within row i the running index is too large by where the row begins and too small by its start.
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.arange(total, dtype=np.int64) + np.repeat(shift, lengths)


def to_device(array: Array, device: torch.device) -> Tensor:
    """The array as a tensor on ``device``; on the CPU it shares the array's memory."""
    return torch.from_numpy(array).to(device, non_blocking=True)
