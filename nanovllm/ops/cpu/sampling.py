"""Choosing tokens, and penalties, on the C++ kernels (csrc/sampling.cpp, penalties.cpp)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanovllm.ops.cpu.library import ChooseArguments, Library, PenaltyArguments
from nanovllm.ops.operators import Array


class Sampling:
    """The operators ``choose`` and ``penalise``. Logits are float32 [S, V], contiguous."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def choose(
        self,
        logits: Tensor,
        temperature: Array,
        top_k: Array,
        top_p: Array,
        min_p: Array,
        seeds: Array,
        positions: Array,
    ) -> Tensor:
        """A column of every row: int64 [S]; see ``Operators.choose``. The logits stay as they are.

        A row with NaN or +inf gives a column that holds one, a row of -inf its first.
        """
        _check(logits)
        rows, columns = logits.shape
        tokens = torch.empty(rows, dtype=torch.int64)
        floats = [_as(array, np.float32) for array in (temperature, top_p, min_p)]
        integers = [_as(array, np.int64) for array in (top_k, positions)]
        seeds = _as(seeds, np.uint64)
        self._library.choose(
            ChooseArguments(
                rows=rows,
                logits=logits.data_ptr(),
                temperature=floats[0].ctypes.data,
                top_k=integers[0].ctypes.data,
                top_p=floats[1].ctypes.data,
                min_p=floats[2].ctypes.data,
                seeds=seeds.ctypes.data,
                positions=integers[1].ctypes.data,
                tokens=tokens.data_ptr(),
                columns=columns,
            )
        )
        return tokens

    def penalise(
        self,
        logits: Tensor,
        tokens: Tensor,
        which: Array,
        rows: Array,
        positions: Array,
        num_prompt: Array,
        repetition: Array,
        frequency: Array,
        presence: Array,
    ) -> None:
        """Penalise in place, to the same bits as runner/logit_rules.py; see ``Operators.penalise``."""
        _check(logits)
        if tokens.dtype != torch.int32 or tokens.stride(1) != 1:
            raise ValueError("the penalty kernel needs a token table of int32, its rows contiguous")
        integers = [_as(array, np.int64) for array in (which, rows, positions, num_prompt)]
        floats = [_as(array, np.float32) for array in (repetition, frequency, presence)]
        self._library.penalise(
            PenaltyArguments(
                rows=len(which),
                logits=logits.data_ptr(),
                tokens=tokens.data_ptr(),
                logit_rows=integers[0].ctypes.data,
                table_rows=integers[1].ctypes.data,
                lengths=integers[2].ctypes.data,
                num_prompt=integers[3].ctypes.data,
                repetition=floats[0].ctypes.data,
                frequency=floats[1].ctypes.data,
                presence=floats[2].ctypes.data,
                columns=logits.shape[1],
                token_stride=tokens.stride(0),
            )
        )


def _check(logits: Tensor) -> None:
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError("the sampling kernels need contiguous logits of float32")


def _as(array: Array, dtype: type) -> Array:
    return np.ascontiguousarray(array, dtype)
