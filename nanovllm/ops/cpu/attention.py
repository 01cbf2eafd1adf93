"""Paged attention on the C++ kernel (csrc/attention.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.ops.cpu.library import DTYPES, AttentionArguments, Batch, Library
from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.operators import Operators


@dataclass(slots=True)
class Step:
    """What the layers of a step share: the requests' lengths and blocks as arrays, and where the kernel finds them."""

    query_start: Tensor  # int32 [B + 1]
    seq_lens: Tensor  # int32 [B]
    block_table: Tensor  # int32 [B, width], rows contiguous
    batch: Batch

    @classmethod
    def of(cls, meta: AttentionMetadata) -> Step:
        query_start = torch.tensor(meta.query_start_loc, dtype=torch.int32)
        seq_lens = torch.tensor(meta.seq_lens, dtype=torch.int32)
        table = meta.block_table
        if table.dtype != torch.int32 or table.stride(-1) != 1:
            table = table.to(torch.int32).contiguous()
        batch = Batch(
            query_start.data_ptr(), seq_lens.data_ptr(), table.data_ptr(), table.stride(0), len(meta.seq_lens)
        )
        return cls(query_start, seq_lens, table, batch)


class CpuAttention:
    """The operators ``prepare_attention`` and ``paged_attention``."""

    def __init__(self, library: Library, base: Operators) -> None:
        self._library = library
        self._base = base

    def prepare_attention(self, meta: AttentionMetadata, windows: Sequence[int | None], dtype: torch.dtype) -> None:
        """See ``reference.prepare_attention``."""
        if dtype in DTYPES:
            meta.backend = Step.of(meta)
        else:
            self._base.prepare_attention(meta, windows, dtype)

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float, window: int | None
    ) -> Tensor:
        """See ``reference.paged_attention``."""
        step = meta.backend
        if not isinstance(step, Step):
            return self._base.paged_attention(q, k_cache, v_cache, meta, scale, window)
        tokens, heads, head_dim = q.shape
        strides = k_cache.stride()
        if not (
            q.dtype == k_cache.dtype == v_cache.dtype
            and strides == v_cache.stride()
            and q.stride(2) == strides[3] == 1
            and q.stride(1) == head_dim
            and head_dim % 2 == 0
        ):
            raise ValueError("the attention kernel needs q and the caches in one dtype, heads contiguous")
        out = torch.empty(q.shape, dtype=q.dtype)
        call = AttentionArguments(
            rows=tokens,
            q=q.data_ptr(),
            out=out.data_ptr(),
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            batch=ctypes.addressof(step.batch),
            q_stride=q.stride(0),
            block_stride=strides[0],
            token_stride=strides[1],
            head_stride=strides[2],
            block_size=meta.block_size,
            heads=heads,
            kv_heads=k_cache.shape[2],
            head_dim=head_dim,
            window=window or 0,
            scale=scale,
            dtype=DTYPES[q.dtype],
        )
        self._library.call(self._library.paged_attention, call)
        return out
