"""q/k norm, rotation and the write to the cache as one operator of our own, instead of five launches of torch_npu's.

torch_npu has no operator that goes from the product q | k | v to attention: in its place run two norms, a rotation, a
write, and a copy that makes v contiguous. This one reads the product once.

Nobody has run it on an NPU yet: it is used only where ``NANOVLLM_ASCEND_FUSED`` is "1", and wherever it cannot be, the
operators of torch_npu are. What is shown without an NPU: the numbers, under Triton's interpreter, and that
triton-ascend lowers it to linalg, the last form before CANN's own compiler.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from importlib import metadata

import torch
from torch import Tensor

from nanovllm.ops.operators import Operators

logger = logging.getLogger("nanovllm")

VARIABLE = "NANOVLLM_ASCEND_FUSED"
_VECTOR_CORES = 40  # of the smallest 910B; more programs than cores take turns
_TILE_BYTES = 24 * 1024  # of half of the query heads of a token in float32; some six such tiles live at once


class FusedNormRotateWrite:
    """``norm_rotate_write`` in one launch; shapes that the kernel does not know go to ``base``.

    A launch that fails (no compiler, a CANN that does not fit) is the last one: from then on ``base`` does the work.
    """

    def __init__(self, base: Operators, programs: int = _VECTOR_CORES) -> None:
        self._base, self._programs = base, programs
        self._works = True

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
        arguments = (qkv, q_weight, k_weight, eps, cos, sin, k_cache, v_cache, slot_mapping)
        if not (self._works and _knows(qkv, q_weight, k_weight, cos, sin, k_cache, v_cache)):
            return self._base.norm_rotate_write(*arguments)
        try:
            return self._launch(*arguments)
        except Exception as error:
            logger.warning(
                "The fused operator of %s=1 cannot be used (%s: %s); torch_npu's operators are used instead.",
                VARIABLE, type(error).__name__, error,
            )  # fmt: skip
            self._works = False
            return self._base.norm_rotate_write(*arguments)

    def _launch(
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
        tokens, all_heads, head_dim = qkv.shape
        kv_heads = k_cache.shape[2]
        heads = all_heads - 2 * kv_heads
        q = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
        if tokens:
            from nanovllm.ops.npu.fused_kernel import norm_rotate_write_kernel

            norm_rotate_write_kernel[(min(tokens, self._programs),)](
                qkv, q_weight if q_weight is not None else qkv, k_weight if k_weight is not None else qkv,
                cos, sin, slot_mapping, q, k_cache, v_cache, tokens, eps,
                H=heads, HK=kv_heads, D=head_dim, NORM=q_weight is not None, **tiles(heads, kv_heads, head_dim),
            )  # fmt: skip
        return q


def tiles(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """Sizes of the kernel's tiles: powers of two that hold the heads, half of a head, and the values of a token."""
    sizes = {"Q_ROWS": heads, "K_ROWS": kv_heads, "COLUMNS": head_dim // 2, "VALUES": kv_heads * head_dim}
    return {name: 1 << (size - 1).bit_length() for name, size in sizes.items()}


def _knows(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> bool:
    """Whether everything lies as the kernel reads it, in one dtype, and fits a vector core."""
    weights = [weight for weight in (q_weight, k_weight) if weight is not None]
    tensors = [qkv, cos, sin, k_cache, v_cache, *weights]
    size = tiles(qkv.shape[1] - 2 * k_cache.shape[2], k_cache.shape[2], qkv.shape[2]) if k_cache.dim() == 4 else {}
    return (
        len(weights) != 1
        and k_cache.dim() == 4  # [blocks, block size, heads, head_dim]: not the tiled cache of a 310P
        and qkv.shape[2] % 2 == 0
        and all(tensor.is_contiguous() and tensor.dtype == qkv.dtype for tensor in tensors)
        and 4 * max(size["Q_ROWS"], size["K_ROWS"]) * size["COLUMNS"] <= _TILE_BYTES
    )


def with_fused(base: Operators) -> Operators:
    """``base`` with the fused operator in place of its own, if the user asks for it and triton-ascend is installed."""
    if os.environ.get(VARIABLE) != "1":
        return base
    try:
        metadata.version("triton-ascend")
    except metadata.PackageNotFoundError:
        logger.warning("%s=1 needs triton-ascend, which is not installed; torch_npu's operators are used.", VARIABLE)
        return base
    return replace(base, norm_rotate_write=FusedNormRotateWrite(base).norm_rotate_write, linear_parts=None)
