"""What context and memory cost on a CPU: one request of growing length, and the most memory the process takes.

The model has Qwen3-0.6B's shape and random bfloat16 weights, read from a file as any checkpoint.

    python benchmarks/cpu_context.py

- prefill: seconds per token of a prompt, and the share of the time that arithmetic alone would take
- decode: tokens per second behind such a prompt, and the share of what memory bandwidth allows, reading all weights and
  the request's keys and values once per token
- memory: peak of a process of its own (VmHWM), beside its weights and the keys and values written
- ready: seconds from the process's start until the engine can take a request, imports included
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from cpu_peers import HERE, MODELS, make_checkpoint, measure_limits, run
from report import RESULTS, print_table, write_results
from workloads import SHAPES, parameters

STARTED = time.time()


def kv_bytes_per_token(shape: dict[str, Any]) -> int:
    """Keys and values of one token in all layers, in bfloat16."""
    return 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]


def peak_memory() -> int:
    """The most bytes this process has had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(model: str, lengths: list[int], tokens: int) -> dict[str, Any]:
    """Time one request of each length; prompts are computed whole, none of them cached."""
    from nanovllm import LLM, SamplingParams

    with LLM(model, skip_tokenizer_init=True, max_model_len=max(lengths) + tokens + 16, max_num_seqs=8,
             enable_prefix_caching=False) as llm:  # fmt: skip
        ready, memory_ready = time.time() - STARTED, peak_memory()
        engine, rows = llm.llm_engine, []
        for length in lengths:
            params = SamplingParams(max_tokens=tokens + 1, temperature=0, ignore_eos=True)
            engine.add_request(str(length), {"prompt_token_ids": [i * 7 % 9000 + 100 for i in range(length)]}, params)
            times = [time.perf_counter()]
            while engine.has_unfinished_requests():
                if any(output.outputs[0].token_ids for output in engine.step()):
                    times.append(time.perf_counter())
            steps = [after - before for before, after in itertools.pairwise(times[1:])]
            rows.append({"length": length, "prefill": times[1] - times[0], "decode": statistics.median(steps)})
        return {"rows": rows, "ready": ready, "memory_ready": memory_ready, "memory": peak_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=16, help="decoded behind every prompt")
    parser.add_argument("--prefix", default="", help="command before every measured process")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of models, kept between runs")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b", help="tiny only shows that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_context.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "limits":
        print(json.dumps(measure_limits(1.0 if options.shape == "qwen3-0.6b" else 0.1)))
        return
    if options.worker:
        print(json.dumps(measure(options.worker, options.lengths, options.tokens)))
        return

    shape, folder = SHAPES[options.shape], options.models.resolve() / options.shape
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        make_checkpoint(shape, folder)

    def worker(task: str) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "cpu_context.py"), "--worker", task, "--shape", options.shape, "--tokens",
                   str(options.tokens), "--lengths", *map(str, options.lengths)]  # fmt: skip
        return json.loads(run(command, options.prefix).splitlines()[-1])

    limits = [worker("limits")]
    measured = worker(str(folder))
    limits.append(worker("limits"))
    machine = {name: statistics.median(each[name] for each in limits) for name in limits[0]}
    report(options, shape, machine, measured)


def report(
    options: argparse.Namespace, shape: dict[str, Any], machine: dict[str, float], measured: dict[str, Any]
) -> None:
    """Print and write what was measured, beside the limits."""
    layers, head = parameters(shape)
    pair = 4 * shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
    per_token = kv_bytes_per_token(shape)
    rows = []
    for row in measured["rows"]:
        length = row["length"]
        operations = 2 * layers * length + 2 * head + pair * length * (length + 1) // 2
        row["prefill_limit"] = operations / machine["flops"]
        row["decode_limit"] = (2 * (layers + head) + per_token * (length + options.tokens / 2)) / machine["bandwidth"]
        rows.append([length, row["prefill"] / length * 1e3, row["prefill_limit"] / row["prefill"], 1 / row["decode"],
                     row["decode_limit"] / row["decode"]])  # fmt: skip
    print(f"memory {machine['bandwidth'] / 1e9:.1f} GB/s, bfloat16 {machine['flops'] / 1e9:,.0f} GFLOP/s\n")
    print_table(["context", "prefill ms/token", "of limit", "decode tokens/s", "of limit"], rows)
    weights, cache = 2 * (layers + head), per_token * (max(options.lengths) + options.tokens)
    other = measured["memory"] - weights - cache
    print(f"\nready {measured['ready']:.2f} s; peak {measured['memory'] / 2**20:,.0f} MiB = weights "
          f"{weights / 2**20:,.0f} + keys and values {cache / 2**20:,.0f} + {other / 2**20:,.0f}")  # fmt: skip
    write_results(options.output, shape=options.shape, lengths=options.lengths, tokens=options.tokens, limits=machine,
                  **measured, weights=weights, cache=cache, other=other)  # fmt: skip


if __name__ == "__main__":
    main()
