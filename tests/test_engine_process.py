"""An engine in a process of its own: the same streams as on a thread, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from engine_processes import LONG, SHORT, alive, child_pid, collect, engine, quiet
from fake_executor import FakeExecutor, engine_config

from nanovllm import AsyncLLM, RequestOutputKind, SamplingParams
from nanovllm.engine import core_process
from nanovllm.engine.channel import Channel
from nanovllm.engine.core_process import ChannelInbox
from nanovllm.engine.messages import Update
from nanovllm.engine.plan import EngineOutput
from nanovllm.errors import EngineDeadError, ParameterError

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


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
