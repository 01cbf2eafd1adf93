"""Several streams of the engine as one, and the usage they add up to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.outputs import RequestOutput

Streams = Sequence[AsyncGenerator[RequestOutput, None]]


async def merged(streams: Streams) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """(number of the stream, output) of streams that run together. Leaving early, or a failing stream, ends all."""
    queue: asyncio.Queue[tuple[int, RequestOutput] | BaseException | None] = asyncio.Queue()
    # A stream has one item in the queue: what a slow reader has not taken stays with the engine, which joins it.
    taken = [asyncio.Semaphore(0) for _ in streams]

    async def pump(index: int) -> None:
        try:
            async for output in streams[index]:
                queue.put_nowait((index, output))
                await taken[index].acquire()
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)
        finally:
            await streams[index].aclose()

    tasks = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
                taken[item[0]].release()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def final_outputs(streams: Streams) -> list[RequestOutput]:
    """The last output of each stream."""
    if len(streams) == 1:
        async for output in streams[0]:
            final = output
        return [final]
    finals: dict[int, RequestOutput] = {}
    source = merged(streams)
    try:
        async for index, output in source:
            finals[index] = output
    finally:
        await source.aclose()
    return [finals[index] for index in range(len(streams))]


@dataclass
class Usage:
    """Tokens of one answer.

    Attributes:
        prompt: of all prompts.
        completion: generated, over all choices.
        cached: of the prompts, those whose computation the prefix cache saved.
        reasoning: of the generated ones, those before the answer; None without a reasoning parser.
        with_details: name the cached ones.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int | None = None
    with_details: bool = False

    def add_prompt(self, output: RequestOutput) -> None:
        """Count the prompt of an output, once per request."""
        self.prompt += len(output.prompt_token_ids)
        self.cached += output.num_cached_tokens or 0

    def as_json(self) -> dict[str, Any]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached} if self.with_details else None,
            "completion_tokens_details": None if self.reasoning is None else {"reasoning_tokens": self.reasoning},
        }
