"""The whole engine against transformers, token for token, on tiny float32 models: every way of cutting the same work
into steps (chunks, cache hits, preemptions, forks, plans in flight) must give what a plain forward pass gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, ROPES, make_checkpoint, reference_greedy, reference_logits

from nanovllm import LLM, SamplingParams
from nanovllm.engine.invariants import InvariantChecker

# Ragged, with a common prefix of two full blocks among the last three, lengths around multiples of the block size (8).
COMMON = [17, 99, 23, 54, 101, 7, 7, 88, 61, 12, 45, 110, 9, 31, 77, 64]
PROMPTS = [
    [5],
    [11, 3, 120],
    list(range(20, 27)),
    list(range(40, 48)),
    [*COMMON, 4],
    [*COMMON, 70, 71, 72],
    [*COMMON, *range(90, 115)],
]
MAX_TOKENS = 10

GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)


def engine(path: Path, **options: Any) -> LLM:
    """An engine watched by the invariant checker."""
    settings = {"block_size": 8, "max_num_seqs": 8, "num_gpu_blocks_override": 80, "max_model_len": 128}
    llm = LLM(str(path), skip_tokenizer_init=True, dtype="float32", **{**settings, **options})
    core = llm.llm_engine.core
    core.checker = InvariantChecker(core.scheduler)
    return llm


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def check_idle(llm: LLM) -> None:
    checker = llm.llm_engine.core.checker
    assert checker is not None
    checker.idle()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(folder, expected greedy continuations of PROMPTS, transformers model) by family and rope, made once."""
    made: dict[Any, Any] = {}

    def get(family: str, rope: str = "default", **overrides: Any) -> tuple[Path, list[list[int]], Any]:
        key = (family, rope, tuple(sorted(overrides.items())))
        if key not in made:
            path = tmp_path_factory.mktemp(family)
            model = make_checkpoint(path, family, rope, **overrides)
            made[key] = path, [reference_greedy(model, prompt, MAX_TOKENS) for prompt in PROMPTS], model
        return made[key]

    yield get


SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks of 1": {"long_prefill_token_threshold": 1},
    "chunks of 7": {"long_prefill_token_threshold": 7},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 128},
    "no prefix cache": {"enable_prefix_caching": False},
    "preempted": {"num_gpu_blocks_override": 12, "max_model_len": 64},
    "preempted, no prefix cache": {
        "num_gpu_blocks_override": 12,
        "max_model_len": 64,
        "enable_prefix_caching": False,
    },
    "preempted, chunks of 7, two in flight": {
        "num_gpu_blocks_override": 12,
        "max_model_len": 64,
        "long_prefill_token_threshold": 7,
        "async_scheduling": True,
    },
    "two in flight": {"async_scheduling": True},
    "one at a time": {"max_num_seqs": 1},
    "budget of 8": {"max_num_batched_tokens": 8},
    "blocks of 1": {"block_size": 1, "num_gpu_blocks_override": 400},
    "reference attention": {"attention_backend": "reference"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_greedy_tokens_equal_transformers(checkpoints: Any, family: str, schedule: str):
    path, expected, _ = checkpoints(family)
    with engine(path, **SCHEDULES[schedule]) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
        # Again, now with whatever the first run has left in the cache.
        assert tokens(llm.generate(PROMPTS[::-1], GREEDY, use_tqdm=False)) == expected[::-1]
        if schedule.startswith("preempted"):
            assert llm.llm_engine.core.scheduler.num_preemptions > 0
        check_idle(llm)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_tokens_equal_transformers_for_every_rope(checkpoints: Any, family: str, rope: str):
    # Dynamic and longrope choose their frequencies by length; the context here is one length regime (docs/models.md).
    length = 64 if rope == "longrope" else 128
    path, expected, _ = checkpoints(family, rope)
    for schedule in ({}, {"long_prefill_token_threshold": 7}):
        with engine(path, max_model_len=length, **schedule) as llm:
            assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


@pytest.mark.parametrize("schedule", ["plain", "chunks of 7", "preempted", "two in flight"])
def test_sliding_windows_equal_transformers(checkpoints: Any, schedule: str):
    path, expected, _ = checkpoints("mistral", sliding_window=6)
    with engine(path, **SCHEDULES[schedule]) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_a_window_of_some_layers_equals_transformers(checkpoints: Any):
    path, expected, _ = checkpoints("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    for schedule in ("plain", "chunks of 7"):
        with engine(path, **SCHEDULES[schedule]) as llm:
            assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


@pytest.mark.parametrize(
    "shape",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},  # MQA
        {"num_key_value_heads": 6},  # MHA
        {"head_dim": 32},
    ],
    ids=str,
)
def test_odd_shapes_equal_transformers(checkpoints: Any, shape: dict[str, Any]):
    path, expected, _ = checkpoints("qwen3", **shape)
    with engine(path, long_prefill_token_threshold=7) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


@pytest.mark.parametrize("schedule", ["plain", "chunks of 7", "preempted", "no prefix cache"])
def test_logprobs_equal_transformers(checkpoints: Any, schedule: str):
    path, expected, model = checkpoints("qwen3")
    params = SamplingParams(
        temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=3, prompt_logprobs=2, detokenize=False
    )
    with engine(path, **SCHEDULES[schedule]) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)  # fill the cache: prompt_logprobs must not read it
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, output, continuation in zip(PROMPTS, outputs, expected, strict=True):
        exact = reference_logits(model, prompt + continuation).log_softmax(-1)
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
        found = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(found) == len(prompt) - 1 + MAX_TOKENS
        for position, (token, entry) in enumerate(zip([*prompt, *continuation][1:], found, strict=True)):
            row = exact[position]
            assert entry[token].logprob == pytest.approx(row[token].item(), abs=2e-4)
            assert entry[token].rank == 1 + int((row > row[token]).sum())
            count = 2 if position < len(prompt) - 1 else 3
            assert set(row.topk(count).indices.tolist()) <= set(entry)
            for other, value in entry.items():
                assert value.logprob == pytest.approx(row[other].item(), abs=2e-4)
        assert output.outputs[0].cumulative_logprob == pytest.approx(
            sum(exact[len(prompt) - 1 + i, t].item() for i, t in enumerate(continuation)), abs=2e-3
        )


@pytest.mark.parametrize("schedule", ["plain", "chunks of 7", "preempted", "no prefix cache", "two in flight"])
def test_n_outputs_see_the_right_context(checkpoints: Any, schedule: str):
    """Forks share the prompt's blocks; the log-probabilities of what each samples show that each has its own cache."""
    path, _, model = checkpoints("qwen3")
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    with engine(path, **SCHEDULES[schedule]) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        check_idle(llm)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert [c.index for c in output.outputs] == [0, 1, 2]
        assert len({tuple(c.token_ids) for c in output.outputs}) == 3
        for completion in output.outputs:
            exact = reference_logits(model, prompt + completion.token_ids).log_softmax(-1)
            for i, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
                assert entry[token].logprob == pytest.approx(exact[len(prompt) - 1 + i, token].item(), abs=2e-4)


def test_a_seed_fixes_the_output_whatever_else_is_in_the_batch(checkpoints: Any):
    path, _, _ = checkpoints("qwen3")
    params = SamplingParams(temperature=1.3, top_p=0.95, top_k=40, seed=11, max_tokens=16, ignore_eos=True)
    noise = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    with engine(path) as llm:
        alone = tokens(llm.generate(PROMPTS[5], params, use_tqdm=False))[0]
        for shift in range(3):
            prompts = [*PROMPTS[shift:], PROMPTS[5]]
            found = tokens(llm.generate(prompts, [noise] * (len(prompts) - 1) + [params], use_tqdm=False))
            assert found[-1] == alone
        assert tokens(llm.generate([PROMPTS[5]] * 2, noise, use_tqdm=False))[0] != alone
    with engine(path, max_num_seqs=1, long_prefill_token_threshold=7, seed=3) as llm:
        assert tokens(llm.generate(PROMPTS[5], params, use_tqdm=False))[0] == alone


def test_the_engine_seed_fixes_runs_without_seeds(checkpoints: Any):
    path, _, _ = checkpoints("qwen3")
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)

    def sample(seed: int) -> list[list[int]]:
        with engine(path, seed=seed) as llm:
            return tokens(llm.generate(PROMPTS, params, use_tqdm=False))

    assert sample(1) == sample(1) != sample(2)


def test_a_prefix_hit_skips_compute(checkpoints: Any):
    # field_lessons 5.5: the number of tokens executed, not only the number reported.
    path, expected, _ = checkpoints("llama")
    with engine(path) as llm:
        checker = llm.llm_engine.core.checker
        assert checker is not None
        llm.generate(PROMPTS[-1], GREEDY, use_tqdm=False)
        before = checker.num_slots_written
        (output,) = llm.generate(PROMPTS[-1], GREEDY, use_tqdm=False)
        hit = (len(PROMPTS[-1]) - 1) // 8 * 8
        assert output.num_cached_tokens == hit
        assert checker.num_slots_written - before == len(PROMPTS[-1]) - hit + MAX_TOKENS - 1
        assert output.outputs[0].token_ids == expected[-1]


def test_bf16_stays_within_rounding_of_transformers(tmp_path: Path):
    """The same checkpoint in bf16: log-probabilities within 0.15 of float32's, as transformers' own bf16 is."""
    model = make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16)
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    with LLM(
        str(tmp_path),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        block_size=8,
        num_gpu_blocks_override=80,
        max_model_len=128,
    ) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    exact_model = model.float()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        exact = reference_logits(exact_model, prompt + output.outputs[0].token_ids).log_softmax(-1)
        for i, entry in enumerate(output.outputs[0].logprobs):
            (token, value), *_ = entry.items()
            assert value.logprob == pytest.approx(exact[len(prompt) - 1 + i, token].item(), abs=0.15)


@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.1), ("w8a8", 0.2), ("int4", 2.0)])
def test_quantised_weights_stay_close(tmp_path: Path, quantization: str, tolerance: float):
    """Mean error of log-probabilities against the same checkpoint in float32; the tied embedding is quantised too."""
    model = make_checkpoint(
        tmp_path, "qwen3", hidden_size=64, intermediate_size=128, head_dim=16, tie_word_embeddings=True
    )
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    with engine(tmp_path, quantization=quantization) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    errors = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        exact = reference_logits(model, prompt + output.outputs[0].token_ids).log_softmax(-1)
        for i, entry in enumerate(output.outputs[0].logprobs):
            (token, value), *_ = entry.items()
            errors.append(abs(value.logprob - exact[len(prompt) - 1 + i, token].item()))
    mean = sum(errors) / len(errors)
    assert 1e-5 < mean < tolerance, mean
