"""Every operator in plain torch: what the others are tested against, and what runs where a device has none.

T tokens, H query heads, Hk KV heads, D head_dim. Norms are computed in float32 and rounded to the model's dtype at the
same points as in transformers, so float32 results agree to about 1e-6 and bfloat16 results bit for bit in most places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.operators import Array, Forward
from nanovllm.ops.transfer import to_device

# ---- norms, rotary, activation ------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] divided by its root mean square over n, times ``weight`` [n] (Zhang & Sennrich 2019)."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual connection and the norm behind it: ``(rms_norm(x + residual), x + residual)``."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, the half-split form of GPT-NeoX).

    q [T, H, D], k [T, Hk, D]; cos, sin [T, 1, D] in the dtype of q. The first half of ``sin`` carries the minus sign of
    the rotation, so one roll by D / 2 is all that is left: out = q * cos + (q2 | q1) * (-sin | sin).
    """
    half = q.shape[-1] // 2
    return q * cos + q.roll(half, -1) * sin, k * cos + k.roll(half, -1) * sin


def silu_and_mul(x: Tensor) -> Tensor:
    """Gated activation: x [T, 2n] = gate | up -> silu(gate) * up [T, n]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul(x: Tensor, approximate: str) -> Tensor:
    """Gated activation: x [T, 2n] = gate | up -> gelu(gate) * up [T, n]; ``approximate`` is "none" or "tanh"."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


# ---- linear -------------------------------------------------------------------------------------------------------


def pack_linear(weight: Tensor) -> Tensor:
    """Bring a weight [out, in] into the form ``linear`` likes best; called once, after loading."""
    return weight


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] @ weight.T + bias -> [T, out], where ``packed`` is what ``pack_linear`` made of the weight."""
    return F.linear(x, packed, bias)


def weight_rows(packed: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` int64 [T] of a weight [out, in], packed or not: [T, in]. An embedding finds its tokens here."""
    return F.embedding(indices, packed)


# ---- paged KV cache -----------------------------------------------------------------------------------------------


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store k, v [T, Hk, D] at ``slot_mapping`` [T] of the caches [num_blocks, block_size, Hk, D]."""
    for cache, new in ((k_cache, k), (v_cache, v)):
        block_size = cache.shape[1]
        if cache.stride(0) == block_size * cache.stride(1):
            cache.flatten(0, 1).index_copy_(0, slot_mapping, new)
        else:  # blocks that are no neighbours: flattened, they would be a copy
            cache.index_put_((slot_mapping // block_size, slot_mapping % block_size), new)


def norm_rotate_write(
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
    """All that happens between the product q | k | v and attention: qkv [T, H + 2 Hk, D] -> q [T, H, D].

    ``rms_norm`` of each q and k head (where it has a weight [D]), ``rotary``, and ``write_kv``.
    """
    kv_heads = k_cache.shape[2]
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    q = q if q_weight is None else rms_norm(q, q_weight, eps)
    k = k if k_weight is None else rms_norm(k, k_weight, eps)
    q, k = rotary(q, k, cos, sin)
    write_kv(k, v, k_cache, v_cache, slot_mapping)
    return q


def copy_blocks(kv_caches: Sequence[tuple[Tensor, Tensor]], sources: Sequence[int], targets: Sequence[int]) -> None:
    """Copy block ``sources[i]`` to block ``targets[i]`` in the K and V cache of every layer (copy on write).

    All sources are read before any target is written.
    """
    if not sources:
        return
    device = kv_caches[0][0].device
    source = torch.tensor(sources, dtype=torch.int64, device=device)
    target = torch.tensor(targets, dtype=torch.int64, device=device)
    for k_cache, v_cache in kv_caches:
        k_cache.index_copy_(0, target, k_cache.index_select(0, source))
        v_cache.index_copy_(0, target, v_cache.index_select(0, source))


# ---- attention ----------------------------------------------------------------------------------------------------


def prepare_attention(meta: AttentionMetadata, windows: Sequence[int | None], dtype: torch.dtype) -> None:
    """Derive what ``paged_attention`` needs from ``meta``, once for all layers; leaves it in ``meta.backend``.

    ``windows`` are the distinct values of ``window`` the layers will ask for, ``dtype`` that of their queries.
    """
    meta.backend = ()


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float, window: int | None
) -> Tensor:
    """Causal attention of the new tokens over their rows' cached keys and values, which ``write_kv`` has completed.

    q [T, H, D], caches [num_blocks, block_size, Hk, D] -> [T, H, D]. Query head h reads KV head h // (H // Hk). A token
    at position p sees positions p - window < j <= p, or all j <= p without a window. Softmax in float32.
    """
    out = torch.empty_like(q)
    group = q.shape[1] // k_cache.shape[2]
    for row, seq_len in enumerate(meta.seq_lens):
        start, end = meta.query_start_loc[row], meta.query_start_loc[row + 1]
        blocks = meta.block_table[row, : -(-seq_len // meta.block_size)]
        k = k_cache[blocks].flatten(0, 1)[:seq_len].repeat_interleave(group, dim=1)  # [seq_len, H, D]
        v = v_cache[blocks].flatten(0, 1)[:seq_len].repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k) * scale
        query_position = torch.arange(seq_len - (end - start), seq_len, device=q.device)[:, None]
        key_position = torch.arange(seq_len, device=q.device)
        hidden = key_position > query_position
        if window is not None:
            hidden |= key_position <= query_position - window
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
        out[start:end] = torch.einsum("hqk,khd->qhd", probabilities, v)
    return out


# ---- whole steps --------------------------------------------------------------------------------------------------


def record(forward: Forward, max_tokens: int, block_size: int, eager: bool = False) -> Forward | None:
    """What computes the same as ``forward`` for up to ``max_tokens`` tokens, with less work between the operators.

    None if there is no such thing, and ``forward`` itself should be called. Its result is valid until the next call.
    ``eager``: operators are to be called one by one, with results that are the same, bit for bit.
    """
    return None


# ---- sampling -----------------------------------------------------------------------------------------------------


def keep_likeliest(logits: Tensor, k: Array, top_p: Array, min_p: Array) -> Tensor:
    """What may be drawn, by sorting: logits [R, V] with everything else at -inf.

    The definition of min-p, then top-k, then top-p over what is left, renormalised; each keeps the ties with the last
    token it keeps. k int [R] (0: off), top_p [R] (>= 1: off), min_p [R] (0: off).
    """
    device, vocab_size = logits.device, logits.shape[1]
    values = logits.sort(dim=-1, descending=True).values
    last = np.where((k > 0) & (k < vocab_size), k, vocab_size) - 1
    boundary = values.gather(1, to_device(last, device).unsqueeze(1))
    weights = torch.exp(values - values[:, :1])
    kept = (values >= boundary) & (weights >= to_device(min_p, device).unsqueeze(1))
    kept &= values >= nucleus_boundary(values, weights * kept, to_device(top_p, device).unsqueeze(1))
    lowest = values.gather(1, kept.sum(-1, keepdim=True).clamp_(min=1) - 1)
    return logits.masked_fill(logits < lowest, -torch.inf)


def nucleus_boundary(values: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """The lowest value of the nucleus [R, 1]: weights [R, C] of descending values [R, C]; top_p [R, 1] (>= 1: off)."""
    reached = weights.cumsum(-1)
    limit = torch.where(top_p < 1.0, top_p * reached[:, -1:], torch.inf)
    # The boundary token is the last one before which the limit is not reached yet.
    return values.gather(1, (reached[:, :-1] < limit).sum(-1, keepdim=True))
