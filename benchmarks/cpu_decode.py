"""One stream beside the limit of memory, in turns: what of a step on a CPU is not the reading of weights.

The model has Qwen3-0.6B's shape and random bfloat16 weights. Reading memory and decoding take turns in one process, so
that a machine which is slower in one minute than in the next is so for both.

    python benchmarks/cpu_decode.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from cpu_peers import MODELS, make_checkpoint, memory_to_read
from report import RESULTS, print_table, write_results
from workloads import SHAPES, parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="of two readings of memory and four steps")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of models, kept between runs")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b", help="tiny only shows that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_decode.json")
    options = parser.parse_args()
    shape, folder = SHAPES[options.shape], options.models.resolve() / options.shape
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        make_checkpoint(shape, folder)
    bandwidths, steps = measure(str(folder), options.rounds, 1024 if options.shape == "qwen3-0.6b" else 16)
    weights = 2 * sum(parameters(shape))
    shares = [weights / bandwidth / step for bandwidth, step in zip(bandwidths, steps, strict=True)]
    rows = {"memory, GB/s": [each / 1e9 for each in bandwidths], "step, ms": [each * 1e3 for each in steps],
            "share of the limit": shares}  # fmt: skip
    spread = {name: statistics.quantiles(values, n=10) for name, values in rows.items()}  # index 4 is the median
    print_table(["", "10 %", "median", "90 %"], [[name, q[0], q[4], q[8]] for name, q in spread.items()])
    write_results(options.output, shape=options.shape, rounds=options.rounds, weights=weights, bandwidth=bandwidths,
                  step=steps, share=statistics.median(shares))  # fmt: skip


def measure(model: str, rounds: int, mebibytes: int) -> tuple[list[float], list[float]]:
    """Bytes per second of reading memory, and seconds of a decoding step, for each round."""
    from nanovllm import LLM, SamplingParams

    memory = memory_to_read(mebibytes)

    def timed(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    bandwidths, steps = [], []
    with LLM(model, skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=8) as llm:
        engine = llm.llm_engine
        params = SamplingParams(max_tokens=4 * rounds + 16, temperature=0, ignore_eos=True)
        engine.add_request("stream", {"prompt_token_ids": list(range(100, 132))}, params)
        for _ in range(8):
            engine.step()
        for _ in range(rounds):
            bandwidths.append(memory.nbytes / min(timed(memory.max) for _ in range(2)))
            steps.append(statistics.median([timed(engine.step) for _ in range(4)][1:]))  # the first finds cold caches
        engine.abort_request(["stream"])
    return bandwidths, steps


if __name__ == "__main__":
    main()
