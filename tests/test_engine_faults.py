"""What goes wrong with an engine's process is seen at once, told as what it is, and ends no more than it must."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
from engine_processes import LONG, alive, child_pid, collect, engine, quiet, streams_in_flight
from fake_executor import FakeExecutor

from nanovllm import AsyncLLM
from nanovllm.engine.child_core import ChildCore
from nanovllm.entrypoints.serve.metrics import MetricsObserver
from nanovllm.errors import EngineDeadError, EngineGenerateError, ModelError, ParameterError


def test_a_killed_engine_ends_its_streams_and_says_what_happened():
    async def main(llm: AsyncLLM) -> None:
        metrics = MetricsObserver(llm, "fake")
        tasks = await streams_in_flight(llm)
        os.kill(child_pid(llm), signal.SIGKILL)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError) and "SIGKILL" in str(result)
        assert llm.errored and "SIGKILL" in str(llm.dead_error) and not llm.is_running
        assert llm.stats.num_running == 0 and metrics._finished == {"error": 4}
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await llm.check_health()
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await collect(llm, "late")

    with engine("slow") as llm:
        asyncio.run(main(llm))


def test_a_killed_engine_is_started_again_as_often_as_was_asked():
    async def main(llm: AsyncLLM) -> None:
        for number in range(2):
            tasks = await streams_in_flight(llm)
            os.kill(child_pid(llm), signal.SIGKILL)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, EngineDeadError) for result in results)
            assert not llm.errored
            with pytest.raises(EngineDeadError, match="being loaded"):
                await llm.check_health()
            assert (await collect(llm, f"after {number}"))[-1].finished
            await quiet(llm)
        os.kill(child_pid(llm), signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await collect(llm, "third time")
        assert llm.errored

    with engine("slow", max_restarts=2) as llm:
        asyncio.run(main(llm))


def test_requests_without_a_token_outlive_their_engine_once():
    async def main(llm: AsyncLLM) -> None:
        running = await streams_in_flight(llm, 2)
        waiting = [asyncio.create_task(collect(llm, str(i))) for i in range(3)]
        while llm.stats.num_waiting < 3:
            await asyncio.sleep(0.001)
        os.kill(child_pid(llm), signal.SIGKILL)
        results = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        for outputs in await asyncio.gather(*waiting):
            assert len(outputs[-1].outputs[0].token_ids) == 8
        assert llm.stats.num_retries == 3
        await quiet(llm)

        running = await streams_in_flight(llm, 2)
        again = [asyncio.create_task(collect(llm, f"again {i}")) for i in range(3)]
        while llm.stats.num_waiting < 3:
            await asyncio.sleep(0.001)
        for _ in range(2):  # the second time while it loads
            pid = child_pid(llm)
            os.kill(pid, signal.SIGKILL)
            while child_pid(llm) == pid:
                await asyncio.sleep(0.001)
        results = await asyncio.gather(*running, *again, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        assert (await collect(llm, "new"))[-1].finished
        await quiet(llm)

    with engine("slow", max_restarts=3, max_num_seqs=2) as llm:
        asyncio.run(main(llm))


def test_requests_that_wait_for_the_engine_outlive_its_restarts():
    async def main(llm: AsyncLLM) -> None:
        await llm.ready()
        waiting = []
        for number in range(2):  # the second time while it loads
            pid = child_pid(llm)
            os.kill(pid, signal.SIGKILL)
            while child_pid(llm) == pid:
                await asyncio.sleep(0.001)
            waiting += [asyncio.create_task(collect(llm, f"{number} {i}")) for i in range(3)]
            await asyncio.sleep(0)
        assert all(outputs[-1].finished for outputs in await asyncio.gather(*waiting))
        await quiet(llm)

    with engine(max_restarts=2) as llm:
        asyncio.run(main(llm))


def test_a_failed_step_is_computed_again():
    async def main(llm: AsyncLLM) -> None:
        assert (await collect(llm, "a"))[-1].finished
        await quiet(llm)
        assert llm.stats.faults["step_failed"] == 1 and llm.stats.num_retries == 1

    with engine("failing_step") as llm:
        asyncio.run(main(llm))


def test_a_request_that_makes_every_step_fail_ends_alone_and_the_others_lose_nothing():
    async def main(llm: AsyncLLM) -> None:
        seeded = [LONG.from_optional(max_tokens=20, ignore_eos=True, seed=seed) for seed in range(10)]
        tasks = [collect(llm, str(seed), params=params) for seed, params in enumerate(seeded)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for seed, result in enumerate(results):
            if seed == 7:
                assert isinstance(result, EngineGenerateError) and "on fire" in str(result)
            else:
                tokens = result[-1].outputs[0].token_ids  # type: ignore[index]
                assert tokens == [FakeExecutor().token(seed, position) for position in range(3, 23)]
        await quiet(llm)
        assert llm.stats.faults["step_failed"] >= 4

    with engine("poisonable") as llm:
        asyncio.run(main(llm))


def test_a_device_that_is_lost_is_a_dead_engine():
    async def main(llm: AsyncLLM) -> None:
        with pytest.raises(EngineDeadError, match=r"exit code 1.*on fire.*illegal memory access"):
            await collect(llm, "a")
        assert llm.stats.faults["engine_died"] == 1

    with engine("lost_device") as llm:
        asyncio.run(main(llm))


def test_a_bug_in_the_engine_is_told_with_its_text():
    async def main(llm: AsyncLLM) -> None:
        results = await asyncio.gather(*(collect(llm, str(i)) for i in range(3)), return_exceptions=True)
        for result in results:
            assert isinstance(result, EngineDeadError)
            assert "exit code 1" in str(result) and "RuntimeError: a bug" in str(result)

    with engine("buggy") as llm:
        asyncio.run(main(llm))


@pytest.mark.parametrize(
    ("main", "kind", "text"),
    [
        ("cannot_load", ModelError, "picture of a cat"),
        ("no_memory", ParameterError, r"too much \(parameter=kv_cache_memory_bytes, value=1000000000000000\)"),
        ("missing_library", EngineDeadError, r"exit code 1 while it was loading: ImportError: libcudart"),
        ("exits", EngineDeadError, "exit code 7 while it was loading"),
    ],
)
def test_errors_of_loading_come_back_as_what_they_are(main: str, kind: type[Exception], text: str):
    async def wait(llm: AsyncLLM) -> None:
        for _ in range(2):
            with pytest.raises(kind, match=text):
                await llm.ready()
        assert llm.errored

    with engine(main, max_restarts=3) as llm:
        asyncio.run(wait(llm))


def test_a_process_that_talks_nonsense_is_ended():
    async def main(llm: AsyncLLM) -> None:
        await llm.ready()
        pid = child_pid(llm)
        with pytest.raises(EngineDeadError, match="not a message"):
            await collect(llm, "a")
        assert not alive(pid)

    with engine("bad_frame") as llm:
        asyncio.run(main(llm))


def test_a_process_that_is_told_nonsense_ends_and_says_so():
    async def main(llm: AsyncLLM) -> None:
        await llm.ready()
        assert isinstance(llm._core, ChildCore)
        task = asyncio.create_task(collect(llm, "a", params=LONG))
        await asyncio.sleep(0.05)
        llm._core._channel.send(b"nonsense")
        with pytest.raises(EngineDeadError, match="not a command"):
            await task

    with engine("slow") as llm:
        asyncio.run(main(llm))


def test_signals_of_the_terminal_do_not_end_the_process_before_its_parent():
    async def main(llm: AsyncLLM) -> None:
        tasks = await streams_in_flight(llm)
        assert os.getsid(child_pid(llm)) != os.getsid(0)
        os.kill(child_pid(llm), signal.SIGINT)
        os.kill(child_pid(llm), signal.SIGTERM)
        assert all(outputs[-1].finished for outputs in await asyncio.gather(*tasks))

    with engine("slow") as llm:
        asyncio.run(main(llm))


@pytest.mark.parametrize("main", ["fake", "stuck", "slow_to_load"])
def test_the_process_ends_when_its_parent_is_gone_whatever_it_is_doing(main: str):
    script = f"""
import asyncio, sys
sys.path[:] = {sys.path!r}
from engine_processes import LONG, collect, child_pid, engine

async def forever(llm):
    print(child_pid(llm), flush=True)
    if {main!r} != "slow_to_load":
        await llm.ready()
        print("ready", flush=True)
    await collect(llm, "a", params=LONG.from_optional(max_tokens=100, ignore_eos=True))
    await asyncio.sleep(600)

with engine({main!r}) as llm:
    asyncio.run(forever(llm))
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if main != "slow_to_load":
        assert parent.stdout.readline() == "ready\n"
    time.sleep(0.2)
    assert alive(pid)
    parent.kill()
    parent.wait()
    for _ in range(1000):
        if not alive(pid):
            break
        time.sleep(0.01)
    assert not alive(pid)


def test_two_engines_live_side_by_side():
    async def main(one: AsyncLLM, two: AsyncLLM) -> None:
        first, second = [await streams_in_flight(llm) for llm in (one, two)]
        os.kill(child_pid(one), signal.SIGKILL)
        assert all(outputs[-1].finished for outputs in await asyncio.gather(*second))
        results = await asyncio.gather(*first, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        assert one.errored and not two.errored

    with engine("slow") as one, engine("slow") as two:
        asyncio.run(main(one, two))
