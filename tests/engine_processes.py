"""Engines in processes of their own, for tests: what they run is in `child_mains`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fake_executor import engine_config

from nanovllm import AsyncLLM, RequestOutputKind, SamplingParams
from nanovllm.engine.child_core import ChildCore
from nanovllm.engine.spawn import spawn

LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
SHORT = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@contextmanager
def engine(main: str = "fake", max_restarts: int = 0, **options: Any) -> Iterator[AsyncLLM]:
    """An engine whose process runs a function of `child_mains`."""
    config = engine_config(**options)
    made = AsyncLLM(config, process=spawn(config, f"child_mains:{main}"), max_restarts=max_restarts)
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


def alive(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and was not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def streams_in_flight(llm: AsyncLLM, count: int = 4) -> list[asyncio.Task[list[Any]]]:
    await llm.ready()
    tasks = [asyncio.create_task(collect(llm, f"flight {i}", params=LONG)) for i in range(count)]
    while llm.stats.num_running < count:
        await asyncio.sleep(0.001)
        assert not any(task.done() for task in tasks)
    return tasks
