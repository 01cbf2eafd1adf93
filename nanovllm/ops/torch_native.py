"""Paged attention with torch's own fused attention, on any device.

Keys and values are gathered from their blocks into a workspace, then attended to with ``scaled_dot_product_attention``:

- decodes in batches. Rows of similar length share a *bucket*, so a ragged batch is never padded to its longest row, and
  a bucket is small enough to stay in the cache between gathering and use;
- longer queries row by row, in *tiles* of queries, each with the keys its first and last query reach.

With a sliding window, only what the window covers is gathered. Grouped-query attention copies no keys: the query heads
that share a KV head are extra queries of it (decode), or see it through a stride of zero (longer queries). Which slots
to gather, and which keys to hide, is worked out once per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.ops.metadata import AttentionMetadata

_BUCKET_TOKENS = 2048  # gathered at a time, unless one row alone has more
_TILE_QUERIES = 512


@dataclass(slots=True)
class DecodeBucket:
    """Rows with one query each and about the same number of visible keys, padded to ``length``.

    Padding repeats a row's own last slot (a foreign slot might hold a NaN) and is hidden by ``mask``.
    """

    tokens: Tensor | slice  # the rows' places in the flat batch
    slots: Tensor  # int64 [rows * length]
    length: int
    mask: Tensor | None  # [rows, 1, 1, length], 0 or -inf; None: nothing is padded


@dataclass(slots=True)
class Tile:
    """Consecutive queries of a row, and the keys they see."""

    queries: slice  # in the flat batch
    keys: slice  # among the row's gathered slots
    mask: Tensor | None  # [queries, keys], 0 or -inf; None: causal, aligned at the first key


@dataclass(slots=True)
class LongRow:
    """A row with several queries."""

    slots: Tensor  # int64 [visible keys]
    tiles: list[Tile]


@dataclass(slots=True)
class AttentionPlan:
    """What attention does in a step, for one kind of window."""

    buckets: list[DecodeBucket]
    rows: list[LongRow]


class TorchNativeAttention:
    """The operators ``prepare_attention`` and ``paged_attention``, and the workspace they keep between steps."""

    def __init__(self) -> None:
        self._workspace: tuple[Tensor, Tensor] | None = None  # gathered K and V, each [tokens, Hk, D]

    def prepare_attention(self, meta: AttentionMetadata, windows: Sequence[int | None], dtype: torch.dtype) -> None:
        """See ``reference.prepare_attention``; one plan for each window."""
        meta.backend = {window: _plan(meta, window, dtype) for window in windows}

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float, window: int | None
    ) -> Tensor:
        """See ``reference.paged_attention``."""
        plan: AttentionPlan = meta.backend[window]
        out = torch.empty_like(q)
        num_kv_heads, head_dim = k_cache.shape[2:]
        group = q.shape[1] // num_kv_heads
        for bucket in plan.buckets:
            k, v = self._gather(k_cache, v_cache, bucket.slots)
            shape = (-1, bucket.length, num_kv_heads, head_dim)
            attended = F.scaled_dot_product_attention(
                q[bucket.tokens].reshape(-1, num_kv_heads, group, head_dim),  # the group's heads as queries
                k.view(shape).transpose(1, 2),  # [rows, Hk, length, D]
                v.view(shape).transpose(1, 2),
                attn_mask=bucket.mask,
                scale=scale,
            )
            out[bucket.tokens] = attended.view(-1, num_kv_heads * group, head_dim)
        for row in plan.rows:
            k, v = (x.transpose(0, 1)[:, None] for x in self._gather(k_cache, v_cache, row.slots))  # [Hk, 1, keys, D]
            for tile in row.tiles:
                queries = q[tile.queries].unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)  # [Hk, group, t, D]
                attended = F.scaled_dot_product_attention(
                    queries,
                    k[:, :, tile.keys].expand(-1, group, -1, -1),
                    v[:, :, tile.keys].expand(-1, group, -1, -1),
                    attn_mask=tile.mask,
                    is_causal=tile.mask is None,
                    scale=scale,
                )
                out[tile.queries] = attended.permute(2, 0, 1, 3).flatten(1, 2)
        return out

    def _gather(self, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K and V at ``slots`` [n]: [n, Hk, D] each, in the workspace. Fresh memory would cost 4 x the copying."""
        count = slots.shape[0]
        workspace = self._workspace
        if workspace is None or workspace[0].shape[0] < count or workspace[0].shape[1:] != k_cache.shape[2:]:
            size = (max(count, _BUCKET_TOKENS), *k_cache.shape[2:])
            with torch.inference_mode(False):  # so that it may be written in any mode
                workspace = (k_cache.new_empty(size), v_cache.new_empty(size))
            self._workspace = workspace
        k, v = workspace[0][:count], workspace[1][:count]
        torch.index_select(k_cache.flatten(0, 1), 0, slots, out=k)
        torch.index_select(v_cache.flatten(0, 1), 0, slots, out=v)
        return k, v


def _plan(meta: AttentionMetadata, window: int | None, dtype: torch.dtype) -> AttentionPlan:
    visible = [length if window is None else min(length, window) for length in meta.seq_lens[: meta.num_decodes]]
    buckets = [_bucket(meta, rows, visible, dtype) for rows in _similar_rows(visible)]
    rows = _long_rows(meta, window, dtype) if meta.num_decodes < len(meta.seq_lens) else []
    return AttentionPlan(buckets, rows)


def _similar_rows(lengths: list[int]) -> Iterator[list[int]]:
    """Indexes of ``lengths``, each once, in groups of about the same length and bounded size."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[row]
        if group:
            shortest = lengths[group[0]]
            if length > shortest + max(16, shortest // 4) or (len(group) + 1) * length > _BUCKET_TOKENS:
                yield sorted(group)
                group = []
        group.append(row)
    if group:
        yield sorted(group)


def _bucket(meta: AttentionMetadata, rows: list[int], visible: list[int], dtype: torch.dtype) -> DecodeBucket:
    device = meta.block_table.device
    length = max(visible[row] for row in rows)
    ends = torch.tensor([meta.seq_lens[row] for row in rows], device=device)[:, None]
    counts = torch.tensor([visible[row] for row in rows], device=device)[:, None]
    places = torch.arange(length, device=device)  # [length]
    positions = torch.minimum(ends - counts + places, ends - 1)  # [rows, length]
    contiguous = rows[-1] - rows[0] + 1 == len(rows)
    tokens = slice(rows[0], rows[-1] + 1) if contiguous else torch.tensor(rows, device=device)
    slots = _slots(meta.block_table[tokens], positions, meta.block_size)
    mask = None
    if any(visible[row] != length for row in rows):
        mask = torch.zeros(len(rows), length, dtype=dtype, device=device).masked_fill_(places >= counts, -torch.inf)
        mask = mask[:, None, None]
    return DecodeBucket(tokens, slots.flatten(), length, mask)


def _slots(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """block_table int32 [rows, width], positions [rows, n] -> their slots in the cache, int64 [rows, n]."""
    blocks = block_table.gather(1, positions // block_size)
    return blocks.long() * block_size + positions % block_size


def _long_rows(meta: AttentionMetadata, window: int | None, dtype: torch.dtype) -> list[LongRow]:
    device = meta.block_table.device
    planned: list[LongRow] = []
    hidden: list[tuple[Tile, int]] = []  # tiles that need a mask, and the context before their first query
    for row in range(meta.num_decodes, len(meta.seq_lens)):
        start, end, seq_len = meta.query_start_loc[row], meta.query_start_loc[row + 1], meta.seq_lens[row]
        if start == end:
            continue
        context = seq_len - (end - start)
        first = 0 if window is None else max(0, context - window + 1)  # the first position any query sees
        positions = torch.arange(first, seq_len, device=device)[None]
        slots = _slots(meta.block_table[row : row + 1], positions, meta.block_size)[0]
        if context == 0 and (window is None or seq_len <= window):
            tiles = [Tile(slice(start, end), slice(0, seq_len), None)]
        else:
            tiles = []
            for offset in range(0, end - start, _TILE_QUERIES):
                stop = min(offset + _TILE_QUERIES, end - start)
                reach = 0 if window is None else max(0, context + offset - window + 1)
                tile = Tile(slice(start + offset, start + stop), slice(reach - first, context + stop - first), None)
                tiles.append(tile)
                hidden.append((tile, context + offset - reach))
        planned.append(LongRow(slots, tiles))
    if hidden:
        _cut_masks(hidden, window, dtype, device)
    return planned


def _cut_masks(hidden: list[tuple[Tile, int]], window: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """Give each tile its mask, cut out of one staircase: whether a query sees a key depends on their distance only.

    ::

        keys      0 1 2 3 4 5 6 7      widest context 4, window 4
        query 0   - x x x x - - -      a tile with 2 queries and 1 key of context
        query 1   - - x x x x - -      takes rows 0..1, columns 3..5
        query 2   - - - x x x x -
    """
    rows = max(tile.queries.stop - tile.queries.start for tile, _ in hidden)
    widest = max(context for _, context in hidden)
    distance = torch.arange(rows, device=device)[:, None] + widest - torch.arange(widest + rows, device=device)
    unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
    staircase = torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, -torch.inf)
    for tile, context in hidden:
        count = tile.queries.stop - tile.queries.start
        tile.mask = staircase[:count, widest - context : widest + count]
