"""Longer queries through torch's own flash attention (``torch.nn.attention.varlen``); decodes stay with Triton."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.errors import ParameterError
from nanovllm.ops.cuda.attention import Layer, LongPlan, TritonAttention

_PAGE = 256  # flash attention reads a paged cache whose blocks are multiples of this


class VarlenAttention(TritonAttention):
    """As `TritonAttention`, but rows with several new tokens go to ``varlen_attn``.

    It reads the cache itself where torch can pass it a block table and blocks have 256 tokens; else keys and values are
    first gathered into one piece. What flash attention does not cover (float32, another dtype in the cache) stays with
    Triton.

    Raises:
        ParameterError: this torch has no ``varlen_attn`` with a sliding window and a scale.
    """

    def __init__(self, multiprocessors: int, shared_memory: int) -> None:
        super().__init__(multiprocessors, shared_memory)
        self._varlen, parameters = _varlen_attn()
        if not {"window_size", "scale"} <= parameters:
            raise ParameterError(
                f"torch {torch.__version__} has no varlen_attn with window_size and scale; use 'triton'",
                "attention_backend",
                "torch_varlen",
            )
        self._reads_pages = {"block_table", "seqused_k"} <= parameters
        self._options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters else {}

    def long(self, layer: Layer, plan: LongPlan) -> None:
        """See `TritonAttention.long`."""
        if not layer.is_flash:
            super().long(layer, plan)
            return
        first, k_cache = plan.first_row, layer.k_cache
        shared = {
            "max_q": plan.max_query_len,
            "max_k": plan.max_seq_len,
            "scale": layer.scale,
            "window_size": layer.reach,
            **self._options,
        }
        queries = layer.q[first:]
        if self._reads_pages and k_cache.shape[1] % _PAGE == 0:
            paged = {"seqused_k": plan.seq_lens[first:], "block_table": layer.table[first:]}
            out = self._varlen(queries, k_cache, layer.v_cache, plan.starts, None, **shared, **paged)
        else:
            out = self._varlen(queries, *layer.gather(plan), plan.starts, plan.key_starts, **shared)
        layer.out[first:] = out


def _varlen_attn() -> tuple[Callable[..., Tensor], set[str]]:
    """torch's function, and the names of its parameters; none of them where torch has no such function."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return lambda *_, **__: torch.empty(0), set()
    return varlen_attn, set(inspect.signature(varlen_attn).parameters)
