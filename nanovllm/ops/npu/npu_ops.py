"""Every operator of torch_npu that this engine calls, one function each, and nothing else: no other module names one.

The functions fix what the engine never varies, in the words of the operators' documentation, so that what is left can
be replaced by plain torch where there is no NPU. `tests/npu/lint.py` holds the calls against the schemas of several
torch-npu versions. Loaded only where an NPU is used: ``platforms/npu.py`` has imported torch_npu by then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch_npu
from torch import Tensor

_FRACTAL_NZ = 29  # the format of matrices in tiles of 16 x 16
_CAUSAL, _BAND = 3, 4  # sparse modes: causal aligned to the end, and that within a window
_COMPRESSED = 5  # mask type of splitfuse: one mask of 2048 x 2048 for any length

# ---- norms, activation, rotation ----------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``."""
    return torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``reference.add_rms_norm``."""
    normed, _, total = torch_npu.npu_add_rms_norm(x, residual, weight, epsilon=eps)
    return normed, total


def silu_and_mul(x: Tensor) -> Tensor:
    """See ``reference.silu_and_mul``."""
    return torch_npu.npu_swiglu(x, dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] -> x * cos + (-x2 | x1) * sin; cos, sin [T, 1, D]; any even D below 896."""
    return torch_npu.npu_rotary_mul(x.unsqueeze(0), cos.unsqueeze(0), sin.unsqueeze(0), rotary_mode="half").squeeze(0)


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``rotate`` of q [T, H, D] and k [T, Hk, D], contiguous, in place and in one launch; D is 64 or 128."""
    return torch_npu.npu_apply_rotary_pos_emb(q, k, cos, sin, layout="TND", rotary_mode="half")


# ---- products ------------------------------------------------------------------------------------------------------


def grouped_linear(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x [T, in], 16 bits, and weights [n, in] each -> x @ weight.T [T, n] of each, contiguous, in one launch."""
    transposed = [weight.t() for weight in weights]
    return torch_npu.npu_grouped_matmul([x] * len(weights), transposed, split_item=0, group_type=-1)


def int8_linear(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """x [T, in] @ (values int8 [out, in] * scales [out, 1]).T -> [T, out]; scales in the dtype of x."""
    return torch_npu.npu_weight_quant_batchmatmul(x, values.t(), scales)


# ---- sampling -------------------------------------------------------------------------------------------------------


def top_k_top_p(logits: Tensor, p: Tensor, k: Tensor | None) -> Tensor:
    """logits float32 [R, V] with -inf for all but the k [R] (int32, 1 to 1024) largest, and of those the likeliest that
    reach p [R]."""
    return torch_npu.npu_top_k_top_p(logits, p, k)


# ---- Atlas A2 and A3: a cache [num_blocks, block_size, Hk, D] ------------------------------------------------------


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """See ``reference.write_kv``; all contiguous, slots int32 or int64 in range."""
    # By default the operator takes the cache for one in tiles ("PA_NZ"), and scrambles it.
    torch_npu.npu_scatter_pa_kv_cache(k, v, k_cache, v_cache, slots, cache_mode="Norm")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str,
    mask: Tensor | None,
    window: int | None,
    query_lengths: list[int] | None,
    kv_lengths: list[int],
    block_table: Tensor,
    kv_heads: int,
    block_size: int,
    scale: float,
) -> Tensor:
    """FusedInferAttentionScore over a paged cache.

    q is [T, H, D] in layout "TND", with ``query_lengths`` cumulative, or [B, S, H, D] in "BSND"; k and v are the caches
    as [num_blocks, block_size, Hk * D]. ``kv_lengths`` are per row. With the mask, causal; without, every key is seen.
    The numbers on the host become part of a recorded graph; `NpuCapture` replaces them before a replay.
    """
    out, _ = torch_npu.npu_fused_infer_attention_score(
        q,
        k,
        v,
        atten_mask=mask,
        actual_seq_lengths=query_lengths,
        actual_seq_lengths_kv=kv_lengths,
        block_table=block_table,
        num_heads=q.shape[-2],
        num_key_value_heads=kv_heads,
        scale=scale,
        input_layout=layout,
        block_size=block_size,
        sparse_mode=0 if mask is None else _CAUSAL if window is None else _BAND,
        pre_tokens=2**31 - 1 if window is None else window - 1,  # before a query's own
        next_tokens=2**31 - 1 if window is None else 0,
    )
    return out


# ---- Atlas 310P: a cache in tiles [num_blocks, Hk * D / 16, block_size, 16] ------------------------------------------


def to_tiles(x: Tensor) -> Tensor:
    """x [..., n, 16] in the device's format of tiles, as the operators below take caches and masks."""
    return torch_npu.npu_format_cast(x, _FRACTAL_NZ)


def write_kv_tiles(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Store k, v [T, Hk, D] at slots int32 [T]."""
    torch_npu._npu_reshape_and_cache(k, v, k_cache, v_cache, slots)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor, kv_heads: int, scale: float
) -> Tensor:
    """One query per row: q [B, H, D], lengths int32 [B] of keys, on the device."""
    out = torch.empty_like(q)
    torch_npu._npu_paged_attention(
        query=q,
        key_cache=k_cache,
        value_cache=v_cache,
        num_kv_heads=kv_heads,
        num_heads=q.shape[1],
        scale_value=scale,
        block_table=block_table,
        context_lens=lengths,
        out=out,
    )
    return out


def chunk_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_lengths: Tensor,
    mask: Tensor,
    kv_heads: int,
    scale: float,
) -> Tensor:
    """Several queries per row: q [T, H, D], lengths int32 [B] of keys on the device, query_lengths int32 [B] on the
    host, mask float16 [2048, 2048]."""
    out = torch.empty_like(q)
    torch_npu._npu_paged_attention_splitfuse_v2(
        query=q,
        key_cache=k_cache,
        value_cache=v_cache,
        block_table=block_table,
        context_lens=lengths,
        mask=mask,
        seq_len=query_lengths,
        num_kv_heads=kv_heads,
        num_heads=q.shape[1],
        scale_value=scale,
        mask_type=_COMPRESSED,
        out=out,
    )
    return out


def masked_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    query_lengths: Tensor,
    mask: Tensor,
    kv_heads: int,
    scale: float,
) -> Tensor:
    """As ``chunk_attention``, with a mask float16 of the step in tiles [1, K / 16, T, 16]: row t is added to the scores
    of query t, its columns belong to the keys of that query's row."""
    out = torch.empty_like(q)
    torch_npu._npu_paged_attention_splitfuse(
        query=q,
        key_cache=k_cache,
        value_cache=v_cache,
        block_table=block_table,
        context_lens=lengths,
        mask=mask,
        seq_len=query_lengths,
        num_kv_heads=kv_heads,
        num_heads=q.shape[1],
        scale_value=scale,
        out=out,
    )
    return out


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, mask: Tensor, kv_heads: int, scale: float
) -> Tensor:
    """Whole prompts: q [T, H, D], k, v [T, Hk, D] with T a multiple of 16, lengths int32 [B] on the host that add up to
    T; mask float16 in tiles [1, S / 16, S, 16] for S at least the longest."""
    out = torch.empty_like(q)
    torch_npu._npu_flash_attention(
        query=q,
        key=k,
        value=v,
        mask=mask,
        seq_len=lengths,
        scale_value=scale,
        num_heads=q.shape[1],
        num_kv_heads=kv_heads,
        out=out,
    )
    return out
