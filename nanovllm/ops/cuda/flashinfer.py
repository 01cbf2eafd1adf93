"""Longer queries through FlashInfer, where it is installed; decodes stay with Triton, whose plans can be recorded."""

from __future__ import annotations

import importlib.util
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.errors import ParameterError
from nanovllm.ops.cuda.attention import Layer, LongPlan, TritonAttention
from nanovllm.ops.operators import Array
from nanovllm.ops.transfer import to_device

_WORKSPACE = 128 << 20  # bytes for partial results, as FlashInfer recommends
_HEAD_DIMS = (64, 128, 256)


class FlashInferAttention(TritonAttention):
    """As `TritonAttention`, but rows with several new tokens go to FlashInfer, which reads a cache of any blocks.

    It plans on the host, once per step and kind of layer (window and scale).

    Raises:
        ParameterError: FlashInfer is not installed, or cannot be loaded.
    """

    def __init__(self, multiprocessors: int, shared_memory: int) -> None:
        super().__init__(multiprocessors, shared_memory)
        try:
            self._wrapper: Any = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper
        except (ImportError, OSError) as error:
            raise ParameterError(
                f"FlashInfer is not installed, or not for this torch ({error}); install flashinfer-python, or use "
                "'triton'",
                "attention_backend",
                "flashinfer",
            ) from error
        self._workspace: Tensor | None = None
        self._wrappers: dict[tuple[int, float], Any] = {}  # by window and scale
        self._planned: dict[tuple[int, float], LongPlan] = {}  # what each has been told last

    def long(self, layer: Layer, plan: LongPlan) -> None:
        """See `TritonAttention.long`."""
        if not layer.is_flash or layer.q.shape[2] not in _HEAD_DIMS:
            super().long(layer, plan)
            return
        kind = layer.window, layer.scale
        if kind not in self._wrappers:
            if self._workspace is None:  # one for all: layers run one after the other
                self._workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=layer.q.device)
            self._wrappers[kind] = self._wrapper(self._workspace, "NHD")
        if self._planned.get(kind) is not plan:
            self._plan(self._wrappers[kind], layer, plan)
            self._planned[kind] = plan
        layer.out[plan.first_row :] = self._wrappers[kind].run(
            layer.q[plan.first_row :], (layer.k_cache, layer.v_cache)
        )

    @staticmethod
    def _plan(wrapper: Any, layer: Layer, plan: LongPlan) -> None:
        block_size, first = layer.k_cache.shape[1], plan.first_row
        table, lengths = layer.table[first:], plan.seq_lens_host[first:]
        blocks = -(-lengths // block_size)
        used = to_device(np.flatnonzero(np.arange(table.shape[1]) < blocks[:, None]), table.device)
        wrapper.plan(
            _host(plan.query_start_host[first:] - first, table.device),
            _host(np.concatenate([[0], blocks.cumsum()]), table.device),
            table.flatten().index_select(0, used),
            _host((lengths - 1) % block_size + 1, table.device),
            layer.q.shape[1],
            layer.k_cache.shape[2],
            layer.q.shape[2],
            block_size,
            causal=True,
            sm_scale=layer.scale,
            window_left=layer.reach[0],
            q_data_type=layer.q.dtype,
            kv_data_type=layer.k_cache.dtype,
        )


def is_ready() -> bool:
    """Whether FlashInfer is installed with its kernels compiled; else each is compiled when first used, for minutes."""
    return all(importlib.util.find_spec(name) is not None for name in ("flashinfer", "flashinfer_jit_cache"))


def _host(array: Array, device: torch.device) -> Tensor:
    """int32 on the host, where FlashInfer plans; pinned, so that its copy to the device makes nobody wait."""
    tensor = torch.from_numpy(array.astype(np.int32))
    return tensor if device.type == "cpu" else tensor.pin_memory()
