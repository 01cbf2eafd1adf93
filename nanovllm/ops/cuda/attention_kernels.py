"""Triton kernels of paged attention: decodes with their history split, its pieces merged; tiles of longer queries.

Keys and values are read where they lie, once per KV head for all query heads of its group (GQA), with an online softmax
(Milakov and Gimelshein 2018) in base 2. A score is ``q . k * scale`` in float32, whatever the dtype of q. Keys and
values may be stored in another dtype than q's (float8): they are converted as they arrive.

D is the head size; tiles have D_PAD >= D columns, a power of two >= 16, because matrix units want that.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What changes from step to step: without this, numbers that are multiples of 16 and pieces of a plan that begin at
# multiples of 16 bytes would be compiled for themselves, while a step waits.
_VARIES = ["table_stride", "window"]
_ANYWHERE = ["seq_lens", "item_start", "item_row", "query_start", "tile_row", "tile_first"]


@triton.jit
def _place(block_table, row, table_stride, n, inside, kv_head, block_size, block_stride, token_stride, head_stride):
    """Where the keys (or values) of positions n of a row lie: int64 offsets of their first number."""
    block = tl.load(block_table + row * table_stride + n // block_size, mask=inside, other=0).to(tl.int64)
    return block * block_stride + (n % block_size) * token_stride + kv_head * head_stride


@triton.jit
def _attend(
    q, m, l, acc, k_cache, v_cache, place, seen, inside, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the running maximum m, sum l and weighted values acc of all queries, with these keys."""
    d = tl.arange(0, D_PAD)
    k = tl.load(k_cache + place[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale_log2
    scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(m, tl.max(scores, 1))
    origin = tl.where(highest == float("-inf"), 0.0, highest)  # a query that has seen no key yet
    p = tl.exp2(scores - origin[:, None])
    shrink = tl.exp2(m - origin)
    v = tl.load(v_cache + place[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    acc = acc * shrink[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee")
    return highest, l * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=_VARIES, do_not_specialize_on_alignment=_ANYWHERE)
def decode_kernel(
    q, k_cache, v_cache, out, partial, partial_lse, block_table, seq_lens, item_start, item_row,
    table_stride, window, block_size, block_stride, token_stride, head_stride, scale_log2,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, GROUP_PAD: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Item ``program_id(0)`` of the plan: a stretch of one row's history, for one KV head.

    A row that is one item goes to ``out``; the pieces of others go to ``partial`` with the logarithm (base 2) of their
    sums, for ``merge_kernel``.
    """
    item, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(item_row + item)
    if row < 0:
        return
    seq_len = tl.load(seq_lens + row)
    first_item = tl.load(item_start + row)
    count = tl.load(item_start + row + 1) - first_item
    begin = 0
    if WINDOWED:
        begin = tl.maximum(seq_len - window, 0)
    length = tl.cdiv(tl.cdiv(seq_len - begin, BLOCK_N), count) * BLOCK_N
    begin += (item - first_item) * length
    end = tl.minimum(begin + length, seq_len)

    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, D_PAD)
    real = (g < GROUP)[:, None] & (d < D)[None, :]
    head = kv_head * GROUP + g
    place_q = (row.to(tl.int64) * H + head)[:, None] * D + d[None, :]
    queries = tl.load(q + place_q, mask=real, other=0.0)
    m = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    l = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < end
        place = _place(block_table, row, table_stride, n, inside, kv_head, block_size, block_stride, token_stride,
                       head_stride)  # fmt: skip
        m, l, acc = _attend(queries, m, l, acc, k_cache, v_cache, place, inside[None, :], inside, scale_log2, D, D_PAD)
    total = tl.where(l > 0, l, 1.0)  # no keys: zeros
    result = acc / total[:, None]
    if count == 1:
        tl.store(out + place_q, result.to(out.dtype.element_ty), mask=real)
    else:
        place = (item.to(tl.int64) * H + head)[:, None] * D + d[None, :]
        tl.store(partial + place, result, mask=real)
        tl.store(partial_lse + item * H + head, m + tl.log2(total), mask=g < GROUP)


@triton.jit(do_not_specialize_on_alignment=_ANYWHERE)
def merge_kernel(
    partial, partial_lse, out, item_start,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Put the pieces of row ``program_id(0)``, head ``program_id(1)`` together, each with its share of the softmax."""
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(item_start + row), tl.load(item_start + row + 1)
    if end - begin <= 1:
        return
    d = tl.arange(0, D_PAD)
    highest = -float("inf")
    total = 0.0
    acc = tl.zeros([D_PAD], tl.float32)
    for start in range(begin, end, PIECES):
        item = start + tl.arange(0, PIECES)
        lse = tl.load(partial_lse + item * H + head, mask=item < end, other=-float("inf"))
        place = (item.to(tl.int64) * H + head)[:, None] * D + d[None, :]
        values = tl.load(partial + place, mask=(item < end)[:, None] & (d < D)[None, :], other=0.0)
        most = tl.maximum(highest, tl.max(lse, 0))
        origin = tl.where(most == -float("inf"), 0.0, most)
        weight = tl.exp2(lse - origin)
        shrink = tl.exp2(highest - origin)
        acc = acc * shrink + tl.sum(weight[:, None] * values, 0)
        total = total * shrink + tl.sum(weight, 0)
        highest = most
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + (row.to(tl.int64) * H + head) * D + d, acc.to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=_VARIES, do_not_specialize_on_alignment=_ANYWHERE)
def tile_kernel(
    q, k_cache, v_cache, out, block_table, seq_lens, query_start, tile_row, tile_first,
    table_stride, window, block_size, block_stride, token_stride, head_stride, scale_log2,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Tile ``program_id(0)``: consecutive queries of one row, for all heads of one KV head's group.

    Line i of the tile is head i % GROUP of query ``tile_first + i // GROUP``; lines left over are idle.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row, first = tl.load(tile_row + tile), tl.load(tile_first + tile)
    begin_q = tl.load(query_start + row)
    num_queries = tl.load(query_start + row + 1) - begin_q
    seq_len = tl.load(seq_lens + row)
    context = seq_len - num_queries

    QUERIES: tl.constexpr = BLOCK_M // GROUP
    line = tl.arange(0, BLOCK_M)
    query = first + line // GROUP
    d = tl.arange(0, D_PAD)
    real = ((line < QUERIES * GROUP) & (query < num_queries))[:, None] & (d < D)[None, :]
    place_q = ((begin_q + query).to(tl.int64) * H + kv_head * GROUP + line % GROUP)[:, None] * D + d[None, :]
    queries = tl.load(q + place_q, mask=real, other=0.0)
    position = context + query

    end = tl.minimum(context + first + QUERIES, seq_len)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(context + first - window + 1, 0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < end
        place = _place(block_table, row, table_stride, n, inside, kv_head, block_size, block_stride, token_stride,
                       head_stride)  # fmt: skip
        seen = (n[None, :] <= position[:, None]) & inside[None, :]
        if WINDOWED:
            seen = seen & (n[None, :] > position[:, None] - window)
        m, l, acc = _attend(queries, m, l, acc, k_cache, v_cache, place, seen, inside, scale_log2, D, D_PAD)
    result = acc / tl.where(l > 0, l, 1.0)[:, None]
    tl.store(out + place_q, result.to(out.dtype.element_ty), mask=real)
