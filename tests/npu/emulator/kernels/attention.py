"""FusedInferAttentionScore: attention for prefill, chunks and decoding, over packed or paged keys and values.

Layouts, lengths, masks and limits follow the operator's documentation for Atlas A2 and A3. What right or wrong hang on:

- TND (packed): query lengths are *cumulative*; key lengths are so without a block table, and one per sequence with it.
- Other layouts: one length per sequence.
- ``scale`` is multiplied as given; its default in the operator is 1.
- ``sparse_mode`` 3 is causal with the last query at the last key; it needs the shared mask of 2048 x 2048.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .decode import Ints, Tensor, Tensors
from .registry import IS_310P, SOC, operator, require

_UNLIMITED = 2147483647
_MASK_SIDE = 2048


@dataclass
class _Call:
    """The arguments that matter, by the documentation's names."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    query_lengths: list[int] | None
    key_lengths: list[int] | None
    block_table: Tensor | None
    heads: int
    scale: float
    pre_tokens: int
    next_tokens: int
    layout: str
    kv_heads: int
    sparse_mode: int
    block_size: int
    sink: Tensor | None
    out: Tensor
    lse: Tensor | None


# ---- what the host checks -----------------------------------------------------------------------------------------


def _check(call: _Call) -> None:
    require(not IS_310P, f"the operator does not exist on {SOC}")
    require(call.layout in ("BSH", "BSND", "BNSD", "TND"), f"input_layout {call.layout} is not emulated")
    for name in ("query", "key", "value"):
        tensor = getattr(call, name)
        require(tensor.is_contiguous(), f"{name} must be contiguous, its strides are {tensor.stride()}")
        require(tensor.dtype in (torch.float16, torch.bfloat16), f"{name} is {tensor.dtype}; float16 or bfloat16")
        require(tensor.dtype == call.query.dtype, f"{name} is {tensor.dtype}, query {call.query.dtype}")
    require(call.heads <= 256 and call.heads % call.kv_heads == 0, f"{call.heads} heads over {call.kv_heads} KV heads")
    require(call.heads // call.kv_heads <= 64, "more than 64 query heads per KV head")
    require(call.sparse_mode in (0, 1, 2, 3, 4), f"sparse_mode {call.sparse_mode} is not supported")
    _check_head_dim(call)
    _check_mask(call)
    _check_lengths(call)
    if call.block_table is not None:
        _check_paging(call)


def _head_dim(call: _Call) -> int:
    return call.query.shape[-1] // (call.heads if call.layout == "BSH" else 1)


def _query_length_one(call: _Call) -> bool:
    return call.layout != "TND" and call.query.shape[2 if call.layout == "BNSD" else 1] == 1


def _check_head_dim(call: _Call) -> None:
    dim = _head_dim(call)
    require(dim % 16 == 0 and dim <= 512, f"head_dim {dim} must be a multiple of 16 up to 512")
    if call.layout == "TND":
        require(dim in (128, 192), f"with TND and without rope inputs head_dim must be 128 or 192, not {dim}")
        require(call.query.shape[1] == call.heads, f"num_heads {call.heads}, query {tuple(call.query.shape)}")
    if call.layout in ("BSH", "BSND"):
        require(call.heads * dim < 65535, f"num_heads * head_dim {call.heads * dim} must stay below 65535")


def _check_mask(call: _Call) -> None:
    if _query_length_one(call):
        return
    if call.sparse_mode in (2, 3, 4):
        require(call.mask is not None, f"sparse_mode {call.sparse_mode} needs the mask of 2048 x 2048")
        shape = tuple(call.mask.shape)
        require(shape[-2:] == (_MASK_SIDE, _MASK_SIDE) and call.mask.numel() == _MASK_SIDE**2, f"mask of shape {shape}")
    if call.sparse_mode == 1:
        require(call.mask is not None, "sparse_mode 1 needs a full mask")
    if call.layout == "TND":
        require(
            (call.sparse_mode == 0) == (call.mask is None),
            "with TND: sparse_mode 0 without a mask, or 3 or 4 with one",
        )
    if call.mask is not None:
        require(call.mask.dtype in (torch.bool, torch.int8, torch.uint8), f"mask of {call.mask.dtype}")
        require(call.mask.is_contiguous(), "the mask must be contiguous")


def _check_lengths(call: _Call) -> None:
    if call.layout == "TND":
        lengths = call.query_lengths
        require(bool(lengths), "TND needs actual_seq_lengths")
        require(len(lengths) <= 4096, f"{len(lengths)} sequences, at most 4096")
        _require_cumulative("actual_seq_lengths", lengths, call.query.shape[0])
        require(bool(call.key_lengths), "TND needs actual_seq_lengths_kv")
        require(len(call.key_lengths) == len(lengths), f"{len(lengths)} query and {len(call.key_lengths)} key lengths")
        if call.block_table is None:
            _require_cumulative("actual_seq_lengths_kv", call.key_lengths, call.key.shape[0])
    if call.block_table is not None:
        require(bool(call.key_lengths), "paged attention needs actual_seq_lengths_kv")
    require(all(length >= 0 for length in call.key_lengths or []), f"negative lengths in {call.key_lengths}")
    if call.sparse_mode == 3 and not _query_length_one(call):
        for q, k in _lengths(call):
            require(q <= k, f"sparse_mode 3: a sequence has {q} queries but {k} keys")


def _require_cumulative(name: str, lengths: list[int], total: int) -> None:
    require(lengths == sorted(lengths) and lengths[0] >= 0, f"{name} must be cumulative, not {lengths}")
    require(lengths[-1] == total, f"{name} must be cumulative and end at the {total} tokens given, not {lengths}")


def _check_paging(call: _Call) -> None:
    table, block = call.block_table, call.block_size
    require(table.dtype == torch.int32 and table.dim() == 2, f"block_table must be int32 [B, n], not {table.dtype}")
    require(table.is_contiguous(), "block_table must be contiguous")
    sequences = len(_lengths(call))
    require(table.shape[0] == sequences, f"block_table has {table.shape[0]} rows for {sequences} sequences")
    if call.layout == "TND":
        require(block % 16 == 0 and 16 <= block <= 1024, f"TND: block_size {block} must be a multiple of 16 up to 1024")
    elif _query_length_one(call):
        require(block % 16 == 0 and 16 <= block <= 512, f"block_size {block} must be a multiple of 16 up to 512")
    else:
        require(block % 128 == 0 and 128 <= block <= 512, f"block_size {block} must be a multiple of 128 up to 512")
    for name in ("key", "value"):
        shape = tuple(getattr(call, name).shape)
        if len(shape) == 3:
            require(shape[1] == block, f"{name} cache {shape} is not [blocks, block_size {block}, heads * dim]")
            require(shape[2] % call.kv_heads == 0 and shape[2] <= 65535, f"{name} cache {shape}: last dimension")
        elif len(shape) == 4:
            require(call.layout in ("TND", "BNSD"), f"a 4-D {name} cache needs TND or BNSD")
            expected = f"[blocks, kv_heads {call.kv_heads}, block_size {block}, dim]"
            require(shape[1:3] == (call.kv_heads, block), f"{name} cache {shape} is not {expected}")
        else:
            require(False, f"{name} cache of shape {shape} is not emulated")
    for _, length in _lengths(call):
        needed = -(-length // block)
        require(
            needed <= table.shape[1], f"{length} keys need {needed} blocks, block_table has {table.shape[1]} columns"
        )


# ---- what the device does -----------------------------------------------------------------------------------------


def _differences(cumulative: list[int]) -> list[int]:
    return [end - begin for begin, end in zip([0, *cumulative], cumulative, strict=False)]


def _lengths(call: _Call) -> list[tuple[int, int]]:
    """(queries, keys) of each sequence."""
    if call.layout == "TND":
        paged = call.block_table is not None
        keys = call.key_lengths if paged else _differences(call.key_lengths)
        return list(zip(_differences(call.query_lengths), keys, strict=True))
    batch, dim = call.query.shape[0], 2 if call.layout == "BNSD" else 1
    queries = _per_sequence(call.query_lengths, batch, call.query.shape[dim])
    if _query_length_one(call):
        queries = [1] * batch  # the lengths are ignored
    return list(zip(queries, _per_sequence(call.key_lengths, batch, call.key.shape[dim]), strict=True))


def _per_sequence(lengths: list[int] | None, batch: int, whole: int) -> list[int]:
    if not lengths:
        return [whole] * batch
    if len(lengths) == 1:
        return lengths * batch
    require(len(lengths) >= batch, f"{len(lengths)} lengths for {batch} sequences")
    return lengths[:batch]


def _unpack(tensor: Tensor, layout: str, heads: int, sequence: int, begin: int, length: int) -> Tensor:
    """One sequence as a view [length, heads, dim]."""
    if layout == "TND":
        return tensor[begin : begin + length]
    if layout == "BNSD":
        return tensor[sequence].transpose(0, 1)[:length]
    return tensor[sequence].view(tensor.shape[1], heads, -1)[:length]


def _paged(cache: Tensor, kv_heads: int, block: int, table: Tensor, length: int) -> Tensor:
    """The first ``length`` entries of a sequence's blocks: [length, kv_heads, dim]."""
    blocks = table[: -(-length // block)].long()
    if blocks.numel():
        wrong = [int(b) for b in blocks if not 0 <= int(b) < cache.shape[0]]
        require(not wrong, f"MTE DDR address out of range: block {wrong[:1]} of a cache of {cache.shape[0]} blocks")
    found = cache[blocks]
    if cache.dim() == 4:
        found = found.transpose(1, 2)
    return found.reshape(-1, kv_heads, cache.shape[-1] // (kv_heads if cache.dim() == 3 else 1))[:length]


def _hidden(call: _Call, sequence: int, queries: int, keys: int) -> Tensor | None:
    """True where a query must not see a key: [queries, keys]."""
    i = torch.arange(queries, device="cpu")[:, None] + (keys - queries if call.sparse_mode in (3, 4) else 0)
    j = torch.arange(keys, device="cpu")[None, :]
    if _query_length_one(call) or call.sparse_mode in (0, 1):
        if call.mask is None:
            return None
        shape = call.mask.shape
        rows = call.mask.bool().reshape(-1, *shape[-2:]) if call.mask.dim() > 2 else call.mask.bool()[None]
        if _query_length_one(call) and call.mask.dim() == 2:
            return rows[0, sequence, None, :keys]
        return rows[sequence if rows.shape[0] > 1 else 0, :queries, :keys]
    _require_causal_mask(call.mask)
    if call.sparse_mode in (2, 3):
        return j > i
    return (j > i + call.next_tokens) | (j < i - call.pre_tokens)


def _require_causal_mask(mask: Tensor) -> None:
    """The compressed mask's upper triangle hides; a few of its rows are looked at."""
    square = mask.reshape(_MASK_SIDE, _MASK_SIDE)
    columns = torch.arange(_MASK_SIDE, device="cpu")
    for row in (0, 1, 1000, _MASK_SIDE - 1):
        right = torch.equal(square[row].bool(), columns > row)
        require(right, f"the mask's row {row} must hide what is right of the diagonal, and nothing else")


def _attend(call: _Call) -> None:
    begin_query = begin_key = 0
    for sequence, (queries, keys) in enumerate(_lengths(call)):
        query = _unpack(call.query, call.layout, call.heads, sequence, begin_query, queries).float()
        if call.block_table is not None:
            table = call.block_table[sequence]
            key, value = (_paged(c, call.kv_heads, call.block_size, table, keys) for c in (call.key, call.value))
        else:
            key, value = (
                _unpack(c, call.layout, call.kv_heads, sequence, begin_key, keys) for c in (call.key, call.value)
            )
        groups = call.heads // call.kv_heads
        key, value = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * call.scale
        hidden = _hidden(call, sequence, queries, keys)
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        lse = scores.logsumexp(-1)
        if call.sink is not None:
            lse = torch.logaddexp(lse, call.sink.float()[:, None])
        weights = torch.nan_to_num(torch.exp(scores - lse[..., None]))
        result = torch.einsum("hqk,khd->qhd", weights, value)
        _unpack(call.out, call.layout, call.heads, sequence, begin_query, queries).copy_(result)
        if call.lse is not None and call.layout == "TND":
            call.lse[begin_query : begin_query + queries].copy_(lse.transpose(0, 1).unsqueeze(-1))
        begin_query, begin_key = begin_query + queries, begin_key + keys


# ---- the operator's versions --------------------------------------------------------------------------------------


def _call_v3(
    query, key, value, pse, mask, query_lengths, key_lengths, dequant1, quant1, dequant2, quant2, offset2,
    antiquant_scale, antiquant_offset, block_table, query_padding, kv_padding, key_scale, key_offset, value_scale,
    value_offset, key_prefix, value_prefix, prefix_length, query_rope, key_rope, key_rope_scale, heads, scale,
    pre_tokens, next_tokens, layout, kv_heads, sparse_mode, inner_precise, block_size, antiquant_mode, with_lse,
    key_mode, value_mode, out, lse, sink=None,
) -> _Call:  # fmt: skip
    not_emulated = [pse, dequant1, quant1, dequant2, quant2, offset2, antiquant_scale, antiquant_offset, query_padding]
    not_emulated += [kv_padding, key_scale, key_offset, value_scale, value_offset, key_prefix, value_prefix]
    not_emulated += [prefix_length, query_rope, key_rope, key_rope_scale]
    require(all(x is None for x in not_emulated), "quantisation, prefixes, padding and rope inputs are not emulated")
    require(len(key) == len(value) == 1, "lists of keys and values are not emulated")
    require(inner_precise in (0, 1, 2, 3), f"inner_precise {inner_precise}")
    return _Call(
        query, key[0], value[0], mask, query_lengths, key_lengths, block_table, heads, scale, pre_tokens, next_tokens,
        layout, kv_heads or heads, sparse_mode, block_size, sink, out, lse if with_lse else None,
    )  # fmt: skip


@operator("FusedInferAttentionScoreV3", check=lambda *arguments: _check(_call_v3(*arguments)))
def fused_infer_attention_score_v3(
    query: Tensor, key: Tensors, value: Tensors, pse: Tensor | None, mask: Tensor | None, query_lengths: Ints | None,
    key_lengths: Ints | None, dequant1: Tensor | None, quant1: Tensor | None, dequant2: Tensor | None,
    quant2: Tensor | None, offset2: Tensor | None, antiquant_scale: Tensor | None, antiquant_offset: Tensor | None,
    block_table: Tensor | None, query_padding: Tensor | None, kv_padding: Tensor | None, key_scale: Tensor | None,
    key_offset: Tensor | None, value_scale: Tensor | None, value_offset: Tensor | None, key_prefix: Tensor | None,
    value_prefix: Tensor | None, prefix_length: Ints | None, query_rope: Tensor | None, key_rope: Tensor | None,
    key_rope_scale: Tensor | None, heads: int, scale: float, pre_tokens: int, next_tokens: int, layout: str,
    kv_heads: int, sparse_mode: int, inner_precise: int, block_size: int, antiquant_mode: int, with_lse: bool,
    key_mode: int, value_mode: int, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    arguments = tuple(locals().values())
    _attend(_call_v3(*arguments))


def _call_v4(*arguments: object) -> _Call:
    """Version 4 has two more optional inputs behind the rope's (a query scale, a sink), and a mode of the first."""
    inputs, query_scale, sink, attributes = arguments[:27], arguments[27], arguments[28], list(arguments[29:])
    require(query_scale is None, "quantisation is not emulated")
    require(attributes.pop(13) == 0, "quantisation is not emulated")
    return _call_v3(*inputs, *attributes, sink=sink)


@operator("FusedInferAttentionScoreV4", check=lambda *arguments: _check(_call_v4(*arguments)))
def fused_infer_attention_score_v4(
    query: Tensor, key: Tensors, value: Tensors, pse: Tensor | None, mask: Tensor | None, query_lengths: Ints | None,
    key_lengths: Ints | None, dequant1: Tensor | None, quant1: Tensor | None, dequant2: Tensor | None,
    quant2: Tensor | None, offset2: Tensor | None, antiquant_scale: Tensor | None, antiquant_offset: Tensor | None,
    block_table: Tensor | None, query_padding: Tensor | None, kv_padding: Tensor | None, key_scale: Tensor | None,
    key_offset: Tensor | None, value_scale: Tensor | None, value_offset: Tensor | None, key_prefix: Tensor | None,
    value_prefix: Tensor | None, prefix_length: Ints | None, query_rope: Tensor | None, key_rope: Tensor | None,
    key_rope_scale: Tensor | None, query_scale: Tensor | None, sink: Tensor | None, heads: int, scale: float,
    pre_tokens: int, next_tokens: int, layout: str, kv_heads: int, sparse_mode: int, inner_precise: int,
    block_size: int, antiquant_mode: int, with_lse: bool, key_mode: int, value_mode: int, query_mode: int, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    arguments = tuple(locals().values())
    _attend(_call_v4(*arguments))
