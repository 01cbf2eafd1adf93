"""The classic faults of Ascend backends, each put into this engine's own code: the emulation must notice every one.

A layer of the engine (norms, rotation, cache, attention) runs three steps on the emulated device and is compared with a
golden computed here. Unchanged it passes; each mutant raises an error that names the fault, or computes something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from on_npu import DEVICE, npu, randn, torch_npu

from nanovllm.ops import torch_operators
from nanovllm.ops.metadata import AttentionMetadata

HEADS, GROUPS, DIM, BLOCK, EPS = 4, 2, 128, 128, 1e-6
# Steps: (first token, tokens) of both sequences. Prompts of 5 and 131 tokens, a decode beside a chunk, two decodes.
STEPS = [((0, 5), (0, 131)), ((5, 1), (131, 3)), ((6, 1), (134, 1))]
TABLE = [[3, 1], [4, 2]]


class Layer:
    """One layer's attention by the engine's operators, its inputs, and what must come out."""

    def __init__(self, dtype: torch.dtype, is_310p: bool) -> None:
        self.dtype, self.is_310p = dtype, is_310p
        self.tokens = [randn(135, HEADS + 2 * GROUPS, DIM, dtype=dtype, seed=seed) for seed in (1, 2)]
        self.weights = [randn(DIM, dtype=dtype, seed=seed).abs() for seed in (3, 4)]

    def run(self) -> list[torch.Tensor]:
        """The outputs [T, H, D] of the steps."""
        from nanovllm.ops import npu as backend
        from nanovllm.ops.npu import npu_ops

        ops = backend.operators(torch_operators(), npu_ops, self.is_310p)
        shape = (6, BLOCK, GROUPS, DIM)
        new_cache = ops.new_cache or (lambda *sizes: torch.empty(sizes[:4], dtype=sizes[4], device=sizes[5]))
        caches = [new_cache(*shape, self.dtype, torch.device(DEVICE)) for _ in range(2)]
        for cache in caches:
            cache[0].zero_()
        results = []
        for step in STEPS:
            qkv = torch.cat([self.tokens[i][a : a + n] for i, (a, n) in enumerate(step)])
            positions = torch.cat([torch.arange(a, a + n) for a, n in step])
            meta = metadata(step)
            ops.prepare_attention(meta, [None], self.dtype)
            cos, sin = (npu(x) for x in self.angles(positions))
            weights = [npu(weight) for weight in self.weights]
            q = ops.norm_rotate_write(npu(qkv), *weights, EPS, cos, sin, *caches, meta.slot_mapping)
            results.append(ops.paged_attention(q, *caches, meta, DIM**-0.5, None).cpu())
        return results

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, 1, D] as the engine's models hand them over: the first half of sin carries the minus sign."""
        theta = torch.outer(positions.double(), 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM))[:, None]
        cos, sin = theta.cos(), theta.sin()
        return torch.cat((cos, cos), -1).to(self.dtype), torch.cat((-sin, sin), -1).to(self.dtype)

    def golden(self) -> list[torch.Tensor]:
        """The same in float64, token by token, without a cache."""
        whole = [self._attention(tokens.double().numpy()) for tokens in self.tokens]
        return [
            torch.from_numpy(np.concatenate([whole[i][a : a + n] for i, (a, n) in enumerate(step)])) for step in STEPS
        ]

    def _attention(self, qkv: np.ndarray) -> np.ndarray:
        count = len(qkv)
        theta = np.outer(np.arange(count), 10000.0 ** (-np.arange(0, DIM, 2) / DIM))[:, None]
        heads = []
        for part, weight in zip((qkv[:, :HEADS], qkv[:, HEADS : HEADS + GROUPS]), self.weights, strict=True):
            part = part / np.sqrt((part**2).mean(-1, keepdims=True) + EPS) * weight.double().numpy()
            a, b = np.split(part, 2, -1)
            turned = (a * np.cos(theta) - b * np.sin(theta), b * np.cos(theta) + a * np.sin(theta))
            heads.append(np.concatenate(turned, -1))
        query, key, value = *heads, qkv[:, HEADS + GROUPS :]
        out = np.zeros((count, HEADS, DIM))
        for t in range(count):
            for h in range(HEADS):
                g = h // (HEADS // GROUPS)
                scores = key[: t + 1, g] @ query[t, h] * DIM**-0.5
                weights = np.exp(scores - scores.max())
                out[t, h] = weights / weights.sum() @ value[: t + 1, g]
        return out


def metadata(step: tuple) -> AttentionMetadata:
    """What attention is told of a step: ((first token, tokens) of both sequences)."""
    slots = [TABLE[i][p // BLOCK] * BLOCK + p % BLOCK for i, (a, n) in enumerate(step) for p in range(a, a + n)]
    counts, lengths = [n for _, n in step], [a + n for a, n in step]
    decodes = sum(n == 1 for n in counts) if counts[0] == 1 else 0
    return AttentionMetadata(
        [0, *np.cumsum(counts).tolist()], lengths, decodes, max(counts), max(lengths),
        npu(torch.tensor(TABLE, dtype=torch.int32)), npu(torch.tensor(slots)), BLOCK,
    )  # fmt: skip


def is_right(layer: Layer) -> bool:
    tolerance = 5e-3 if layer.dtype == torch.float16 else 4e-2
    pairs = zip(layer.run(), layer.golden(), strict=True)
    return all(torch.allclose(found.double(), wanted, atol=tolerance, rtol=tolerance) for found, wanted in pairs)


# ---- the mutants of Atlas A2: name -> (patches, the error that is seen) ----------------------------------------------

WRONG = None  # no error, but another result


def _running_sums_of_keys(patch: pytest.MonkeyPatch) -> None:
    from nanovllm.ops.npu.attention import FusedAttention, FusedPlan

    def prepare(self: Any, meta: AttentionMetadata, windows: Any, dtype: Any) -> None:
        meta.backend = FusedPlan(meta.query_start_loc[1:], np.cumsum(meta.seq_lens).tolist())

    patch.setattr(FusedAttention, "prepare_attention", prepare)


def _queries_of_each_sequence(patch: pytest.MonkeyPatch) -> None:
    from nanovllm.ops.npu.attention import FusedAttention, FusedPlan

    def prepare(self: Any, meta: AttentionMetadata, windows: Any, dtype: Any) -> None:
        meta.backend = FusedPlan(np.diff(meta.query_start_loc).tolist(), meta.seq_lens)

    patch.setattr(FusedAttention, "prepare_attention", prepare)


def _default_cache_mode(patch: pytest.MonkeyPatch) -> None:
    from nanovllm.ops.npu import npu_ops

    patch.setattr(npu_ops, "write_kv", lambda *tensors: torch_npu.npu_scatter_pa_kv_cache(*tensors))


def _strided_values(patch: pytest.MonkeyPatch) -> None:
    from nanovllm.ops.npu import npu_ops

    right = npu_ops.write_kv
    strided = lambda v: torch.cat((v, v), -1)[..., :DIM]  # noqa: E731
    patch.setattr(npu_ops, "write_kv", lambda k, v, *rest: right(k, strided(v), *rest))


def _strided_queries(patch: pytest.MonkeyPatch) -> None:
    from nanovllm.ops.npu import npu_ops

    right = npu_ops.attention
    strided = lambda q: torch.cat((q, q), -1)[..., :DIM]  # noqa: E731
    patch.setattr(npu_ops, "attention", lambda q, *rest, **keywords: right(strided(q), *rest, **keywords))


def _attention_with(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        from nanovllm.ops.npu import npu_ops

        right = npu_ops.attention

        def attention(*tensors: Any, **keywords: Any) -> torch.Tensor:
            new = {name: change(keywords[name]) for name, change in changes.items()}
            return right(*tensors, **{**keywords, **new})

        patch.setattr(npu_ops, "attention", attention)

    return mutate


def _signed_sines(patch: pytest.MonkeyPatch) -> None:
    from nanovllm.ops.npu.elementwise import UnsignedSin

    patch.setattr(UnsignedSin, "__call__", lambda self, sin: sin)


def _cache_as_four_dimensions(patch: pytest.MonkeyPatch) -> None:
    from nanovllm.ops.npu import npu_ops

    right = npu_ops.attention
    whole = lambda cache: cache.unflatten(2, (GROUPS, DIM))  # noqa: E731
    patch.setattr(npu_ops, "attention", lambda q, k, v, **rest: right(q, whole(k), whole(v), **rest))


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str | None]] = {
    "key lengths as running sums": (_running_sums_of_keys, WRONG),
    "query lengths of each sequence": (_queries_of_each_sequence, "actual_seq_lengths must be cumulative"),
    "cache mode left at PA_NZ": (_default_cache_mode, "cache_mode PA_NZ"),
    "scale left at 1": (_attention_with(scale=lambda _: 1.0), WRONG),
    "values strided": (_strided_values, "value must be contiguous"),
    "queries strided": (_strided_queries, "query must be contiguous"),
    "block table past the end": (_attention_with(block_table=lambda t: t + 4), "MTE DDR address out of range: block"),
    "block table of a neighbour": (_attention_with(block_table=lambda t: t.flip(0)), WRONG),
    "mask forgotten": (_attention_with(mask=lambda _: None), WRONG),
    "mask of the other triangle": (_attention_with(mask=lambda m: ~m), "must hide what is right of the diagonal"),
    "sines with the engine's sign": (_signed_sines, WRONG),
    "cache as [blocks, block, heads, dim]": (_cache_as_four_dimensions, "is not .blocks, kv_heads 2, block_size 128"),
    "key lengths of the step before": (
        _attention_with(kv_lengths=lambda lengths: [length - 1 for length in lengths]),
        "a sequence has 5 queries but 4 keys",
    ),
}


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_engines_layer_is_right(dtype: torch.dtype) -> None:
    assert is_right(Layer(dtype, is_310p=False))


@pytest.mark.emulated
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, error = MUTANTS[name]
    mutate(monkeypatch)
    if error is None:
        assert not is_right(Layer(torch.float16, is_310p=False))
    else:
        with pytest.raises(RuntimeError, match=rf"(?s)\[emulated Ascend\].*{error}"):
            Layer(torch.float16, is_310p=False).run()


# ---- graphs ---------------------------------------------------------------------------------------------------------


def _recorded_decode(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of two decodes, recorded at one length and replayed at ``lengths``; and what it should be."""
    from nanovllm.ops.npu import npu_ops
    from nanovllm.ops.npu.attention import FusedAttention
    from nanovllm.ops.npu.graphs import NpuCapture

    attention = FusedAttention(npu_ops)
    meta = metadata(((4, 1), (129, 1)))
    query, caches = npu(randn(2, HEADS, DIM, dtype=torch.float16)), []
    for seed in (1, 2):
        caches.append(npu(randn(6, BLOCK, GROUPS, DIM, dtype=torch.float16, seed=seed)))
    plan = attention.allocate(2, torch.device(DEVICE))
    meta.backend = attention.backend(plan, 2)
    replay, out = NpuCapture(attention)(lambda: attention.paged_attention(query, *caches, meta, DIM**-0.5, None), plan)
    for now in ([5, 130], lengths):
        attention.fill(np.array(now), plan)
        replay()
    found = out.cpu()
    meta.backend = attention.backend(plan, 2)
    return found, attention.paged_attention(query, *caches, meta, DIM**-0.5, None).cpu()


@pytest.mark.parametrize(
    "schedule",
    [pytest.param("eager", marks=pytest.mark.emulated), pytest.param("lazy", marks=pytest.mark.emulated(lazy=1))],
)
def test_a_forgotten_task_update_is_noticed(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, wanted = _recorded_decode([9, 200])
    assert torch.equal(found, wanted)
    monkeypatch.setattr(torch.npu.NPUGraph, "update", lambda self, cpu_update_input: None)
    with pytest.raises(RuntimeError, match=r"(?s)would DEADLOCK|107020"):
        _recorded_decode([9, 200])


@pytest.mark.emulated
def test_an_update_with_the_lengths_of_the_recording_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.npu.NPUGraph.update

    def update(self: Any, cpu_update_input: list[dict]) -> None:
        right(self, cpu_update_input=[{"actual_seq_lengths_kv": [1, 1]}])

    monkeypatch.setattr(torch.npu.NPUGraph, "update", update)
    found, wanted = _recorded_decode([9, 200])
    assert not torch.equal(found, wanted)


# ---- 310P -----------------------------------------------------------------------------------------------------------


@pytest.mark.emulated(soc="Ascend310P3")
def test_the_engines_layer_is_right_on_a_310p() -> None:
    assert is_right(Layer(torch.float16, is_310p=True))


@pytest.mark.emulated(soc="Ascend310P3")
def test_bfloat16_on_a_310p_is_noticed() -> None:
    with pytest.raises(Exception, match="Ascend310P3 has no bfloat16"):
        Layer(torch.bfloat16, is_310p=True).run()


@pytest.mark.emulated(soc="Ascend310P3")
def test_the_larger_cards_operators_on_a_310p_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="does not exist on Ascend310P3"):
        Layer(torch.float16, is_310p=False).run()
