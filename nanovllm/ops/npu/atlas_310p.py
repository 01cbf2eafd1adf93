"""Everything on an Atlas 310P (300I Duo, 300I Pro, 300V): float16, a cache in tiles of 16 numbers, launch by launch.

The cache is [num_blocks, Hk * D / 16, block_size, 16], so that blocks are still the first dimension. There are three
operators for attention: for decodes; for whole prompts, which need no cache; and for everything else (chunks, prompts
with a cached prefix, mixtures). None knows a sliding window: where one is shorter than a row, the last of them gets a
mask of every query and key of the step instead of the one that is the same for all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.errors import ParameterError
from nanovllm.ops import reference
from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.npu.elementwise import UnsignedSin
from nanovllm.ops.operators import Array, AttentionShape, Forward, Operators
from nanovllm.ops.transfer import to_device

logger = logging.getLogger("nanovllm")

_TILE = 16
_MASK = 2048
_HIDDEN = -10000.0  # added to scores that nobody shall see; the largest that float16 sums bear
_BLOCK = 128 * 128  # most numbers of one head in a block
_ROTATED = (64, 128)  # head sizes the rotary operator takes


@dataclass(slots=True)
class TilesPlan:
    """What the layers of a step share: ``AttentionMetadata.backend``.

    Attributes:
        lengths: keys of each row, int32 [B] on the device.
        query_lengths: int32 [B] on the host.
        padded_lengths: the same, those of the padding in the last row.
        decodes: every row has one query.
        window_masks: for each sliding window that hides something, what is added to the scores of the step, in tiles.
        prompt_mask: for a step of whole prompts, what is added to the scores of the longest, in tiles.
        padding: tokens that a step of whole prompts lacks to a multiple of 16; its last row has them in addition.
    """

    lengths: Tensor
    query_lengths: Tensor
    decodes: bool
    window_masks: dict[int, Tensor]
    padded_lengths: Tensor | None = None
    prompt_mask: Tensor | None = None
    padding: int = 0


class Atlas310P:
    """The operators of a 310P.

    Args:
        library: ``npu_ops``, or what stands for it where there is no NPU.
    """

    def __init__(self, base: Operators, library: Any) -> None:
        self._base, self._library = base, library
        self._unsigned = UnsignedSin()
        self._mask: Tensor | None = None
        self._slots: tuple[Tensor, Tensor] | None = None
        self._prompt_mask: Tensor | None = None
        self._fresh: tuple[Tensor, Tensor] | None = None  # what norm_rotate_write has just written

    def operators(self) -> Operators:
        """The operator table; nothing is recorded."""
        return replace(
            self._base,
            rms_norm=self._library.rms_norm,
            add_rms_norm=self._library.add_rms_norm,
            silu_and_mul=self.silu_and_mul,
            norm_rotate_write=self.norm_rotate_write,
            prepare_attention=self.prepare_attention,
            paged_attention=self.paged_attention,
            new_cache=self.new_cache,
            record=self.record,
            tune=self.tune,
            choose_by_sorting=True,
        )

    def tune(self, shape: AttentionShape, device: torch.device) -> None:
        """Look at the model.

        Raises:
            ParameterError: its heads or its blocks are none for this chip.
        """
        if shape.head_dim % _TILE or shape.head_dim > 256:
            raise ParameterError(
                f"a 310P has attention for heads of 16, 32 ... 256, not of {shape.head_dim}", "device", "npu"
            )
        if shape.block_size * shape.head_dim > _BLOCK:
            raise ParameterError(f"heads of {shape.head_dim} need blocks of 64", "block_size", shape.block_size)

    def record(self, forward: Forward, max_tokens: int, block_size: int, eager: bool = False) -> None:
        """See ``reference.record``: nothing is."""
        if not eager:
            logger.info("npu: a 310P has no graphs; steps are launched kernel by kernel, as with --enforce-eager")

    def new_cache(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Keys or values of a layer, in tiles."""
        shape = (num_blocks, kv_heads * head_dim // _TILE, block_size, _TILE)
        return self._library.to_tiles(torch.zeros(shape, dtype=dtype, device=device))

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """See ``reference.silu_and_mul``."""
        return self._library.silu_and_mul(x) if x.shape[1] % 32 == 0 else self._base.silu_and_mul(x)

    def norm_rotate_write(
        self,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """See ``reference.norm_rotate_write``."""
        library, kv_heads = self._library, k_cache.shape[1] * _TILE // qkv.shape[2]
        q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
        q = q if q_weight is None else library.rms_norm(q.contiguous(), q_weight, eps)
        k = k if k_weight is None else library.rms_norm(k.contiguous(), k_weight, eps)
        if qkv.shape[2] in _ROTATED:
            q, k = library.rotate_both(q.contiguous(), k.contiguous(), cos, self._unsigned(sin))
        else:
            q, k = reference.rotary(q, k, cos, sin)
        k, v = k.contiguous(), v.contiguous()
        library.write_kv_tiles(k, v, k_cache, v_cache, self._narrow(slot_mapping))
        self._fresh = k, v
        return q

    def _narrow(self, slots: Tensor) -> Tensor:
        """The slots of a step in int32, for all layers. Every step has a tensor of its own: nothing is recorded
        here."""
        if self._slots is None or self._slots[0] is not slots:
            self._slots = slots, slots.to(torch.int32)
        return self._slots[1]

    def prepare_attention(self, meta: AttentionMetadata, windows: Sequence[int | None], dtype: torch.dtype) -> None:
        """See ``reference.prepare_attention``."""
        device = meta.block_table.device
        queries = np.diff(meta.query_start_loc).astype(np.int32)
        plan = meta.backend = TilesPlan(
            lengths=to_device(np.array(meta.seq_lens, np.int32), device),
            query_lengths=torch.from_numpy(queries),
            decodes=meta.max_query_len == 1,
            window_masks={
                window: self._window_mask(meta, queries, window, dtype)
                for window in windows
                if window is not None and window < meta.max_seq_len
            },
        )
        padding = -meta.query_start_loc[-1] % _TILE
        if not plan.decodes and queries.tolist() == meta.seq_lens and meta.max_seq_len + padding <= _MASK:
            padded = queries.copy()
            padded[-1] += padding
            plan.padded_lengths, plan.padding = torch.from_numpy(padded), padding
            plan.prompt_mask = self._tiled_mask(int(padded.max()), dtype, device)

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float, window: int | None
    ) -> Tensor:
        """See ``reference.paged_attention``."""
        plan: TilesPlan = meta.backend
        kv_heads = k_cache.shape[1] * _TILE // q.shape[2]
        q, caches = q.contiguous(), (k_cache, v_cache, meta.block_table, plan.lengths)
        if window is not None and window in plan.window_masks:
            mask = plan.window_masks[window]
            return self._library.masked_attention(q, *caches, plan.query_lengths, mask, kv_heads, scale)
        if plan.decodes:
            return self._library.decode_attention(q, *caches, kv_heads, scale)
        if plan.prompt_mask is None:
            mask = self._causal_mask(q.dtype, q.device)
            return self._library.chunk_attention(q, *caches, plan.query_lengths, mask, kv_heads, scale)
        assert self._fresh is not None  # a layer writes its keys and values before it attends to them
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, plan.padding)) if plan.padding else x for x in (q, *self._fresh))
        out = self._library.prompt_attention(q, k, v, plan.padded_lengths, plan.prompt_mask, kv_heads, scale)
        return out[: len(out) - plan.padding]

    def _window_mask(self, meta: AttentionMetadata, queries: Array, window: int, dtype: torch.dtype) -> Tensor:
        """[1, K / 16, T, 16] for the T queries of a step and the K keys of its longest row, both rounded up to 16."""
        device, total = meta.block_table.device, meta.query_start_loc[-1]
        positions = np.zeros(-(-total // _TILE) * _TILE, np.int32)
        ends = np.repeat(np.array(meta.seq_lens) - np.array(meta.query_start_loc[1:]), queries)
        positions[:total] = np.arange(total) + ends
        at = to_device(positions, device).unsqueeze(1)
        keys = torch.arange(-(-meta.max_seq_len // _TILE) * _TILE, dtype=torch.int32, device=device)
        hidden = (keys > at) | (keys <= at - window)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, _HIDDEN)
        return self._library.to_tiles(mask.unflatten(1, (-1, _TILE)).transpose(0, 1).contiguous().unsqueeze(0))

    def _causal_mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What is added to scores: one for all layers and steps."""
        if self._mask is None or self._mask.device != device:
            self._mask = torch.full((_MASK, _MASK), _HIDDEN, dtype=dtype, device=device).triu_(1)
        return self._mask

    def _tiled_mask(self, longest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The first rows and columns of the mask, [1, S / 16, S, 16]; S is ``longest`` rounded up."""
        size = -(-longest // _TILE) * _TILE
        if self._prompt_mask is None or self._prompt_mask.shape[2] != size:
            square = self._causal_mask(dtype, device)[:size, :size]
            tiles = square.unflatten(1, (-1, _TILE)).transpose(0, 1).contiguous()
            self._prompt_mask = self._library.to_tiles(tiles.unsqueeze(0))
        return self._prompt_mask
