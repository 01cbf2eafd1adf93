"""What a viewer of the inspector costs: tokens per second of one engine, watched and unwatched in turn.

python benchmarks/inspector_cost.py [--model demo] [--rounds 40] [--requests 32] [--tokens 128]

Rounds alternate, so that what else the machine does meets both alike; the result is the median of the ratios of
neighbouring rounds. The viewer takes all frames and throws them away.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

from nanovllm import AsyncLLM, EngineArgs, RequestOutputKind, SamplingParams


async def one_round(llm: AsyncLLM, number: int, requests: int, tokens: int) -> float:
    """Tokens per second."""
    params = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )

    async def ask(index: int) -> None:
        prompt = [3 + (number * 131 + index * 17 + place * 7) % 200 for place in range(64)]
        async for _ in llm.generate(prompt, params, f"{number}-{index}"):
            pass

    start = time.perf_counter()
    await asyncio.gather(*(ask(index) for index in range(requests)))
    return requests * tokens / (time.perf_counter() - start)


async def watch(llm: AsyncLLM, seen: list[int]) -> None:
    async for frame in llm.viewers.frames():
        seen.append(len(frame))


async def measure(arguments: argparse.Namespace) -> None:
    llm = AsyncLLM.launch(EngineArgs.from_kwargs(model=arguments.model, max_num_seqs=arguments.requests))
    try:
        await llm.ready()
        await one_round(llm, 0, arguments.requests, arguments.tokens)
        ratios, plain, seen = [], [], []
        for number in range(1, arguments.rounds + 1):
            without = await one_round(llm, 2 * number, arguments.requests, arguments.tokens)
            viewer = asyncio.create_task(watch(llm, seen))
            await asyncio.sleep(0.05)
            with_viewer = await one_round(llm, 2 * number + 1, arguments.requests, arguments.tokens)
            viewer.cancel()
            await asyncio.gather(viewer, return_exceptions=True)
            ratios.append(with_viewer / without)
            plain.append(without)
        print(f"{statistics.median(plain):.0f} tokens/s unwatched; watched {statistics.median(ratios):.4f} times that")
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"half of the ratios of {arguments.rounds} pairs of rounds lie between {low:.3f} and {high:.3f}")
        print(f"{len(seen)} frames of {statistics.mean(seen):.0f} bytes in {llm.stats.steps} steps")
    finally:
        llm.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
