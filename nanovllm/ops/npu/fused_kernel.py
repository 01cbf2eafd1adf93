"""The kernel of the fused operator, in Triton, for Ascend's vector cores.

What Ascend asks of a kernel, and how this one is written for it:

- a launch costs per program, so there are at most as many programs as vector cores, and each takes every so many-th
  token;
- addresses that jump element by element are slow, so halves of heads are loaded as they lie, and the rotation swaps
  what is loaded instead of addresses;
- a vector core has 192 KiB of its own memory: the largest tile is half of the query heads of a token, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 ``x`` as it is after a pass through ``dtype``."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def _load_half(start, head, d, D: tl.constexpr, inside):
    return tl.load(start + head * D + d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm_and_rotate(
    source, target, weight, cos, sin, eps,
    HEADS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token from ``source`` to ``target``; both hold them one behind the other."""
    HALF: tl.constexpr = D // 2
    dtype: tl.constexpr = source.dtype.element_ty
    head, d = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside, column = (head < HEADS) & (d < HALF), d < HALF
    first, second = _load_half(source, head, d, D, inside), _load_half(source + HALF, head, d, D, inside)
    if NORM:
        rstd = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
        first = _rounded(_rounded(first * rstd, dtype) * _load_half(weight, 0, d, D, column), dtype)
        second = _rounded(_rounded(second * rstd, dtype) * _load_half(weight + HALF, 0, d, D, column), dtype)
    cos_1, sin_1 = _load_half(cos, 0, d, D, column), _load_half(sin, 0, d, D, column)
    cos_2, sin_2 = _load_half(cos + HALF, 0, d, D, column), _load_half(sin + HALF, 0, d, D, column)
    turned_1 = _rounded(first * cos_1, dtype) + _rounded(second * sin_1, dtype)
    turned_2 = _rounded(second * cos_2, dtype) + _rounded(first * sin_2, dtype)
    tl.store(target + head * D + d, turned_1.to(dtype), mask=inside)
    tl.store(target + HALF + head * D + d, turned_2.to(dtype), mask=inside)


@triton.jit
def norm_rotate_write_kernel(
    qkv, q_weight, k_weight, cos, sin, slots, q_out, k_cache, v_cache, tokens, eps,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Every so many-th token: its query heads to ``q_out``, its keys and values to their slots."""
    first = tl.program_id(0)
    for turn in range(0, tl.cdiv(tokens - first, tl.num_programs(0))):
        at = first.to(tl.int64) + turn * tl.num_programs(0)
        source = qkv + at * ((H + 2 * HK) * D)
        turn_cos, turn_sin = cos + at * D, sin + at * D
        place = tl.load(slots + at).to(tl.int64) * (HK * D)
        _norm_and_rotate(source, q_out + at * (H * D), q_weight, turn_cos, turn_sin, eps, H, D, NORM, Q_ROWS, COLUMNS)
        _norm_and_rotate(
            source + H * D, k_cache + place, k_weight, turn_cos, turn_sin, eps, HK, D, NORM, K_ROWS, COLUMNS
        )
        value = tl.arange(0, VALUES)
        copied = tl.load(source + (H + HK) * D + value, mask=value < HK * D)
        tl.store(v_cache + place + value, copied, mask=value < HK * D)
