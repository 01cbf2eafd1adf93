"""Triton kernels for norms, rotary, activations and cache writes against the reference, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from cuda_device import DEVICE, HALF_DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from nanovllm.ops import reference, torch_operators
from nanovllm.ops.cuda.elementwise import CudaElementwise

OPS = CudaElementwise(torch_operators())
DTYPES = [torch.float32, *HALF_DTYPES]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
few = settings(max_examples=12)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@few
@given(st.integers(0, 9), st.integers(1, 300), st.sampled_from(DTYPES), st.integers(0, 99))
def test_norms(rows: int, size: int, dtype: torch.dtype, seed: int) -> None:
    x, residual, weight = (
        draw(rows, size, seed=seed, dtype=dtype),
        draw(rows, size, seed=seed + 1, dtype=dtype),
        draw(size, seed=seed + 2, dtype=dtype),
    )
    close(OPS.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    for ours, theirs in zip(
        OPS.add_rms_norm(x, residual, weight, 1e-5), reference.add_rms_norm(x, residual, weight, 1e-5), strict=True
    ):
        close(ours, theirs)


def test_the_norm_of_heads_inside_a_fused_product() -> None:
    qkv = draw(5, 7, 24)
    heads = qkv[:, 2:5]
    close(OPS.rms_norm(heads, draw(24, seed=1), 1e-6), reference.rms_norm(heads, draw(24, seed=1), 1e-6))


@few
@given(st.integers(0, 5), st.integers(1, 700), st.sampled_from(DTYPES), st.integers(0, 99))
def test_gated_activations(rows: int, size: int, dtype: torch.dtype, seed: int) -> None:
    x = draw(rows, 2 * size, seed=seed, dtype=dtype) * 3
    close(OPS.silu_and_mul(x), reference.silu_and_mul(x))
    for approximate in ("none", "tanh"):
        close(OPS.gelu_and_mul(x, approximate), reference.gelu_and_mul(x, approximate))


@settings(max_examples=20)
@given(
    slots=st.lists(st.integers(0, 19), unique=True, max_size=6),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 7]),
    half=st.sampled_from([1, 3, 8, 32]),
    norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_norm_rotate_write(
    slots: list[int], kv_heads: int, group: int, half: int, norm: bool, dtype: torch.dtype, seed: int
) -> None:
    """Norm, rotation and write in one pass: every slot that is not written keeps what it held."""
    size, tokens, heads = 2 * half, len(slots), kv_heads * group
    qkv = draw(tokens, heads + 2 * kv_heads, size, seed=seed, dtype=dtype)
    weights = [draw(size, seed=seed + i, dtype=dtype) if norm else None for i in (1, 2)]
    cos, sin = draw(tokens, 1, size, seed=seed + 3, dtype=dtype), draw(tokens, 1, size, seed=seed + 4, dtype=dtype)
    caches = [draw(5, 4, kv_heads, size, seed=seed + i, dtype=dtype) for i in (5, 6)]
    expected = [cache.clone() for cache in caches]
    mapping = torch.tensor(slots, dtype=torch.int64, device=DEVICE)

    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    if weights[0] is not None and weights[1] is not None:
        q, k = reference.rms_norm(q, weights[0], 1e-6), reference.rms_norm(k, weights[1], 1e-6)
    q, k = reference.rotary(q, k, cos, sin)
    reference.write_kv(k, v, *expected, mapping)

    ours = OPS.norm_rotate_write(qkv, *weights, 1e-6, cos, sin, *caches, mapping)
    close(ours, q)
    for cache, wanted in zip(caches, expected, strict=True):
        close(cache, wanted)


def test_keys_and_values_are_rounded_to_the_dtype_of_the_cache() -> None:
    qkv, turn = draw(3, 4, 8), torch.ones(3, 1, 8, device=DEVICE)
    caches = [torch.zeros(2, 4, 1, 8, dtype=torch.float8_e4m3fn, device=DEVICE) for _ in range(2)]
    OPS.norm_rotate_write(
        qkv, None, None, 1e-6, turn, 0 * turn, caches[0], caches[1], torch.tensor([4, 6, 5], device=DEVICE)
    )
    for cache, head in zip(caches, (2, 3), strict=True):
        wanted = qkv[[0, 2, 1], head].to(torch.float8_e4m3fn).float()
        assert torch.equal(cache.float()[1, :3, 0], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_copy_blocks(dtype: torch.dtype) -> None:
    caches = [(draw(6, 4, 1, 3, seed=i).to(dtype), draw(6, 4, 1, 3, seed=i + 9).to(dtype)) for i in range(3)]
    before = [[cache.float() for cache in pair] for pair in caches]
    OPS.copy_blocks(caches, [1, 2, 1], [3, 4, 5])
    for now, was in zip(caches, before, strict=True):
        for cache, old in zip(now, was, strict=True):
            assert torch.equal(cache.float(), old[[0, 1, 2, 1, 2, 1]])


def test_copy_blocks_reads_all_sources_before_it_writes() -> None:
    k, v = draw(5, 2, 1, 3), draw(5, 2, 1, 3, seed=1)
    old = k.clone()
    OPS.copy_blocks([(k, v)], [1, 2], [2, 1])
    assert torch.equal(k, old[[0, 2, 1, 3, 4]])
    OPS.copy_blocks([(k, v)], [], [])
