"""``/metrics``: vLLM's names, numbers that are true, a page in step with the documents."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_executor import FakeExecutor, engine_config
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.entrypoints.serve.admission import Admission
from nanovllm.entrypoints.serve.admission_metrics import AdmissionMetrics
from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.entrypoints.serve.metrics import Histogram, add_metrics, one_two_five

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
LABELS = {"model_name": "tiny", "engine": "0"}


@pytest.fixture
def llm() -> Iterator[AsyncLLM]:
    engine = AsyncLLM(engine_config(), FakeExecutor(num_blocks=200, seconds=0.001))
    yield engine
    engine.shutdown()


async def ask(llm: AsyncLLM, request_id: str, prompt: list[int], **params: Any) -> None:
    settings = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params})
    async for _ in llm.generate(prompt, settings, request_id):
        pass


async def settled(llm: AsyncLLM) -> None:
    while llm.stats.num_running or llm.stats.num_waiting:
        await asyncio.sleep(0.005)


async def scrape(app: FastAPI, accept: str = "") -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        return await client.get("/metrics", headers={"accept": accept})


class Samples:
    """The samples of a page, by name and labels other than the two that all have."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}

    def __call__(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == f"vllm:{name}" and sample.labels == LABELS | labels
        ]
        (value,) = found
        return value


def metrics_after(llm: AsyncLLM, coroutine: Any) -> Samples:
    app = FastAPI()
    observer = add_metrics(app, llm, "tiny")
    observer.registry.register(AdmissionMetrics(Admission(llm, ServeArgs()), llm, "tiny"))

    async def main() -> Samples:
        await coroutine
        await settled(llm)
        response = await scrape(app)
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=")
        return Samples(response.text)

    return asyncio.run(main())


def test_requests_are_counted(llm: AsyncLLM):
    async def work() -> None:
        await asyncio.gather(*(ask(llm, str(i), [i + 1] * 5) for i in range(10)))
        await ask(llm, "again", [1] * 5)
        await ask(llm, "two", [9, 9], n=2, temperature=1.0, max_tokens=3)
        async for _ in llm.generate([1], SamplingParams(max_tokens=100, ignore_eos=True), "left"):
            break

    value = metrics_after(llm, work())
    assert value("num_requests_running") == value("num_requests_waiting") == 0
    assert value("num_requests_waiting_by_reason", reason="capacity") == 0
    assert value("kv_cache_usage_perc") == 0
    assert value("prompt_tokens_total") == 10 * 5 + 5 + 2 * 2 + 1
    assert value("prompt_tokens_cached_total") == value("prefix_cache_hits_total") == 4 + 1  # a block; the fork's share
    assert value("prompt_tokens_by_source_total", source="local_compute") == 60 - 5
    assert value("prompt_tokens_by_source_total", source="local_cache_hit") == 5
    assert value("prefix_cache_queries_total") == 60
    assert value("request_success_total", finished_reason="length") == 12
    assert value("request_success_total", finished_reason="abort") == 1
    assert value("request_success_total", finished_reason="stop") == 0
    assert value("generation_tokens_total") >= 11 * 8 + 2 * 3 + 1
    assert value("request_params_max_tokens_sum") == 11 * 8 + 3 + 100
    assert value("request_params_n_sum") == 12 + 2
    assert value("request_params_n_bucket", le="1.0") == 12
    assert value("request_prompt_tokens_sum") == 55 + 2 + 1
    assert value("request_prefill_kv_computed_tokens_sum") == 55 + 2 + 1 - 4
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "request_decode_time_seconds",
                 "request_prefill_time_seconds", "request_inference_time_seconds", "request_generation_tokens",
                 "request_max_num_generation_tokens", "request_num_preemptions"):  # fmt: skip
        assert value(f"{name}_count") == value(f"{name}_bucket", le="+Inf") == 13, name
    assert value("request_time_per_output_token_seconds_count") >= 12  # who left may have had one token only
    assert value("time_to_first_token_seconds_count") == 14  # outputs
    assert value("inter_token_latency_seconds_count") >= 11 * 7 + 2 * 2
    assert value("iteration_tokens_total_count") == llm.stats.steps
    assert value("iteration_tokens_total_sum") >= 55


def test_faults_retries_and_errors_are_counted():
    from nanovllm.errors import EngineGenerateError

    llm = AsyncLLM(engine_config(), FakeExecutor(num_blocks=200, failing_steps=frozenset(range(2, 6))))

    async def work() -> None:
        with pytest.raises(EngineGenerateError):
            await ask(llm, "a", [1, 2])
        await ask(llm, "b", [1, 2])

    assert metrics_after(llm, work())("request_success_total", finished_reason="error") == 1
    assert llm.stats.faults["step_failed"] == 4 and llm.stats.num_retries == 3
    llm.shutdown()


def test_the_state_is_that_of_the_moment(llm: AsyncLLM):
    app = FastAPI()
    add_metrics(app, llm, "tiny")

    async def main() -> None:
        tasks = [asyncio.create_task(ask(llm, str(i), [1, 2], max_tokens=100)) for i in range(11)]
        while llm.stats.num_waiting != 3:
            await asyncio.sleep(0.001)
        value = Samples((await scrape(app)).text)
        assert (value("num_requests_running"), value("num_requests_waiting")) == (8, 3)
        assert 0 < value("kv_cache_usage_perc") < 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await settled(llm)

    asyncio.run(main())


def test_two_applications_have_metrics_of_their_own(llm: AsyncLLM):
    other = AsyncLLM(engine_config(), FakeExecutor(num_blocks=200))
    add_metrics(FastAPI(), other, "tiny")
    assert metrics_after(llm, ask(llm, "a", [1, 2]))("generation_tokens_total") == 8
    assert metrics_after(other, ask(other, "a", [1, 2], max_tokens=3))("generation_tokens_total") == 3
    other.shutdown()


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;q=0.4",
        "",
    ],
)
def test_a_scraper_gets_the_names_with_their_colons(llm: AsyncLLM, accept: str):
    """The formats that Prometheus prefers have other rules for names."""
    app = FastAPI()
    add_metrics(app, llm, "tiny")
    response = asyncio.run(scrape(app, accept))
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "\nvllm:num_requests_running{" in response.text and "vllm_" not in response.text


def test_the_document_lists_what_there_is(llm: AsyncLLM):
    families = metrics_after(llm, asyncio.sleep(0)).families
    rows = re.findall(r"^\| `([\w:]+)` \| (\w+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    offered = {
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type)
        for family in families.values()
        if family.name.startswith(("vllm:", "nanovllm:", "http_"))
    }
    assert offered == set(rows) and len(rows) == len(offered)
    assert "process_cpu_seconds" in families and "python_info" in families


def test_http_requests_are_counted_by_route(llm: AsyncLLM):
    app = FastAPI()
    add_metrics(app, llm, "tiny")

    @app.get("/things/{name}")
    async def thing(name: str) -> str:
        if name == "broken":
            raise RuntimeError("broken")
        return name

    async def main() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            for path in ("/things/a", "/things/b", "/nowhere", "/elsewhere"):
                await client.get(path)
            with pytest.raises(RuntimeError):
                await client.get("/things/broken")
        return (await scrape(app)).text

    text = asyncio.run(main())
    counts = dict(re.findall(r"^http_requests_total\{(.*)\} ([\d.]+)$", text, re.MULTILINE))
    assert counts == {
        'handler="/things/{name}",method="GET",status="2xx"': "2.0",
        'handler="/things/{name}",method="GET",status="5xx"': "1.0",
        'handler="none",method="none",status="4xx"': "2.0",
    }
    assert 'http_request_duration_seconds_count{handler="/things/{name}",method="GET"} 3.0' in text


def test_buckets_are_cumulated_and_bounds_are_inclusive():
    from prometheus_client.core import HistogramMetricFamily

    histogram = Histogram((1, 2, 5))
    for value, count in ((0.5, 1), (1, 1), (1.5, 2), (5, 1), (7, 3)):
        histogram.observe(value, count)
    family = HistogramMetricFamily("x", "x", labels=())
    histogram.add_to(family, ())
    found = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    assert found == {"1.0": 2, "2.0": 4, "5.0": 5, "+Inf": 8, "x_count": 8, "x_sum": 0.5 + 1 + 3 + 5 + 21}


def test_bounds_go_up_to_the_context():
    assert one_two_five(128) == [1, 2, 5, 10, 20, 50, 100]
    assert one_two_five(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
