"""Norms, rotary embedding, activations and writes to the cache, as Triton kernels.

Each is ``ops/reference.py``'s operator of the same name, rounded at the same points: what the reference does in the
model's dtype is rounded to it here, although the arithmetic is in float32.

Numbers of rows are not specialised: otherwise a step of one row, or of a multiple of 16, would wait for a compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.ops.operators import Operators
from nanovllm.ops.transfer import to_device

_TILE = 1024  # numbers a program works on, unless one row has more
_COPY_TILE = 4096  # 4-byte words of a block that a program copies


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 ``x`` as it is after a pass through ``dtype``."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def _normed(x, weight, rstd, dtype: tl.constexpr):
    return _rounded(weight.to(tl.float32) * _rounded(x * rstd, dtype), dtype)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x, residual, weight, out, total, rows, inner, outer_stride, inner_stride, eps,
    N: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows [rows, N], row r at (r // inner, r % inner) of x; with ADD the norm of x + residual, which goes to total."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < N)
    place = row * N + column
    value = tl.load(x + row // inner * outer_stride + row % inner * inner_stride + column, mask=inside, other=0.0)
    dtype: tl.constexpr = x.dtype.element_ty
    value = value.to(tl.float32)
    if ADD:
        value = _rounded(value + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32), dtype)
        tl.store(total + place, value.to(dtype), mask=inside)
    rstd = tl.rsqrt(tl.sum(value * value, 1) / N + eps)[:, None]
    scale = tl.load(weight + column, mask=column < N, other=0.0)
    tl.store(out + place, _normed(value, scale, rstd, dtype).to(dtype), mask=inside)


@triton.jit
def _gated(x, out, total, N: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """x [T, 2 N] = gate | up -> activation(gate) * up, ``total`` = T * N numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    source = x + place // N * (2 * N) + place % N
    dtype: tl.constexpr = x.dtype.element_ty
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + N, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "none":
        active = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # tanh(z) = 2 sigmoid(2 z) - 1
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1.0 + tl.exp(-2.0 * z))
    tl.store(out + place, (_rounded(active, dtype) * up).to(dtype), mask=inside)


@triton.jit
def _norm_rotate_write(
    qkv, q_weight, k_weight, cos, sin, slots, q_out, k_cache, v_cache,
    eps, block_size, block_stride, token_stride, head_stride,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: norm, rotation, and the place they belong to, by what they are (q, k or v)."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (head < H + 2 * HK) & (d < D)
    other_half = (d + D // 2) % D
    source = qkv + (token * (H + 2 * HK) + head) * D
    dtype: tl.constexpr = qkv.dtype.element_ty
    raw = tl.load(source + d, mask=inside, other=0.0)
    x = raw.to(tl.float32)
    y = tl.load(source + other_half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        weight = tl.where(head < H, tl.load(q_weight + d, mask=d < D, other=0.0),
                          tl.load(k_weight + d, mask=d < D, other=0.0))  # fmt: skip
        weight_y = tl.where(head < H, tl.load(q_weight + other_half, mask=d < D, other=0.0),
                            tl.load(k_weight + other_half, mask=d < D, other=0.0))  # fmt: skip
        x, y = _normed(x, weight, rstd, dtype), _normed(y, weight_y, rstd, dtype)
    turn = token * D + d
    x = _rounded(x * tl.load(cos + turn, mask=d < D, other=0.0).to(tl.float32), dtype)
    y = _rounded(y * tl.load(sin + turn, mask=d < D, other=0.0).to(tl.float32), dtype)
    rotated = (x + y).to(dtype)
    tl.store(q_out + (token * H + head) * D + d, rotated, mask=inside & (head < H))
    slot = tl.load(slots + token)
    place = slot // block_size * block_stride + slot % block_size * token_stride + d
    is_k, is_v = (head >= H) & (head < H + HK), head >= H + HK
    cached: tl.constexpr = k_cache.dtype.element_ty
    tl.store(k_cache + place + (head - H) * head_stride, rotated.to(cached), mask=inside & is_k)
    tl.store(v_cache + place + (head - H - HK) * head_stride, raw.to(cached), mask=inside & is_v)


@triton.jit(do_not_specialize=["count"])
def _copy_blocks(addresses, pairs, count, words, BLOCK: tl.constexpr):
    """Copy ``words`` 4-byte words from block ``pairs[0, i]`` to ``pairs[1, i]`` of the cache at ``addresses[j]``."""
    copy = tl.program_id(0)
    cache = tl.load(addresses + tl.program_id(1)).to(tl.pointer_type(tl.int32))
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    source, target = tl.load(pairs + copy), tl.load(pairs + count + copy)
    value = tl.load(cache + source * words + word, mask=word < words)
    tl.store(cache + target * words + word, value, mask=word < words)


class CudaElementwise:
    """The operators that do one thing to every number; shapes and strides the kernels do not know go to ``base``."""

    def __init__(self, base: Operators) -> None:
        self._base = base
        self._addresses: tuple[tuple[int, ...], Tensor] | None = None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``reference.rms_norm``; x of 2 or 3 dimensions may be a view of something larger."""
        if x.dim() not in (2, 3) or x.stride(-1) != 1 or x.dtype != weight.dtype or not x.numel():
            return self._base.rms_norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inner = x.shape[1] if x.dim() == 3 else 1
        inner_stride = x.stride(1) if x.dim() == 3 else 0
        _launch_norm(x, None, weight, out, None, inner, x.stride(0), inner_stride, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See ``reference.add_rms_norm``."""
        if (
            x.shape != residual.shape
            or not x.dtype == residual.dtype == weight.dtype
            or not (x.is_contiguous() and residual.is_contiguous() and x.numel())
        ):
            return self._base.add_rms_norm(x, residual, weight, eps)
        out, total = torch.empty_like(x), torch.empty_like(x)
        _launch_norm(x, residual, weight, out, total, 1, x.shape[-1], 0, eps)
        return out, total

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """See ``reference.silu_and_mul``."""
        return self._activate(x, "silu") if _plain(x) else self._base.silu_and_mul(x)

    def gelu_and_mul(self, x: Tensor, approximate: str) -> Tensor:
        """See ``reference.gelu_and_mul``."""
        return self._activate(x, approximate) if _plain(x) else self._base.gelu_and_mul(x, approximate)

    def _activate(self, x: Tensor, activation: str) -> Tensor:
        out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype, device=x.device)
        _gated[(triton.cdiv(out.numel(), _TILE),)](x, out, out.numel(), N=out.shape[1], ACTIVATION=activation,
                                                   BLOCK=_TILE)  # fmt: skip
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
        """``rms_norm`` of each q and k head (where they have weights), ``rotary`` and ``write_kv`` in one pass.

        qkv [T, H + 2 Hk, D] -> q [T, H, D].
        """
        tokens, all_heads, head_dim = qkv.shape
        kv_heads = k_cache.shape[2]
        heads = all_heads - 2 * kv_heads
        if (
            (q_weight is None) != (k_weight is None)
            or not (qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous())
            or k_cache.stride() != v_cache.stride()
            or k_cache.stride(3) != 1
        ):
            return self._base.norm_rotate_write(
                qkv, q_weight, k_weight, eps, cos, sin, k_cache, v_cache, slot_mapping
            )  # fmt: skip
        q = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
        if tokens:
            block = triton.next_power_of_2(head_dim)
            per_program = min(triton.next_power_of_2(all_heads), max(1, _TILE // block))
            _norm_rotate_write[(tokens, triton.cdiv(all_heads, per_program))](
                qkv, q_weight, k_weight, cos, sin, slot_mapping, q, k_cache, v_cache,
                eps, k_cache.shape[1], *k_cache.stride()[:3],
                H=heads, HK=kv_heads, D=head_dim, NORM=q_weight is not None, HEADS=per_program, BLOCK=block,
            )  # fmt: skip
        return q

    def copy_blocks(
        self, kv_caches: Sequence[tuple[Tensor, Tensor]], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """See ``reference.copy_blocks``: all layers in one launch, unless a target is a source too."""
        if not sources:
            return
        first = kv_caches[0][0]
        block_bytes = first[0].numel() * first.element_size()
        if set(sources) & set(targets) or block_bytes % 4 or not first.is_contiguous():
            self._base.copy_blocks(kv_caches, sources, targets)
            return
        pairs = to_device(np.array([sources, targets], np.int64), first.device)
        addresses = self._address_table(kv_caches)
        words = block_bytes // 4
        _copy_blocks[(len(sources), addresses.shape[0], triton.cdiv(words, _COPY_TILE))](
            addresses, pairs, len(sources), words, BLOCK=_COPY_TILE
        )

    def _address_table(self, kv_caches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        addresses = tuple(cache.data_ptr() for pair in kv_caches for cache in pair)
        if self._addresses is None or self._addresses[0] != addresses:
            self._addresses = addresses, to_device(np.array(addresses, np.int64), kv_caches[0][0].device)
        return self._addresses[1]


def _plain(x: Tensor) -> bool:
    return x.dim() == 2 and x.is_contiguous() and x.numel() > 0


def _launch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    total: Tensor | None,
    inner: int,
    outer_stride: int,
    inner_stride: int,
    eps: float,
) -> None:
    size = x.shape[-1]
    rows, block = x.numel() // size, triton.next_power_of_2(size)
    per_program = max(1, _TILE // block)
    _rms_norm[(triton.cdiv(rows, per_program),)](
        x, residual, weight, out, total, rows, inner, outer_stride, inner_stride, eps,
        N=size, ADD=residual is not None, ROWS=per_program, BLOCK=block,
    )  # fmt: skip
