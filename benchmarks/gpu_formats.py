"""Number formats of weights and of the cache: recorded steps against single launches, how far results move, speed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from gpu_correctness import our_prompt_logprobs
from gpu_engine import Setup, fixed, free_memory, generate
from gpu_speed import one_stream, run_requests
from workloads import nano_requests

from nanovllm.errors import ParameterError

_OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "w8a8": {"quantization": "w8a8"},
    "fp8": {"quantization": "fp8"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
    "fp8 and fp8 cache": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
# Mean difference of log-probabilities that a format may cause. With random weights, logits spread by 0.64: results that
# have nothing to do with each other differ by 0.7.
_MOST = {"int4": 0.45, "fp8": 0.3, "fp8 and fp8 cache": 0.3}
_MOST_OTHERS = 0.2


def _formats(setup: Setup) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those to try."""
    for name, options in _OPTIONS.items():
        if setup.on_gpu or name in ("int8", "fp8"):  # one that a CPU has, and one that it has not
            yield name, options


def formats(setup: Setup) -> dict[str, Any]:
    """With each format, recorded steps give the tokens of single launches, and prompts nearly the same results."""
    draw = random.Random(5)
    prompt = [draw.randrange(3, 5000) for _ in range(setup.few(300, 30))]
    prompts = [[draw.randrange(3, 5000) for _ in range(draw.randint(1, setup.few(300, 20)))] for _ in range(5)]
    params = [fixed(setup.few(40, 4) + i) for i in range(5)]
    with setup.engine(max_num_seqs=5) as llm:
        wanted = our_prompt_logprobs(llm, prompt)
    free_memory()
    results: dict[str, Any] = {"passed": True}
    for name, options in _formats(setup):
        tokens, found = [], wanted
        try:
            for eager in (False, True):
                with setup.engine(max_num_seqs=5, enforce_eager=eager, **options) as llm:
                    tokens.append(generate(llm, prompts, params))
                    found = our_prompt_logprobs(llm, prompt)
                free_memory()
        except ParameterError as error:  # the GPU does not have it
            results[name] = {"refused": str(error)}
            continue
        difference = (found - wanted).abs().mean().item()
        same = tokens[0] == tokens[1]
        results[name] = {"same tokens recorded and launched": same, "difference": difference}
        right = same and bool(torch.isfinite(found).all()) and difference < _MOST.get(name, _MOST_OTHERS)
        results["passed"] = results["passed"] and right
    return results


def quantised(setup: Setup) -> dict[str, Any]:
    """One stream, and Nano-vLLM's requests, with each format."""
    steps = setup.few(256, 4)
    requests = nano_requests(setup.few(256, 2), setup.few(1024, 8))
    results: dict[str, Any] = {}
    for name, options in _formats(setup):
        try:
            results[name] = {"single_stream_tokens_per_s": steps / one_stream(setup, steps, options)}
            seconds = run_requests(setup, requests, 1, max_num_seqs=len(requests[0]), **options)
        except ParameterError as error:
            results[name] = {"refused": str(error)}
            continue
        results[name]["output_tokens_per_s"] = sum(requests[1]) / seconds
    return results
