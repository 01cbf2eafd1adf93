"""Statistics of an engine: counts are exact, times are in order, nothing is remembered of what has ended."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import pytest
from fake_executor import FakeExecutor, engine_config

from nanovllm import AsyncLLM, LLMEngine, RequestOutput, RequestOutputKind, SamplingParams
from nanovllm.engine import async_llm, stats
from nanovllm.engine.stats import StepRecord

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


class Watcher:
    """Remembers all it is told."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.ends: list[tuple[RequestOutput, SamplingParams]] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def finished(self, output: RequestOutput, params: SamplingParams) -> None:
        self.ends.append((output, params))

    def total(self, name: str) -> int:
        return sum(getattr(record.stats, name) for record in self.steps)


async def ask(llm: AsyncLLM, request_id: str, prompt: list[int], params: SamplingParams = PARAMS) -> RequestOutput:
    async for output in llm.generate(prompt, params, request_id):
        last = output
    return last


async def ask_all(llm: AsyncLLM, prompts: list[list[int]], params: SamplingParams = PARAMS) -> None:
    await asyncio.gather(*(ask(llm, str(number), prompt, params) for number, prompt in enumerate(prompts)))


def run(llm: AsyncLLM, coroutine: Any) -> Watcher:
    watcher = Watcher()
    llm.observers.append(watcher)

    async def main() -> None:
        await coroutine
        for _ in range(500):
            if llm.stats.num_running == llm.stats.num_waiting == 0 and not llm.stats._times:
                break
            await asyncio.sleep(0.005)

    asyncio.run(main())
    llm.shutdown()
    assert not llm.stats._times
    return watcher


@pytest.fixture
def llm() -> AsyncLLM:
    return AsyncLLM(engine_config(), FakeExecutor(num_blocks=200, seconds=0.001))


def test_tokens_and_steps_are_counted_exactly(llm: AsyncLLM):
    two = SamplingParams(n=2, temperature=1.0, max_tokens=5, ignore_eos=True)

    async def main() -> None:
        await ask_all(llm, [[i + 1] * (i + 1) for i in range(10)])
        await ask(llm, "two", [7, 8, 9], two)

    watcher = run(llm, main())
    generated = 10 * 8 + 2 * 5
    assert llm.stats.generation_tokens == sum(r.generation_tokens for r in watcher.steps) == generated
    assert llm.stats.prompt_tokens == watcher.total("prompt_tokens") == sum(range(1, 11)) + 2 * 3
    assert llm.stats.steps == watcher.total("num_steps")
    # Every output has one first token, and an interval for each of the others.
    assert sum(len(record.first_token_times) for record in watcher.steps) == 12
    assert sum(count for record in watcher.steps for _, count in record.intervals) == generated - 12
    assert all(seconds >= 0 for record in watcher.steps for seconds, _ in record.intervals)
    assert max(record.stats.num_running for record in watcher.steps) == 8
    assert max(record.stats.num_waiting for record in watcher.steps) >= 2
    assert max(record.stats.kv_cache_usage for record in watcher.steps) > 0
    last = watcher.steps[-1].stats
    assert (last.num_running, last.num_waiting, last.kv_cache_usage) == (0, 0, 0)


def test_a_prompt_seen_before_is_a_hit_in_tokens(llm: AsyncLLM):
    async def main() -> None:
        for name in ("a", "b"):
            await ask(llm, name, list(range(1, 22)))
        params = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=1)  # it does not look anything up
        await ask(llm, "c", list(range(1, 22)), params)

    run(llm, main())
    assert (llm.stats.prefix_cache_queries, llm.stats.prefix_cache_hits) == (42, 20)
    assert llm.stats.prompt_tokens == 63


def test_times_of_a_request_are_in_order(llm: AsyncLLM):
    watcher = run(llm, ask_all(llm, [[1, 2]] * 12))
    assert len(watcher.ends) == 12
    for output, params in watcher.ends:
        times = output.metrics
        assert times is not None and params is PARAMS
        order = [times.arrival_ts, times.queued_ts, times.scheduled_ts, times.first_token_ts, times.last_token_ts]
        assert order == sorted(order) and order[0] > 0
        assert times.first_token_latency > 0
        assert (times.num_generation_tokens, times.max_generation_tokens) == (8, 8)


def test_the_synchronous_engine_fills_in_the_same_times():
    engine = LLMEngine(engine_config(), FakeExecutor(num_blocks=200))
    engine.add_request("a", [1, 2, 3], PARAMS)
    while engine.has_unfinished_requests():
        outputs = engine.step()
    times = outputs[-1].metrics
    assert times is not None
    order = [times.arrival_ts, times.queued_ts, times.scheduled_ts, times.first_token_ts, times.last_token_ts]
    assert order == sorted(order) and order[0] > 0
    engine.shutdown()


def test_preemptions_are_counted_for_the_engine_and_for_the_request():
    llm = AsyncLLM(engine_config(max_model_len=40), FakeExecutor(num_blocks=14))
    params = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True)
    watcher = run(llm, ask_all(llm, [[i] * 8 for i in range(1, 5)], params))
    assert llm.stats.num_preemptions == watcher.total("num_preemptions") > 0
    assert sum(output.metrics.num_preemptions for output, _ in watcher.ends if output.metrics) > 0
    # Prompts count once, however often they were computed.
    assert llm.stats.prompt_tokens == 4 * 8 and llm.stats.generation_tokens == 4 * 25


def test_requests_that_end_early_are_reported_once_with_their_reason(llm: AsyncLLM):
    long = SamplingParams(max_tokens=100, ignore_eos=True, output_kind=RequestOutputKind.DELTA)

    async def main() -> None:
        async for _ in llm.generate([1], long, "left"):
            break
        stream = llm.generate([1], long, "aborted")
        await anext(stream)
        await llm.abort("aborted")
        async for _ in stream:
            pass
        task = asyncio.create_task(ask(llm, "cancelled", [1], long))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await ask(llm, "whole", [1])

    watcher = run(llm, main())
    ends = [(output.request_id, output.outputs[-1].finish_reason) for output, _ in watcher.ends]
    assert sorted(ends) == [("aborted", "abort"), ("cancelled", "abort"), ("left", "abort"), ("whole", "length")]


def test_an_observer_that_fails_stops_nothing(llm: AsyncLLM, caplog: pytest.LogCaptureFixture):
    class Broken(Watcher):
        def step(self, record: StepRecord) -> None:
            raise RuntimeError("out of ink")

        finished = step  # type: ignore[assignment]

    llm.observers.append(Broken())
    watcher = run(llm, ask(llm, "a", [1, 2]))
    assert len(watcher.ends) == 1 and llm.stats.generation_tokens == 8
    assert "An observer of the engine failed" in caplog.text


@pytest.mark.parametrize("wanted", [True, False])
def test_a_line_is_logged_as_long_as_there_is_work(
    wanted: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(stats, "LOG_INTERVAL", 0.05)
    monkeypatch.setattr(async_llm, "LOG_INTERVAL", 0.05)
    config = dataclasses.replace(engine_config(), log_stats=wanted)
    llm = AsyncLLM(config, FakeExecutor(num_blocks=200, seconds=0.005))

    async def main() -> None:
        await ask(llm, "a", [1, 2], SamplingParams(max_tokens=50, ignore_eos=True))
        await asyncio.sleep(0.2)
        lines = len(caplog.records)
        await asyncio.sleep(0.2)
        assert len(caplog.records) == lines  # nothing to say, nothing said
        await ask(llm, "b", [1, 2])
        await asyncio.sleep(0.2)

    with caplog.at_level(logging.INFO, "nanovllm"):
        run(llm, main())
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Avg prompt")]
    if not wanted:
        assert not lines
        return
    assert len(lines) >= 3
    assert "Running: 1 reqs, Waiting: 0 reqs, GPU KV cache usage: " in lines[0]
    assert "Running: 0 reqs" in lines[-1] and lines[-1].endswith("Prefix cache hit rate: 0.0%")


def test_the_synchronous_engine_logs_too_if_asked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(stats, "LOG_INTERVAL", 0.01)
    engine = LLMEngine(dataclasses.replace(engine_config(), log_stats=True), FakeExecutor(200, seconds=0.005))
    engine.add_request("a", [1, 2, 3], PARAMS)
    with caplog.at_level(logging.INFO, "nanovllm"):
        while engine.has_unfinished_requests():
            engine.step()
    assert "Avg generation throughput: " in caplog.text
    engine.shutdown()
