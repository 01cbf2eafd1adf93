"""`AsyncLLM`: many streams over one engine; leaving one aborts it, an idle engine sleeps, a fault is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_executor import FakeExecutor, engine_config

from nanovllm import AsyncLLM, RequestOutputKind, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.thread_core import ThreadCore
from nanovllm.errors import EngineDeadError, EngineGenerateError, ParameterError

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def make_engine(executor: FakeExecutor | None = None, **options: Any) -> AsyncLLM:
    config: EngineConfig = engine_config(**options)
    engine = AsyncLLM(config, executor or FakeExecutor(num_blocks=200))
    engine._core.core.checker = InvariantChecker(engine._core.core.scheduler)
    return engine


@pytest.fixture
def engine() -> Iterator[AsyncLLM]:
    engine = make_engine(FakeExecutor(num_blocks=200, seconds=0.002))
    yield engine
    engine.shutdown()


async def collect(
    engine: AsyncLLM, request_id: str, prompt: Any = (1, 2, 3), params: SamplingParams = PARAMS
) -> list[Any]:
    return [output async for output in engine.generate(list(prompt), params, request_id)]


async def quiet(engine: AsyncLLM) -> None:
    """Wait until the core has nothing left to do, and check that nothing is left behind."""
    assert isinstance(engine._core, ThreadCore)
    core = engine._core.core
    for _ in range(500):
        if not core.has_work and engine._core._commands.empty():
            break
        await asyncio.sleep(0.01)
    assert core.checker is not None
    core.checker.idle()
    assert engine.output.num_requests == 0 and not engine._streams


def test_streams_run_together_and_each_gets_its_own_tokens(engine: AsyncLLM):
    async def main() -> None:
        results = await asyncio.gather(*(collect(engine, str(i), [i + 1] * (i + 1)) for i in range(20)))
        for outputs in results:
            lengths = [len(output.outputs[0].token_ids) for output in outputs]
            assert lengths == sorted(lengths) and lengths[-1] == 8
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        await quiet(engine)

    asyncio.run(main())


def test_deltas_add_up(engine: AsyncLLM):
    async def main() -> None:
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        whole = (await collect(engine, "whole"))[-1].outputs[0].token_ids
        deltas = await collect(engine, "deltas", params=params)
        # The fake executor's tokens depend on the request's seed; both requests have none of their own.
        assert sum(len(output.outputs[0].token_ids) for output in deltas) == len(whole)

    asyncio.run(main())


def test_leaving_a_stream_aborts_its_request(engine: AsyncLLM):
    async def main() -> None:
        stream = engine.generate([1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True), "left")
        async for _ in stream:
            break
        await stream.aclose()
        await quiet(engine)

    asyncio.run(main())


def test_a_cancelled_task_aborts_its_request_even_while_it_waits(engine: AsyncLLM):
    async def main() -> None:
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        tasks = [asyncio.create_task(collect(engine, str(i), params=params)) for i in range(30)]  # 8 run, 22 wait
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, (asyncio.CancelledError, list)) for result in done)
        await quiet(engine)

    asyncio.run(main())


def test_abort_ends_the_stream_with_a_final_output(engine: AsyncLLM):
    async def main() -> None:
        seen = []
        async for output in engine.generate([1, 2], SamplingParams(max_tokens=100, ignore_eos=True), "a"):
            seen.append(output)
            if len(seen) == 3:
                await engine.abort("a")
                await engine.abort(["a", "unknown"])
        assert seen[-1].finished and seen[-1].outputs[0].finish_reason == "abort"
        await quiet(engine)

    asyncio.run(main())


def test_abort_while_the_prompt_is_being_tokenised_counts(engine: AsyncLLM):
    async def main() -> None:
        task = asyncio.create_task(collect(engine, "a", params=SamplingParams(max_tokens=100, ignore_eos=True)))
        await asyncio.sleep(0)  # it has begun, and waits for its tokens
        await engine.abort("a")
        outputs = await task
        assert [o.outputs[0].finish_reason for o in outputs] == ["abort"] and outputs[0].finished
        await quiet(engine)
        assert not engine._aborted

    asyncio.run(main())


def test_ids_that_look_like_those_of_forks_do_not_collide(engine: AsyncLLM):
    async def main() -> None:
        two = SamplingParams(n=2, temperature=1.0, max_tokens=8, ignore_eos=True)
        results = await asyncio.gather(
            collect(engine, "a", params=two), collect(engine, "0_a"), collect(engine, "1_a"), collect(engine, "0_0_a")
        )
        assert [len(outputs[-1].outputs) for outputs in results] == [2, 1, 1, 1]
        await quiet(engine)

    asyncio.run(main())


def test_bad_requests_are_refused_and_leave_nothing(engine: AsyncLLM):
    async def main() -> None:
        with pytest.raises(ParameterError, match="out of vocabulary"):
            await collect(engine, "bad", [5000])
        with pytest.raises(ParameterError, match="maximum context length"):
            await collect(engine, "long", [1] * 500)
        running = asyncio.create_task(collect(engine, "same"))
        await asyncio.sleep(0)
        with pytest.raises(ParameterError, match="under way"):
            await collect(engine, "same")
        assert (await running)[-1].finished
        await quiet(engine)

    asyncio.run(main())


def test_whoever_makes_every_step_fail_is_told_and_the_engine_goes_on():
    engine = make_engine(FakeExecutor(num_blocks=200, failing_steps=frozenset(range(3, 10))))

    async def main() -> None:
        with pytest.raises(EngineGenerateError, match="on fire"):
            await collect(engine, "a")
        await engine.check_health()
        assert (await collect(engine, "b"))[-1].finished
        await quiet(engine)

    asyncio.run(main())
    engine.shutdown()


def test_a_fault_of_the_engine_itself_ends_all_streams_and_is_not_hidden():
    engine = make_engine()

    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    engine._core.core.scheduler.update = broken  # type: ignore[method-assign]

    async def main() -> None:
        results = await asyncio.gather(*(collect(engine, str(i)) for i in range(3)), return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        with pytest.raises(EngineDeadError):
            await collect(engine, "late")

    asyncio.run(main())
    assert engine.errored
    engine.shutdown()


def test_shutdown_ends_streams_and_is_idempotent(engine: AsyncLLM):
    async def main() -> None:
        task = asyncio.create_task(collect(engine, "a", params=SamplingParams(max_tokens=120, ignore_eos=True)))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(EngineDeadError):
            await task

    asyncio.run(main())
    engine.shutdown()
    assert not engine.is_running


def test_an_idle_engine_uses_no_cpu(engine: AsyncLLM):
    async def main() -> None:
        await collect(engine, "a")
        await quiet(engine)

    asyncio.run(main())
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.05


def test_the_prefix_cache_is_reset_from_outside(engine: AsyncLLM):
    async def main() -> None:
        await collect(engine, "a", [1] * 20)
        await quiet(engine)
        assert engine._core.core.scheduler.kv.pool.cached
        assert await engine.reset_prefix_cache()
        assert not engine._core.core.scheduler.kv.pool.cached

    asyncio.run(main())


def test_text_prompts_stop_strings_and_n_work_over_a_real_model(tmp_path: Path):
    from tiny_models import make_checkpoint
    from tiny_tokenizers import qwen

    from nanovllm import LLM, AsyncEngineArgs

    make_checkpoint(tmp_path, "qwen3", vocab_size=337, eos_token_id=332)
    qwen(tmp_path)
    args = {"num_gpu_blocks_override": 64, "block_size": 8}
    params = SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=12, ignore_eos=True)
    with LLM(str(tmp_path), **args) as llm:
        (expected,) = llm.generate("hello", params, use_tqdm=False)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_kwargs(model=str(tmp_path), **args))
    engine._core.core.checker = InvariantChecker(engine._core.core.scheduler)

    async def main() -> None:
        outputs = [output async for output in engine.generate("hello", params, "n")]
        assert [c.token_ids for c in outputs[-1].outputs] == [c.token_ids for c in expected.outputs]
        stop = expected.outputs[0].text[3:5]
        cut = SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=12, ignore_eos=True, stop=[stop])
        outputs = [output async for output in engine.generate("hello", cut, "stop")]
        assert outputs[-1].outputs[0].stop_reason == stop
        await quiet(engine)

    asyncio.run(main())
    engine.shutdown()
