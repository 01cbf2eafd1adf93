"""Several streams at once in one asyncio program; leaving a stream early aborts its request."""

import asyncio

from nanovllm import AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams

PARAMS = SamplingParams(max_tokens=60, temperature=0.0, output_kind=RequestOutputKind.DELTA)


async def ask(llm: AsyncLLM, name: str, prompt: str, most_tokens: int) -> None:
    """Print a stream's pieces as they come; lose interest after ``most_tokens``."""
    tokens = 0
    async for output in llm.generate(prompt, PARAMS, request_id=name):
        tokens += len(output.token_ids)
        print(f"{name}: {output.text!r}")
        if tokens >= most_tokens:
            print(f"{name}: that is enough")
            break


async def main() -> None:
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model="demo"))
    try:
        await asyncio.gather(
            ask(llm, "first", "What is paged attention?", most_tokens=1000),
            ask(llm, "second", "What is a scheduler?", most_tokens=8),
        )
    finally:
        llm.shutdown()


asyncio.run(main())
