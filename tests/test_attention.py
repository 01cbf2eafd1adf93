"""Paged attention against a definition of its own: one query at a time, in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import make_metadata
from torch import Tensor

from nanovllm.ops import AttentionMetadata, Operators, torch_native, torch_operators

BACKENDS = ["torch_native", "reference"]
SCALE = 0.37

Row = tuple[int, int]  # tokens in the cache before the step, new tokens


def make_batch(
    rows: list[Row], *, group: int = 3, kv_heads: int = 2, block_size: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[AttentionMetadata, Tensor, Tensor, Tensor]:
    """A batch in shuffled blocks, decodes first. What belongs to no row is NaN: reading it shows."""
    rows = sorted(rows, key=lambda row: row[1] != 1)
    torch.manual_seed(len(rows))
    need = [-(-(context + new) // block_size) for context, new in rows]
    ids = list(range(1, sum(need) + 1))
    random.Random(0).shuffle(ids)
    tables = [[ids.pop() for _ in range(count)] for count in need]
    meta = make_metadata(tables, [c for c, _ in rows], [n for _, n in rows], block_size)
    k_cache = torch.full((sum(need) + 1, block_size, kv_heads, 6), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    for table, length in zip(tables, meta.seq_lens, strict=True):
        for cache in (k_cache, v_cache):
            for position in range(length):
                cache[table[position // block_size], position % block_size] = torch.randn(kv_heads, 6).to(dtype)
    return meta, torch.randn(meta.query_start_loc[-1], group * kv_heads, 6).to(dtype), k_cache, v_cache


def exact(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, window: int | None) -> Tensor:
    group = q.shape[1] // k_cache.shape[2]
    out = torch.zeros_like(q, dtype=torch.float64)
    for row, length in enumerate(meta.seq_lens):
        start, end = meta.query_start_loc[row : row + 2]
        for token in range(start, end):
            last = length - (end - token)  # the token's own position
            first = 0 if window is None else max(0, last - window + 1)
            places = [
                (int(meta.block_table[row, p // meta.block_size]), p % meta.block_size) for p in range(first, last + 1)
            ]
            for head in range(q.shape[1]):
                k = torch.stack([k_cache[b, o, head // group] for b, o in places]).double()
                v = torch.stack([v_cache[b, o, head // group] for b, o in places]).double()
                out[token, head] = (k @ q[token, head].double() * SCALE).softmax(0) @ v
    return out


def attend(ops: Operators, batch: tuple[AttentionMetadata, Tensor, Tensor, Tensor], window: int | None) -> Tensor:
    meta, q, k_cache, v_cache = batch
    ops.prepare_attention(meta, [window], q.dtype)
    return ops.paged_attention(q, k_cache, v_cache, meta, SCALE, window)


rows = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 2, 5, 11])), min_size=1, max_size=7)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    rows=rows,
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3]),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 1, 2, 7, 30]),
    tile=st.sampled_from([3, 512]),
    bucket=st.sampled_from([24, 2048]),
)
def test_any_batch(
    backend: str,
    rows: list[Row],
    kv_heads: int,
    group: int,
    block_size: int,
    window: int | None,
    tile: int,
    bucket: int,
) -> None:
    batch = make_batch(rows, group=group, kv_heads=kv_heads, block_size=block_size)
    meta, q, k_cache, v_cache = batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_native, "_TILE_QUERIES", tile)
        patch.setattr(torch_native, "_BUCKET_TOKENS", bucket)
        result = attend(torch_operators(backend), batch, window)
    torch.testing.assert_close(result.double(), exact(q, k_cache, v_cache, meta, window), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    batch = make_batch([(0, 9), (30, 1), (5, 1), (12, 8), (31, 1)], dtype=dtype)
    meta, q, k_cache, v_cache = batch
    for window in (None, 6):
        result = attend(torch_operators(backend), batch, window)
        assert result.dtype == dtype
        assert (result.double() - exact(q, k_cache, v_cache, meta, window)).abs().max() < tolerance


def test_one_preparation_serves_layers_with_different_windows() -> None:
    batch = make_batch([(20, 1), (3, 1), (10, 6), (0, 9)])
    meta, q, k_cache, v_cache = batch
    ops = torch_operators()
    ops.prepare_attention(meta, [None, 5], q.dtype)
    for window in (5, None, 5):
        result = ops.paged_attention(q, k_cache, v_cache, meta, SCALE, window)
        torch.testing.assert_close(result.double(), exact(q, k_cache, v_cache, meta, window), atol=2e-6, rtol=1e-5)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    """One engine's workspace is used again and again: nothing of an earlier batch may be left in a later one."""
    ops = torch_operators()
    alone = make_batch([(17, 1)])
    expected = attend(ops, alone, None)
    meta, q, k_cache, v_cache = make_batch([(17, 1), (40, 1), (18, 1), (2, 7)])
    q[0] = alone[1][0]
    for position in range(18):  # the same keys and values for row 0
        place = (meta.block_table[0, position // 4], position % 4)
        source = (alone[0].block_table[0, position // 4], position % 4)
        k_cache[place], v_cache[place] = alone[2][source], alone[3][source]
    for _ in range(2):
        result = attend(ops, (meta, q, k_cache, v_cache), None)
        torch.testing.assert_close(result[:1], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", [True, False])
def test_the_workspace_serves_both_inference_and_ordinary_mode(mode: bool) -> None:
    ops, batch = torch_operators(), make_batch([(5, 1), (3, 4)])
    with torch.inference_mode(mode):
        first = attend(ops, batch, None)
    with torch.inference_mode(not mode):
        assert torch.equal(attend(ops, batch, None), first)


# ---- how much torch_native gathers --------------------------------------------------------------------------------


def plan_of(rows: list[Row], window: int | None = None) -> Any:
    meta = make_batch(rows, kv_heads=1, group=1)[0]
    torch_operators().prepare_attention(meta, [window], torch.float32)
    return meta.backend[window]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5000), max_size=80))
def test_decodes_are_grouped_by_similar_length(lengths: list[int]) -> None:
    groups = list(torch_native._similar_rows(lengths))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        shortest, longest = min(lengths[row] for row in group), max(lengths[row] for row in group)
        assert longest <= shortest + max(16, shortest // 4)
        assert len(group) == 1 or len(group) * longest <= torch_native._BUCKET_TOKENS


def test_a_ragged_batch_is_not_padded_to_its_longest_row() -> None:
    decodes = [(length, 1) for length in (3, 5, 9, 20, 40, 41, 300, 320)]
    gathered = sum(bucket.slots.numel() for bucket in plan_of(decodes).buckets)
    visible = sum(context + 1 for context, _ in decodes)
    assert visible <= gathered < 1.25 * visible


def test_rows_of_one_length_need_no_mask() -> None:
    (bucket,) = plan_of([(12, 1)] * 5).buckets
    assert bucket.mask is None and bucket.tokens == slice(0, 5)


def test_a_sliding_window_gathers_only_what_it_covers() -> None:
    plan = plan_of([(300, 1), (200, 1), (250, 10)], window=8)
    assert sum(bucket.slots.numel() for bucket in plan.buckets) == 2 * 8
    assert plan.rows[0].slots.numel() == 10 + 7


def test_a_prompt_without_context_needs_no_mask_and_a_long_chunk_is_cut_into_tiles() -> None:
    assert plan_of([(0, 100)]).rows[0].tiles[0].mask is None
    tiles = plan_of([(30, 1100)]).rows[0].tiles
    assert [tile.queries.stop - tile.queries.start for tile in tiles] == [512, 512, 76]
    assert [tile.keys.stop for tile in tiles] == [542, 1054, 1130]  # no tile looks beyond its last query
