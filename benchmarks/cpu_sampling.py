"""Milliseconds for choosing a token from each of many rows of logits: the C++ kernels beside the sampler on torch.

    python benchmarks/cpu_sampling.py

Both work on as many threads as the engine would give them, in turn, on the same logits; the copy of the logits that
either works on is not timed. ``greedy`` and so on say what all rows of a batch ask for; ``penalties`` are a repetition,
presence and frequency penalty over a history of 1,024 tokens, with temperature 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import RESULTS, print_table, write_results

from nanovllm.engine.plan import RowStart
from nanovllm.ops import operator_table
from nanovllm.platforms import get_platform
from nanovllm.runner.sampler import Sampler
from nanovllm.sampling_params import SamplingParams

HISTORY = 1024
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "no filter": {"temperature": 0.6},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50": {"top_k": 50},
    "top-k 20, top-p 0.95": {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--spread", type=float, default=2.5, help="standard deviation of the logits")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_sampling.json")
    options = parser.parse_args()

    platform = get_platform("cpu")
    platform.set_threads()
    ops = operator_table("cpu")
    table, lines = [], []
    for rows in options.rows:
        logits = torch.randn(rows, options.vocab, generator=torch.Generator().manual_seed(0)) * options.spread
        tokens = torch.randint(0, options.vocab, (rows, HISTORY), dtype=torch.int32)
        scratch = torch.empty_like(logits)
        for name, asked in ASKED.items():
            samplers = {
                "kernels": Sampler(rows, options.vocab, "raw_logprobs", ops.choose, ops.penalise),
                "torch": Sampler(rows, options.vocab, "raw_logprobs"),
            }
            for sampler in samplers.values():
                for row in range(rows):
                    sampler.start(RowStart(row, [], 0, SamplingParams(**asked), row, (), ()))
            times: dict[str, list[float]] = {each: [] for each in samplers}
            for position in range(options.rounds + 1):
                for each, sampler in samplers.items():
                    scratch.copy_(logits)
                    with platform.sampling(scratch.numel()):
                        start = time.perf_counter()
                        sampler.sample(scratch, np.arange(rows), np.full(rows, HISTORY - position), tokens)
                        times[each].append(1e3 * (time.perf_counter() - start))
            kernels, on_torch = (statistics.median(times[each][1:]) for each in ("kernels", "torch"))
            table.append({"rows": rows, "asked": name, "kernels_ms": kernels, "torch_ms": on_torch})
            lines.append([f"{rows}", name, kernels, on_torch, on_torch / kernels])
    print_table(["rows", "asked for", "kernels, ms", "torch, ms", "times as fast"], lines)
    write_results(
        options.output, vocab=options.vocab, spread=options.spread, threads=torch.get_num_threads(), rows=table
    )


if __name__ == "__main__":
    main()
