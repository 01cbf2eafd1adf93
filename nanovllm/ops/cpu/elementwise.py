"""Norms, activation, and the steps before attention, on the C++ kernels.

Each is ``ops/reference.py``'s operator of the same name, rounded at the same points. Tensors are handed over by
address; shapes and strides the kernels do not know go to the base operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.ops.cpu.library import DTYPES, GateArguments, Library, NormArguments, QkvArguments
from nanovllm.ops.operators import Operators


class Elementwise:
    """The operators that do one thing to every number."""

    def __init__(self, library: Library, base: Operators) -> None:
        self._library = library
        self._base = base
        self._norm = NormArguments()
        self._gate = GateArguments()
        self._qkv = QkvArguments()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``reference.rms_norm``."""
        if not _alike(x, weight):
            return self._base.rms_norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype)
        call = self._norm
        call.residual = call.sum = None
        self._run_norm(x, weight, out, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See ``reference.add_rms_norm``."""
        if not _alike(x, residual, weight) or x.shape != residual.shape:
            return self._base.add_rms_norm(x, residual, weight, eps)
        out, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
        call = self._norm
        call.residual, call.sum = residual.data_ptr(), total.data_ptr()
        self._run_norm(x, weight, out, eps)
        return out, total

    def _run_norm(self, x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
        call, n = self._norm, x.shape[-1]
        call.x, call.weight, call.out = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        call.rows, call.n, call.eps, call.dtype = x.numel() // n if n else 0, n, eps, DTYPES[x.dtype]
        self._library.call(self._library.norm, call)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """See ``reference.silu_and_mul``."""
        if not _alike(x) or x.dim() != 2:
            return self._base.silu_and_mul(x)
        rows, n = x.shape[0], x.shape[1] // 2
        out = torch.empty((rows, n), dtype=x.dtype)
        call = self._gate
        call.x, call.out = x.data_ptr(), out.data_ptr()
        call.rows, call.n, call.dtype = rows, n, DTYPES[x.dtype]
        self._library.call(self._library.silu_and_mul, call)
        return out

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
        tokens, all_heads, head_dim = qkv.shape
        block_stride, token_stride, head_stride, element_stride = k_cache.stride()
        kv_heads = k_cache.shape[2]
        heads = all_heads - 2 * kv_heads
        weights = [weight for weight in (q_weight, k_weight) if weight is not None]
        if (
            not _alike(qkv, cos, sin, *weights)
            or not (qkv.dtype == k_cache.dtype == v_cache.dtype)
            or k_cache.stride() != v_cache.stride()
            or element_stride != 1
            or slot_mapping.dtype != torch.int64
            or not slot_mapping.is_contiguous()
        ):
            return self._base.norm_rotate_write(qkv, q_weight, k_weight, eps, cos, sin, k_cache, v_cache, slot_mapping)
        q = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype)
        call = self._qkv
        call.qkv, call.q_out = qkv.data_ptr(), q.data_ptr()
        call.q_weight = None if q_weight is None else q_weight.data_ptr()
        call.k_weight = None if k_weight is None else k_weight.data_ptr()
        call.cosine, call.sine, call.slots = cos.data_ptr(), sin.data_ptr(), slot_mapping.data_ptr()
        call.k_cache, call.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
        call.rows, call.block_size = tokens, k_cache.shape[1]
        call.block_stride, call.token_stride, call.head_stride = block_stride, token_stride, head_stride
        call.heads, call.kv_heads, call.head_dim = heads, kv_heads, head_dim
        call.eps, call.dtype = eps, DTYPES[qkv.dtype]
        self._library.call(self._library.norm_rotate_write, call)
        return q


def _alike(first: Tensor, *others: Tensor) -> bool:
    """Whether all are contiguous and of one dtype that the kernels know."""
    if first.dtype not in DTYPES or not first.is_contiguous():
        return False
    return all(x.dtype == first.dtype and x.is_contiguous() for x in others)
