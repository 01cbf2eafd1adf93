"""Paged attention on the C++ kernel (csrc/attention.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanovllm.ops.cpu.library import DTYPES, AttentionArguments, Library
from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.operators import Operators


@dataclass(slots=True)
class Step:
    """What the layers of a step share: the batch's lengths as arrays, and a filled-in call for each kind of layer."""

    query_start: Tensor  # int32 [B + 1]
    seq_lens: Tensor  # int32 [B]
    block_table: Tensor  # int32 [B, width], rows contiguous
    calls: dict[Any, AttentionArguments] = field(default_factory=dict)


class CpuAttention:
    """The operators ``prepare_attention`` and ``paged_attention``."""

    def __init__(self, library: Library, base: Operators) -> None:
        self._library = library
        self._run = library.paged_attention
        self._base = base

    def prepare_attention(self, meta: AttentionMetadata, windows: Sequence[int | None], dtype: torch.dtype) -> None:
        """See ``reference.prepare_attention``."""
        if dtype not in DTYPES:
            self._base.prepare_attention(meta, windows, dtype)
            return
        self._library.set_threads(torch.get_num_threads())  # for all kernels of the step
        table = meta.block_table
        if table.dtype != torch.int32 or table.stride(-1) != 1:
            table = table.to(torch.int32).contiguous()
        meta.backend = Step(
            torch.tensor(meta.query_start_loc, dtype=torch.int32), torch.tensor(meta.seq_lens, dtype=torch.int32), table
        )

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float, window: int | None
    ) -> Tensor:
        """See ``reference.paged_attention``."""
        step = meta.backend
        if not isinstance(step, Step):
            return self._base.paged_attention(q, k_cache, v_cache, meta, scale, window)
        kind = (q.shape, q.stride(), k_cache.stride(), scale, window)
        call = step.calls.get(kind)
        if call is None:
            call = step.calls[kind] = self._describe(step, q, k_cache, v_cache, meta, scale, window)
        out = torch.empty(q.shape, dtype=q.dtype)
        call.q, call.out = q.data_ptr(), out.data_ptr()
        call.k_cache, call.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
        self._run(call)
        return out

    def _describe(
        self,
        step: Step,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        window: int | None,
    ) -> AttentionArguments:
        """The arguments of a call, all but the addresses of its tensors."""
        _, heads, head_dim = q.shape
        if not (
            q.dtype == k_cache.dtype == v_cache.dtype
            and k_cache.stride() == v_cache.stride()
            and q.stride(2) == k_cache.stride(3) == 1
            and q.stride(1) == head_dim
            and head_dim % 2 == 0
        ):
            raise ValueError("the attention kernel needs q and the caches in one dtype, heads contiguous")
        block_stride, token_stride, head_stride, _ = k_cache.stride()
        return AttentionArguments(
            query_start=step.query_start.data_ptr(),
            seq_lens=step.seq_lens.data_ptr(),
            block_table=step.block_table.data_ptr(),
            q_stride=q.stride(0),
            block_stride=block_stride,
            token_stride=token_stride,
            head_stride=head_stride,
            table_stride=step.block_table.stride(0),
            rows=len(meta.seq_lens),
            block_size=meta.block_size,
            heads=heads,
            kv_heads=k_cache.shape[2],
            head_dim=head_dim,
            window=window or 0,
            scale=scale,
            dtype=DTYPES[q.dtype],
        )
