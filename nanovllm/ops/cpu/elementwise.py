"""Norms, rotary embedding, activation and the KV write, on the C++ kernels.

Each is ``ops/reference.py``'s operator of the same name, rounded at the same points. Tensors are handed over by
address; shapes and strides the kernels do not know go to the base operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.ops.cpu.library import DTYPES, Library, QkvArguments
from nanovllm.ops.operators import Operators


class Elementwise:
    """The operators that do one thing to every number."""

    def __init__(self, library: Library, base: Operators) -> None:
        self._library = library
        self._base = base
        self._qkv = QkvArguments()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``reference.rms_norm``; x of 2 or 3 dimensions may be a view of something larger."""
        dtype = DTYPES.get(x.dtype)
        if dtype is None or x.dtype != weight.dtype or x.dim() not in (2, 3) or x.stride(-1) != 1:
            return self._base.rms_norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype)
        if x.dim() == 2:
            rows, n = x.shape
            sizes = (rows, 1, n, x.stride(0), 0)
        else:
            rows, inner, n = x.shape
            sizes = (rows, inner, n, x.stride(0), x.stride(1))
        self._library.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *sizes, eps, dtype)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See ``reference.add_rms_norm``."""
        dtype = DTYPES.get(x.dtype)
        if (
            dtype is None
            or not (x.dtype == residual.dtype == weight.dtype)
            or x.shape != residual.shape
            or not (x.is_contiguous() and residual.is_contiguous())
        ):
            return self._base.add_rms_norm(x, residual, weight, eps)
        n = x.shape[-1]
        out, total = torch.empty_like(x), torch.empty_like(x)
        self._library.add_rms_norm(
            x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr(),
            x.numel() // n if n else 0, n, eps, dtype,
        )  # fmt: skip
        return out, total

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """See ``reference.rotary``; q and k may be views, their heads side by side."""
        head_dim = q.shape[-1]
        dtype = DTYPES.get(q.dtype)
        if (
            dtype is None
            or not (q.dtype == k.dtype == cos.dtype == sin.dtype)
            or not (cos.is_contiguous() and sin.is_contiguous())
            or not all(x.stride(2) == 1 and x.stride(1) == head_dim for x in (q, k))
        ):
            return self._base.rotary(q, k, cos, sin)
        return self._rotate(q, cos, sin, dtype), self._rotate(k, cos, sin, dtype)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: int) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        tokens, heads, head_dim = x.shape
        self._library.rotary(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), tokens, heads, head_dim, x.stride(0), dtype
        )
        return out

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        """See ``reference.write_kv``."""
        tokens, kv_heads, head_dim = k.shape
        if not (
            k.dtype == v.dtype == k_cache.dtype == v_cache.dtype
            and k_cache.stride() == v_cache.stride()
            and k_cache.stride(3) == 1
            and all(x.stride(2) == 1 and x.stride(1) == head_dim for x in (k, v))
            and slot_mapping.dtype == torch.int64
            and slot_mapping.is_contiguous()
        ):
            self._base.write_kv(k, v, k_cache, v_cache, slot_mapping)
            return
        size = k.element_size()
        self._library.write_kv(
            k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), slot_mapping.data_ptr(),
            tokens, kv_heads, head_dim * size, k.stride(0), v.stride(0),
            k_cache.shape[1], k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), size,
        )  # fmt: skip

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """See ``reference.silu_and_mul``."""
        dtype = DTYPES.get(x.dtype)
        if dtype is None or x.dim() != 2 or not x.is_contiguous():
            return self._base.silu_and_mul(x)
        rows, n = x.shape[0], x.shape[1] // 2
        out = torch.empty((rows, n), dtype=x.dtype)
        self._library.silu_and_mul(x.data_ptr(), out.data_ptr(), rows, n, dtype)
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
        """``rms_norm`` of each q and k head (where it has a weight), ``rotary`` and ``write_kv`` in one pass.

        qkv [T, H + 2 Hk, D] -> q [T, H, D]. The same bits as the three operators one after the other.
        """
        tokens, all_heads, head_dim = qkv.shape
        block_stride, token_stride, head_stride, element_stride = k_cache.stride()
        kv_heads = k_cache.shape[2]
        heads = all_heads - 2 * kv_heads
        dtype = DTYPES.get(qkv.dtype)
        if (
            dtype is None
            or not (qkv.dtype == cos.dtype == sin.dtype == k_cache.dtype == v_cache.dtype)
            or not (qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous())
            or k_cache.stride() != v_cache.stride()
            or element_stride != 1
        ):
            q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
            q = q if q_weight is None else self._base.rms_norm(q, q_weight, eps)
            k = k if k_weight is None else self._base.rms_norm(k, k_weight, eps)
            q, k = self._base.rotary(q, k, cos, sin)
            self._base.write_kv(k, v, k_cache, v_cache, slot_mapping)
            return q
        q = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype)
        call = self._qkv
        call.qkv, call.q_out = qkv.data_ptr(), q.data_ptr()
        call.q_weight = None if q_weight is None else q_weight.data_ptr()
        call.k_weight = None if k_weight is None else k_weight.data_ptr()
        call.cosine, call.sine, call.slots = cos.data_ptr(), sin.data_ptr(), slot_mapping.data_ptr()
        call.k_cache, call.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
        call.tokens, call.block_size = tokens, k_cache.shape[1]
        call.block_stride, call.token_stride, call.head_stride = block_stride, token_stride, head_stride
        call.heads, call.kv_heads, call.head_dim = heads, kv_heads, head_dim
        call.eps, call.dtype = eps, dtype
        self._library.norm_rotate_write(call)
        return q
