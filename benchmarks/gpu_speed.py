"""The figures of gpu_check.py and npu_check.py, each beside what the card's own bandwidth and product rate allow."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_engine import Setup, fixed, free_memory, generate
from workloads import Requests, nano_requests, parameters

from nanovllm.ops import AttentionMetadata, Operators, operator_table

HERE = Path(__file__).parent

# ---- what the card allows -------------------------------------------------------------------------------------------


def measured_limits(setup: Setup) -> dict[str, Any]:
    """Bytes per second of copying (read and written counted), operations per second of a product in the same dtype."""
    setup.limits = {"bytes_per_s": _copy_rate(setup), "operations_per_s": _product_rate(setup)}
    free_memory()
    return dict(setup.limits)


def _copy_rate(setup: Setup) -> float:
    source = torch.empty(setup.few(2**30, 2**24), dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / setup.seconds(lambda: target.copy_(source), 10)


def _product_rate(setup: Setup) -> float:
    n = setup.few(8192, 256)
    a, b = (torch.randn(n, n, device=setup.device).to(setup.dtype) for _ in range(2))
    return 2 * n**3 / setup.seconds(lambda: a @ b, 10)


def _limits(setup: Setup) -> dict[str, float]:
    return setup.limits or measured_limits(setup)


def kv_bytes(setup: Setup) -> int:
    """Bytes of keys and values of one token in all layers."""
    shape = setup.shape
    heads, layers = shape["num_key_value_heads"], shape["num_hidden_layers"]
    return 2 * heads * shape["head_dim"] * layers * setup.dtype.itemsize


def weight_bytes(setup: Setup) -> int:
    """Bytes of weights that a decode step reads: the layers, and the tied head."""
    return sum(parameters(setup.shape)) * setup.dtype.itemsize


def prompt_operations(setup: Setup, lengths: list[int]) -> float:
    """Operations of computing prompts: two per weight and token, four per head dimension and pair in attention."""
    shape = setup.shape
    pair = 4 * shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
    layers, head = parameters(shape)
    return sum(2 * layers * n + 2 * head + pair * n * (n + 1) / 2 for n in lengths)


def limit_seconds(setup: Setup, prompts: list[list[int]], output_lens: list[int]) -> float:
    """The least time of requests that run at once: keys and values of every step, weights once per step, prompts."""
    limits = _limits(setup)
    reads = sum(n * len(p) + n * (n - 1) / 2 for p, n in zip(prompts, output_lens, strict=True)) * kv_bytes(setup)
    reads += max(output_lens) * weight_bytes(setup)
    operations = prompt_operations(setup, list(map(len, prompts)))
    return reads / limits["bytes_per_s"] + operations / limits["operations_per_s"]


# ---- figures --------------------------------------------------------------------------------------------------------


def attention(setup: Setup) -> dict[str, Any]:
    """Attention alone, with each implementation that is installed: decodes against copying, prompts against products.

    ``chosen`` is what an engine takes by itself.
    """
    cases = {
        "256 x 1k": (256, 1024, 1),
        "1 x 32k": (1, 32_768, 1),
        "16 x 4k": (16, 4096, 1),
        "prompts": (16, 1024, 1024),
    }
    if setup.quick:
        cases = {"2 x 40": (2, 40, 1), "prompts": (2, 9, 9)}
    results: dict[str, Any] = {}
    for backend in setup.attention_backends():
        ops = operator_table(setup.device, backend)
        results[backend or "own"] = {}
        for name, case in cases.items():
            results[backend or "own"][name] = _attention_case(setup, ops, *case)
            free_memory()
    if setup.attention_backend is None and setup.on_gpu:
        results["chosen"] = _chosen_attention(setup)
    return results


def _attention_case(setup: Setup, ops: Operators, rows: int, length: int, new: int) -> dict[str, float]:
    """``rows`` of ``length`` tokens, of which the last ``new`` are queries."""
    shape, block_size = setup.shape, 16
    heads, kv_heads, head_dim = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    width = -(-length // block_size)
    table = (torch.randperm(rows * width) + 1).view(rows, width).int().to(setup.device)
    caches = [
        torch.randn(rows * width + 1, block_size, kv_heads, head_dim, device=setup.device).to(setup.dtype)
        for _ in range(2)
    ]
    q = torch.randn(rows * new, heads, head_dim, device=setup.device).to(setup.dtype)
    slots = torch.zeros(rows * new, dtype=torch.int64, device=setup.device)
    starts, decodes = list(range(0, rows * new + 1, new)), rows if new == 1 else 0
    meta = AttentionMetadata(starts, [length] * rows, decodes, new, length, table, slots, block_size)
    ops.prepare_attention(meta, [None], setup.dtype)
    repeats = setup.few(20, 2)

    def layers() -> None:
        for _ in range(repeats):  # launches overlap, as those of a model's layers do
            ops.paged_attention(q, caches[0], caches[1], meta, head_dim**-0.5, None)

    seconds = setup.seconds(layers, 5) / repeats
    result = {"microseconds": seconds * 1e6}
    if new == 1:
        read = 2 * rows * length * kv_heads * head_dim * setup.dtype.itemsize
        return {**result, "bytes_per_s": read / seconds, "of_copying": read / seconds / _limits(setup)["bytes_per_s"]}
    operations = 4 * heads * head_dim * rows * sum(range(length - new + 1, length + 1))
    return {**result, "of_products": operations / seconds / _limits(setup)["operations_per_s"]}


def _chosen_attention(setup: Setup) -> dict[str, str]:
    """What an engine chooses for the model."""
    with setup.engine() as llm:
        tune: Any = llm.llm_engine.core.executor._runner.ops.tune
        chosen = {"decodes": tune.__self__.decodes_with, "longer queries": tune.__self__.long_with}
        del tune
    free_memory()
    return chosen


def start(setup: Setup) -> dict[str, Any]:
    """Seconds from a new process to the first token, the import of torch included; kernels compiled before, and not."""
    code = (
        "import json, sys, time; started = time.perf_counter()\n"
        "from nanovllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], device=sys.argv[2], load_format='dummy', skip_tokenizer_init=True, max_model_len=256,"
        " num_gpu_blocks_override=200)\n"
        "ready = time.perf_counter()\n"
        "params = SamplingParams(max_tokens=2, detokenize=False)\n"
        "llm.generate([{'prompt_token_ids': [5, 6, 7]}], params, use_tqdm=False)\n"
        "print(json.dumps([ready - started, time.perf_counter() - started]))"
    )
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(setup.model), setup.device],
            capture_output=True, text=True, check=True, cwd=HERE.parent,
        )  # fmt: skip
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        "first": {"ready_s": runs[0][0], "first_token_s": runs[0][1]},
        "second": {"ready_s": runs[1][0], "first_token_s": runs[1][1]},
    }


def run_requests(setup: Setup, requests: Requests, rounds: int, **options: Any) -> float:
    """The least seconds of ``rounds`` runs of Nano-vLLM's benchmark on one engine, after a run that records graphs."""
    prompts, output_lens = requests
    params = [fixed(n, 0.6) for n in output_lens]
    with setup.engine(enable_prefix_caching=False, **options) as llm:
        generate(llm, prompts, [fixed(min(8, n), 0.6) for n in output_lens])
        if setup.on_accelerator:  # every bucket, while requests leave one by one
            generate(llm, [[5]] * len(prompts), [fixed(2 + i, 0.6) for i in range(len(prompts))])
        times = []
        for _ in range(rounds):
            setup.synchronize()
            started = time.perf_counter()
            outputs = generate(llm, prompts, params)
            times.append(time.perf_counter() - started)
            assert [len(output) for output in outputs] == output_lens
    free_memory()
    return min(times)


def nano_vllm_bench(setup: Setup) -> dict[str, Any]:
    """Nano-vLLM's benchmark: 256 requests at once. ``ratio_to_nano_vllm`` comes from ``nano_vllm``, where that runs."""
    requests = nano_requests(setup.few(256, 4), setup.few(1024, 20))
    tokens = sum(requests[1])
    seconds = run_requests(setup, requests, setup.few(2, 1), max_num_seqs=setup.few(256, 4))
    least = limit_seconds(setup, *requests)
    return {
        "output_tokens_per_s": tokens / seconds,
        "limit_tokens_per_s": tokens / least,
        "ratio_to_limit": least / seconds,
        "ratio_to_nano_vllm": None,
        "requests": len(requests[0]),
        "output_tokens": tokens,
    }


def nano_vllm(setup: Setup) -> dict[str, Any]:
    """Nano-vLLM itself on the same requests, where a checkout of it is given."""
    if setup.nano_vllm is None:
        return {"skipped": "no checkout of Nano-vLLM was given"}
    command = [sys.executable, str(HERE / "gpu_nano_vllm.py"), str(setup.nano_vllm), str(setup.model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Nano-vLLM failed: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one_stream(setup: Setup, steps: int, options: dict[str, Any]) -> float:
    """Seconds of one request of so many new tokens, by an engine with these options."""
    with setup.engine(max_num_seqs=1, enable_prefix_caching=False, **options) as llm:
        generate(llm, [[5] * 32], fixed(8))
        times = []
        for _ in range(setup.few(3, 1)):
            started = time.perf_counter()
            generate(llm, [[5] * 32], fixed(steps))
            times.append(time.perf_counter() - started)
    free_memory()
    return statistics.median(times)


def single_stream(setup: Setup) -> dict[str, Any]:
    """One request, greedy, against reading the weights once per token."""
    steps = setup.few(512, 8)
    seconds = one_stream(setup, steps, {}) / steps
    least = weight_bytes(setup) / _limits(setup)["bytes_per_s"]
    return {"tokens_per_s": 1 / seconds, "ms_per_token": seconds * 1e3, "ratio_to_limit": least / seconds}


def prefill(setup: Setup) -> dict[str, Any]:
    """16 prompts of 1,024 tokens, one token each, against the product rate."""
    count, length = setup.few(16, 2), setup.few(1024, 30)
    prompts = [[(i * 31 + j * 7) % 9000 for j in range(length)] for i in range(count)]
    with setup.engine(max_num_seqs=count, enable_prefix_caching=False) as llm:
        seconds = setup.seconds(lambda: generate(llm, prompts, fixed(1)), setup.few(5, 1))
    free_memory()
    operations = prompt_operations(setup, [length] * count)
    rate = operations / seconds
    return {
        "tokens_per_s": count * length / seconds,
        "operations_per_s": rate,
        "ratio_to_products": rate / _limits(setup)["operations_per_s"],
    }


def batch_sweep(setup: Setup) -> dict[str, Any]:
    """Output tokens per second of the same benchmark with fewer requests, all at once."""
    results = {}
    for count in (1, 2) if setup.quick else (16, 32, 48, 64, 128, 256):
        requests = nano_requests(count, setup.few(1024, 12))
        seconds = run_requests(setup, requests, 1, max_num_seqs=count)
        least = limit_seconds(setup, *requests)
        results[str(count)] = {"output_tokens_per_s": sum(requests[1]) / seconds, "ratio_to_limit": least / seconds}
    return results


FIGURES: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "measured_limits": measured_limits,
    "nano_vllm_bench": nano_vllm_bench,
    "single_stream": single_stream,
    "prefill": prefill,
    "attention": attention,
    "start": start,
    "batch_sweep": batch_sweep,
}
