"""What CUDA adds to ``ops/graphs.py``: how work is recorded, and the plan of a bucket as one tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.ops.cuda.attention import Plan, TritonAttention
from nanovllm.ops.graphs import Work
from nanovllm.ops.operators import Array
from nanovllm.ops.transfer import upload


class CudaCapture:
    """Records work as CUDA graphs that share one memory pool: they never run at the same time.

    torch gives a pool up with its last graph, and refuses to record into it again: the next graph begins a new one.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._recorded: weakref.WeakSet[Any] = weakref.WeakSet()  # graphs that somebody can still replay
        self._stream = torch.cuda.Stream()

    def __call__(self, work: Work, plan: Tensor) -> tuple[Callable[[], None], Tensor]:
        """Returns (replay, the tensor that ``work`` returned and every replay fills again); nothing has run by then
        that a replay would not run again.

        ``work`` runs once before it is recorded, on the same stream: kernels are compiled and chosen then, which cannot
        be recorded, and libraries get the stream's workspace, which would keep a pool alive.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        if not self._recorded:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = work()
        self._recorded.add(graph)
        return graph.replay, result


class DecodePlans:
    """`BucketPlans` of Triton's attention: int32 [plan_size], which goes to the device in one transfer."""

    padding_length = 0

    def __init__(self, attention: TritonAttention) -> None:
        self._attention = attention

    def allocate(self, rows: int, device: torch.device) -> Tensor:
        """See `BucketPlans`."""
        return torch.zeros(self._attention.plan_size(rows), dtype=torch.int32, device=device)

    def fill(self, lengths: Array, plan: Tensor) -> None:
        """See `BucketPlans`."""
        filled = np.empty(plan.shape[0], np.int32)
        self._attention.fill_plan(lengths, filled)
        upload(filled, plan)

    def backend(self, plan: Tensor, rows: int) -> Plan:
        """See `BucketPlans`."""
        return self._attention.view_plan(plan, rows)
