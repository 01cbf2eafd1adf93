"""Our engine and transformers side by side on three CPU workloads, with the machine's limits beside them.

The model has Qwen3-0.6B's shape and random bfloat16 weights; both read the same files. Each engine runs in a process of
its own, in turn, several rounds; every round also measures memory bandwidth and the speed of a bfloat16 matrix product.
Medians over the rounds are what counts.

    python benchmarks/cpu_workloads.py

- ``bs1``: prompt of 32 tokens, 64 new ones, greedy; output tokens per second
- ``prefill``: prompt of 1,024 tokens, one new token; prompt tokens per second
- ``batch``: 32 requests at once, prompts of 64 to 256 tokens, outputs of 32 to 96, temperature 0.6; output tokens per
  second. transformers pads such a batch and runs it to its longest output.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import RESULTS, print_table, write_results
from workloads import SHAPES, Workload, limits, workloads

ENGINES = ("nanovllm", "transformers")


def run_nanovllm(model: str, works: dict[str, Workload]) -> dict[str, float]:
    """Seconds by workload, and until the engine is ready, imports included."""
    start = time.perf_counter()
    from nanovllm import LLM, SamplingParams

    # Peers have no prefix cache; with ours the warm-up would do half of the work that is measured.
    llm = LLM(model, skip_tokenizer_init=True, max_model_len=2048, enable_prefix_caching=False, max_num_seqs=64)
    seconds = {"ready": time.perf_counter() - start}

    def generate(work: Workload) -> None:
        params = [SamplingParams(temperature=work.temperature, max_tokens=n, ignore_eos=True) for n in work.output_lens]
        outputs = llm.generate(work.prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        assert [len(output.token_ids) for output in outputs] == work.output_lens

    return seconds | time_workloads(generate, works)


def run_transformers(model: str, works: dict[str, Workload]) -> dict[str, float]:
    """Seconds by workload, and until the model is loaded, imports included."""
    start = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    seconds = {"ready": time.perf_counter() - start}

    def generate(work: Workload) -> None:
        width = max(map(len, work.prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in work.prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in work.prompts])
        longest = max(work.output_lens)
        sampling: dict[str, Any] = {"do_sample": False}
        if work.temperature > 0:
            sampling = {"do_sample": True, "temperature": work.temperature, "top_k": 0, "top_p": 1.0}
        output = network.generate(ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest,
                                  eos_token_id=None, pad_token_id=0, **sampling)  # fmt: skip
        assert output.shape[1] == width + longest

    return seconds | time_workloads(generate, works)


def time_workloads(generate: Callable[[Workload], None], works: dict[str, Workload]) -> dict[str, float]:
    """Seconds by workload, after a short one that does not count."""
    generate(Workload(next(iter(works.values())).prompts, [4], 0.0))
    seconds = {}
    for name, work in works.items():
        start = time.perf_counter()
        generate(work)
        seconds[name] = time.perf_counter() - start
    return seconds


def measure_limits(scale: float) -> dict[str, float]:
    """Bytes per second of reading memory, operations per second of a bfloat16 matrix product: best of several."""
    import torch

    def best(function: Any, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    pages = mmap.mmap(-1, max(1, int(scale * 1024)) << 20)  # 1 GiB: beyond any cache
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # small pages cost a fifth of the speed
    memory = torch.frombuffer(pages, dtype=torch.float32).fill_(1.0)
    size = max(64, int(scale * 4096))
    left, right = torch.ones(size, size, dtype=torch.bfloat16), torch.ones(size, size, dtype=torch.bfloat16)
    return {
        "bandwidth": memory.nbytes / best(memory.max, 16),
        "flops": 2 * size**3 / best(lambda: torch.nn.functional.linear(left, right), 8),
        "threads": torch.get_num_threads(),
    }


def make_model(shape: dict[str, Any], folder: str) -> None:
    """Write a checkpoint with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(folder)


def worker(task: str, options: argparse.Namespace, folder: str) -> Any:
    """What a process of its own does."""
    works = {name: work for name, work in workloads(options.scale).items() if name in options.workloads}
    if task == "model":
        return make_model(SHAPES[options.shape], folder)
    if task == "limits":
        return measure_limits(options.scale)
    return {"nanovllm": run_nanovllm, "transformers": run_transformers}[task](folder, works)


def in_process(task: str, options: argparse.Namespace, folder: str) -> Any:
    """Run `worker` in a fresh process; its last line of output is the result."""
    command = [sys.executable, __file__, "--shape", options.shape, "--scale", str(options.scale), "--workloads",
               *options.workloads, "--worker", task, "--folder", folder]  # fmt: skip
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{task} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--workloads", nargs="+", choices=list(workloads()), default=list(workloads()))
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b", help="tiny only shows that it runs")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: shorter prompts and outputs")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_workloads.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker, options, options.folder)))
        return

    rounds: dict[str, list[dict[str, float]]] = {task: [] for task in ("limits", *options.engines)}
    with tempfile.TemporaryDirectory() as folder:
        in_process("model", options, folder)
        for number in range(options.rounds):
            for task, measured in rounds.items():
                print(f"round {number + 1} of {options.rounds}: {task}", flush=True)
                measured.append(in_process(task, options, folder))
    report(options, rounds)


def report(options: argparse.Namespace, rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print and write medians, their ratio, and the share of the limit."""
    machine = _medians(rounds["limits"])
    most = limits(SHAPES[options.shape], options.scale, machine["bandwidth"], machine["flops"])
    works = workloads(options.scale)
    medians = {engine: _medians(rounds[engine]) for engine in options.engines}
    speeds = {
        name: {engine: works[name].num_tokens / medians[engine][name] for engine in options.engines}
        for name in options.workloads
    }
    print(f"\nmemory {machine['bandwidth'] / 1e9:.1f} GB/s, bfloat16 {machine['flops'] / 1e9:,.0f} GFLOP/s, "
          f"{machine['threads']:.0f} threads; tokens per second, medians of {options.rounds} rounds\n")  # fmt: skip
    ours = options.engines[0]
    rows = [
        [name, *speed.values(), speed[ours] / speed[options.engines[-1]], most[name], speed[ours] / most[name]]
        for name, speed in speeds.items()
    ]
    rows.append(["ready (s)", *(medians[engine]["ready"] for engine in options.engines), "", "", ""])
    print_table(["workload", *options.engines, "ratio", "limit", f"{ours} / limit"], rows)
    write_results(
        options.output,
        shape=options.shape,
        scale=options.scale,
        limits=machine | {"tokens_per_second": most},
        tokens_per_second=speeds,
        seconds=medians,
        rounds=rounds,
    )


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


if __name__ == "__main__":
    main()
