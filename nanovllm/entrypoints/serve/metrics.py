"""``/metrics``: what the engine does, in Prometheus's format and under vLLM's names.

The engine's statistics come once per step. They are summed up here in plain numbers, and made into metrics when
somebody asks: a step of hundreds of requests costs microseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from nanovllm.entrypoints.serve.http_metrics import CountRequests
from nanovllm.outputs import PoolingRequestOutput

if TYPE_CHECKING:
    from nanovllm.engine.async_llm import AsyncLLM
    from nanovllm.engine.output import AnyOutput
    from nanovllm.engine.stats import StepRecord
    from nanovllm.sampling_params import SamplingParams

FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
                       40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
                 80.0)  # fmt: skip
LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
                   480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
N_BUCKETS = (1, 2, 5, 10, 20)
PREEMPTION_BUCKETS = (0, 1, 2, 5, 10, 20)

LABELS = ("model_name", "engine")
# Whatever a scraper says it prefers: in OpenMetrics' format its client library makes vllm_ of vllm:.
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts of values by bucket; the last bucket has no bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, as often as it has occurred."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Hand the counts to Prometheus, which wants them cumulated."""
        buckets, total = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((floatToGoString(bound), total))
        family.add_metric(labels, buckets, self._sum)


class MetricsObserver(Collector):
    """Follows an engine (`Observer`) and tells Prometheus (`Collector`).

    Attributes:
        registry: holds these metrics and those of the server's process, and nothing else.
    """

    def __init__(self, engine: AsyncLLM, model_name: str) -> None:
        """Start to follow ``engine``."""
        self._engine = engine
        self._labels = [model_name, "0"]
        self._finished: Counter[str] = Counter()  # requests by finish reason
        tokens = one_two_five(engine.config.model.max_model_len)
        self._first_token = Histogram(FIRST_TOKEN_BUCKETS)
        self._interval = Histogram(TOKEN_BUCKETS)
        self._step_tokens = Histogram(STEP_TOKEN_BUCKETS)
        self._times = {name: Histogram(LATENCY_BUCKETS) for name in ("e2e", "queue", "inference", "prefill", "decode")}
        self._per_token = Histogram(TOKEN_BUCKETS)
        names = ("prompt", "generation", "max_generation", "params_max", "prefill_computed")
        self._tokens = {name: Histogram(tokens) for name in names}
        self._n = Histogram(N_BUCKETS)
        self._preemptions = Histogram(PREEMPTION_BUCKETS)
        engine.observers.append(self)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    # -- following the engine ------------------------------------------------------------------------------------

    def step(self, record: StepRecord) -> None:
        """A step has ended."""
        if record.stats.num_tokens:
            self._step_tokens.observe(record.stats.num_tokens)
        for seconds in record.first_token_times:
            self._first_token.observe(seconds)
        for seconds, count in record.intervals:
            self._interval.observe(seconds, count)

    def finished(self, output: AnyOutput, params: SamplingParams) -> None:
        """A request has ended."""
        times = output.metrics
        assert times is not None
        self._finished[finish_reason(output)] += 1
        generated = times.num_generation_tokens
        self._times["e2e"].observe(times.last_token_ts - times.arrival_ts)
        if times.scheduled_ts:
            self._times["queue"].observe(times.scheduled_ts - times.queued_ts)
            self._times["inference"].observe(times.last_token_ts - times.scheduled_ts)
            self._tokens["prefill_computed"].observe(len(output.prompt_token_ids) - (output.num_cached_tokens or 0))
        if times.first_token_ts:
            decode = times.last_token_ts - times.first_token_ts
            self._times["prefill"].observe(times.first_token_ts - times.scheduled_ts)
            self._times["decode"].observe(decode)
            if times.max_generation_tokens > 1:
                self._per_token.observe(decode / (times.max_generation_tokens - 1))
        self._tokens["prompt"].observe(len(output.prompt_token_ids))
        self._tokens["generation"].observe(generated)
        self._tokens["max_generation"].observe(times.max_generation_tokens)
        if params.max_tokens is not None:
            self._tokens["params_max"].observe(params.max_tokens)
        self._n.observe(params.n)
        self._preemptions.observe(times.num_preemptions)

    # -- telling Prometheus --------------------------------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:
        """All metrics as they are now."""
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        stats, cache = self._engine.stats, self._engine.config.cache
        yield self._gauge("num_requests_running", "Requests in the batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", stats.num_waiting)
        family = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "Requests in the queue, by what they wait for.",
            labels=[*LABELS, "reason"],
        )  # fmt: skip
        family.add_metric([*self._labels, "capacity"], stats.num_waiting)
        yield family
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache's blocks in use, 0 to 1.", stats.kv_cache_usage)
        settings = {
            "block_size": cache.block_size,
            "cache_dtype": cache.dtype,
            "enable_prefix_caching": cache.enable_prefix_caching,
            "num_gpu_blocks": self._engine.num_blocks,
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Settings of the KV cache, as labels.", labels=[*LABELS, *settings]
        )
        family.add_metric([*self._labels, *map(str, settings.values())], 1)
        yield family

    def _counters(self) -> Iterator[Metric]:
        stats = self._engine.stats
        hits, computed = stats.prefix_cache_hits, stats.prompt_tokens - stats.prefix_cache_hits
        yield self._counter("prompt_tokens", "Tokens of prompts, cached ones included.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("prompt_tokens_cached", "Tokens of prompts found in the prefix cache.", hits)
        sources = {"local_compute": computed, "local_cache_hit": hits}
        text = "Tokens of prompts, by where their keys and values came from."
        yield self._counter_by("prompt_tokens_by_source", text, "source", sources)
        text = "Tokens of prompts looked up in the prefix cache."
        yield self._counter("prefix_cache_queries", text, stats.prefix_cache_queries)
        yield self._counter("prefix_cache_hits", "Tokens of prompts found in the prefix cache.", hits)
        text = "Requests put back into the queue, to be computed again."
        yield self._counter("num_preemptions", text, stats.num_preemptions)
        text = "Requests computed again because their step raised, or their engine died."
        yield CounterMetricFamily("nanovllm:request_retries", text, stats.num_retries)
        family = CounterMetricFamily("nanovllm:faults", "Faults that were met, by what it was.", labels=["fault"])
        for name, count in stats.faults.items():
            family.add_metric([name], count)
        yield family
        text = "Requests that have ended, by the reason of the output that ended last."
        reasons = {reason: 0 for reason in ("stop", "length", "abort", "error", "repetition")} | self._finished
        yield self._counter_by("request_success", text, "finished_reason", reasons)

    def _histograms(self) -> Iterator[Metric]:
        times, tokens = self._times, self._tokens
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.", self._first_token),
            ("inter_token_latency_seconds", "Between two tokens of an output.", self._interval),
            ("request_time_per_output_token_seconds", "Mean time of a request's tokens after its first.",
             self._per_token),
            ("e2e_request_latency_seconds", "From arrival to the last token.", times["e2e"]),
            ("request_queue_time_seconds", "In the queue, before the first step.", times["queue"]),
            ("request_inference_time_seconds", "From the first step to the last token.", times["inference"]),
            ("request_prefill_time_seconds", "From the first step to the first token.", times["prefill"]),
            ("request_decode_time_seconds", "From the first token to the last.", times["decode"]),
            ("iteration_tokens_total", "Tokens that a step computed.", self._step_tokens),
            ("request_prompt_tokens", "Tokens of a prompt.", tokens["prompt"]),
            ("request_generation_tokens", "Tokens generated for a request, over all its outputs.",
             tokens["generation"]),
            ("request_max_num_generation_tokens", "Tokens of a request's longest output.", tokens["max_generation"]),
            ("request_params_n", "Outputs asked for.", self._n),
            ("request_params_max_tokens", "Most tokens asked for.", tokens["params_max"]),
            ("request_prefill_kv_computed_tokens", "Tokens of a prompt that were not in the prefix cache.",
             tokens["prefill_computed"]),
            ("request_num_preemptions", "Times a request was put back into the queue.", self._preemptions),
        ):  # fmt: skip
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=LABELS)
            histogram.add_to(family, self._labels)
            yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter_by(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=[*LABELS, label])
        for key, value in values.items():
            family.add_metric([*self._labels, key], value)
        return family


def add_metrics(app: FastAPI, engine: AsyncLLM, model_name: str) -> MetricsObserver:
    """Follow ``engine``, count the application's requests, and have it answer ``GET /metrics``."""
    observer = MetricsObserver(engine, model_name)
    app.add_middleware(CountRequests, registry=observer.registry)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """The server's metrics in Prometheus's text format."""
        return Response(generate_latest(observer.registry), media_type=TEXT_FORMAT)

    return observer


def finish_reason(output: AnyOutput) -> str:
    """Of the output that ended last; a vector is always complete."""
    if isinstance(output, PoolingRequestOutput):
        return "stop"
    return next(completion.finish_reason for completion in reversed(output.outputs) if completion.finish_reason)


def one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to ``most``."""
    bounds, scale = [], 1
    while scale <= most:
        bounds += [digit * scale for digit in (1, 2, 5) if digit * scale <= most]
        scale *= 10
    return bounds
