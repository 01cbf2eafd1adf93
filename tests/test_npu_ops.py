"""The operators of an NPU on substitutes of torch_npu (npu_substitutes.py): their numbers, and how many there are."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from npu_substitutes import Substitutes
from paged import load_model, make_metadata
from tiny_models import make_checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nanovllm.errors import ParameterError
from nanovllm.models import Decoder
from nanovllm.ops import Operators, reference, torch_operators
from nanovllm.ops.graphs import DecodeGraphs
from nanovllm.ops.npu import operators
from nanovllm.ops.npu.attention import FusedAttention, FusedPlan, _spans
from nanovllm.ops.npu.elementwise import UnsignedSin
from nanovllm.ops.operators import AttentionShape
from nanovllm.platforms.npu import NpuPlatform, chip_of

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def make_operators(is_310p: bool = False) -> tuple[Operators, Substitutes]:
    library = Substitutes()
    return operators(torch_operators(), library, is_310p), library


def randn(*shape: int, dtype: torch.dtype = BFLOAT16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- one operator at a time -----------------------------------------------------------------------------------------


def test_norms_and_activation() -> None:
    ops, library = make_operators()
    x, residual, weight = randn(7, 48), randn(7, 48, seed=1), randn(48, seed=2)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    for ours, theirs in zip(
        ops.add_rms_norm(x, residual, weight, 1e-6), reference.add_rms_norm(x, residual, weight, 1e-6), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ops.silu_and_mul(x), reference.silu_and_mul(x))
    torch.testing.assert_close(ops.gelu_and_mul(x, "tanh"), reference.gelu_and_mul(x, "tanh"))  # torch's
    assert library.calls.total() == 3
    none = x[:0]
    for empty in (ops.rms_norm(none, weight, 1e-6), ops.silu_and_mul(none), *ops.add_rms_norm(none, none, weight, 1)):
        assert len(empty) == 0
    assert library.calls.total() == 3  # an NPU is asked for nothing


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("head_dim", [10, 64, 80, 128])
def test_from_the_product_to_the_cache(head_dim: int, apart: bool, normed: bool) -> None:
    ops, library = make_operators()
    heads, kv_heads, tokens, block = 6, 2, 9, 4
    qkv = randn(tokens, heads + 2 * kv_heads, head_dim)
    q_weight, k_weight = (randn(head_dim, seed=s) if normed else None for s in (1, 2))
    angles = torch.rand(tokens, 1, head_dim // 2) * 6
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(BFLOAT16)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(BFLOAT16)
    slots = torch.tensor(random.Random(0).sample(range(40), tokens))
    results = []
    for function in (ops.norm_rotate_write, reference.norm_rotate_write):
        caches = [torch.zeros(10, block, kv_heads, head_dim, dtype=BFLOAT16) for _ in range(2)]
        product: Any = qkv.clone()
        if apart and function is ops.norm_rotate_write:
            product = [part.contiguous() for part in product.split((heads, kv_heads, kv_heads), 1)]
        q = function(product, q_weight, k_weight, 1e-6, cos, sin, caches[0], caches[1], slots)
        results.append((q, *caches))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    in_one = head_dim in (64, 128) and (normed or apart)
    assert library.calls["rotate_both"] == (1 if in_one else 0)
    assert library.calls.total() == 2 * normed + (1 if in_one else 2) + 1


def test_a_product_comes_in_parts_wherever_the_operator_takes_it() -> None:
    ops, library = make_operators()
    assert ops.linear_parts is not None
    for dtype, biased, tokens, grouped in (
        (BFLOAT16, False, 3, 1), (FLOAT16, False, 1, 1), (BFLOAT16, True, 3, 0), (FLOAT32, False, 3, 0),
        (BFLOAT16, False, 0, 0),
    ):  # fmt: skip
        x, weight = randn(tokens, 32, dtype=dtype), randn(40, 32, dtype=dtype, seed=1)
        bias = randn(40, dtype=dtype, seed=2) if biased else None
        library.calls.clear()
        parts = ops.linear_parts(x, ops.pack_linear(weight), bias, [24, 8, 8])
        torch.testing.assert_close(torch.cat(list(parts), 1), torch.nn.functional.linear(x, weight, bias))
        assert library.calls["grouped_linear"] == grouped
        assert not grouped or all(part.is_contiguous() for part in parts)


def test_the_sign_of_sin_is_taken_away_once_for_all_layers_and_anew_for_every_step() -> None:
    unsigned = UnsignedSin()
    first, second = torch.tensor([[[-0.5, 0.5]]]), torch.tensor([[[-0.25, 0.25]]])
    assert unsigned(first) is unsigned(first)
    assert unsigned(first).tolist() == [[[0.5, 0.5]]]
    assert unsigned(second).tolist() == [[[0.25, 0.25]]]
    narrow = torch.tensor([[[-0.5, -0.5, 0.5, 0.5]]], dtype=BFLOAT16)
    assert unsigned(narrow).tolist() == [[[0.5, 0.5, 0.5, 0.5]]] and unsigned(narrow).dtype == BFLOAT16


def batches(seed: int, block_size: int) -> tuple[list[list[int]], list[int], list[int]]:
    """(tables, contexts, news) of a random mixed batch; rows with one new token first, as the scheduler has them."""
    choose = random.Random(seed)
    singles, longer = choose.randrange(4), choose.randrange(1, 4)
    news = [1] * singles + [choose.choice([1, 2, 17, 40]) for _ in range(longer)]
    contexts = [choose.randrange(90) for _ in news]
    blocks = list(range(1, 200))
    choose.shuffle(blocks)
    tables = [[blocks.pop() for _ in range(-(-(c + n) // block_size))] for c, n in zip(contexts, news, strict=True)]
    return tables, contexts, news


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("head_dim", "block_size", "window", "dtype", "fused"),
    [
        (128, 16, None, BFLOAT16, True),
        (128, 128, 20, FLOAT16, True),
        (64, 128, None, BFLOAT16, True),
        (256, 128, None, FLOAT16, True),
        (80, 128, 20, BFLOAT16, False),
        (10, 16, None, BFLOAT16, False),
        (128, 16, 9, FLOAT32, False),
    ],
)
def test_attention_of_mixed_batches(
    head_dim: int, block_size: int, window: int | None, dtype: torch.dtype, fused: bool, seed: int
) -> None:
    ops, library = make_operators()
    tables, contexts, news = batches(seed, block_size)
    meta = make_metadata(tables, contexts, news, block_size)
    heads, kv_heads = 4, 2
    caches = [randn(200, block_size, kv_heads, head_dim, dtype=dtype, seed=s) for s in (1, 2)]
    q = randn(sum(news), heads, head_dim, dtype=dtype, seed=3)
    ops.prepare_attention(meta, (window,), dtype)
    ours = ops.paged_attention(q, *caches, meta, 0.2, window)
    if fused:
        theirs = reference.paged_attention(q.float(), *(cache.float() for cache in caches), meta, 0.2, window)
        tolerance = 1e-2 if dtype == BFLOAT16 else 2e-3
        torch.testing.assert_close(ours.float(), theirs, atol=tolerance, rtol=tolerance)
    else:
        assert torch.equal(ours, reference.paged_attention(q, *caches, meta, 0.2, window))
    assert (library.calls["attention"] > 0) is fused
    if fused and head_dim == 128:
        assert library.calls["attention"] == 1


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    ("contexts", "news", "called"),
    [
        ([3, 70, 128], [1, 1, 1], "decode_attention"),
        ([0, 0], [5, 40], "prompt_attention"),  # 45 tokens: 3 are added
        ([0, 0, 0], [16, 1, 15], "prompt_attention"),
        ([9, 0, 64], [1, 7, 30], "chunk_attention"),
        ([0], [2050], "chunk_attention"),  # longer than the mask of prompts
    ],
)
@pytest.mark.parametrize(("head_dim", "window"), [(32, None), (64, None), (64, 12)])
def test_a_layer_on_a_310p(
    head_dim: int, window: int | None, contexts: list[int], news: list[int], called: str, normed: bool
) -> None:
    ops, library = make_operators(is_310p=True)
    block_size, heads, kv_heads, blocks = 64, 4, 2, 40
    ids = iter(random.Random(1).sample(range(1, blocks), blocks - 1))
    tables = [[next(ids) for _ in range(-(-(c + n) // block_size))] for c, n in zip(contexts, news, strict=True)]
    meta, plain_meta = (make_metadata(tables, contexts, news, block_size) for _ in range(2))
    assert ops.new_cache is not None
    caches = [ops.new_cache(blocks, block_size, kv_heads, head_dim, FLOAT16, torch.device("cpu")) for _ in range(2)]
    assert caches[0].shape == (blocks, kv_heads * head_dim // 16, block_size, 16)
    plain = [randn(blocks, block_size, kv_heads, head_dim, dtype=FLOAT16, seed=s) for s in (1, 2)]
    for tiles, cache in zip(caches, plain, strict=True):
        tiles.copy_(cache.view(blocks, block_size, -1, 16).transpose(1, 2))
    tokens = sum(news)
    qkv = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=FLOAT16)
    weights = [randn(head_dim, dtype=FLOAT16, seed=s) if normed else None for s in (4, 5)]
    angles = torch.rand(tokens, 1, head_dim // 2) * 6
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(FLOAT16)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(FLOAT16)
    ops.prepare_attention(meta, (window,), FLOAT16)
    scale = head_dim**-0.5
    q = ops.norm_rotate_write(qkv, *weights, 1e-6, cos, sin, *caches, meta.slot_mapping)
    ours = ops.paged_attention(q, caches[0], caches[1], meta, scale, window)
    wanted_q = reference.norm_rotate_write(qkv, *weights, 1e-6, cos, sin, *plain, meta.slot_mapping)
    theirs = reference.paged_attention(
        wanted_q.float(), plain[0].float(), plain[1].float(), plain_meta, scale, window
    )  # fmt: skip
    torch.testing.assert_close(ours.float(), theirs, atol=4e-3, rtol=4e-3)
    for tiles, cache in zip(caches, plain, strict=True):
        torch.testing.assert_close(tiles.transpose(1, 2).reshape(cache.shape), cache, atol=4e-3, rtol=4e-3)
    assert [name for name in library.calls if name.endswith("attention")] == ["masked_attention" if window else called]


def test_a_window_that_hides_nothing_on_a_310p_needs_no_mask() -> None:
    ops, _ = make_operators(is_310p=True)
    meta = make_metadata([[1], [2]], [0, 0], [5, 7], 64)
    ops.prepare_attention(meta, (7, None), FLOAT16)
    assert not meta.backend.window_masks
    ops.prepare_attention(meta, (6, None), FLOAT16)
    assert list(meta.backend.window_masks) == [6]


def test_rows_of_one_query_go_together() -> None:
    assert list(_spans([1, 2, 3])) == [(slice(0, 3), slice(0, 3))]
    assert list(_spans([1, 2, 5, 6, 7, 9])) == [
        (slice(0, 2), slice(0, 2)),
        (slice(2, 3), slice(2, 5)),
        (slice(3, 5), slice(5, 7)),
        (slice(5, 6), slice(7, 9)),
    ]


# ---- models that do not fit -----------------------------------------------------------------------------------------


def shape(**changes: Any) -> AttentionShape:
    values: dict[str, Any] = {
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "block_size": 128, "dtype": BFLOAT16,
        "kv_dtype": BFLOAT16, "window": None, "rows": 8, "longest": 4096,
    }  # fmt: skip
    return AttentionShape(**{**values, **changes})


@pytest.mark.parametrize(
    ("is_310p", "changes", "message"),
    [
        (False, {"head_dim": 64, "block_size": 16}, "need blocks of 128, 256, 384 or 512"),
        (True, {"head_dim": 40}, "not of 40"),
        (True, {"head_dim": 256}, "need blocks of 64"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_at_the_start(is_310p: bool, changes: Any, message: str) -> None:
    ops, _ = make_operators(is_310p)
    assert ops.tune is not None
    with pytest.raises(ParameterError, match=message):
        ops.tune(shape(**changes), torch.device("cpu"))


@pytest.mark.parametrize("changes", [{}, {"head_dim": 64}, {"head_dim": 128, "block_size": 16, "window": 512}])
def test_a_model_that_fits_can_be_recorded(changes: Any) -> None:
    attention = FusedAttention(Substitutes())
    attention.tune(shape(**changes), torch.device("cpu"))
    assert attention.recordable


@pytest.mark.parametrize("changes", [{"dtype": FLOAT32}, {"head_dim": 10}, {"head_dim": 80, "window": 512}])
def test_what_plain_torch_computes_is_announced_and_not_recorded(
    changes: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.ops.npu.attention.logger.propagate", True)
    attention = FusedAttention(Substitutes())
    attention.tune(shape(**changes), torch.device("cpu"))
    assert not attention.recordable and "slowly" in caplog.text


# ---- weights in 8 bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_310p", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("biased", [False, True])
def test_a_weight_in_8_bits_is_off_by_half_a_step_at_most(dtype: torch.dtype, is_310p: bool, biased: bool) -> None:
    library = Substitutes()
    ops = operators(torch_operators(), library, is_310p, "int8")
    weight, x, bias = randn(24, 64, dtype=dtype) / 30, randn(3, 64, dtype=dtype, seed=1), randn(24, dtype=dtype, seed=2)
    weight[3] = 0  # an output without weights
    weight[4] *= 0.03  # its scale is a subnormal number in float16
    packed = ops.pack_linear(weight)
    rows = ops.weight_rows(packed, torch.arange(24)).float()
    steps = weight.float().abs().amax(1, keepdim=True) / 127
    assert ((rows - weight.float()).abs() <= 0.52 * steps + rows.abs() * 2**-8).all()
    ours = ops.linear(x, packed, bias if biased else None)
    wanted = x.float() @ rows.T + (bias.float() if biased else 0)
    torch.testing.assert_close(ours.float(), wanted, atol=3e-2, rtol=2e-2)
    assert library.calls["int8_linear"] == 1
    assert ops.linear(x[:0], packed, None).shape == (0, 24) and library.calls["int8_linear"] == 1
    if ops.linear_parts is not None:
        parts = ops.linear_parts(x, packed, bias if biased else None, [8, 8, 8])
        assert torch.equal(torch.cat(list(parts), 1), ours)


def test_a_matrix_that_the_operator_does_not_take_stays_as_it_is() -> None:
    ops = operators(torch_operators(), Substitutes(), False, "int8")
    head = randn(65536, 4)
    assert ops.pack_linear(head) is head
    assert torch.equal(ops.linear(randn(2, 4), head, None), randn(2, 4) @ head.T)
    with pytest.raises(ParameterError, match="use float16"):
        ops.pack_linear(randn(8, 8, dtype=FLOAT32))


@pytest.mark.parametrize("name", ["int4", "w8a8", "fp8"])
def test_other_weights_are_refused_before_anything_is_loaded(name: str) -> None:
    with pytest.raises(ParameterError, match="use 'int8' or leave it out"):
        NpuPlatform(chip_of("Ascend310P3")).check_quantization(name)
    with pytest.raises(ParameterError, match="choose one of int8"):
        operators(torch_operators(), Substitutes(), False, name)


# ---- steps of a model: buckets, launches, waits ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in ("qwen3", "llama", "qwen2"):
        path = made[family] = tmp_path_factory.mktemp(family)
        sizes = {"head_dim": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        make_checkpoint(path, family, dtype=BFLOAT16, num_hidden_layers=2, **sizes)
    return made


class LaunchCounter(TorchDispatchMode):
    """Counts what an NPU would launch beside torch_npu's operators, and what would wait for it."""

    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_to_copy", "aten::unique")

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith(self.WAITS):
            self.waited.append(name)
        copies = name == "aten::contiguous" and not args[0].is_contiguous()
        if copies or (not func.is_view and not name.startswith(("aten::empty", "aten::_unsafe_view"))):
            self.launched.append(name)
        return func(*args, **(kwargs or {}))


class Uncounted:
    """The substitutes, whose own operators do not count."""

    def __init__(self, library: Substitutes) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call


@pytest.mark.parametrize(("family", "budget"), [("llama", 10), ("qwen3", 12), ("qwen2", 12)])
def test_launches_of_a_layer_stay_in_their_budget_and_nothing_waits(
    family: str, budget: int, checkpoints: dict[str, Path]
) -> None:
    """A decode step of five rows, with one layer and with two: the difference is a layer's."""
    counts = {}
    for layers in (1, 2):
        library = Substitutes()
        ops = operators(torch_operators(), Uncounted(library), False)
        model = load_model(checkpoints[family], dtype=BFLOAT16, ops=ops, num_hidden_layers=2)
        model.layers = model.layers[:layers]
        caches = [tuple(randn(40, 16, 2, 128, seed=s) for s in (1, 2)) for _ in range(layers)]
        meta = make_metadata([[i + 1] for i in range(5)], [3, 4, 5, 6, 7], [1] * 5, 16)
        ids, positions = torch.arange(5), torch.tensor([3, 4, 5, 6, 7])
        with torch.inference_mode(), LaunchCounter() as counter:
            model.forward(ids, positions, caches, meta)  # type: ignore[arg-type]
        counts[layers] = library.calls.total() + len(counter.launched)
        assert not counter.waited
    assert counts[2] - counts[1] == budget, counts


class Steps:
    """Steps of a model over caches of its own, through buckets or not."""

    def __init__(self, path: Path, capture: Any, wrap: bool) -> None:
        self.attention = FusedAttention(Substitutes())
        ops, _ = make_operators()
        ops = replace(
            ops, prepare_attention=self.attention.prepare_attention, paged_attention=self.attention.paged_attention
        )
        self.model: Decoder = load_model(path, dtype=BFLOAT16, ops=ops)
        self.caches = [tuple(randn(60, 16, 2, 128, seed=s) for s in (1, 2)) for _ in range(self.model.num_layers)]
        self.forward: Any = DecodeGraphs(self._plain, self.attention, capture, 8, 16) if wrap else self._plain

    def _plain(self, ids: Tensor, positions: Tensor, meta: Any) -> Tensor:
        return self.model.forward(ids, positions, self.caches, meta)  # type: ignore[arg-type]

    @torch.inference_mode()
    def run(self, tables: list[list[int]], contexts: list[int]) -> Tensor:
        meta = make_metadata(tables, contexts, [1] * len(tables), 16)
        positions = torch.tensor(contexts)
        return self.forward(positions % 100 + 1, positions, meta).clone()


class UpdatedTape:
    """A recording that takes the lengths of a plan from the plan, as `NpuCapture` does with ``update``."""

    def __init__(self, updates: bool = True) -> None:
        self.updates, self.captures = updates, 0

    def __call__(self, work: Any, plan: FusedPlan) -> Any:
        self.captures += 1
        baked = list(plan.kv_lengths)
        result = work()

        def replay() -> None:
            now, plan.kv_lengths = plan.kv_lengths, (plan.kv_lengths if self.updates else baked)
            result.copy_(work())
            plan.kv_lengths = now

        return replay, result


def test_buckets_give_what_plain_steps_give(checkpoints: dict[str, Path]) -> None:
    recorded, launched, plain = (
        Steps(checkpoints["qwen3"], *arguments) for arguments in ((UpdatedTape(), True), (None, True), (None, False))
    )
    for tables, contexts in (
        ([[1], [2], [3]], [3, 9, 15]),
        ([[1, 4], [2], [3, 5]], [16, 10, 17]),
        ([[6], [7], [8], [9], [10]], [1, 2, 3, 4, 5]),
        ([[6]], [2]),
    ):
        wanted = plain.run(tables, contexts)
        assert torch.equal(recorded.run(tables, contexts), launched.run(tables, contexts))
        torch.testing.assert_close(launched.run(tables, contexts), wanted, atol=3e-2, rtol=3e-2)
    forgotten = Steps(checkpoints["qwen3"], UpdatedTape(updates=False), True)
    forgotten.run([[1], [2], [3]], [3, 9, 15])
    stale = forgotten.run([[1, 4], [2], [3, 5]], [16, 10, 17])
    assert not torch.equal(stale, launched.run([[1, 4], [2], [3, 5]], [16, 10, 17]))  # the test would notice


def test_plans_of_buckets_are_filled_from_the_step() -> None:
    attention = FusedAttention(Substitutes())
    plan = attention.allocate(4, torch.device("cpu"))
    attention.fill(np.array([7, 3, 1, 1], np.int64), plan)
    assert plan == FusedPlan([1, 2, 3, 4], [7, 3, 1, 1])
    assert attention.backend(plan, 4) is plan and json.dumps(plan.kv_lengths)  # ints, not numpy's
