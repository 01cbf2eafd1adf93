"""Triton's paged attention against the reference on random batches, under Triton's interpreter."""

from __future__ import annotations

from inspect import signature

import numpy as np
import pytest
import torch
from attention_libraries import varlen_attn
from cuda_device import DEVICE, HALF_DTYPES, ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import make_metadata
from torch import Tensor

pytest.importorskip("triton")

from nanovllm.errors import ParameterError
from nanovllm.ops import AttentionMetadata, reference
from nanovllm.ops.cuda import attention, varlen
from nanovllm.ops.cuda.attention import Tiles, TritonAttention, decode_tiles, long_tiles
from nanovllm.ops.cuda.attention_plan import cut_queries, split_decodes
from nanovllm.ops.cuda.varlen import VarlenAttention

Row = tuple[int, int]  # tokens in the cache before the step, new tokens
SCALE = 0.37
TOLERANCE = {torch.float32: 1e-4 if ON_GPU else 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=not ON_GPU)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small batches have several tiles."""
    monkeypatch.setattr(attention, "decode_tiles", lambda *_: Tiles(16, 16, 4, 2))
    monkeypatch.setattr(attention, "long_tiles", lambda *_: Tiles(16, 16, 4, 2))
    monkeypatch.setattr(attention, "_SPLIT_TILE", 16)


Batch = tuple[AttentionMetadata, Tensor, Tensor, Tensor]


def make_batch(
    rows: list[Row],
    *,
    group: int = 2,
    kv_heads: int = 2,
    head_dim: int = 8,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """A batch in shuffled blocks, decodes first. What belongs to no row is NaN: reading it shows."""
    rows = sorted(rows, key=lambda row: row[1] != 1)
    generator = torch.Generator().manual_seed(seed)
    need = [-(-(context + new) // block_size) for context, new in rows]
    ids = (torch.randperm(sum(need), generator=generator) + 1).tolist()
    tables = [[ids.pop() for _ in range(count)] for count in need]
    meta = make_metadata(tables, [c for c, _ in rows], [n for _, n in rows], block_size)
    shape = (sum(need) + 1, block_size, kv_heads, head_dim)
    k_cache, v_cache = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    for table, length in zip(tables, meta.seq_lens, strict=True):
        slots = [table[p // block_size] * block_size + p % block_size for p in range(length)]
        for cache in (k_cache, v_cache):
            cache.flatten(0, 1)[slots] = torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype)
    q = torch.randn(meta.query_start_loc[-1], group * kv_heads, head_dim, generator=generator).to(dtype)
    meta.block_table, meta.slot_mapping = meta.block_table.to(DEVICE), meta.slot_mapping.to(DEVICE)
    return meta, q.to(DEVICE), k_cache.to(DEVICE), v_cache.to(DEVICE)


def attend(batch: Batch, window: int | None = None, multiprocessors: int = 3) -> Tensor:
    meta, q, k_cache, v_cache = batch
    ops = TritonAttention(multiprocessors, 100_000)
    ops.prepare_attention(meta, [window], q.dtype)
    return ops.paged_attention(q, k_cache, v_cache, meta, SCALE, window)


def check(batch: Batch, window: int | None, multiprocessors: int = 3) -> None:
    meta, q, k_cache, v_cache = batch
    wanted = reference.paged_attention(q.double(), k_cache.double(), v_cache.double(), meta, SCALE, window)
    ours = attend(batch, window, multiprocessors)
    assert ours.dtype == q.dtype
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(ours.double(), wanted, atol=tolerance, rtol=tolerance)


@settings(max_examples=22)
@given(
    rows=st.lists(st.tuples(st.integers(0, 70), st.sampled_from([1, 1, 2, 5, 11])), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 2, 3, 7]),
    head_dim=st.sampled_from([6, 16, 20]),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, None, 1, 7, 30]),
    dtype=st.sampled_from([torch.float32, *HALF_DTYPES]),
    multiprocessors=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 99),
)
def test_any_batch(
    rows: list[Row],
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    multiprocessors: int,
    seed: int,
) -> None:
    check(
        make_batch(
            rows, group=group, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype, seed=seed
        ),
        window,
        multiprocessors,
    )


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("block_size", [8, 256])
def test_head_and_block_sizes_of_real_models(head_dim: int, block_size: int) -> None:
    check(make_batch([(20, 1), (3, 4)], kv_heads=1, head_dim=head_dim, block_size=block_size), None)


def test_more_heads_in_a_group_than_a_tile_has_lines() -> None:
    check(make_batch([(20, 1), (3, 4)], kv_heads=1, group=20), None)


def test_layers_with_and_without_a_window_share_one_plan() -> None:
    batch = make_batch([(90, 1), (3, 1), (10, 6)])
    meta, q, k_cache, v_cache = batch
    ops = TritonAttention(3, 100_000)
    ops.prepare_attention(meta, [None, 5], q.dtype)
    for window in (5, None, 5):
        ours = ops.paged_attention(q, k_cache, v_cache, meta, SCALE, window)
        wanted = reference.paged_attention(q, k_cache, v_cache, meta, SCALE, window)
        torch.testing.assert_close(ours, wanted, atol=2e-6, rtol=1e-5)


def test_an_empty_row_between_others() -> None:
    """A row with no new tokens is skipped, before and behind rows with many."""
    batch = make_batch([(5, 1), (9, 3), (4, 5)])
    meta = batch[0]
    meta.query_start_loc = [0, 1, 4, 4, 9]
    meta.seq_lens = [*meta.seq_lens[:2], 7, meta.seq_lens[2]]
    meta.block_table = meta.block_table[[0, 1, 1, 2]]
    check(batch, None)


def test_padded_rows_give_zeros_and_leave_the_others_alone() -> None:
    meta, q, k_cache, v_cache = make_batch([(40, 1), (3, 1)])
    ops = TritonAttention(2, 100_000)
    ops.prepare_attention(meta, [None], q.dtype)
    alone = ops.paged_attention(q, k_cache, v_cache, meta, SCALE, None)
    plan = np.empty(ops.plan_size(4), np.int32)
    ops.fill_plan(np.array([*meta.seq_lens, 0, 0]), plan)
    meta.backend = ops.view_plan(torch.from_numpy(plan).to(DEVICE), 4)
    meta.block_table = torch.cat([meta.block_table, torch.zeros_like(meta.block_table)])
    padded = ops.paged_attention(torch.cat([q, q]), k_cache, v_cache, meta, SCALE, None)
    torch.testing.assert_close(padded[:2], alone, atol=1e-6, rtol=1e-6)
    assert not padded[2:].any()


def test_a_cache_of_eight_bit_floats() -> None:
    meta, q, k_cache, v_cache = make_batch([(30, 1), (7, 5)], head_dim=16)
    stored = [cache.nan_to_num().to(torch.float8_e4m3fn) for cache in (k_cache, v_cache)]
    ours = attend((meta, q, stored[0], stored[1]))
    wanted = reference.paged_attention(q, stored[0].float(), stored[1].float(), meta, SCALE, None)
    torch.testing.assert_close(ours, wanted, atol=2e-6, rtol=1e-5)


# ---- plans --------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60), st.integers(0, 300), st.sampled_from([16, 64]))
def test_items_cover_every_row_and_none_is_much_longer(lengths: list[int], spare: int, tile: int) -> None:
    capacity = len(lengths) + spare
    starts, rows = split_decodes(np.array(lengths), capacity, tile)
    assert len(rows) == capacity and starts[0] == 0 and starts[-1] <= capacity
    counts = np.diff(starts)
    assert (counts >= 1).all()
    assert rows.tolist() == [r for r, count in enumerate(counts) for _ in range(count)] + [-1] * (capacity - starts[-1])
    if spare:
        fair = -(-sum(lengths) // (spare * tile)) * tile
        assert max(-(-length // count) for length, count in zip(lengths, counts, strict=True)) <= max(fair, tile)


def test_one_long_request_is_spread_over_the_gpu() -> None:
    starts, _ = split_decodes(np.array([32_000]), 1 + 264, 64)
    assert starts[-1] == 250  # 500 tiles, two each


def test_many_short_requests_are_not_cut() -> None:
    starts, _ = split_decodes(np.full(256, 1000), 256 + 264, 64)
    assert starts[-1] == 256


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 16), st.data())
def test_tiles_cover_every_query_once(lengths: list[int], queries: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(lengths)))
    rows, begins = cut_queries(np.cumsum([0, *lengths]), first, queries)
    covered = [(r, q) for r, b in zip(rows, begins, strict=True) for q in range(b, min(b + queries, lengths[r]))]
    assert covered == [(r, q) for r in range(first, len(lengths)) for q in range(lengths[r])]


@pytest.mark.parametrize("shared_memory", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_into_shared_memory(shared_memory: int, head_dim: int, itemsize: int) -> None:
    for choose in (decode_tiles, long_tiles):
        tiles = choose(head_dim, itemsize, shared_memory)
        row = head_dim * itemsize
        assert tiles.lines * row + max(1, tiles.stages - 1) * 2 * tiles.keys * row <= shared_memory
        assert tiles.stages == 3 or itemsize == 4  # shorter pipelines only where nothing is fast anyway


# ---- torch's flash attention for longer queries -------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [4, 256])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("rows", [[(20, 1), (3, 1), (9, 4), (0, 7)], [(5, 3)]])
def test_torch_varlen(block_size: int, window: int | None, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(varlen, "_varlen_attn", lambda: (varlen_attn, set(signature(varlen_attn).parameters)))
    elif not {"window_size", "scale"} <= varlen._varlen_attn()[1]:
        pytest.skip("this torch has no such varlen_attn")
    batch = make_batch(rows, block_size=block_size, dtype=torch.float16)
    meta, q, k_cache, v_cache = batch
    ops = VarlenAttention(3, 100_000)
    ops.prepare_attention(meta, [window], q.dtype)
    ours = ops.paged_attention(q, k_cache, v_cache, meta, SCALE, window)
    wanted = reference.paged_attention(q.double(), k_cache.double(), v_cache.double(), meta, SCALE, window)
    torch.testing.assert_close(ours.double(), wanted, atol=2e-3, rtol=2e-3)


def test_torch_varlen_is_refused_where_torch_has_it_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_varlen_attn", lambda: (varlen_attn, {"query", "is_causal"}))
    with pytest.raises(ParameterError, match="use 'triton'"):
        VarlenAttention(3, 100_000)
