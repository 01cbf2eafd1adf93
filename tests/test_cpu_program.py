"""A recorded step computes what the model computes call by call, and only what can be recorded is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import load_model, make_metadata
from tiny_models import FAMILIES, make_checkpoint
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.models import Decoder
from nanovllm.ops import AttentionMetadata, Operators, operator_table
from nanovllm.ops.cpu import library
from nanovllm.ops.cpu.program import Program

pytestmark = pytest.mark.skipif(not library.supported_instruction_sets(), reason="the C++ kernels are not built")

BLOCK = 4
MOST = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3", dtype=torch.bfloat16)
    return path


def caches_of(model: Decoder, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (40, BLOCK, model.num_kv_heads, model.head_dim)
    return [
        tuple(torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2))  # type: ignore[misc]
        for _ in range(model.num_layers)
    ]


def record(model: Decoder, caches: list[tuple[Tensor, Tensor]]) -> Program | None:
    def forward(input_ids: Tensor, positions: Tensor, meta: AttentionMetadata) -> Tensor:
        return model.forward(input_ids, positions, caches, meta)

    return model.ops.record(forward, MOST, BLOCK)  # type: ignore[return-value]


@settings(max_examples=15, deadline=None)
@given(
    batches=st.lists(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), min_size=1, max_size=3), max_size=3)
)
def test_one_program_equals_the_model_for_every_batch(folder: Path, batches: list[list[tuple[int, int]]]) -> None:
    """Hidden states and caches, bit by bit: contexts and new tokens of any number, one batch after another."""
    model = load_model(folder, dtype=torch.bfloat16)
    plain, recorded = caches_of(model, 1), caches_of(model, 1)
    program = record(model, recorded)
    assert isinstance(program, Program)
    for batch in batches:
        batch = sorted(batch, key=lambda row: row[1] != 1)
        tables = [list(range(1 + 9 * row, 10 + 9 * row)) for row in range(len(batch))]
        meta = make_metadata(tables, [c for c, _ in batch], [n for _, n in batch], BLOCK)
        positions = torch.tensor([context + i for context, new in batch for i in range(new)])
        tokens = positions * 7 % 131
        expected = model.forward(tokens, positions, plain, meta)
        assert torch.equal(program(tokens, positions, meta), expected)
        for layer, other in zip(plain, recorded, strict=True):
            assert torch.equal(layer[0], other[0]) and torch.equal(layer[1], other[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [None, "w8a8"])
def test_enforce_eager_changes_no_token_and_no_logprob(family: str, quantization: str | None, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family, hidden_size=96, intermediate_size=128, head_dim=16, dtype=torch.bfloat16)
    prompts = [[3 + (7 * i + 11 * j) % 120 for j in range(5 + 9 * i)] for i in range(5)]
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=6, logprobs=2, ignore_eos=True)
    results = []
    for eager in (True, False):
        with LLM(str(tmp_path), skip_tokenizer_init=True, enforce_eager=eager, quantization=quantization,
                 num_gpu_blocks_override=40, max_num_batched_tokens=24, max_num_seqs=4) as llm:  # fmt: skip
            runner = llm.llm_engine.core.executor._runner
            assert isinstance(runner.forward, Program) is not eager
            results.append([o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)])
    for eager_output, output in zip(*results, strict=True):
        assert output.token_ids == eager_output.token_ids and output.logprobs == eager_output.logprobs


def test_memory_is_used_again_from_layer_to_layer(folder: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16, num_hidden_layers=6)
    programs = [record(model, caches_of(model, 0)) for model in (load_model(folder), load_model(tmp_path))]
    assert len(programs[1].calls) > 2 * len(programs[0].calls)
    assert programs[1].memory_used < 1.5 * programs[0].memory_used


@pytest.mark.parametrize(("overrides", "dtype"), [({"hidden_act": "gelu"}, torch.bfloat16), ({}, torch.float16)])
def test_a_model_with_other_operations_runs_call_by_call(
    overrides: dict, dtype: torch.dtype, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(folder, dtype=dtype, **overrides)
    caches = caches_of(model, 0)
    with caplog.at_level(logging.INFO, "nanovllm"):
        assert record(model, caches) is None
    assert "call by call" in caplog.text
    meta = make_metadata([[1, 2]], [0], [3], BLOCK)
    hidden = model.forward(torch.tensor([5, 6, 7]), torch.arange(3), caches, meta)  # and kernels run again
    assert hidden.isfinite().all()


@pytest.mark.parametrize("change", ["x * 2", "x.mul_(2)", "x[:, :3].reshape(-1)", "x.clone()", "x.double()"])
def test_an_operation_on_numbers_ends_the_recording(change: str) -> None:
    ops = operator_table("cpu")
    weight = torch.ones(8)

    def forward(input_ids: Tensor, positions: Tensor, meta: AttentionMetadata) -> Tensor:
        x = ops.rms_norm(torch.empty(input_ids.shape[0], 8), weight, 1e-6)
        eval(change)
        return x.view(-1, 2, 4).flatten(1)

    assert ops.record(forward, 4, BLOCK) is None
    change = "x[:, 2:].unsqueeze(0)"
    assert ops.record(forward, 4, BLOCK) is not None


def test_without_kernels_there_is_no_program() -> None:
    ops: Operators = operator_table("cpu", "torch_native")
    assert ops.record(lambda ids, positions, meta: torch.zeros(1), 4, BLOCK) is None
