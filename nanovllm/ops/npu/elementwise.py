"""Norms, rotary embedding, activations and writes to the cache through torch_npu, on Atlas A2 and A3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanovllm.ops.operators import Operators

_ROTATED_BOTH = (64, 128)  # head sizes of the operator that rotates q and k in one launch
_GROUPED = (torch.float16, torch.bfloat16)  # what the grouped product takes with several results


class UnsignedSin:
    """Our table's sin carries the minus sign of the rotation in its first half, torch_npu wants it without.

    All layers of a step pass the same tensor, so that the sign is taken away once. It is kept for as long as that
    tensor is the last one, and keeps it alive: no other can take its place in memory meanwhile.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None
        self._sign: Tensor | None = None

    def __call__(self, sin: Tensor) -> Tensor:
        """sin [T, 1, D] with the sign -> without."""
        if self._last is None or self._last[0] is not sin:
            if self._sign is None or self._sign.shape[0] != sin.shape[-1] or self._sign.dtype != sin.dtype:
                self._sign = torch.ones(sin.shape[-1], dtype=sin.dtype, device=sin.device)
                self._sign[: sin.shape[-1] // 2] = -1
            self._last = sin, sin * self._sign
        return self._last[1]


class NpuElementwise:
    """The operators that do one thing to every number.

    Args:
        library: ``npu_ops``, or what stands for it where there is no NPU.
    """

    def __init__(self, base: Operators, library: Any) -> None:
        self._base, self._library = base, library
        self._unsigned = UnsignedSin()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``reference.rms_norm``."""
        return self._library.rms_norm(x, weight, eps) if x.numel() else self._base.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See ``reference.add_rms_norm``."""
        library = self._library if x.numel() else self._base
        return library.add_rms_norm(x, residual, weight, eps)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """See ``reference.silu_and_mul``."""
        return self._library.silu_and_mul(x) if x.numel() else self._base.silu_and_mul(x)

    def linear_parts(self, x: Tensor, packed: Any, bias: Tensor | None, widths: Sequence[int]) -> Sequence[Tensor]:
        """x [T, in] -> the products with the rows of ``packed`` that make up each part, [T, width] each.

        One grouped product in 16 bits, whose results are contiguous: what comes next takes nothing else, and would copy
        q, k and v out of a common product. With a bias, in float32 or with weights in 8 bits, which that operator does
        not take so, the parts are views of one product.
        """
        if not isinstance(packed, Tensor) or bias is not None or x.dtype not in _GROUPED or not x.numel():
            return self._base.linear(x, packed, bias).split(list(widths), 1)
        return self._library.grouped_linear(x, packed.split(list(widths)))

    def norm_rotate_write(
        self,
        qkv: Tensor | Sequence[Tensor],
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """See ``reference.norm_rotate_write``; q, k and v may come apart, and then q and k may be overwritten.

        Apart, 4 launches with norms and 2 without (for heads of 64 and 128; one more for others). As views of one
        product, one more with norms, two without.
        """
        library, kv_heads = self._library, k_cache.shape[2]
        if isinstance(qkv, Tensor):
            qkv = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
        q, k, v = qkv
        sin = self._unsigned(sin)
        q = q if q_weight is None else library.rms_norm(q, q_weight, eps)
        k = k if k_weight is None else library.rms_norm(k, k_weight, eps)
        if q.shape[2] in _ROTATED_BOTH and q.numel() and q.is_contiguous() and k.is_contiguous():
            q, k = library.rotate_both(q, k, cos, sin)
        else:
            q, k = library.rotate(q, cos, sin), library.rotate(k, cos, sin)
        library.write_kv(k, v.contiguous(), k_cache, v_cache, slot_mapping)
        return q
