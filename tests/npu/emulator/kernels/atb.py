"""Operators of the ATB library (``torch.ops.atb``), which has a C++ interface that cannot be imitated below the wheel.

So these replace the wheel's own implementations in torch's dispatcher. Their work goes through the emulated stream as
everything else does: it is captured, delayed and replayed. Lengths in host memory are read when the operator is called.

The 310P's caches are tiled, [blocks, heads * dim / 16, block_size, 16]; others are [blocks, block_size, heads, dim].
Masks are added to the scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .decode import Tensor, view_of_memory
from .kv_cache import scatter_tokens
from .registry import IS_310P, SOC, plain_torch, require, submit

_library = torch.library.Library("atb", "IMPL")


def _implement(name: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        def checked(*arguments: object, **keywords: object) -> None:
            with plain_torch():
                task = function(*arguments, **keywords)
            submit(torch.npu.current_stream().npu_stream, f"atb::{name}", task)

        _library.impl(name, checked, "PrivateUse1", allow_override=True)
        return function

    return register


def _alias(tensor: Tensor) -> Tensor:
    """A CPU view of a device tensor, or a copy of a host tensor as it is now."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    memory = view_of_memory(tensor.data_ptr(), reach * tensor.element_size())
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _check_tensors(query: Tensor, **others: Tensor) -> None:
    require(query.dtype in (torch.float16, torch.bfloat16), f"query is {query.dtype}; float16 or bfloat16")
    require(not (IS_310P and query.dtype == torch.bfloat16), f"{SOC} has no bfloat16")
    for name, tensor in others.items():
        require(tensor.dtype == query.dtype, f"{name} is {tensor.dtype}, query {query.dtype}")


def _check_cache(cache: Tensor, kv_heads: int, dim: int) -> None:
    shape = tuple(cache.shape)
    require(cache.is_contiguous(), "caches must be contiguous")
    require(cache.dim() == 4, f"a cache must have 4 dimensions, not {shape}")
    if IS_310P:
        fits = shape[3] == 16 and shape[1] * 16 == kv_heads * dim
        require(fits, f"{SOC}: the cache {shape} is not [blocks, {kv_heads} * {dim} / 16, block_size, 16]")
    else:
        require(shape[2:] == (kv_heads, dim), f"the cache {shape} is not [blocks, block_size, {kv_heads}, {dim}]")


def _rows(cache: Tensor, kv_heads: int, table: Tensor, length: int) -> Tensor:
    """The first ``length`` entries of a sequence's blocks: [length, kv_heads, dim]."""
    size = cache.shape[2 if IS_310P else 1]
    blocks = table[: -(-length // size)].long()
    require(len(blocks) * size >= length, f"{length} keys, but the block table has {table.numel()} columns")
    wrong = [int(b) for b in blocks if not 0 <= int(b) < cache.shape[0]]
    require(not wrong, f"MTE DDR address out of range: block {wrong[:1]} of a cache of {cache.shape[0]} blocks")
    found = cache[blocks].transpose(1, 2) if IS_310P else cache[blocks]
    return found.reshape(len(blocks) * size, kv_heads, -1)[:length]


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """query [q, heads, dim], key and value [k, kv_heads, dim], mask [q, k] -> [q, heads, dim]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    if mask is not None:
        scores = scores + mask.float()
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def _flat_mask(mask: Tensor) -> Tensor:
    """A mask [rows, columns], also if it comes tiled as [1, columns / 16, rows, 16]."""
    if mask.dim() == 4 and mask.shape[-1] == 16:
        return mask[0].transpose(0, 1).reshape(mask.shape[2], -1)
    return mask.reshape(mask.shape[-2:])


@_implement("_npu_reshape_and_cache")
def reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> Callable[[], None]:
    """Keys and values [tokens, kv_heads, dim] to their slots."""
    _check_tensors(key, value=value, key_cache=key_cache, value_cache=value_cache)
    require(slot_indices.dtype == torch.int32, f"slot_indices must be int32, not {slot_indices.dtype}")
    require(slot_indices.shape == key.shape[:1], f"{tuple(slot_indices.shape)} slots for {key.shape[0]} tokens")
    for new, cache in ((key, key_cache), (value, value_cache)):
        _check_cache(cache, *new.shape[1:])
    views = [_alias(tensor) for tensor in (key, value, key_cache, value_cache, slot_indices)]

    def task() -> None:
        keys, values, key_into, value_into, slots = views
        scatter_tokens(keys, key_into, slots, IS_310P)
        scatter_tokens(values, value_into, slots, IS_310P)

    return task


@_implement("_npu_paged_attention")
def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, num_kv_heads: int, num_heads: int, scale_value: float,
    block_table: Tensor, context_lens: Tensor, out: Tensor, *, workspace: Tensor | None = None,
) -> Callable[[], None]:  # fmt: skip
    """Decoding: one query [sequences, heads, dim] per sequence over its blocks."""
    _check_tensors(query, key_cache=key_cache, value_cache=value_cache, out=out)
    require(query.dim() == 3 and query.shape[1] == num_heads, f"query {tuple(query.shape)}, {num_heads} heads")
    _check_cache(key_cache, num_kv_heads, query.shape[2])
    _check_cache(value_cache, num_kv_heads, query.shape[2])
    for name, tensor in (("block_table", block_table), ("context_lens", context_lens)):
        require(tensor.dtype == torch.int32, f"{name} must be int32, not {tensor.dtype}")
        require(tensor.shape[0] == query.shape[0], f"{name} {tuple(tensor.shape)} for {query.shape[0]} sequences")
    views = [_alias(tensor) for tensor in (query, key_cache, value_cache, block_table, context_lens, out)]

    def task() -> None:
        queries, keys, values, table, lengths, result = views
        for i, length in enumerate(lengths.tolist()):
            key, value = (_rows(cache, num_kv_heads, table[i], length) for cache in (keys, values))
            result[i] = _attention(queries[i : i + 1], key, value, scale_value, None)[0]

    return task


@_implement("_npu_flash_attention")
def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, seq_len: Tensor, scale_value: float, num_heads: int,
    num_kv_heads: int, out: Tensor,
) -> Callable[[], None]:  # fmt: skip
    """Prefill: packed sequences [tokens, heads, dim] of lengths ``seq_len`` (int32, on the host), one mask for all."""
    _check_tensors(query, key=key, value=value, out=out, mask=mask)
    _check_packed(query, num_heads, seq_len)
    require(key.shape[1] == value.shape[1] == num_kv_heads, f"key {tuple(key.shape)}, {num_kv_heads} KV heads")
    require(key.shape[0] == query.shape[0] == value.shape[0], "queries and keys of equal number expected")
    lengths = seq_len.tolist()
    views = [_alias(tensor) for tensor in (query, key, value, mask, out)]

    def task() -> None:
        queries, keys, values, masks, result = views
        square, begin = _flat_mask(masks), 0
        for length in lengths:
            part = slice(begin, begin + length)
            result[part] = _attention(queries[part], keys[part], values[part], scale_value, square[:length, :length])
            begin += length

    return task


@_implement("_npu_paged_attention_splitfuse")
def paged_attention_splitfuse(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor, mask: Tensor,
    seq_len: Tensor, num_kv_heads: int, num_heads: int, scale_value: float, out: Tensor,
) -> Callable[[], None]:  # fmt: skip
    """Chunks: ``seq_len`` queries (int32, on the host) of each sequence at the end of its ``context_lens`` keys.

    Row i of the mask belongs to the i-th query of all, its columns to the keys of that query's sequence.
    """
    arguments = (query, key_cache, value_cache, block_table, context_lens, seq_len, num_kv_heads, num_heads, out)
    rows = _alias(mask)
    return _splitfuse(*arguments, scale_value, lambda begin, end, keys: _flat_mask(rows)[begin:end, :keys])


_COMPRESSED, _MASK_SIDE = 5, 2048


@_implement("_npu_paged_attention_splitfuse_v2")
def paged_attention_splitfuse_v2(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor, mask: Tensor,
    seq_len: Tensor, num_kv_heads: int, num_heads: int, scale_value: float, *, out: Tensor, mask_type: int = 5,
) -> Callable[[], None]:  # fmt: skip
    """Chunks with one compressed causal mask [2048, 2048] for any length: what is right of its diagonal hides."""
    require(mask_type == _COMPRESSED, f"mask_type {mask_type} is not emulated")
    require(mask.shape[-2:] == (_MASK_SIDE, _MASK_SIDE), f"the compressed mask has shape {tuple(mask.shape)}")
    arguments = (query, key_cache, value_cache, block_table, context_lens, seq_len, num_kv_heads, num_heads, out)
    square = _alias(mask)

    def rows(begin: int, end: int, keys: int) -> Tensor:
        require(bool((square[1, :2] == 0).all()) and float(square[0, 1]) <= -10000, "the mask is not triangular")
        first = keys - (end - begin)
        hidden = torch.arange(keys, device="cpu") > torch.arange(first, keys, device="cpu")[:, None]
        return hidden * torch.clamp_min(square[0, 1].float(), -1e30)

    return _splitfuse(*arguments, scale_value, rows)


def _splitfuse(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor, seq_len: Tensor,
    num_kv_heads: int, num_heads: int, out: Tensor, scale: float, mask_rows: Callable[[int, int, int], Tensor],
) -> Callable[[], None]:  # fmt: skip
    _check_tensors(query, key_cache=key_cache, value_cache=value_cache, out=out)
    _check_packed(query, num_heads, seq_len)
    for cache in (key_cache, value_cache):
        _check_cache(cache, num_kv_heads, query.shape[2])
    for name, tensor in (("block_table", block_table), ("context_lens", context_lens)):
        require(tensor.dtype == torch.int32, f"{name} must be int32, not {tensor.dtype}")
        require(tensor.shape[0] == seq_len.numel(), f"{name} {tuple(tensor.shape)} for {seq_len.numel()} sequences")
    counts = seq_len.tolist()
    views = [_alias(tensor) for tensor in (query, key_cache, value_cache, block_table, context_lens, out)]

    def task() -> None:
        queries, keys, values, table, lengths, result = views
        begin = 0
        for i, (count, length) in enumerate(zip(counts, lengths.tolist(), strict=True)):
            require(count <= length, f"{count} queries of {length} keys")
            part = slice(begin, begin + count)
            key, value = (_rows(cache, num_kv_heads, table[i], length) for cache in (keys, values))
            result[part] = _attention(queries[part], key, value, scale, mask_rows(begin, begin + count, length))
            begin += count

    return task


def _check_packed(query: Tensor, num_heads: int, seq_len: Tensor) -> None:
    require(query.dim() == 3 and query.shape[1] == num_heads, f"query {tuple(query.shape)}, {num_heads} heads")
    require(seq_len.device.type == "cpu" and seq_len.dtype == torch.int32, "seq_len must be int32, on the host")
    require(int(seq_len.sum()) == query.shape[0], f"lengths {seq_len.tolist()} of {query.shape[0]} tokens")
