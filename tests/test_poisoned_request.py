"""A request whose numbers are no numbers ends with an error, alone: neither its batch nor the engine ends with it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint

from nanovllm import LLM, AsyncEngineArgs, AsyncLLM, SamplingParams
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.errors import EngineGenerateError

POISON = 7  # the token whose embedding is NaN
SETTINGS: dict[str, Any] = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 24, "block_size": 4}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "top-p": {"top_p": 0.8},
    "top-k": {"top_k": 5},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.2},
}
GOOD = [[20 + i, 30, 40 + i, 50, 60] for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("poisoned")
    make_checkpoint(path, "qwen3")
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, path / "model.safetensors")
    return path


def params(kind: str = "greedy") -> SamplingParams:
    return SamplingParams(max_tokens=6, ignore_eos=True, seed=1, logit_bias={POISON: -100.0}, **KINDS[kind])


@pytest.mark.parametrize("backend", [None, "torch_native", "reference"])
def test_only_the_poisoned_end_with_an_error(folder: Path, backend: str | None):
    kinds = list(KINDS)
    with LLM(str(folder), attention_backend=backend, **SETTINGS) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(GOOD, params(), use_tqdm=False)]
    with LLM(str(folder), attention_backend=backend, **SETTINGS) as llm:
        core = llm.llm_engine.core
        core.checker = InvariantChecker(core.scheduler)
        # Several rounds, so that good requests get blocks in which poisoned ones have left their numbers.
        for _ in range(3):
            bad = [[20, 30, POISON, 50, 60 + number, 61, 62, 63, 64] for number in range(len(kinds))]
            prompts = [GOOD[0], bad[0], GOOD[1], *bad[1:], GOOD[2], GOOD[3]]
            settings = [params(kinds[bad.index(prompt)]) if prompt in bad else params() for prompt in prompts]
            outputs = llm.generate(prompts, settings, use_tqdm=False)
            good = []
            for output, prompt in zip(outputs, prompts, strict=True):
                completion = output.outputs[0]
                if prompt in bad:
                    assert completion.finish_reason == "error" and "finite" in str(completion.stop_reason)
                    assert completion.token_ids == []
                else:
                    good.append(completion.token_ids)
            assert good == expected
        core.checker.idle()


def test_nobody_finds_the_blocks_of_a_poisoned_request(folder: Path):
    with LLM(str(folder), **SETTINGS) as llm:
        (output,) = llm.generate([[20, 30, 40, 50, POISON, 60, 61, 62, 63]], params(), use_tqdm=False)
        assert output.outputs[0].finish_reason == "error"
        assert not llm.llm_engine.core.scheduler.kv.pool.cached


def test_a_stream_is_told_and_the_engine_goes_on(folder: Path):
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **SETTINGS))

    async def ask(name: str, prompt: list[int]) -> Any:
        async for output in llm.generate(prompt, params(), name):
            last = output
        return last

    async def main() -> None:
        good, bad = await asyncio.gather(ask("good", GOOD[0]), ask("bad", [POISON, 1]), return_exceptions=True)
        assert isinstance(bad, EngineGenerateError) and "not finite" in str(bad)
        assert good.finished and len(good.outputs[0].token_ids) == 6
        await llm.check_health()

    asyncio.run(main())
    llm.shutdown()
