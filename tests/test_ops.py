"""Every operator against a second definition: float64 arithmetic spelled out, or transformers' own module."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.errors import ParameterError
from nanovllm.ops import Operators, operator_table, reference, torch_operators

OPS = torch_operators()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
sizes = st.integers(1, 9)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_table_is_complete_and_frozen() -> None:
    for field in dataclasses.fields(Operators):
        optional = field.default is not dataclasses.MISSING  # not every device has them
        assert optional or callable(getattr(OPS, field.name)), field.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        OPS.linear = None  # type: ignore[misc, assignment]


@pytest.mark.parametrize(
    ("device", "backend", "parameter"), [("tpu", None, "device"), ("cpu", "flash", "attention_backend")]
)
def test_an_unknown_device_or_backend_is_named(device: str, backend: str | None, parameter: str) -> None:
    with pytest.raises(ParameterError) as caught:
        operator_table(device, backend)
    assert caught.value.parameter == parameter


@settings(max_examples=25, deadline=None)
@given(tokens=sizes, size=st.integers(1, 70), seed=st.integers(0, 99))
def test_rms_norm(tokens: int, size: int, seed: int) -> None:
    x, weight, residual = draw(tokens, size, seed=seed), draw(size, seed=seed + 1), draw(tokens, size, seed=seed + 2)

    def exact(x: Tensor) -> Tensor:
        return (x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()) * weight.double()

    torch.testing.assert_close(OPS.rms_norm(x, weight, 1e-5), exact(x.double()).float(), atol=1e-6, rtol=1e-5)
    normed, total = OPS.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, exact(total.double()).float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norm = Qwen3RMSNorm(64, 1e-6).to(dtype)
    norm.weight.data = draw(64, dtype=dtype)
    x = draw(5, 3, 64, seed=1, dtype=dtype) * 3
    assert torch.equal(OPS.rms_norm(x, norm.weight.data, 1e-6), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = draw(7, 6, 10, dtype=dtype), draw(7, 2, 10, seed=1, dtype=dtype)
    angles = torch.arange(7)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.02, 0.003])
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    theirs = apply_rotary_pos_emb(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        torch.cat((cos, cos), -1)[None],
        torch.cat((sin, sin), -1)[None],
    )
    ours = reference.rotary(q, k, torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y[0].transpose(0, 1))


def test_rotary_turns_each_pair_by_its_angle() -> None:
    angle = torch.tensor([0.3, 1.2], dtype=torch.float64)
    x = draw(1, 1, 4).double()
    cos, sin = angle.cos(), angle.sin()
    turned, _ = reference.rotary(x, x, torch.cat((cos, cos)).view(1, 1, 4), torch.cat((-sin, sin)).view(1, 1, 4))
    for pair in range(2):
        number = torch.complex(x[0, 0, pair], x[0, 0, pair + 2]) * torch.polar(torch.ones(()).double(), angle[pair])
        assert torch.isclose(turned[0, 0, pair], number.real) and torch.isclose(turned[0, 0, pair + 2], number.imag)


@settings(max_examples=25, deadline=None)
@given(tokens=sizes, size=st.integers(1, 40), seed=st.integers(0, 99))
def test_gated_activations(tokens: int, size: int, seed: int) -> None:
    x = draw(tokens, 2 * size, seed=seed) * 3
    gate, up = x[:, :size].double(), x[:, size:].double()
    normal = torch.distributions.Normal(torch.zeros(()).double(), 1.0)
    torch.testing.assert_close(OPS.silu_and_mul(x).double(), gate / (1 + (-gate).exp()) * up, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(OPS.gelu_and_mul(x, "none").double(), gate * normal.cdf(gate) * up, atol=1e-5, rtol=1e-5)
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    torch.testing.assert_close(OPS.gelu_and_mul(x, "tanh").double(), gate * 0.5 * (1 + tanh) * up, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_linear_on_a_packed_weight(tokens: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight, b = (
        draw(tokens, inputs, dtype=dtype),
        draw(outputs, inputs, seed=1, dtype=dtype),
        draw(outputs, seed=2, dtype=dtype),
    )
    exact = x.double() @ weight.double().T + (b.double() if bias else 0)
    result = OPS.linear(x, OPS.pack_linear(weight), b if bias else None)
    assert result.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(result.double(), exact, atol=tolerance, rtol=tolerance)


@settings(max_examples=25, deadline=None)
@given(block_size=st.sampled_from([1, 3, 16]), blocks=st.integers(1, 6), seed=st.integers(0, 99), data=st.data())
def test_write_kv_writes_its_slots_and_no_others(block_size: int, blocks: int, seed: int, data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(0, blocks * block_size - 1), unique=True, min_size=1))
    k_cache, v_cache = draw(blocks, block_size, 2, 4, seed=seed), draw(blocks, block_size, 2, 4, seed=seed + 1)
    # Slices of a fused q | k | v product, as the model passes them: not contiguous.
    qkv = draw(len(slots), 7, 4, seed=seed + 2)
    k, v = qkv[:, 3:5], qkv[:, 5:]
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for token, slot in enumerate(slots):
        expected_k[slot // block_size, slot % block_size] = k[token]
        expected_v[slot // block_size, slot % block_size] = v[token]
    reference.write_kv(k, v, k_cache, v_cache, torch.tensor(slots))
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)


def test_copy_blocks_reads_all_sources_before_it_writes() -> None:
    caches = [(draw(5, 2, 1, 3, seed=i), draw(5, 2, 1, 3, seed=i + 9)) for i in range(2)]
    before = [(k.clone(), v.clone()) for k, v in caches]
    OPS.copy_blocks(caches, [1, 2, 4], [2, 1, 3])  # a swap, and a copy
    for now, was in zip(caches, before, strict=True):
        for cache, old in zip(now, was, strict=True):
            assert torch.equal(cache, old[[0, 2, 1, 4, 4]])
    OPS.copy_blocks(caches, [], [])


@pytest.mark.parametrize("norms", [True, False])
def test_the_steps_before_attention_are_norm_rotary_and_cache_write(norms: bool) -> None:
    """Qwen3's way, through transformers' own modules: norm of each head, rotation; keys and values in their slots."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    qkv, slots = draw(5, 8, 6), torch.tensor([3, 9, 0, 4, 7])
    weights = [draw(6, seed=i) for i in (1, 2)] if norms else [None, None]
    cos, sin = draw(5, 1, 6, seed=3), draw(5, 1, 6, seed=4)
    caches = [torch.zeros(3, 4, 2, 6) for _ in range(2)]
    ours = OPS.norm_rotate_write(qkv, *weights, 1e-6, cos, torch.cat((-sin[..., 3:], sin[..., 3:]), -1), *caches, slots)
    normed = []
    for x, weight in zip((qkv[:, :4], qkv[:, 4:6]), weights, strict=True):
        norm = Qwen3RMSNorm(6, 1e-6)
        norm.weight.data = torch.ones(6) if weight is None else weight
        normed.append((x if weight is None else norm(x)).transpose(0, 1)[None])
    sin = torch.cat((sin[..., 3:], sin[..., 3:]), -1)
    q, k = apply_rotary_pos_emb(*normed, cos[None, :, 0], sin[None, :, 0])
    torch.testing.assert_close(ours, q[0].transpose(0, 1))
    torch.testing.assert_close(caches[0].flatten(0, 1)[slots], k[0].transpose(0, 1))
    assert torch.equal(caches[1].flatten(0, 1)[slots], qkv[:, 6:])


@settings(max_examples=30, deadline=None)
@given(tokens=sizes, half=st.integers(1, 8), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_the_device_agrees_with_the_reference(tokens: int, half: int, dtype: torch.dtype, seed: int) -> None:
    """Whatever a device overrides must stay within rounding of the reference."""
    size = 2 * half
    x, w = draw(tokens, size, seed=seed, dtype=dtype), draw(size, seed=seed + 1, dtype=dtype)
    for name, arguments in {
        "rms_norm": (x, w, 1e-6),
        "add_rms_norm": (x, x, w, 1e-6),
        "silu_and_mul": (x,),
        "gelu_and_mul": (x, "tanh"),
    }.items():
        ours, theirs = getattr(OPS, name)(*arguments), getattr(reference, name)(*arguments)
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
