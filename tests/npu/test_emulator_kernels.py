"""Kernels of a decoder and a sampler against goldens written here; what torch has too, against torch on the CPU."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from on_npu import DEVICE, npu, randn, refused, torch_npu

pytestmark = pytest.mark.emulated

A, B = randn(3, 4), randn(3, 4, seed=1)
I = torch.tensor([2, 0, 1])
M = A > 0

# Each is called with a function that leaves tensors on the CPU, and with one that brings them to the device.
PLAIN: dict[str, Callable] = {
    "add": lambda d: d(A) + d(B),
    "add of a number": lambda d: d(A) + 2.5,
    "add with alpha": lambda d: torch.add(d(A), d(B), alpha=2),
    "sub": lambda d: d(A) - d(B),
    "number minus tensor": lambda d: 1 - d(A),
    "mul": lambda d: d(A) * d(B),
    "div": lambda d: d(A) / d(B),
    "div by a number": lambda d: d(A) / 3,
    "floor division": lambda d: d(I) // 2,
    "remainder": lambda d: d(I) % 2,
    "power": lambda d: d(A) ** 2,
    "number to a power": lambda d: 2 ** d(A),
    "in place": lambda d: d(A.clone()).add_(1).mul_(2).sub_(3).div_(4),
    "broadcast": lambda d: d(A) * d(B[:1]) + d(B[:, :1]),
    "neg": lambda d: -d(A),
    "rsqrt": lambda d: torch.rsqrt(d(A.abs())),
    "sigmoid": lambda d: torch.sigmoid(d(A)),
    "silu": lambda d: F.silu(d(A)),
    "gelu": lambda d: F.gelu(d(A)),
    "gelu with tanh": lambda d: F.gelu(d(A), approximate="tanh"),
    "cos and sin": lambda d: d(A).cos() + d(A).sin(),
    "exp and log": lambda d: d(A).exp().log(),
    "clamp": lambda d: d(A).clamp(-0.5, 0.5),
    "maximum": lambda d: torch.maximum(d(A), d(B)),
    "matmul": lambda d: d(A) @ d(B).T,
    "batched matmul": lambda d: torch.bmm(d(A[None]), d(B.T[None].contiguous())),
    "linear": lambda d: F.linear(d(A), d(B)),
    "linear with bias": lambda d: F.linear(d(A), d(B), d(B[:, 0].contiguous())),
    "linear in bfloat16": lambda d: F.linear(d(A.bfloat16()), d(B.bfloat16())),
    "einsum": lambda d: torch.einsum("ab,cb->ac", d(A), d(B)),
    "rows": lambda d: d(A)[d(I)],
    "rows and columns": lambda d: d(A)[d(I), d(I)],
    "columns": lambda d: d(A)[:, d(I)],
    "boolean rows": lambda d: d(A)[d(M)],
    "embedding": lambda d: F.embedding(d(I), d(A)),
    "index_select": lambda d: d(A).index_select(1, d(I)),
    "gather": lambda d: d(A).gather(1, d(I[:, None])),
    "scatter": lambda d: d(A).scatter(1, d(I[:, None]), d(B)),
    "scatter of a number": lambda d: d(A).scatter(1, d(I[:, None]), 2.0),
    "scatter_add": lambda d: d(A.clone()).scatter_add_(1, d(I[:, None]), d(B)),
    "index_copy": lambda d: d(A.clone()).index_copy_(0, d(I), d(B)),
    "index_add": lambda d: d(A.clone()).index_add_(0, d(I), d(B)),
    "assignment by index": lambda d: d(A.clone()).index_put_((d(I),), d(B)),
    "assignment to a slice": lambda d: d(A.clone()).narrow(1, 1, 2).copy_(d(B[:, :2])),
    "cat": lambda d: torch.cat([d(A), d(B)], 1),
    "stack": lambda d: torch.stack([d(A), d(B)]),
    "split": lambda d: torch.cat(d(A).split([1, 3], 1)[::-1], 1),
    "topk": lambda d: d(A).topk(2).values,
    "topk indices": lambda d: d(A).topk(2).indices,
    "sort": lambda d: d(A).sort(descending=True, stable=True).values,
    "argsort": lambda d: d(A).argsort(-1),
    "argmax": lambda d: d(A).argmax(-1),
    "max": lambda d: d(A).max(-1).values + d(A).max(),
    "amax": lambda d: d(A).amax(-1, keepdim=True),
    "softmax": lambda d: d(A).softmax(-1),
    "softmax to float32": lambda d: d(A.half()).softmax(-1, dtype=torch.float32),
    "log_softmax": lambda d: d(A).log_softmax(-1),
    "logsumexp": lambda d: d(A).logsumexp(-1),
    "cumsum": lambda d: d(A).cumsum(-1),
    "sum": lambda d: d(A).sum() + d(A).sum(-1),
    "mean": lambda d: d(A).mean(-1, keepdim=True),
    "any and all": lambda d: torch.stack([d(M).any(), d(M).all(), d(M[0]).all()]),
    "where": lambda d: torch.where(d(M), d(A), d(B)),
    "where with a number": lambda d: torch.where(d(M), d(A), -float("inf")),
    "masked_fill": lambda d: d(A).masked_fill(d(M), -1.0),
    "comparisons": lambda d: (d(A) < d(B)) | (d(A) >= 0.5) & ~d(M),
    "isfinite": lambda d: torch.isfinite(d(A / 0)) | torch.isnan(d(A)) | torch.isinf(d(A)),
    "bits": lambda d: (d(I) << 2) ^ (d(I) >> 1) & 3,
    "casts": lambda d: d(A).half().float() + d(A).bfloat16().float() + d(A).int(),
    "transposed": lambda d: d(A).T.contiguous(),
    "permuted": lambda d: d(randn(2, 3, 4)).permute(2, 0, 1).contiguous(),
    "expanded": lambda d: d(A[:1]).expand(3, 4).contiguous(),
    "repeat": lambda d: d(A).repeat(2, 1),
    "repeat_interleave": lambda d: d(A).repeat_interleave(2, 0),
    "repeat_interleave by tensor": lambda d: d(A).repeat_interleave(d(torch.tensor([1, 2, 3])), 0),
    "flip and roll": lambda d: d(A).flip(0).roll(2, -1),
    "triangles": lambda d: d(A).tril() + torch.triu(d(A), 1) * 2,
    "pad": lambda d: F.pad(d(A), (1, 2)),
    "nonzero": lambda d: d(M).nonzero(),
    "unique": lambda d: torch.unique(d(torch.tensor([3, 1, 3]))),
    "bincount": lambda d: torch.bincount(d(I), minlength=5),
    "layer_norm": lambda d: F.layer_norm(d(A), (4,), d(B[0]), d(B[1])),
    "norm": lambda d: d(A).norm(dim=-1),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_operators_do_as_torch_on_the_cpu(name: str) -> None:
    wanted = PLAIN[name](lambda tensor: tensor)
    found = PLAIN[name](lambda tensor: tensor.to(DEVICE))
    assert found.device.type == "npu"
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["rand", "randn", "exponential", "randint", "multinomial"])
def test_random_numbers_follow_the_seed(kind: str) -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return {
            "rand": lambda: torch.rand(64, device=DEVICE),
            "randn": lambda: torch.randn(64, device=DEVICE),
            "exponential": lambda: torch.empty(64, device=DEVICE).exponential_(),
            "randint": lambda: torch.randint(0, 1000, (64,), device=DEVICE),
            "multinomial": lambda: torch.multinomial(torch.ones(64, device=DEVICE), 64, replacement=True),
        }[kind]().cpu()

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_made_on_the_device() -> None:
    assert torch.arange(2, 11, 3, device=DEVICE).tolist() == [2, 5, 8]
    assert torch.full((2,), 3.5, device=DEVICE).tolist() == [3.5, 3.5]
    assert torch.zeros(2, dtype=torch.bool, device=DEVICE).tolist() == [False, False]
    assert torch.eye(2, device=DEVICE).tolist() == [[1, 0], [0, 1]]
    torch.set_default_device(DEVICE)
    try:
        assert torch.ones(2).add(1).tolist() == [2, 2], "kernels are on the CPU whatever the default device is"
    finally:
        torch.set_default_device(None)


# ---- fused operators ----------------------------------------------------------------------------------------------


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def assert_near(found: torch.Tensor, wanted: np.ndarray) -> None:
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(found.dtype, 1e-5)
    np.testing.assert_allclose(numpy(found.cpu()), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x, gamma = randn(5, 48, dtype=dtype), randn(48, dtype=dtype, seed=1)
    y, rstd = torch_npu.npu_rms_norm(npu(x), npu(gamma), 1e-5)
    scale = 1 / np.sqrt((numpy(x) ** 2).mean(1, keepdims=True) + 1e-5)
    assert_near(y, numpy(x) * scale * numpy(gamma))
    np.testing.assert_allclose(rstd.cpu().numpy(), scale, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_add_rms_norm_gives_the_norm_the_scale_and_the_sum(dtype: torch.dtype) -> None:
    a, b, gamma = randn(5, 48, dtype=dtype), randn(5, 48, dtype=dtype, seed=1), randn(48, dtype=dtype, seed=2)
    y, _, total = torch_npu.npu_add_rms_norm(npu(a), npu(b), npu(gamma), 1e-5)
    assert torch.equal(total.cpu(), a + b)
    s = numpy(a + b)
    assert_near(y, s / np.sqrt((s**2).mean(1, keepdims=True) + 1e-5) * numpy(gamma))


def test_gemma_rms_norm_adds_one_to_the_weight() -> None:
    x, gamma = randn(5, 48), randn(48, seed=1)
    y = torch_npu.npu_gemma_rms_norm(npu(x), npu(gamma), 1e-6)[0]
    assert_near(y, numpy(x) / np.sqrt((numpy(x) ** 2).mean(1, keepdims=True) + 1e-6) * (1 + numpy(gamma)))


def test_add_rms_norm_refuses_what_meta_tensors_let_through() -> None:
    with refused("x1 .7, 64. and x2 .3, 64."):
        torch_npu.npu_add_rms_norm(npu(randn(7, 64)), npu(randn(3, 64)), npu(randn(64)), 1e-6)


def test_swiglu_takes_the_gate_first() -> None:
    x = randn(5, 12, dtype=torch.float16)
    gate, up = numpy(x)[:, :6], numpy(x)[:, 6:]
    assert_near(torch_npu.npu_swiglu(npu(x)), gate / (1 + np.exp(-gate)) * up)


def angles(tokens: int, dim: int) -> np.ndarray:
    return np.arange(tokens)[:, None] / 10000 ** (np.arange(dim // 2) * 2 / dim)


def turn_halves(x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The rotation by definition: the pair (x[i], x[i + D/2]) turns by theta[i]. x [T, H, D], theta [T, D/2]."""
    first, second = np.split(x, 2, -1)
    cos, sin = np.cos(theta)[:, None], np.sin(theta)[:, None]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_rotary_mul_turns_halves(dim: int) -> None:
    x, theta = randn(6, 3, dim), angles(6, dim)
    cos, sin = (torch.from_numpy(np.tile(f(theta), 2)).float()[None, :, None] for f in (np.cos, np.sin))
    found = torch_npu.npu_rotary_mul(npu(x[None]), npu(cos), npu(sin))[0]
    assert_near(found, turn_halves(numpy(x), theta))


def test_rotary_mul_interleaved_turns_neighbours() -> None:
    x, theta = randn(6, 3, 16), angles(6, 16)
    cos, sin = (torch.from_numpy(np.repeat(f(theta), 2, -1)).float()[None, :, None] for f in (np.cos, np.sin))
    found = torch_npu.npu_rotary_mul(npu(x[None]), npu(cos), npu(sin), "interleave")[0]
    pairs = np.concatenate((numpy(x)[..., ::2], numpy(x)[..., 1::2]), -1)
    wanted = turn_halves(pairs, theta)
    assert_near(found[..., ::2].contiguous(), wanted[..., :8])
    assert_near(found[..., 1::2].contiguous(), wanted[..., 8:])


def test_apply_rotary_works_in_place() -> None:
    q, k, theta = randn(6, 3, 64), randn(6, 1, 64, seed=1), angles(6, 64)
    cos, sin = (npu(torch.from_numpy(np.tile(f(theta), 2)).float()[:, None]) for f in (np.cos, np.sin))
    there = npu(q), npu(k)
    torch_npu.npu_apply_rotary_pos_emb(*there, cos, sin, layout="TND")
    assert_near(there[0], turn_halves(numpy(q), theta))
    assert_near(there[1], turn_halves(numpy(k), theta))


@pytest.mark.parametrize("dim, message", [(96, "head_dim must be 64 or 128"), (32, "head_dim must be 64 or 128")])
def test_apply_rotary_refuses_other_head_dims(dim: int, message: str) -> None:
    q, table = npu(randn(6, 3, dim)), npu(randn(6, 1, dim))
    with refused(message):
        torch_npu.npu_apply_rotary_pos_emb(q, q.clone(), table, table, layout="TND")


def test_mrope_without_sections_is_plain_rotary() -> None:
    q, k = randn(4, 2 * 32), randn(4, 32, seed=1)
    positions, theta = torch.tensor([7, 0, 3, 9]), angles(16, 32)
    cache = torch.from_numpy(np.concatenate((np.cos(theta), np.sin(theta)), 1)).float()
    found = torch_npu.npu_mrope(
        npu(positions), npu(q), npu(k), npu(cache), 32, mrope_section=[0, 0, 0], rotary_mode="half"
    )
    for x, y in zip((q, k), found, strict=True):
        wanted = turn_halves(numpy(x.view(4, -1, 32)), theta[positions.numpy()])
        assert_near(y.view(4, -1, 32), wanted)


def test_top_k_top_p_keeps_what_the_definition_keeps() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0], [0.0, 0.0, 5.0, 1.0]])
    p, k = torch.tensor([0.9, 1.0]), torch.tensor([3, 2], dtype=torch.int32)
    found = torch_npu.npu_top_k_top_p(npu(logits), npu(p), npu(k)).cpu()
    # row 0: k keeps 4, 3, 2 with probabilities .665, .245, .090; p = .9 drops the last.  row 1: k keeps 5 and 1.
    assert found.tolist() == [[-math.inf, 4.0, -math.inf, 3.0], [-math.inf, -math.inf, 5.0, 1.0]]


@pytest.mark.parametrize("k", [0, 5])
def test_top_k_has_limits(k: int) -> None:
    with refused("k must be in 1..4"):
        torch_npu.npu_top_k_top_p(npu(A), None, npu(torch.full((3,), k, dtype=torch.int32)))


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_top_p_has_limits(p: float) -> None:
    with refused("p must be in 0..1"):
        torch_npu.npu_top_k_top_p(npu(A), npu(torch.full((3,), p)), None)
        torch.npu.synchronize()


# ---- mixture of experts -------------------------------------------------------------------------------------------


def test_gating_picks_the_largest_probabilities() -> None:
    x = randn(5, 8)
    weights, experts, _ = torch_npu.npu_moe_gating_top_k_softmax(npu(x), None, 3)
    probabilities = np.exp(numpy(x)) / np.exp(numpy(x)).sum(1, keepdims=True)
    order = np.argsort(-probabilities, 1)[:, :3]
    assert experts.cpu().numpy().tolist() == order.tolist()
    assert_near(weights, np.take_along_axis(probabilities, order, 1))


def test_gating_with_sigmoids_groups_and_a_bias() -> None:
    x, bias = randn(4, 12), randn(12, seed=1)
    weights, experts, _ = torch_npu.npu_moe_gating_top_k(
        npu(x), 3, bias=npu(bias), k_group=2, group_count=4, group_select_mode=1, norm_type=1, routed_scaling_factor=2.5
    )
    for t in range(4):
        scores = 1 / (1 + np.exp(-numpy(x[t])))
        biased = scores + numpy(bias)
        groups = [range(g, g + 3) for g in range(0, 12, 3)]
        best = sorted(groups, key=lambda group: -sum(sorted(biased[list(group)])[-2:]))[:2]
        allowed = sorted((e for group in best for e in group), key=lambda e: -biased[e])[:3]
        assert experts[t].tolist() == allowed
        assert_near(weights[t], scores[allowed] / scores[allowed].sum() * 2.5)


def test_gating_with_softmax_keeps_the_probabilities() -> None:
    x = randn(4, 12)
    weights, experts, _ = torch_npu.npu_moe_gating_top_k(npu(x), 3)
    probabilities = np.exp(numpy(x)) / np.exp(numpy(x)).sum(1, keepdims=True)
    order = np.argsort(-probabilities, 1)[:, :3]
    assert experts.tolist() == order.tolist()
    assert_near(weights, np.take_along_axis(probabilities, order, 1))


@pytest.mark.parametrize("list_type", [0, 1])
def test_a_layer_of_experts(list_type: int) -> None:
    """Sorting by expert, a product per expert, and adding up again: the same as expert by expert."""
    tokens, chosen, experts, width = 6, 2, 4, 16
    x, weight = randn(tokens, width, dtype=torch.float16), randn(experts, width, 8, dtype=torch.float16, seed=1)
    picks = torch.tensor([[0, 2], [2, 3], [1, 0], [3, 2], [0, 1], [2, 0]], dtype=torch.int32)
    shares = randn(tokens, chosen, seed=2).softmax(-1).half()
    sorted_x, rows, counts, _ = torch_npu.npu_moe_init_routing_v2(
        npu(x), npu(picks), active_num=tokens * chosen, expert_num=experts, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[0, experts], quant_mode=-1,
    )  # fmt: skip
    assert counts.tolist() == [4, 2, 4, 2]
    groups = counts if list_type == 1 else counts.cumsum(0)
    product = torch_npu.npu_grouped_matmul(
        [sorted_x], [npu(weight)], group_list=groups, split_item=2, group_type=0, group_list_type=list_type
    )[0]
    found = torch_npu.npu_moe_token_unpermute(product, rows, npu(shares))
    wanted = np.zeros((tokens, 8))
    for t in range(tokens):
        for j in range(chosen):
            wanted[t] += shares[t, j].item() * (numpy(x[t]) @ numpy(weight[picks[t, j]]))
    np.testing.assert_allclose(numpy(found.cpu()), wanted, atol=2e-2, rtol=2e-2)


def test_counts_given_as_running_sums_are_noticed() -> None:
    x, weight = npu(randn(6, 16, dtype=torch.float16)), npu(randn(3, 16, 8, dtype=torch.float16))
    with refused("wants running sums"):
        groups = npu(torch.tensor([4, 0, 2]))
        torch_npu.npu_grouped_matmul([x], [weight], group_list=groups, split_item=2, group_type=0, group_list_type=0)
    with refused("10 rows of 6"):
        groups = npu(torch.tensor([4, 0, 6]))
        torch_npu.npu_grouped_matmul([x], [weight], group_list=groups, split_item=2, group_type=0, group_list_type=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_one_x_with_several_weights(dtype: torch.dtype) -> None:
    x, weights = randn(5, 48, dtype=dtype), [randn(n, 48, dtype=dtype, seed=n) for n in (32, 16, 24)]
    fused = npu(torch.cat(weights)).split([32, 16, 24])  # rows of one matrix, as models keep them
    biases = [randn(n, dtype=torch.float32 if dtype == torch.bfloat16 else dtype, seed=n) for n in (32, 16, 24)]
    for bias in (None, biases):
        found = torch_npu.npu_grouped_matmul(
            [npu(x)] * 3, [w.t() for w in fused], bias=bias and [npu(b) for b in bias], split_item=0, group_type=-1
        )
        for i, result in enumerate(found):
            assert result.is_contiguous()
            wanted = numpy(x) @ numpy(weights[i]).T + (numpy(bias[i]) if bias else 0)
            np.testing.assert_allclose(numpy(result.cpu()), wanted, atol=6e-2, rtol=1e-2)


def test_limits_of_several_products() -> None:
    x, weight = npu(randn(5, 48, dtype=torch.float16)), npu(randn(32, 48, dtype=torch.float16))

    def multiply(x: list, weight: list, **options: Any) -> None:
        torch_npu.npu_grouped_matmul(x, weight, **{"split_item": 0, "group_type": -1, **options})

    multiply([x, x], [weight.t(), weight.t()])
    with refused("transposed, or none"):
        multiply([x, x], [weight.t(), weight.t().contiguous()])
    with refused("need 16 bits"):
        multiply([x.float()] * 2, [weight.t().float()] * 2)
    with refused("bias is torch.bfloat16"):
        multiply([x.bfloat16()] * 2, [weight.t().bfloat16()] * 2, bias=[weight[:, 0].bfloat16().contiguous()] * 2)
    with refused("65536"):
        wide = npu(torch.zeros(2, 65536, dtype=torch.float16))
        multiply([wide], [wide.t()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_with_a_weight_in_8_bits(dtype: torch.dtype) -> None:
    x, scales = randn(5, 48, dtype=dtype), (randn(32, seed=1).abs() / 100).to(dtype)
    values = (randn(32, 48, seed=2) * 40).round().clamp(-127, 127).to(torch.int8)
    found = torch_npu.npu_weight_quant_batchmatmul(npu(x), npu(values).t(), npu(scales))
    wanted = numpy(x) @ (numpy(values) * numpy(scales)[:, None]).T
    np.testing.assert_allclose(numpy(found.cpu()), wanted, atol=6e-2, rtol=1e-2)
    with refused("antiquant_scale is torch.float32"):
        torch_npu.npu_weight_quant_batchmatmul(npu(x), npu(values).t(), npu(scales.float()))
    with refused("at most 65535"):
        wide = npu(torch.zeros(65536, 48, dtype=torch.int8))
        torch_npu.npu_weight_quant_batchmatmul(npu(x), wide.t(), npu(torch.ones(65536, dtype=dtype)))
