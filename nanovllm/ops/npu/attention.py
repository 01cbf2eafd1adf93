"""Paged attention on Atlas A2 and A3: FusedInferAttentionScore for prompts, chunks and decodes alike.

The operator takes all lengths from the host and the cache through a block table, and has two shapes for us:

- TND, the flat batch as it is, one launch for all rows. Documented for heads of 128 only.
- BSND, a rectangle. Heads of other sizes go through it without padding: all decodes together as [B, 1, H, D], every
  longer row on its own as [1, S, H, D].

What neither takes is computed in plain torch, row by row, and is slow: float32, heads that are no multiple of 16, and a
sliding window with heads of other sizes than 128 (in BSND, a single query ignores the window). The operator checks
neither block ids nor slots; the runner has (``InputBatch``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanovllm.errors import ParameterError
from nanovllm.ops import reference
from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.operators import Array, AttentionShape

logger = logging.getLogger("nanovllm")

_TND_HEAD = 128
_LARGEST_HEAD = 512
_MASK = 2048  # the one size of mask that the operator takes for causal attention of any length
_RECTANGLE_BLOCKS = (128, 256, 384, 512)


@dataclass(slots=True)
class FusedPlan:
    """Lengths as the operator takes them, on the host: `AttentionMetadata.backend`.

    Attributes:
        query_ends: cumulative numbers of queries [B].
        kv_lengths: keys of each row [B].
    """

    query_ends: list[int]
    kv_lengths: list[int]


def why_plain(head_dim: int, dtype: torch.dtype, window: int | None) -> str | None:
    """Why the operator does not compute this attention; None if it does."""
    if dtype not in (torch.float16, torch.bfloat16):
        return str(dtype).removeprefix("torch.")
    if head_dim % 16 or head_dim > _LARGEST_HEAD:
        return f"heads of {head_dim}"
    if window is not None and head_dim != _TND_HEAD:
        return f"a sliding window with heads of {head_dim}"
    return None


class FusedAttention:
    """The operators ``prepare_attention``, ``paged_attention`` and ``tune``, and `BucketPlans` of recorded decodes.

    Args:
        library: ``npu_ops``, or what stands for it where there is no NPU.

    Attributes:
        recordable: whether a graph can hold this model's attention; plain torch decides on the host what it gathers.
    """

    padding_length = 1  # a row without keys is not documented

    def __init__(self, library: Any) -> None:
        self._library = library
        self._mask: Tensor | None = None
        self.recordable = True

    def tune(self, shape: AttentionShape, device: torch.device) -> None:
        """Look at the model.

        Raises:
            ParameterError: blocks of this size cannot be read for heads of this size.
        """
        reason = why_plain(shape.head_dim, shape.dtype, shape.window)
        if reason is not None:
            logger.warning("npu: no fused attention for %s; plain torch computes it, slowly", reason)
            self.recordable = False
        elif shape.head_dim != _TND_HEAD and shape.block_size not in _RECTANGLE_BLOCKS:
            raise ParameterError(
                f"heads of {shape.head_dim} need blocks of 128, 256, 384 or 512 tokens", "block_size", shape.block_size
            )

    def prepare_attention(self, meta: AttentionMetadata, windows: Sequence[int | None], dtype: torch.dtype) -> None:
        """See ``reference.prepare_attention``: nothing but lists that exist already."""
        meta.backend = FusedPlan(meta.query_start_loc[1:], meta.seq_lens)

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float, window: int | None
    ) -> Tensor:
        """See ``reference.paged_attention``."""
        plan: FusedPlan = meta.backend
        if why_plain(q.shape[2], q.dtype, window) is not None:
            self.recordable = False
            lengths = replace(meta, query_start_loc=[0, *plan.query_ends], seq_lens=plan.kv_lengths)
            return reference.paged_attention(q, k_cache, v_cache, lengths, scale, window)
        kv_heads, block_size = k_cache.shape[2], k_cache.shape[1]
        # Four dimensions would mean [num_blocks, Hk, block_size, D] to the operator.
        k, v = k_cache.flatten(2), v_cache.flatten(2)
        shared = {"kv_heads": kv_heads, "block_size": block_size, "scale": scale, "window": window}
        if q.shape[2] == _TND_HEAD:
            return self._library.attention(
                q.contiguous(),
                k,
                v,
                layout="TND",
                mask=self._causal_mask(q.device),
                query_lengths=plan.query_ends,
                kv_lengths=plan.kv_lengths,
                block_table=meta.block_table,
                **shared,
            )
        return self._rectangles(q.contiguous(), k, v, meta.block_table, plan, shared)

    def _rectangles(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, plan: FusedPlan, shared: dict[str, Any]
    ) -> Tensor:
        """Rows of one query side by side in one launch, the others one by one."""
        pieces = []
        for rows, queries in _spans(plan.query_ends):
            count, total = rows.stop - rows.start, queries.stop - queries.start
            out = self._library.attention(
                q[queries].unflatten(0, (count, total // count)),
                k,
                v,
                layout="BSND",
                mask=None if total == count else self._causal_mask(q.device),
                query_lengths=[total // count] * count,
                kv_lengths=plan.kv_lengths[rows],
                block_table=table[rows],
                **shared,
            )
            pieces.append(out.flatten(0, 1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _causal_mask(self, device: torch.device) -> Tensor:
        """True above the diagonal, one for all layers and steps."""
        if self._mask is None or self._mask.device != device:
            self._mask = torch.ones(_MASK, _MASK, dtype=torch.bool, device=device).triu_(1)
        return self._mask

    # ---- plans of recorded decodes ---------------------------------------------------------------------------------

    def allocate(self, rows: int, device: torch.device) -> FusedPlan:
        """See `BucketPlans`; it is all on the host."""
        return FusedPlan(list(range(1, rows + 1)), [self.padding_length] * rows)

    def fill(self, lengths: Array, plan: FusedPlan) -> None:
        """See `BucketPlans`."""
        plan.kv_lengths = lengths.tolist()

    def backend(self, plan: FusedPlan, rows: int) -> FusedPlan:
        """See `BucketPlans`."""
        return plan


def _spans(query_ends: list[int]) -> Iterator[tuple[slice, slice]]:
    """(rows, their queries): each longer row alone, and as many rows of one query at a time as stand side by side."""
    row, start = 0, 0
    while row < len(query_ends):
        stop, end = row + 1, query_ends[row]
        while end - start == stop - row and stop < len(query_ends) and query_ends[stop] == end + 1:
            stop, end = stop + 1, end + 1
        yield slice(row, stop), slice(start, end)
        row, start = stop, end
