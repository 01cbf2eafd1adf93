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
from typing import Any

import torch
from torch import Tensor

from nanovllm.ops.graphs import CaptureError, Work
from nanovllm.ops.npu.attention import FusedAttention, FusedPlan


class NpuCapture:
    """Records work as NPU graphs that share one memory pool: they never run at the same time."""

    def __init__(self, attention: FusedAttention) -> None:
        self._attention = attention
        self._resources: tuple[Any, Any] | None = None  # memory pool, and the stream that is recorded
        self._replayed: Any = None  # event: the last replay has run

    def __call__(self, work: Work, plan: FusedPlan) -> tuple[Callable[[], None], Tensor]:
        """See `Capture`. ``work`` runs once before it is recorded, so that nothing is made or chosen meanwhile.

        Raises:
            CaptureError: the device cannot record this, or no more of it.
        """
        work()
        if not self._attention.recordable:
            raise CaptureError("npu: attention in plain torch cannot be recorded")
        try:
            graph, result = self._record(work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(f"npu: a graph could not be recorded ({_reason(error)})") from error
        if self._replayed is None:
            self._replayed = torch.npu.Event()

        def replay() -> None:
            self._replayed.synchronize()  # at once, if it was never recorded
            graph.replay()
            self._replayed.record()
            graph.update(cpu_update_input=[{"actual_seq_lengths_kv": plan.kv_lengths}])

        return replay, result

    def _record(self, work: Work) -> tuple[Any, Tensor]:
        if self._resources is None:
            self._resources = torch.npu.graph_pool_handle(), torch.npu.Stream()
        pool, stream = self._resources
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph, pool=pool, stream=stream, auto_dispatch_capture=True):
            result = work()
        return graph, result


def _reason(error: RuntimeError) -> str:
    """The line of an error of torch_npu that says what is wrong; the first is where in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(word in str(error) for word in ("207005", "207008", "tream resource")):
        return "the device has no streams left, of which every graph takes some"
    return lines[0] if lines else "no reason given"
