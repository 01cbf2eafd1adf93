"""An engine in a process of its own: the same streams as on a thread, whatever ends is told, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fake_executor import FakeExecutor, engine_config

from nanovllm import AsyncLLM, RequestOutputKind, SamplingParams
from nanovllm.engine import core_process
from nanovllm.engine.channel import Channel
from nanovllm.engine.child_core import ChildCore
from nanovllm.engine.core_process import ChannelInbox
from nanovllm.engine.messages import Update
from nanovllm.engine.plan import EngineOutput
from nanovllm.entrypoints.serve.metrics import MetricsObserver
from nanovllm.errors import EngineDeadError, EngineGenerateError, ModelError, ParameterError

LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
SHORT = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@contextmanager
def engine(main: str = "fake", max_restarts: int = 0, **options: Any) -> Iterator[AsyncLLM]:
    """An engine whose process runs a function of `child_mains`."""
    config = engine_config(**options)
    made = AsyncLLM(config, process=ChildCore(config, f"child_mains:{main}"), max_restarts=max_restarts)
    try:
        yield made
    finally:
        made.shutdown()


async def collect(llm: AsyncLLM, request_id: str, prompt: Any = (1, 2, 3), params: SamplingParams = SHORT) -> list[Any]:
    return [output async for output in llm.generate(list(prompt), params, request_id)]


async def quiet(llm: AsyncLLM) -> None:
    """Wait until nothing is under way; the child checks its invariants by itself."""
    for _ in range(500):
        if llm.stats.num_running == llm.stats.num_waiting == 0:
            break
        await asyncio.sleep(0.01)
    await llm.check_health()
    assert llm.output.num_requests == 0 and not llm._streams
    assert not llm.stats._times


def child_pid(llm: AsyncLLM) -> int:
    assert isinstance(llm._core, ChildCore)
    return llm._core.pid


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def alive(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and was not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# -- it works as on a thread -----------------------------------------------------------------------------------------


def test_a_process_gives_what_a_thread_gives():
    async def ask(llm: AsyncLLM) -> list[list[int]]:
        two = SamplingParams(n=2, temperature=1.0, max_tokens=8, ignore_eos=True)
        jobs = [collect(llm, str(i), [i + 1] * (i + 1), two if i % 3 == 0 else SHORT) for i in range(20)]
        results = [await job for job in jobs]
        results += await asyncio.gather(*(collect(llm, f"together {i}") for i in range(20)))
        return [completion.token_ids for outputs in results for completion in outputs[-1].outputs]

    on_a_thread = AsyncLLM(engine_config(), FakeExecutor(num_blocks=200))
    expected = asyncio.run(ask(on_a_thread))
    on_a_thread.shutdown()
    with engine() as llm:
        assert asyncio.run(ask(llm)) == expected


def test_one_engine_serves_one_event_loop_after_the_other():
    with engine() as llm:
        for number in range(3):
            assert asyncio.run(collect(llm, str(number)))[-1].finished


def test_leaving_and_cancelling_abort_in_the_process_too():
    async def main(llm: AsyncLLM) -> None:
        async for _ in llm.generate([1, 2, 3], LONG, "left"):
            break
        tasks = [asyncio.create_task(collect(llm, str(i), params=LONG)) for i in range(30)]  # 8 run, 22 wait
        while not llm.stats.num_waiting:
            await asyncio.sleep(0.001)
            assert not all(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await quiet(llm)
        assert (await collect(llm, "after"))[-1].finished

    with engine() as llm:
        asyncio.run(main(llm))


def test_what_the_scheduler_refuses_is_told_by_name():
    async def main(llm: AsyncLLM) -> None:
        with pytest.raises(ParameterError, match="scheduling_policy") as refused:
            async for _ in llm.generate([1], SHORT, "a", priority=3):
                pass
        assert (refused.value.parameter, refused.value.value) == ("priority", 3)
        await quiet(llm)

    with engine() as llm:
        asyncio.run(main(llm))


def test_the_context_is_shortened_to_what_the_cache_of_the_process_holds():
    async def main(llm: AsyncLLM) -> None:
        assert llm.config.model.max_model_len == 128
        await llm.ready()
        assert llm.config.model.max_model_len == llm.input.max_model_len == 8 * 4
        assert llm.num_blocks == 9
        with pytest.raises(ParameterError, match="maximum context length is 32"):
            await collect(llm, "long", [1] * 40)

    with engine("small_cache") as llm:
        asyncio.run(main(llm))


def test_the_prefix_cache_is_reset_in_the_process():
    async def main(llm: AsyncLLM) -> None:
        cached = []
        for number in range(3):
            cached.append((await collect(llm, str(number), [1] * 20))[-1].num_cached_tokens)
            if number == 1:
                assert await llm.reset_prefix_cache()
        assert cached == [0, 16, 0]

    with engine() as llm:
        asyncio.run(main(llm))


def test_a_real_model_gives_the_same_text_and_the_front_has_no_torch(tmp_path: Path):
    from tiny_models import make_checkpoint
    from tiny_tokenizers import qwen

    from nanovllm import LLM

    make_checkpoint(tmp_path, "qwen3", vocab_size=337, eos_token_id=332)
    qwen(tmp_path)
    settings = {"model": str(tmp_path), "num_gpu_blocks_override": 64, "block_size": 8}
    params = SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=12, logprobs=2, prompt_logprobs=1)
    with LLM(**settings) as llm:
        (expected,) = llm.generate("hello world", params, use_tqdm=False)
        (vector,) = llm.encode("hello world", pooling_task="embed", use_tqdm=False)
    script = f"""
import asyncio, sys
from nanovllm import AsyncEngineArgs, AsyncLLM, SamplingParams

async def main():
    llm = AsyncLLM.launch(AsyncEngineArgs(**{settings!r}))
    params = SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=12, logprobs=2, prompt_logprobs=1)
    outputs = [output async for output in llm.generate("hello world", params, "a")]
    (vector,) = [output async for output in llm.encode("hello world", None, "b")]
    llm.shutdown()
    print((outputs[-1].outputs, outputs[-1].prompt_logprobs, vector.outputs.data.tolist()))

asyncio.run(main())
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == repr(
        (expected.outputs, expected.prompt_logprobs, vector.outputs.data.tolist())
    )


# -- slow readers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_who_reads_slowly_gets_fewer_outputs_with_more_in_each(kind: RequestOutputKind):
    params = SamplingParams(
        n=2, temperature=1.0, seed=3, max_tokens=100, ignore_eos=True, output_kind=kind, stream_interval=1
    )

    async def main(llm: AsyncLLM) -> None:
        whole = await collect(llm, "whole", params=params.from_optional(n=2, seed=3, max_tokens=100, ignore_eos=True))
        expected = [completion.token_ids for completion in whole[-1].outputs]
        outputs = []
        async for output in llm.generate([1, 2, 3], params, "slow"):
            outputs.append(output)
            await asyncio.sleep(0.05)
        assert len(outputs) < 50
        found: list[list[int]] = [[], []]
        for output in outputs:
            for completion in output.outputs:
                found[completion.index] = (
                    found[completion.index] + completion.token_ids
                    if kind is RequestOutputKind.DELTA
                    else completion.token_ids
                )
        assert found == expected and outputs[-1].finished
        await quiet(llm)

    with engine() as llm:
        asyncio.run(main(llm))


def test_an_event_loop_that_is_held_up_does_not_hold_up_the_engine():
    async def main(llm: AsyncLLM) -> None:
        params = LONG.clone()
        params.max_tokens = 50
        stream = llm.generate([1, 2, 3], params, "a")
        await anext(stream)
        time.sleep(1.5)  # a step takes 2 ms: by now all are done
        resumed = time.monotonic()
        outputs = [output async for output in stream]
        assert outputs[-1].metrics.last_token_ts < resumed
        assert sum(len(output.token_ids) for output in outputs) < 50

    with engine() as llm:
        asyncio.run(main(llm))


# -- what goes wrong -------------------------------------------------------------------------------------------------


async def streams_in_flight(llm: AsyncLLM, count: int = 4) -> list[asyncio.Task[list[Any]]]:
    await llm.ready()
    tasks = [asyncio.create_task(collect(llm, f"flight {i}", params=LONG)) for i in range(count)]
    while llm.stats.num_running < count:
        await asyncio.sleep(0.001)
        assert not any(task.done() for task in tasks)
    return tasks


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


def test_a_failed_step_ends_its_requests_only():
    async def main(llm: AsyncLLM) -> None:
        with pytest.raises(EngineGenerateError, match="on fire"):
            await collect(llm, "a")
        assert (await collect(llm, "b"))[-1].finished
        await quiet(llm)

    with engine("failing_step") as llm:
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
from test_engine_process import LONG, collect, child_pid, engine

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


# -- the end ---------------------------------------------------------------------------------------------------------


def open_files() -> list[str]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
    return sorted(name for name in found if not name.startswith(("/proc", "/dev/null")))


def test_shutdown_leaves_no_process_no_thread_and_no_file_behind():
    async def main(llm: AsyncLLM, where: str) -> None:
        await llm.ready()
        task = asyncio.create_task(collect(llm, "a", params=LONG))
        await asyncio.sleep(0.05)
        if where == "here":
            llm.shutdown()
        else:
            await asyncio.to_thread(llm.shutdown)
        with pytest.raises(EngineDeadError, match="shut down"):
            await task

    asyncio.run(asyncio.sleep(0))
    files, threads = open_files(), threading.active_count()
    for where in ("here", "in a thread", "here"):
        with engine("slow") as llm:
            pid = child_pid(llm)
            asyncio.run(main(llm, where))
            assert not alive(pid)
            llm.shutdown()
    for _ in range(2):  # before it was ever used
        with engine("slow") as llm:
            pid = child_pid(llm)
        assert not alive(pid)
    assert open_files() == files and threading.active_count() == threads


def test_a_process_that_does_not_end_is_killed_at_shutdown():
    async def main(llm: AsyncLLM) -> None:
        task = asyncio.create_task(collect(llm, "a"))
        await asyncio.sleep(0.5)
        pid = child_pid(llm)
        llm.shutdown()
        assert not alive(pid)
        with pytest.raises(EngineDeadError):
            await task

    with engine("stuck") as llm:
        asyncio.run(main(llm))


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


def test_an_idle_engine_uses_no_cpu_in_either_process():
    async def main(llm: AsyncLLM) -> None:
        await collect(llm, "a")
        await quiet(llm)
        here, there = time.process_time(), cpu_seconds(child_pid(llm))
        await asyncio.sleep(1.0)
        assert time.process_time() - here < 0.02
        assert cpu_seconds(child_pid(llm)) - there < 0.02

    with engine() as llm:
        asyncio.run(main(llm))


def test_an_engine_waits_for_a_front_that_leaves_too_much_unread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(core_process, "MOST_BACKLOG", 100_000)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inbox, peer = ChannelInbox(Channel(ours)), Channel(theirs)
        update = Update([EngineOutput("x" * 50_000, [1])])
        sent = 0
        while inbox._channel.backlog <= 100_000:
            assert inbox.take(wait=False) == []  # it need not wait yet
            inbox.deliver(update)
            sent += 1
        taken: list[object] = []
        waiting = threading.Thread(target=lambda: taken.append(inbox.take(wait=False)))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        received = 0
        while waiting.is_alive():
            received += len(peer.receive())
        waiting.join()
        assert taken == [[]]
        while received < sent:
            inbox.take(wait=False)
            received += len(peer.receive())
