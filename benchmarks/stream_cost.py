"""What streaming costs: tokens per second of one engine, read as a whole, over a thread and over a process.

The same requests run through `LLM` (nobody reads before the end), through an `AsyncLLM` on a thread, and through one in
a process of its own, each request a stream of deltas with text; the three take turns. The front's CPU time is that of
the process that tokenises, detokenises and streams.

    python benchmarks/stream_cost.py
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from report import RESULTS, print_table, write_results

from nanovllm import LLM, AsyncLLM, EngineArgs, RequestOutputKind, SamplingParams

PROMPT_LEN = 64


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    return [[(number * 7919 + position * 31) % vocab_size for position in range(PROMPT_LEN)] for number in range(count)]


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def whole(llm: LLM, streams: int, max_tokens: int) -> dict[str, float]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    texts = prompts(streams, llm.llm_engine.model_config.vocab_size)
    llm.reset_prefix_cache()
    start = time.perf_counter()
    llm.generate(texts, params, use_tqdm=False)
    return {"tokens_per_s": streams * max_tokens / (time.perf_counter() - start)}


async def streamed(llm: AsyncLLM, streams: int, max_tokens: int) -> dict[str, float]:
    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    texts = prompts(streams, llm.model_config.vocab_size)

    async def one(number: int) -> int:
        return len([output async for output in llm.generate(texts[number], params, str(number))])

    while not await llm.reset_prefix_cache():
        await asyncio.sleep(0.01)
    start, used = time.perf_counter(), cpu_seconds()
    counts = await asyncio.gather(*map(one, range(streams)))
    seconds, used = time.perf_counter() - start, cpu_seconds() - used
    tokens = streams * max_tokens
    return {
        "tokens_per_s": tokens / seconds,
        "front_us_per_token": used / tokens * 1e6,
        "tokens_per_output": tokens / sum(counts),
    }


def measure(args: EngineArgs, streams: int, max_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """The ways take turns, so that whatever else the machine does meets them all; each one's best round counts."""
    best: dict[str, dict[str, Any]] = {}
    thread, process = AsyncLLM.from_engine_args(args), AsyncLLM.launch(args)
    loop = asyncio.new_event_loop()
    with LLM(**vars(args)) as llm, closing(loop):
        ways = {
            "LLM": lambda: whole(llm, streams, max_tokens),
            "thread": lambda: loop.run_until_complete(streamed(thread, streams, max_tokens)),
            "process": lambda: loop.run_until_complete(streamed(process, streams, max_tokens)),
        }
        for _ in range(rounds):
            for way, run in ways.items():
                result = run()
                if way not in best or result["tokens_per_s"] > best[way]["tokens_per_s"]:
                    best[way] = result
        thread.shutdown()
        process.shutdown()
    best["thread"].pop("front_us_per_token")  # the engine's is in it
    rows: list[dict[str, Any]] = [{"way": way, "streams": streams, **result} for way, result in best.items()]
    for row in rows:
        row["of_LLM"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="the best counts")
    parser.add_argument("--output", type=Path, default=RESULTS / "stream_cost.json")
    options = parser.parse_args()

    args = EngineArgs(model=options.model, disable_log_stats=True, kv_cache_memory_bytes=256 << 20)
    rows = [row for streams in options.streams for row in measure(args, streams, options.max_tokens, options.rounds)]
    columns = ["way", "streams", "tokens_per_s", "of_LLM", "front_us_per_token", "tokens_per_output"]
    print_table(columns, [[row.get(column) for column in columns] for row in rows])
    write_results(options.output, rows=rows)


if __name__ == "__main__":
    logging.getLogger("nanovllm").setLevel(logging.ERROR)
    main()
