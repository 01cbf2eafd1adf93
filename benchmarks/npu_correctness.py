"""The checks of npu_check.py: each returns what it found, with ``passed`` where that is a matter of judgement.

Number formats differ between the device and what it is compared with, and so may tokens, where two are about equally
likely. So a run is compared with another one token by token, up to the first that differs; that is a tie if both runs
found the two tokens about equally likely, and an error otherwise.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import gpu_correctness
import torch
from gpu_engine import Setup, fixed, free_memory
from npu_operators import operators
from npu_ranks import ranks
from tokenizers import Tokenizer

from nanovllm import LLM
from nanovllm.hub import DEMO_PATH
from nanovllm.platforms import get_platform

QUESTIONS = ("What is paged attention?", "What is a block table?", "What is 17 + 25?", "什么是前缀缓存？", "Hello!")
TIE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}  # difference of log-probabilities


def _prompts(setup: Setup) -> list[list[int]]:
    """Questions for the model in the box, some of them behind text that is longer than a block."""
    tokenizer = Tokenizer.from_file(str(DEMO_PATH / "tokenizer.json"))
    preamble = "A block holds the keys and values of some tokens. " * setup.few(40, 16)
    asked = [tokenizer.encode(question).ids for question in QUESTIONS]
    behind = tokenizer.encode(preamble).ids
    return [*asked, *(behind + question for question in asked)]


def _run(llm: LLM, prompts: Sequence[list[int]], steps: int) -> list[tuple[list[int], list[Any]]]:
    """The output tokens of every prompt, and their log-probabilities with those of the two most likely tokens."""
    params = fixed(steps, logprobs=2)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [(list(each.outputs[0].token_ids), list(each.outputs[0].logprobs or ())) for each in outputs]


def compare_runs(ours: list[Any], theirs: list[Any], tie: float) -> dict[str, int]:
    """How many outputs are equal, differ from a tie on, or differ."""
    counts = {"equal": 0, "ties": 0, "different": 0}
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(ours, theirs, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(tokens, other_tokens, strict=True)) if a != b), None)
        if at is None:
            counts["equal"] += 1
            continue
        a, b = tokens[at], other_tokens[at]
        close = all(
            a in found and b in found and abs(found[a].logprob - found[b].logprob) < tie
            for found in (logprobs[at], other_logprobs[at])
        )
        counts["ties" if close else "different"] += 1
    return counts


def _judge(ours: list[Any], theirs: list[Any], tie: float, **more: Any) -> dict[str, Any]:
    counts = compare_runs(ours, theirs, tie)
    return {"passed": counts["different"] == 0 and counts["equal"] > 0, **counts, **more}


def _demo(setup: Setup, **options: Any) -> LLM:
    """An engine of the model in the box, in the device's own format."""
    settings = {"dtype": str(setup.dtype).removeprefix("torch."), "max_model_len": 1024, "max_num_seqs": 16}
    return setup.engine(DEMO_PATH, **{**settings, "num_gpu_blocks_override": 400, **options})


def tokens(setup: Setup) -> dict[str, Any]:
    """Greedy tokens of the model in the box, against the CPU in float32."""
    prompts, steps = _prompts(setup), setup.few(48, 6)
    with _demo(setup) as llm:
        ours = _run(llm, prompts, steps)
    free_memory()
    with LLM(str(DEMO_PATH), device="cpu", dtype="float32", max_model_len=1024, num_gpu_blocks_override=800) as llm:
        theirs = _run(llm, prompts, steps)
    return _judge(ours, theirs, TIE[setup.dtype])


def prefix_cache(setup: Setup) -> dict[str, Any]:
    """Prompts whose beginning is cached give the tokens they gave before, and the cache is used."""
    prompts, steps = _prompts(setup)[len(QUESTIONS) :], setup.few(32, 6)
    with _demo(setup, enable_prefix_caching=False) as llm:
        cold = _run(llm, prompts, steps)
    with _demo(setup, enable_prefix_caching=True) as llm:
        _run(llm, prompts[:1], 1)
        warm = _run(llm, prompts, steps)
        (output,) = llm.generate([{"prompt_token_ids": prompts[1]}], fixed(1), use_tqdm=False)
    free_memory()
    block_size: int = get_platform(setup.device).block_size
    shared = next(i for i, (a, b) in enumerate(zip(*prompts[:2], strict=False)) if a != b)
    cached = output.num_cached_tokens or 0
    result = _judge(warm, cold, TIE[setup.dtype], **{"cached tokens": cached})
    return {**result, "passed": result["passed"] and cached >= shared // block_size * block_size > 0}


def chunks(setup: Setup) -> dict[str, Any]:
    """Prompts cut into chunks, mixed with decodes, give the tokens of prompts computed whole."""
    prompts, steps = _prompts(setup), setup.few(32, 6)
    runs = []
    for budget in (2048, 48):
        with _demo(setup, max_num_batched_tokens=budget, enable_prefix_caching=False) as llm:
            runs.append(_run(llm, prompts, steps))
        free_memory()
    return _judge(*runs, TIE[setup.dtype])


def preemption(setup: Setup) -> dict[str, Any]:
    """With too few blocks requests are preempted and recomputed, and give the same tokens."""
    block_size: int = get_platform(setup.device).block_size
    steps, draw = setup.few(2, 1) * block_size + 5, random.Random(1)
    question = _prompts(setup)[0]
    prompts = [question + [draw.randrange(50, 250) for _ in range(draw.randrange(5, 20))] for _ in range(6)]
    most = -(-(max(map(len, prompts)) + steps) // block_size)
    runs, preempted = [], 0
    for blocks in (400, 2 * most + 2):
        with _demo(setup, num_gpu_blocks_override=blocks, enable_prefix_caching=False) as llm:
            runs.append(_run(llm, prompts, steps))
            preempted = llm.llm_engine.core.scheduler.num_preemptions
        free_memory()
    result = _judge(*runs, TIE[setup.dtype], preemptions=preempted)
    return {**result, "passed": result["passed"] and preempted > 0}


def doctor(setup: Setup) -> dict[str, Any]:
    """What ``nanovllm doctor`` finds; it does not pass with a problem."""
    from nanovllm.entrypoints.cli.doctor import examine

    findings = [asdict(finding) for finding in examine(setup.device)]
    problems = [finding["subject"] for finding in findings if finding["level"] == "problem"]
    emulated = os.environ.get("NANOVLLM_NPU_EMULATED") == "1"
    return {"passed": not problems, "problems": problems, "emulated": emulated, "findings": findings}


CHECKS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "doctor": doctor,
    "operators": operators,
    "tokens": tokens,
    "graphs": gpu_correctness.graphs,
    "prefix_cache": prefix_cache,
    "chunks": chunks,
    "preemption": preemption,
    "ranks": ranks,
}
