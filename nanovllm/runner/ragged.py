"""Index arithmetic on rows of different lengths, without a Python loop over tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from nanovllm.ops.transfer import to_device

__all__ = ["Array", "ragged_ranges", "to_device"]

Array = np.ndarray[Any, Any]


def ragged_ranges(starts: Array, lengths: Array) -> Array:
    """``concatenate([arange(s, s + n) for s, n in zip(starts, lengths)])`` as int64 [sum(lengths)]."""
    total = int(lengths.sum())
    # Within row i the running index is too large by where the row begins and too small by its start.
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.arange(total, dtype=np.int64) + np.repeat(shift, lengths)
