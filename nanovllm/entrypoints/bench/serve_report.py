"""What an online benchmark found out: vLLM's table and JSON keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nanovllm.entrypoints.bench.backends import RequestResult

WIDTH = 50
METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
DETAILS = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors")


@dataclass
class ServingReport:
    """Figures of a run. Times are seconds here, milliseconds in what is printed and written.

    Attributes:
        results: in the order of the requests.
        duration: seconds from the start to the last answer.
        metrics: of `METRICS`, those to show.
        percentiles: percentages to show of each, such as 99.
        goodput: metric -> most milliseconds it may take in a request that counts as good.
        generates: False for an endpoint that generates nothing.
        request_rate: requests per second that were asked for.
    """

    results: Sequence[RequestResult]
    duration: float
    metrics: Sequence[str] = ("ttft", "tpot", "itl")
    percentiles: Sequence[float] = (99.0,)
    goodput: Mapping[str, float] | None = None
    generates: bool = True
    request_rate: float = math.inf
    max_concurrency: int | None = None

    @cached_property
    def completed(self) -> list[RequestResult]:
        """Requests that were answered."""
        return [result for result in self.results if result.success]

    @cached_property
    def failed(self) -> list[RequestResult]:
        """And those that were not."""
        return [result for result in self.results if not result.success]

    @property
    def total_input(self) -> int:
        return sum(result.prompt_len for result in self.completed)

    @property
    def total_output(self) -> int:
        return sum(_output_len(result) for result in self.completed)

    @property
    def request_goodput(self) -> float:
        """Good requests per second."""
        limits = self.goodput or {}
        good = [
            all(_VALUES[metric](result) * 1000 <= limit for metric, limit in limits.items())
            for result in self.completed
        ]
        return sum(good) / self.duration

    @cached_property
    def peaks(self) -> tuple[float, int]:
        """Most output tokens, and most requests under way, in any second of the run."""
        if not self.completed:
            return 0.0, 0
        begin = min(result.start_time for result in self.completed)
        end = max(result.start_time + result.latency for result in self.completed)
        tokens = np.zeros(math.ceil(end - begin) + 1)
        requests = np.zeros(len(tokens), dtype=np.int64)
        for result in self.completed:
            arrivals = result.start_time - begin + result.ttft + np.cumsum([0.0, *result.itls])
            # A piece may carry several tokens.
            np.add.at(tokens, arrivals.astype(np.int64), _output_len(result) / len(arrivals))
            first = int(result.start_time - begin)
            requests[first : int(result.start_time - begin + result.latency) + 1] += 1
        return float(tokens.max()), int(requests.max())

    def statistics(self) -> dict[str, tuple[str, float]]:
        """JSON key -> (label, milliseconds) of all metrics shown."""
        found: dict[str, tuple[str, float]] = {}
        for metric in self._shown():
            name = metric.upper()
            values = np.array(self._all(metric) or [0.0]) * 1000
            found[f"mean_{metric}_ms"] = f"Mean {name} (ms):", float(values.mean())
            found[f"median_{metric}_ms"] = f"Median {name} (ms):", float(np.median(values))
            found[f"std_{metric}_ms"] = "", float(values.std())
            for percentage in self.percentiles:
                word = f"{percentage:g}"
                found[f"p{word}_{metric}_ms"] = f"P{word} {name} (ms):", float(np.percentile(values, percentage))
        return found

    def __str__(self) -> str:
        """vLLM's table."""
        peak_tokens, peak_requests = self.peaks
        total_input, total_output = self.total_input, self.total_output
        lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
        add = lines.append
        add(_line("Successful requests:", len(self.completed)))
        add(_line("Failed requests:", len(self.failed)))
        if self.max_concurrency is not None:
            add(_line("Maximum request concurrency:", self.max_concurrency))
        if not math.isinf(self.request_rate):
            add(_line("Request rate configured (RPS):", self.request_rate))
        add(_line("Benchmark duration (s):", self.duration))
        add(_line("Total input tokens:", total_input))
        if self.generates:
            add(_line("Total generated tokens:", total_output))
        add(_line("Request throughput (req/s):", len(self.completed) / self.duration))
        if self.goodput:
            add(_line("Request goodput (req/s):", self.request_goodput))
        if self.generates:
            add(_line("Output token throughput (tok/s):", total_output / self.duration))
            add(_line("Peak output token throughput (tok/s):", peak_tokens))
            add(_line("Peak concurrent requests:", float(peak_requests)))
        add(_line("Total token throughput (tok/s):", (total_input + total_output) / self.duration))
        statistics = self.statistics()
        for metric in self._shown():
            add(f"{METRICS[metric]:-^{WIDTH}}")
            lines += [
                _line(label, value)
                for key, (label, value) in statistics.items()
                if label and key.endswith(f"_{metric}_ms")
            ]
        add("=" * WIDTH)
        return "\n".join(lines)

    def to_json(self, detailed: bool) -> dict[str, Any]:
        """vLLM's keys; ``detailed`` adds what is known of every request."""
        peak_tokens, peak_requests = self.peaks
        total_input, total_output = self.total_input, self.total_output
        values: dict[str, Any] = {
            "duration": self.duration,
            "completed": len(self.completed),
            "failed": len(self.failed),
            "total_input_tokens": total_input,
            "total_output_tokens": total_output,
            "request_throughput": len(self.completed) / self.duration,
            "request_goodput": self.request_goodput if self.goodput else None,
            "output_throughput": total_output / self.duration,
            "total_token_throughput": (total_input + total_output) / self.duration,
            "input_lens": [result.prompt_len for result in self.results],
            "output_lens": [_output_len(result) if result.success else 0 for result in self.results],
            "ttfts": [result.ttft for result in self.results],
            "itls": [result.itls for result in self.results],
            "latencies": [result.latency for result in self.results],
            "start_times": [result.start_time for result in self.results],
            "queue_times": [result.queue_time for result in self.results],
            "generated_texts": [result.text for result in self.results],
            "errors": [result.error for result in self.results],
            "max_output_tokens_per_s": peak_tokens,
            "max_concurrent_requests": peak_requests,
            "rtfx": 0.0,  # of speech recognition
            **{key: value for key, (_, value) in self.statistics().items()},
        }
        return {key: value for key, value in values.items() if detailed or key not in DETAILS}

    def _shown(self) -> list[str]:
        return [metric for metric in METRICS if metric in self.metrics and (self.generates or metric == "e2el")]

    def _all(self, metric: str) -> list[float]:
        if metric == "itl":
            return [itl for result in self.completed for itl in result.itls]
        if metric == "tpot":
            return [_tpot(result) for result in self.completed if _output_len(result) > 1]
        return [_VALUES[metric](result) for result in self.completed]


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"


def _output_len(result: RequestResult) -> int:
    """As the server counts; one token for each piece where it does not."""
    return len(result.itls) + 1 if result.output_len is None else result.output_len


def _tpot(result: RequestResult) -> float:
    """Seconds per token after the first; 0 if there is no other."""
    count = _output_len(result)
    return (result.latency - result.ttft) / (count - 1) if count > 1 else 0.0


_VALUES: dict[str, Callable[[RequestResult], float]] = {
    "ttft": lambda result: result.ttft,
    "tpot": _tpot,
    "e2el": lambda result: result.latency,
}
