"""Latency of one batch: the time from all its prompts to all its outputs, over and over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanovllm.entrypoints.bench.datasets import SampleRequest
from nanovllm.entrypoints.bench.throughput import check_lengths
from nanovllm.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from nanovllm.entrypoints.llm import LLM

PERCENTAGES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True)
class LatencyResult:
    """What was measured.

    Attributes:
        latencies: seconds of each batch, in the order they ran.
    """

    latencies: list[float]

    @property
    def average(self) -> float:
        """Mean, in seconds."""
        return sum(self.latencies) / len(self.latencies)

    @property
    def percentiles(self) -> dict[int, float]:
        """Percentage -> seconds, linear between the two nearest latencies."""
        ordered = sorted(self.latencies)
        result = {}
        for percentage in PERCENTAGES:
            position = (len(ordered) - 1) * percentage / 100
            below = int(position)
            above = min(below + 1, len(ordered) - 1)
            result[percentage] = ordered[below] + (ordered[above] - ordered[below]) * (position - below)
        return result

    def __str__(self) -> str:
        """vLLM's lines."""
        lines = [f"Avg latency: {self.average} seconds"]
        lines += [
            f"{percentage}% percentile latency: {value} seconds" for percentage, value in self.percentiles.items()
        ]
        return "\n".join(lines)

    def to_json(self, model_id: str) -> dict[str, Any]:
        """vLLM's keys."""
        return {
            "model_id": model_id,
            "avg_latency": self.average,
            "latencies": self.latencies,
            "percentiles": {str(percentage): value for percentage, value in self.percentiles.items()},
        }


def measure_latency(
    llm: LLM,
    batch: Sequence[SampleRequest],
    *,
    n: int = 1,
    use_beam_search: bool = False,
    detokenize: bool = True,
    num_warmups: int = 10,
    num_iterations: int = 30,
    use_tqdm: bool = True,
) -> LatencyResult:
    """Run the same batch again and again.

    Args:
        batch: requests whose outputs are equally long.
        n: outputs per request, or the beam's width.
        detokenize: make text of the outputs.
        num_warmups: batches before those that count.
        num_iterations: batches that count.

    Raises:
        ParameterError: a request does not fit the context, or a parameter is out of range.
    """
    from tqdm import tqdm

    check_lengths(batch, llm.llm_engine.model_config.max_model_len)
    prompts = [request.prompt for request in batch]
    output_len = batch[0].expected_output_len
    params = SamplingParams(n=n, temperature=1.0, ignore_eos=True, max_tokens=output_len, detokenize=detokenize)
    beam_params = BeamSearchParams(beam_width=n, max_tokens=output_len, ignore_eos=True)

    def run() -> float:
        start = time.perf_counter()
        if use_beam_search:
            llm.beam_search(prompts, beam_params)
        else:
            llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    def repeat(count: int, title: str) -> list[float]:
        return [run() for _ in tqdm(range(count), desc=title, dynamic_ncols=True, disable=not use_tqdm)]

    repeat(num_warmups, "Warmup iterations")
    return LatencyResult(repeat(num_iterations, "Bench iterations"))
