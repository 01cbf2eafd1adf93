"""Paged attention on Triton kernels: plans of a step, and the launches of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import triton
from torch import Tensor

from nanovllm.ops.cuda.attention_kernels import decode_kernel, merge_kernel, tile_kernel
from nanovllm.ops.cuda.attention_plan import Array, cut_queries, split_decodes
from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.transfer import to_device

_LOG2_E = math.log2(math.e)
_SPLIT_TILE = 64  # a row is cut at multiples of so many keys, at least


@dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel's tiles: ``lines`` (query, head) pairs by ``keys`` keys, and how they are pipelined."""

    lines: int
    keys: int
    warps: int
    stages: int


def decode_tiles(head_dim: int, itemsize: int, shared_memory: int) -> Tiles:
    """For one query per row."""
    row = head_dim * itemsize  # bytes
    keys = 64 if row <= 256 else 32 if row <= 512 else 16
    return Tiles(16, keys, 4, _stages(2 * keys * row, 16 * row, shared_memory))


def long_tiles(head_dim: int, itemsize: int, shared_memory: int) -> Tiles:
    """For many queries per row. Without matrix units (float32), what a tile multiplies has to fit into registers."""
    row = head_dim * itemsize  # bytes
    if itemsize == 4:
        lines, keys = 16, 32 if row <= 512 else 16
    else:
        lines, keys = (128, 64) if row <= 256 else (64, 32)
    return Tiles(lines, keys, 8 if lines == 128 else 4, _stages(2 * keys * row, lines * row, shared_memory))


def _stages(per_stage: int, fixed: int, shared_memory: int) -> int:
    """Three, where two tiles of keys and values fit: the block table is read two steps ahead, what it points to one."""
    return max(1, min(3, 1 + (shared_memory - fixed) // per_stage))


@dataclass(slots=True)
class DecodePlan:
    """Rows with one new token, cut into items: int32 tensors on the device, as `split_decodes` makes them."""

    seq_lens: Tensor  # [rows]
    item_start: Tensor  # [rows + 1]
    item_row: Tensor  # [capacity]


@dataclass(slots=True)
class LongPlan:
    """Rows with several new tokens; ``cut`` makes tiles of them when the first layer knows how large they are."""

    seq_lens: Tensor  # int32 [B]
    query_start: Tensor  # int32 [B + 1]
    query_start_host: Array
    seq_lens_host: Array
    first_row: int
    _tiles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _key_starts: Tensor | None = None
    _slots: Tensor | None = None

    def cut(self, queries: int) -> tuple[Tensor, Tensor]:
        """Row and first query of every tile of ``queries`` queries, int32 on the device."""
        if queries not in self._tiles:
            tile_row, tile_first = cut_queries(self.query_start_host, self.first_row, queries)
            both = to_device(np.stack([tile_row, tile_first]), self.seq_lens.device)
            self._tiles[queries] = both[0], both[1]
        return self._tiles[queries]

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest of these rows."""
        return int(self.seq_lens_host[self.first_row :].max())

    @property
    def max_query_len(self) -> int:
        """New tokens of the row that has most of them."""
        return int(np.diff(self.query_start_host[self.first_row :]).max())

    @property
    def starts(self) -> Tensor:
        """Where each of these rows begins among their queries: int32 [rows + 1]."""
        return self.query_start[self.first_row :] - self.first_row  # one token of every decode comes before

    @property
    def key_starts(self) -> Tensor:
        """Where each of these rows begins among all of their tokens: int32 [rows + 1]."""
        if self._key_starts is None:
            lengths = self.seq_lens[self.first_row :]
            self._key_starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return self._key_starts

    def slots(self, table: Tensor, block_size: int) -> Tensor:
        """Slots of all tokens of these rows, one after the other: int64."""
        if self._slots is None:
            lengths = self.seq_lens[self.first_row :]
            total = int(self.seq_lens_host[self.first_row :].sum())  # known: the device need not be asked
            rows = torch.arange(len(lengths), device=table.device).repeat_interleave(lengths, output_size=total)
            position = torch.arange(total, device=table.device) - self.key_starts[rows]
            blocks = table[self.first_row :][rows, position // block_size].long()
            self._slots = blocks * block_size + position % block_size
        return self._slots


@dataclass(slots=True)
class Plan:
    """What the layers of a step share: ``AttentionMetadata.backend``."""

    decodes: DecodePlan | None
    long: LongPlan | None


class TritonAttention:
    """The operators ``prepare_attention`` and ``paged_attention``, and the plans of steps that are captured.

    Args:
        multiprocessors: SMs of the GPU, which should all have work.
        shared_memory: bytes of it a program may use.
    """

    def __init__(self, multiprocessors: int, shared_memory: int) -> None:
        self._multiprocessors = multiprocessors
        self._shared_memory = shared_memory

    # ---- plans -----------------------------------------------------------------------------------------------------

    def capacity(self, rows: int) -> int:
        """Items that ``rows`` decodes are cut into at most: one each, and one per SM for those that are long."""
        return rows + self._multiprocessors

    def plan_size(self, rows: int) -> int:
        """int32 words of the plan of ``rows`` decodes."""
        return 2 * rows + 1 + self.capacity(rows)

    def fill_plan(self, seq_lens: Array, out: Array) -> None:
        """Write the plan of decodes with ``seq_lens`` [rows] tokens (0: a padded row) to ``out`` int32 [plan_size]."""
        item_start, item_row = split_decodes(seq_lens, self.capacity(len(seq_lens)), _SPLIT_TILE)
        np.concatenate([seq_lens, item_start, item_row], out=out, casting="unsafe")

    def view_plan(self, plan: Tensor, rows: int) -> Plan:
        """What ``fill_plan`` wrote, by now on the device, as the kernels take it."""
        return Plan(DecodePlan(*plan.split([rows, rows + 1, self.capacity(rows)])), None)

    def prepare_attention(self, meta: AttentionMetadata, windows: Sequence[int | None], dtype: torch.dtype) -> None:
        """See ``reference.prepare_attention``; all goes to the device in one transfer."""
        decodes, rows = meta.num_decodes, len(meta.seq_lens)
        seq_lens = np.array(meta.seq_lens, np.int32)
        query_start = np.array(meta.query_start_loc, np.int32)
        size = self.plan_size(decodes) if decodes else 0
        packed = np.empty(size + 2 * rows + 1, np.int32)
        if decodes:
            self.fill_plan(seq_lens[:decodes], packed[:size])
        np.concatenate([seq_lens, query_start], out=packed[size:])
        on_device = to_device(packed, meta.block_table.device)
        plan = self.view_plan(on_device[:size], decodes) if decodes else Plan(None, None)
        if query_start[-1] > decodes:
            all_lens, starts = on_device[size:].split([rows, rows + 1])
            plan.long = LongPlan(all_lens, starts, query_start, seq_lens, decodes)
        meta.backend = plan

    # ---- launches --------------------------------------------------------------------------------------------------

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float, window: int | None
    ) -> Tensor:
        """See ``reference.paged_attention``; the caches may have another dtype than q."""
        q, table, plan = q.contiguous(), meta.block_table, meta.backend
        out = torch.empty_like(q)
        cache = (*k_cache.stride()[:3],)
        if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1 or table.stride(1) != 1:
            raise ValueError("the caches must be laid out alike, heads and rows of the block table without gaps")
        layer = Layer(q, k_cache, v_cache, out, table, window or 0, cache, scale)
        if plan.decodes is not None:
            self.decode(layer, plan.decodes)
        if plan.long is not None:
            self.long(layer, plan.long)
        return out

    def decode(self, layer: Layer, plan: DecodePlan) -> None:
        """Rows with one new token, the first of ``layer.q``; their result goes to ``layer.out``."""
        q, (heads, group, head_dim, head_pad) = layer.q, layer.shape
        capacity, rows = plan.item_row.shape[0], plan.seq_lens.shape[0]
        partial = torch.empty((capacity, heads, head_dim), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty((capacity, heads), dtype=torch.float32, device=q.device)
        tiles = decode_tiles(head_pad, q.element_size(), self._shared_memory)
        decode_kernel[(capacity, heads // group)](
            q, layer.k_cache, layer.v_cache, layer.out, partial, partial_lse,
            layer.table, plan.seq_lens, plan.item_start, plan.item_row, *layer.numbers,
            H=heads, GROUP=group, D=head_dim, GROUP_PAD=max(tiles.lines, triton.next_power_of_2(group)), D_PAD=head_pad,
            BLOCK_N=tiles.keys, WINDOWED=layer.window > 0, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        merge_kernel[(rows, heads)](
            partial, partial_lse, layer.out, plan.item_start, H=heads, D=head_dim, D_PAD=head_pad, PIECES=16
        )

    def long(self, layer: Layer, plan: LongPlan) -> None:
        """Rows with several new tokens, behind those with one."""
        q, (heads, group, head_dim, head_pad) = layer.q, layer.shape
        tiles = long_tiles(head_pad, q.element_size(), self._shared_memory)
        lines = max(tiles.lines, triton.next_power_of_2(group))
        tile_row, tile_first = plan.cut(lines // group)
        tile_kernel[(tile_row.shape[0], heads // group)](
            q, layer.k_cache, layer.v_cache, layer.out,
            layer.table, plan.seq_lens, plan.query_start, tile_row, tile_first, *layer.numbers,
            H=heads, GROUP=group, D=head_dim, D_PAD=head_pad,
            BLOCK_M=lines, BLOCK_N=tiles.keys, WINDOWED=layer.window > 0,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


@dataclass(slots=True)
class Layer:
    """One call's arguments, as the kernels take them."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    out: Tensor
    table: Tensor
    window: int  # 0: none
    cache_strides: tuple[int, ...]
    scale: float

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Query heads, heads that share a KV head, head size, and that padded."""
        heads, head_dim = self.q.shape[1:]
        return heads, heads // self.k_cache.shape[2], head_dim, max(16, triton.next_power_of_2(head_dim))

    @property
    def is_flash(self) -> bool:
        """Whether flash attention of other libraries covers it: 16 bits, also in the cache, and whole vectors."""
        q = self.q
        half = q.dtype in (torch.float16, torch.bfloat16) and self.k_cache.dtype == q.dtype
        return half and q.shape[2] % 8 == 0 and q.shape[2] <= 256

    def gather(self, plan: LongPlan) -> tuple[Tensor, Tensor]:
        """Keys and values of rows with several new tokens in one piece: two of [tokens, Hk, D]."""
        slots = plan.slots(self.table, self.k_cache.shape[1])
        k, v = (cache.flatten(0, 1).index_select(0, slots) for cache in (self.k_cache, self.v_cache))
        return k, v

    @property
    def reach(self) -> tuple[int, int]:
        """Keys that a query sees before and behind its own, as flash attention counts them; -1: all."""
        return (self.window - 1 if self.window else -1, 0)

    @property
    def numbers(self) -> tuple[float, ...]:
        """Stride of the block table, window, block size, strides of the caches, scale in base 2."""
        return (self.table.stride(0), self.window, self.k_cache.shape[1], *self.cache_strides, self.scale * _LOG2_E)
