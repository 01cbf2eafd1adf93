"""What constrained rows cost a step: batches with and without them take turns, step by step, in one engine.

    python benchmarks/constrained.py                          # the model in the box
    python benchmarks/constrained.py --model Qwen/Qwen3-0.6B  # a vocabulary of 152k

Both batches have the same prompts and parameters, but for the JSON schema of some rows. Beside the step as a whole, the
two parts of the work are timed by themselves: masks (on a worker, while the model runs) and their application.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import RESULTS, print_table, write_results

from nanovllm import LLM, SamplingParams
from nanovllm.engine.structured import Limiter
from nanovllm.runner import model_runner
from nanovllm.sampling_params import StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "count": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "note": {"type": "string"},
    },
    "required": ["name", "count", "tags", "note"],
    "additionalProperties": False,
}


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, its times noted."""

    def call(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds.append(time.perf_counter() - start)

    return call


def run(engine: Any, rows: int, constrained: int, steps: int) -> list[float]:
    """Seconds of ``steps`` decode steps of ``rows`` requests, the first ``constrained`` of them constrained."""
    names = [str(row) for row in range(rows)]
    for row, name in enumerate(names):
        constraint = StructuredOutputsParams(json=SCHEMA) if row < constrained else None
        params = SamplingParams(temperature=1.0, max_tokens=4 * steps, seed=row, ignore_eos=True, detokenize=False,
                                structured_outputs=constraint)  # fmt: skip
        engine.add_request(name, [10 + row] * 16, params)
    for _ in range(2):  # prompts, and the first masks
        engine.step()
    seconds: list[float] = []
    step = timed(engine.step, seconds)
    for _ in range(steps):
        step()
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--constrained", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS / "constrained.json")
    options = parser.parse_args()

    masks: list[float] = []
    applied: list[float] = []
    Limiter.limits = timed(Limiter.limits, masks)  # type: ignore[method-assign]
    model_runner.apply_limits = timed(model_runner.apply_limits, applied)
    with LLM(options.model, load_format=options.load_format, max_model_len=512, max_num_seqs=options.rows) as llm:
        run(llm.llm_engine, options.rows, options.constrained, 2)
        masks.clear()
        applied.clear()
        free: list[float] = []
        held: list[float] = []
        for _ in range(options.rounds):
            free += run(llm.llm_engine, options.rows, 0, options.steps)
            held += run(llm.llm_engine, options.rows, options.constrained, options.steps)
        vocab_size = llm.llm_engine.model_config.vocab_size
    parts = {"step, free": free, "step, constrained": held, "masks (worker)": masks, "applied": applied}
    figures = {name: {"ms": 1e3 * statistics.median(s), "best_ms": 1e3 * min(s)} for name, s in parts.items()}
    print_table(["", "median ms", "best ms"], [[name, *each.values()] for name, each in figures.items()])
    about = {"rows": options.rows, "constrained": options.constrained, "vocab_size": vocab_size}
    write_results(options.output, **about, figures=figures)


if __name__ == "__main__":
    logging.getLogger("nanovllm").setLevel(logging.ERROR)
    main()
