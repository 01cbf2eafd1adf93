"""The checks of npu_check.py: each returns what it found, with ``passed`` where that is a matter of judgement.

Number formats differ between the device and what it is compared with, and so may tokens, where two are about equally
likely. So a run is compared with another one token by token, up to the first that differs; that is a tie if both runs
found the two tokens about equally likely, and an error otherwise.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gpu_correctness
import torch
from gpu_engine import Setup, fixed, free_memory
from tokenizers import Tokenizer
from torch import Tensor

from nanovllm import LLM
from nanovllm.hub import DEMO_PATH
from nanovllm.ops import AttentionMetadata, Operators, operator_table, reference
from nanovllm.platforms import get_platform

QUESTIONS = ("What is paged attention?", "What is a block table?", "What is 17 + 25?", "什么是前缀缓存？", "Hello!")
# Relative to the largest number of the result; the reference computes in float32 from the same rounded numbers.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TIE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}  # difference of log-probabilities


# ---- operators ------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """Random numbers in the device's format, and the same in float32 on the CPU."""

    setup: Setup
    draw: torch.Generator

    def __call__(self, *shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        rounded = (torch.randn(shape, generator=self.draw) * scale).to(self.setup.dtype)
        return rounded.to(self.setup.device), rounded.float()


def operators(setup: Setup) -> dict[str, Any]:
    """Every operator of the device against the reference: the largest error, relative to the largest number."""
    ops, inputs = operator_table(setup.device), Inputs(setup, torch.Generator().manual_seed(0))
    errors: dict[str, float] = {}

    def compare(name: str, ours: Tensor, theirs: Tensor) -> None:
        error = (ours.float().cpu() - theirs).abs().max() / theirs.abs().max()
        errors[name] = float("inf") if error.isnan() else max(errors.get(name, 0.0), error.item())

    for rows in (1, 7, setup.few(300, 20)):
        (x, x32), (r, r32), (w, w32) = inputs(rows, 1024), inputs(rows, 1024), inputs(1024)
        compare("rms_norm", ops.rms_norm(x, w, 1e-6), reference.rms_norm(x32, w32, 1e-6))
        for ours, theirs in zip(
            ops.add_rms_norm(x, r.clone(), w, 1e-6), reference.add_rms_norm(x32, r32, w32, 1e-6), strict=True
        ):
            compare("add_rms_norm", ours, theirs)
        compare("silu_and_mul", ops.silu_and_mul(x), reference.silu_and_mul(x32))
        compare("gelu_and_mul", ops.gelu_and_mul(x, "tanh"), reference.gelu_and_mul(x32, "tanh"))
        weight, weight32 = inputs(384, 1024, scale=0.05)
        compare("linear", ops.linear(x, ops.pack_linear(weight), None), reference.linear(x32, weight32, None))
    for heads, kv_heads, size in ((16, 8, 128), (8, 2, 64)):
        for norms in (True, False):
            for name, ours, theirs in _attend(setup, ops, inputs, heads, kv_heads, size, norms):
                compare(f"{name}, heads of {size}", ours, theirs)
    limit = TOLERANCE[setup.dtype]
    return {"passed": all(error < limit for error in errors.values()), "limit": limit, **errors}


def _attend(
    setup: Setup, ops: Operators, inputs: Inputs, heads: int, kv_heads: int, size: int, norms: bool
) -> list[tuple[str, Tensor, Tensor]]:
    """Writes rows through ``norm_rotate_write``, copies a block, and attends to them: (operator, ours, reference's).

    The cache is only read through attention: a device may lay it out as it likes.
    """
    block_size: int = get_platform(setup.device).block_size
    rows = [(1, 1), (1, 2 * block_size + 3), (1, block_size), (40, block_size + 70), (20, 20)]  # (queries, length)
    if not setup.quick:
        rows += [(300, 300), (129, 4 * block_size + 5)]
    lengths, queries = [length for _, length in rows], [count for count, _ in rows]
    width = max(-(-length // block_size) for length in lengths)
    count = sum(-(-length // block_size) for length in lengths)
    order = (torch.randperm(count, generator=inputs.draw) + 1).tolist()
    table = torch.zeros(len(rows), width, dtype=torch.int32)
    for row, length in enumerate(lengths):
        blocks = -(-length // block_size)
        table[row, :blocks] = torch.tensor([order.pop() for _ in range(blocks)], dtype=torch.int32)
    slots = torch.cat([
        table[row].long()[torch.arange(length) // block_size] * block_size + torch.arange(length) % block_size
        for row, length in enumerate(lengths)
    ])  # fmt: skip
    total = sum(lengths)
    angles = torch.rand(total, 1, size // 2, generator=inputs.draw) * 6
    cos = torch.cat([angles.cos(), angles.cos()], -1).to(setup.dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(setup.dtype)
    qkv, qkv32 = inputs(total, heads + 2 * kv_heads, size)
    weights = [inputs(size) if norms else (None, None) for _ in range(2)]
    last = torch.cat([
        torch.arange(end - count, end)
        for count, end in zip(queries, torch.tensor(lengths).cumsum(0).tolist(), strict=True)
    ])  # fmt: skip
    starts = [0, *torch.tensor(queries).cumsum(0).tolist()]
    found = []
    for device, dtype, table_of, numbers, norm in (
        (setup.device, setup.dtype, ops, qkv, [ours for ours, _ in weights]),
        ("cpu", torch.float32, reference, qkv32, [theirs for _, theirs in weights]),
    ):
        caches = [
            _new_cache(table_of, count + 2, block_size, kv_heads, size, dtype, torch.device(device)) for _ in range(2)
        ]
        turn = cos.to(device, dtype), sin.to(device, dtype)
        q = table_of.norm_rotate_write(numbers, norm[0], norm[1], 1e-6, *turn, caches[0], caches[1], slots.to(device))
        table_of.copy_blocks([(caches[0], caches[1])], [int(table[1, 0])], [count + 1])
        copied = table.clone()
        copied[1, 0] = count + 1
        meta = AttentionMetadata(
            starts, lengths, 3, max(queries), max(lengths), copied.to(device), slots[last].to(device), block_size
        )
        table_of.prepare_attention(meta, [None], dtype)
        asked = q[last.to(device)].contiguous()
        found.append((q, table_of.paged_attention(asked, caches[0], caches[1], meta, size**-0.5, None)))
    (q, out), (right_q, right_out) = found
    return [("norm_rotate_write", q, right_q), ("paged_attention", out, right_out)]


def _new_cache(ops: Any, *shape_dtype_device: Any) -> Tensor:
    """Keys or values of a layer, as the device lays them out."""
    new = getattr(ops, "new_cache", None)
    if new is not None:
        return new(*shape_dtype_device)
    *shape, dtype, device = shape_dtype_device
    return torch.zeros(shape, dtype=dtype, device=device)


# ---- whole runs -----------------------------------------------------------------------------------------------------


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
    prompts = [question + [draw.randrange(300, 900) for _ in range(draw.randrange(5, 20))] for _ in range(6)]
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
}
