"""Stand-ins for libraries of attention that need a GPU: their signatures, what they demand, and what they compute.

The signatures are those of flash-attn 2.8 (``flash_attn``), of its version 3 (``flash_attn_interface``), and of
FlashInfer 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def attend(
    q: Tensor, rows: Sequence[tuple[Tensor, Tensor]], starts: Sequence[int], scale: float, window: tuple[int, int]
) -> Tensor:
    """Causal attention aligned to the end, one query at a time: row i's queries begin at ``starts[i]`` of q [T, H, D]
    and see keys and values ``rows[i]``, [n, Hk, D] each."""
    assert window[1] in (0, -1)
    out = torch.zeros_like(q)
    for row, (k, v) in enumerate(rows):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1).double() for x in (k, v))
        first, end = int(starts[row]), int(starts[row + 1])
        for i in range(first, end):
            last = len(k) - (end - i)
            begin = max(0, last - window[0]) if window[0] >= 0 else 0
            p = (torch.einsum("hd,khd->hk", q[i].double(), k[begin : last + 1]) * scale).softmax(-1)
            out[i] = torch.einsum("hk,khd->hd", p, v[begin : last + 1])
    return out


def from_pages(k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every row of a paged cache."""
    assert table.dtype == lengths.dtype == torch.int32 and table.stride(-1) == 1
    return [
        (k[pages.long()].flatten(0, 1)[:n], v[pages.long()].flatten(0, 1)[:n])
        for pages, n in zip(table, lengths.tolist(), strict=True)
    ]


def _check(q: Tensor, k: Tensor, v: Tensor, *offsets: Tensor | None) -> None:
    assert q.dtype in HALF and k.dtype == v.dtype == q.dtype
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for offset in offsets:
        assert offset is None or (offset.dtype == torch.int32 and offset.is_contiguous())


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """torch's own (``torch.nn.attention.varlen``)."""
    assert enable_gqa and window_size[1] == 0
    if block_table is None:
        assert cu_seq_k is not None
        rows = [(key[a:b], value[a:b]) for a, b in pairwise(cu_seq_k.tolist())]
    else:
        assert seqused_k is not None
        rows = from_pages(key, value, block_table, seqused_k)
    assert int(cu_seq_q.diff().max()) == max_q and max(len(k) for k, _ in rows) == max_k
    return attend(query, rows, cu_seq_q.tolist(), scale, window_size)


# ---- flash-attn 2 ---------------------------------------------------------------------------------------------------


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    assert causal and softmax_scale is not None and not dropout_p and not softcap
    lengths = cu_seqlens_k.diff().int()
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q and int(lengths.max()) == max_seqlen_k
    if block_table is None:
        ends = cu_seqlens_k.tolist()
        assert ends[-1] == len(k)
        rows = [(k[a:b], v[a:b]) for a, b in pairwise(ends)]
    else:
        assert k.shape[1] % 256 == 0
        rows = from_pages(k, v, block_table, lengths)
    return attend(q, rows, cu_seqlens_q.tolist(), softmax_scale, window_size)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    _check(q, k_cache, v_cache, cache_seqlens)
    assert causal and softmax_scale is not None and cache_seqlens is not None and block_table is not None
    assert q.dim() == 4 and k_cache.shape[1] % 256 == 0
    rows = from_pages(k_cache, v_cache, block_table, cache_seqlens)
    starts = range(0, (len(q) + 1) * q.shape[1], q.shape[1])
    return attend(q.flatten(0, 1), rows, starts, softmax_scale, window_size).view_as(q)


# ---- flash-attn 3 ---------------------------------------------------------------------------------------------------


def flash_attn_3_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    _check(q, k_cache, v_cache, cache_seqlens, cu_seqlens_q)
    assert causal and softmax_scale is not None and cache_seqlens is not None and page_table is not None
    rows = from_pages(k_cache, v_cache, page_table, cache_seqlens)
    if cu_seqlens_q is None:
        assert q.dim() == 4
        starts: list[int] = list(range(0, (len(q) + 1) * q.shape[1], q.shape[1]))
    else:
        assert q.dim() == 3 and max_seqlen_q == int(cu_seqlens_q.diff().max())
        starts = cu_seqlens_q.tolist()
    return attend(q.flatten(0, -3), rows, starts, softmax_scale, window_size).view_as(q)


FLASH_ATTN_2 = SimpleNamespace(
    flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=flash_attn_with_kvcache
)
FLASH_ATTN_3 = SimpleNamespace(
    flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=flash_attn_3_with_kvcache
)


# ---- FlashInfer -----------------------------------------------------------------------------------------------------


class BatchPrefillWithPagedKVCacheWrapper:
    plans = 0  # of all wrappers

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
    ) -> None:
        type(self).plans += 1
        for tensor in (qo_indptr, paged_kv_indptr, paged_kv_last_page_len):
            assert tensor.dtype == torch.int32 and tensor.device.type == "cpu"  # else it waits for the device
        assert paged_kv_indices.dtype == torch.int32 and len(paged_kv_indices) == paged_kv_indptr[-1]
        assert causal and sm_scale is not None
        pages = paged_kv_indptr.diff()
        assert ((paged_kv_last_page_len > 0) & (paged_kv_last_page_len <= page_size)).all()
        self.shape = num_qo_heads, num_kv_heads, head_dim_qk, page_size, q_data_type, kv_data_type
        self.starts, self.scale, self.window = qo_indptr.tolist(), sm_scale, window_left
        self.pages = paged_kv_indices.split(pages.tolist())
        self.lengths = ((pages - 1) * page_size + paged_kv_last_page_len).tolist()

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        k, v = paged_kv_cache
        _check(q, k, v)
        assert self.shape == (q.shape[1], k.shape[2], q.shape[2], k.shape[1], q.dtype, k.dtype)
        rows = [
            (k[pages.long()].flatten(0, 1)[:n], v[pages.long()].flatten(0, 1)[:n])
            for pages, n in zip(self.pages, self.lengths, strict=True)
        ]
        return attend(q, rows, self.starts, self.scale, (self.window, 0))


FLASHINFER = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper)
