"""Decode steps as graphs: the launches of a step are recorded for a number of rows, and replayed by one call.

A model of 28 layers is some 300 kernels, and a host takes longer to launch them than a GPU to run them. A graph runs
them again on whatever the same memory holds by then, so that everything a step depends on is copied there first:
tokens, positions, slots, block table, the plan of attention.

    step of 5 rows -> bucket of 8 -> its graph: copy 5 rows, slots of the padding block for 3, plan of 8 rows -> replay

Padded rows compute something, attend to next to nothing, write to the padding block, and nobody reads their result.
Steps with longer queries, or with more rows than the largest bucket, are launched kernel by kernel. So are those that
the device cannot record.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.operators import Array, Forward

logger = logging.getLogger("nanovllm")

# From 16 rows on, at most a third of a bucket is padding.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_TABLE_WIDTH = 1024  # blocks of a row that graphs have room for at first

Work = Callable[[], Tensor]
# (work, the bucket's plan) -> (replay, the tensor that work returned and every replay fills again)
Capture = Callable[[Work, Any], tuple[Callable[[], None], Tensor]]


class CaptureError(RuntimeError):
    """A device cannot record graphs, or no more of them; the message says why."""


class BucketPlans(Protocol):
    """What the attention of a bucket, which runs again and again, must be told of each step's rows.

    Attributes:
        padding_length: tokens in the cache of a row that is none.
    """

    padding_length: int

    def allocate(self, rows: int, device: torch.device) -> Any:
        """A place for the plan of ``rows`` decodes; where it is on the device, its address stays."""

    def fill(self, lengths: Array, plan: Any) -> None:
        """Plan rows of ``lengths`` int64 [rows] tokens, behind the work that still reads ``plan``."""

    def backend(self, plan: Any, rows: int) -> Any:
        """``AttentionMetadata.backend`` of a step that reads ``plan``."""


@dataclass(slots=True)
class DecodeGraph:
    """The step of a bucket. ``token_ids``, ``positions`` and ``slots`` int64 [rows], at addresses that stay."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    plan: Any
    run: Work  # -> hidden states [rows, hidden]


class DecodeGraphs:
    """A `Forward` that runs decodes as graphs, and everything else through ``forward``.

    Its result is valid until the next call.

    Args:
        plans: of the attention of a bucket.
        capture: how work is recorded; None runs it as it is (``enforce_eager``). Both give the same tokens, for the
            same kernels see the same padded batch.
        max_tokens: most tokens of a step.
    """

    def __init__(
        self, forward: Forward, plans: BucketPlans, capture: Capture | None, max_tokens: int, block_size: int
    ) -> None:
        self._forward, self._plans, self._capture = forward, plans, capture
        self._block_size = block_size
        self._buckets = [size for size in BUCKETS if size <= max_tokens] or [1]
        self._table: Tensor | None = None  # int32 [largest bucket, width], of all graphs
        self._padding: Tensor | None = None  # int64 [largest bucket], slots of the padding block
        self._graphs: dict[int, DecodeGraph] = {}

    def __call__(self, input_ids: Tensor, positions: Tensor, meta: AttentionMetadata) -> Tensor:
        """input_ids, positions int64 [T] -> hidden states [T, hidden]."""
        count = len(meta.seq_lens)
        if meta.num_decodes != count or count > self._buckets[-1]:
            return self._forward(input_ids, positions, meta)
        size = next(bucket for bucket in self._buckets if bucket >= count)
        table = self._place_table(meta.block_table)
        lengths = np.full(size, self._plans.padding_length, np.int64)
        lengths[:count] = meta.seq_lens
        recorded = self._graphs.get(size)
        graph = recorded or self._allocate(size, positions.device)
        torch._foreach_copy_(
            [graph.token_ids[:count], graph.positions[:count], graph.slots[:count]],
            [input_ids, positions, meta.slot_mapping],
        )
        if count < size:  # the slots of an earlier, fuller batch may be anybody's by now
            graph.slots[count:].copy_(self._padding_slots(positions.device)[: size - count])
        self._plans.fill(lengths, graph.plan)
        if recorded is None:
            graph.run = self._record(graph, size, table)
            self._graphs[size] = graph  # not before: what raises while it is recorded must not be replayed
        return graph.run()[:count]

    def release(self) -> None:
        """Give back the memory of what is recorded. It is recorded anew when it is needed."""
        self._graphs.clear()
        self._table = None

    def _place_table(self, block_table: Tensor) -> Tensor:
        """Copy a step's block table to where the graphs read it; a wider one than ever before takes a new place."""
        rows, width = block_table.shape
        if self._table is None or width > self._table.shape[1]:
            room = max(_TABLE_WIDTH, 2 * width)
            self._table = block_table.new_zeros(self._buckets[-1], room)
            self._graphs.clear()  # they read the old one
        self._table[:rows, :width].copy_(block_table)
        return self._table

    def _padding_slots(self, device: torch.device) -> Tensor:
        """Where padded rows write: each in a slot of its own, as far as the padding block goes."""
        if self._padding is None:
            self._padding = torch.arange(self._buckets[-1], device=device) % self._block_size
        return self._padding

    def _allocate(self, size: int, device: torch.device) -> DecodeGraph:
        token_ids, positions, slots = torch.zeros(3, size, dtype=torch.int64, device=device)
        return DecodeGraph(token_ids, positions, slots, self._plans.allocate(size, device), lambda: token_ids)

    def _record(self, graph: DecodeGraph, size: int, table: Tensor) -> Work:
        backend = self._plans.backend(graph.plan, size)
        longest = table.shape[1] * self._block_size

        def work() -> Tensor:
            # The lengths on the host are those of no step: what is recorded must not depend on them.
            meta = AttentionMetadata(
                query_start_loc=list(range(size + 1)),
                seq_lens=[longest] * size,
                num_decodes=size,
                max_query_len=1,
                max_seq_len=longest,
                block_table=table[:size],
                slot_mapping=graph.slots,
                block_size=self._block_size,
                backend=backend,
            )
            return self._forward(graph.token_ids, graph.positions, meta)

        if self._capture is None:
            return work
        started = time.perf_counter()
        try:
            replay, hidden = self._capture(work, graph.plan)
        except torch.OutOfMemoryError:
            logger.warning("No memory to record decode steps of %d rows: they are launched kernel by kernel", size)
            return work
        except CaptureError as error:
            logger.warning("%s: decode steps are launched kernel by kernel from now on", error)
            self._capture = None
            return work
        logger.info("Recorded decode steps of up to %d rows: %.2f s", size, time.perf_counter() - started)

        def run() -> Tensor:
            replay()
            return hidden

        return run
