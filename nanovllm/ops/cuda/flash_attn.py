"""Attention through flash-attn, where it is installed: its version 2, or the one for Hopper (version 3)."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType

from nanovllm.errors import ParameterError
from nanovllm.ops.cuda.attention import DecodePlan, Layer, LongPlan, TritonAttention

_PAGE = 256  # version 2 reads a paged cache whose blocks are multiples of this


class FlashAttention(TritonAttention):
    """As `TritonAttention`, but what flash-attn covers goes there.

    Version 3 reads a cache of any blocks. Version 2 needs blocks of 256 tokens; with others, keys and values of rows
    with several new tokens are first gathered into one piece, and decodes stay with Triton.

    Raises:
        ParameterError: flash-attn is not installed, or cannot be loaded.
    """

    def __init__(self, multiprocessors: int, shared_memory: int, capability: tuple[int, int]) -> None:
        super().__init__(multiprocessors, shared_memory)
        library = _load(capability)
        if library is None:
            raise ParameterError(
                "flash-attn is not installed, or not for this torch and GPU; install it, or use 'triton'",
                "attention_backend",
                "flash_attn",
            )
        self._with_cache, self._varlen = library.flash_attn_with_kvcache, library.flash_attn_varlen_func
        self._any_blocks = "page_table" in inspect.signature(self._with_cache).parameters  # version 3

    def decode(self, layer: Layer, plan: DecodePlan) -> None:
        """See `TritonAttention.decode`."""
        if not layer.is_flash or not self._reads(layer):
            super().decode(layer, plan)
            return
        rows = plan.seq_lens.shape[0]
        out = self._with_cache(
            layer.q[:rows, None],  # one query each
            layer.k_cache,
            layer.v_cache,
            cache_seqlens=plan.seq_lens,
            softmax_scale=layer.scale,
            causal=True,
            window_size=layer.reach,
            **{"page_table" if self._any_blocks else "block_table": layer.table[:rows]},
        )
        layer.out[:rows] = out[:, 0]

    def long(self, layer: Layer, plan: LongPlan) -> None:
        """See `TritonAttention.long`."""
        if not layer.is_flash:
            super().long(layer, plan)
            return
        first = plan.first_row
        queries, table, most = layer.q[first:], layer.table[first:], (plan.max_query_len, plan.max_seq_len)
        options = {"softmax_scale": layer.scale, "causal": True, "window_size": layer.reach}
        if self._any_blocks:
            layer.out[first:] = self._with_cache(
                queries,
                layer.k_cache,
                layer.v_cache,
                cache_seqlens=plan.seq_lens[first:],
                page_table=table,
                cu_seqlens_q=plan.starts,
                max_seqlen_q=most[0],
                **options,
            )
        elif self._reads(layer):
            caches = layer.k_cache, layer.v_cache
            layer.out[first:] = self._varlen(
                queries, *caches, plan.starts, plan.key_starts, *most, block_table=table, **options
            )
        else:
            layer.out[first:] = self._varlen(
                queries, *layer.gather(plan), plan.starts, plan.key_starts, *most, **options
            )

    def _reads(self, layer: Layer) -> bool:
        """Whether it reads blocks of the cache's size."""
        return self._any_blocks or layer.k_cache.shape[1] % _PAGE == 0


def _load(capability: tuple[int, int]) -> ModuleType | None:
    """The library for this GPU; None without one."""
    for name in ("flash_attn_interface", "flash_attn") if capability[0] == 9 else ("flash_attn",):
        try:
            return import_module(name)
        except (ImportError, OSError):  # not there, or built for another torch
            continue
    return None
