"""What an NPU adds to ``ops/graphs.py``: how work is recorded, and how a recorded graph learns of other lengths.

The lengths that attention takes from the host are numbers inside a recorded graph. torch_npu puts every attention of
the recording behind an event, and ``update`` gives it new numbers and signals the event; it runs on a stream of its
own. So

    wait for the last replay -> replay (runs up to the first attention) -> update layer by layer -> ...

The first wait is there since an update changes the graph itself: while an earlier replay is still on its way to a
layer, it would take the new numbers. It costs little: the host has planned the step by then, and sampling goes on
meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanovllm.ops.graphs import CaptureError, Work
from nanovllm.ops.npu.attention import FusedAttention, FusedPlan


class NpuCapture:
    """Records work as NPU graphs that share one memory pool: they never run at the same time."""

    def __init__(self, attention: FusedAttention) -> None:
        self._attention = attention
        self._pool = torch.npu.graph_pool_handle()
        self._stream = torch.npu.Stream()
        self._replayed: torch.npu.Event | None = None  # the last replay has run

    def __call__(self, work: Work, plan: FusedPlan) -> tuple[Callable[[], None], Tensor]:
        """See `Capture`. ``work`` runs once before it is recorded, so that nothing is made or chosen meanwhile.

        Raises:
            CaptureError: the device cannot record this, or no more of it.
        """
        self._stream.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(self._stream):
            work()
        torch.npu.current_stream().wait_stream(self._stream)
        if not self._attention.recordable:
            raise CaptureError("npu: attention in plain torch cannot be recorded")
        graph = torch.npu.NPUGraph()
        try:
            with torch.npu.graph(graph, pool=self._pool, stream=self._stream, auto_dispatch_capture=True):
                result = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise CaptureError(f"npu: a graph could not be recorded ({first}); streams may be used up") from error

        def replay() -> None:
            if self._replayed is None:
                self._replayed = torch.npu.Event()
            else:
                self._replayed.synchronize()
            graph.replay()
            self._replayed.record()
            graph.update(cpu_update_input=[{"actual_seq_lengths_kv": plan.kv_lengths}])

        return replay, result
