"""Decode steps as CUDA graphs: the launches of a step are recorded for a number of rows, and replayed by one call.

A model of 28 layers is some 300 kernels, and a host takes longer to launch them than a GPU to run them. A graph runs
them again on whatever the same memory holds by then, so that everything a step depends on is copied there first:
tokens, positions, slots, block table, the plan of attention.

    step of 5 rows -> bucket of 8 -> its graph: copy 5 rows, slots of the other 3 = 0, plan of 8 rows -> replay

Padded rows compute something, attend to nothing, write to the padding block, and nobody reads their result. Steps with
longer queries, or with more rows than the largest bucket, are launched kernel by kernel. So are those that memory does
not suffice to record.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.ops.cuda.attention import Plan, TritonAttention
from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.operators import Forward
from nanovllm.ops.transfer import upload

logger = logging.getLogger("nanovllm")

# From 16 rows on, at most a third of a bucket is padding.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_TABLE_WIDTH = 1024  # blocks of a row that graphs have room for at first

Work = Callable[[], Tensor]
Capture = Callable[[Work], tuple[Callable[[], None], Tensor]]


class CudaCapture:
    """Records work as CUDA graphs that share one memory pool: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """Returns (replay, the tensor that ``work`` returned and every replay fills again); nothing has run by then
        that a replay would not run again.

        ``work`` runs once before it is recorded: kernels are compiled and chosen then, which cannot be recorded.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


@dataclass(slots=True)
class DecodeGraph:
    """The step of a bucket. ``plan`` int32, the others int64 [rows]: all at addresses that stay."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    plan: Tensor
    run: Work  # -> hidden states [rows, hidden]


class DecodeGraphs:
    """A `Forward` that runs decodes as graphs, and everything else through ``forward``.

    Its result is valid until the next call.

    Args:
        attention: plans the attention of a bucket.
        capture: how work is recorded; None runs it as it is (``enforce_eager``). Both give the same tokens, for the
            same kernels see the same padded batch.
        max_tokens: most tokens of a step.
    """

    def __init__(
        self, forward: Forward, attention: TritonAttention, capture: Capture | None, max_tokens: int, block_size: int
    ) -> None:
        self._forward, self._attention, self._capture = forward, attention, capture
        self._block_size = block_size
        self._buckets = [size for size in BUCKETS if size <= max_tokens] or [1]
        self._table: Tensor | None = None  # int32 [largest bucket, width], of all graphs
        self._graphs: dict[int, DecodeGraph] = {}

    def __call__(self, input_ids: Tensor, positions: Tensor, meta: AttentionMetadata) -> Tensor:
        """input_ids, positions int64 [T] -> hidden states [T, hidden]."""
        count = len(meta.seq_lens)
        if meta.num_decodes != count or count > self._buckets[-1]:
            return self._forward(input_ids, positions, meta)
        size = next(bucket for bucket in self._buckets if bucket >= count)
        table = self._place_table(meta.block_table)
        lengths = np.zeros(size, np.int64)
        lengths[:count] = meta.seq_lens
        plan = np.empty(self._attention.plan_size(size), np.int32)
        self._attention.fill_plan(lengths, plan)
        recorded = self._graphs.get(size)
        graph = recorded or self._allocate(size, positions.device)
        torch._foreach_copy_(
            [graph.token_ids[:count], graph.positions[:count], graph.slots[:count]],
            [input_ids, positions, meta.slot_mapping],
        )
        if count < size:  # the slots of an earlier, fuller batch may be anybody's by now
            graph.slots[count:].zero_()
        upload(plan, graph.plan)
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

    def _allocate(self, size: int, device: torch.device) -> DecodeGraph:
        token_ids, positions, slots = torch.zeros(3, size, dtype=torch.int64, device=device)
        plan = torch.zeros(self._attention.plan_size(size), dtype=torch.int32, device=device)
        return DecodeGraph(token_ids, positions, slots, plan, lambda: token_ids)

    def _record(self, graph: DecodeGraph, size: int, table: Tensor) -> Work:
        backend: Plan = self._attention.view_plan(graph.plan, size)
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
            replay, hidden = self._capture(work)
        except torch.OutOfMemoryError:
            logger.warning("No memory to record decode steps of %d rows: they are launched kernel by kernel", size)
            return work
        logger.info("Recorded decode steps of up to %d rows: %.2f s", size, time.perf_counter() - started)

        def run() -> Tensor:
            replay()
            return hidden

        return run
