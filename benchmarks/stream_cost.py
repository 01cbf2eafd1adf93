"""What streaming costs: tokens per second of one engine, read as a whole, over a thread and over a process.

The same requests run three times: through `LLM` (nobody reads before the end), through an `AsyncLLM` on a thread, and
through one in a process of its own, each request a stream of deltas with text. The front's CPU time is that of the
process that tokenises, detokenises and streams.

    python benchmarks/stream_cost.py
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import time
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


def whole(args: EngineArgs, streams: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    seconds = []
    with LLM(**vars(args)) as llm:
        texts = prompts(streams, llm.llm_engine.model_config.vocab_size)
        for _ in range(rounds + 1):
            llm.reset_prefix_cache()
            start = time.perf_counter()
            llm.generate(texts, params, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
    return {"way": "LLM", "streams": streams, "tokens_per_s": streams * max_tokens / min(seconds[1:])}


async def streamed(llm: AsyncLLM, way: str, streams: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    await llm.ready()
    texts = prompts(streams, llm.model_config.vocab_size)
    results = []

    async def one(number: int) -> int:
        return len([output async for output in llm.generate(texts[number], params, str(number))])

    for _ in range(rounds + 1):
        while not await llm.reset_prefix_cache():
            await asyncio.sleep(0.01)
        start, used = time.perf_counter(), cpu_seconds()
        counts = await asyncio.gather(*map(one, range(streams)))
        seconds, used = time.perf_counter() - start, cpu_seconds() - used
        results.append((seconds, used, sum(counts)))
    seconds, used, outputs = min(results[1:])
    tokens = streams * max_tokens
    return {
        "way": way,
        "streams": streams,
        "tokens_per_s": tokens / seconds,
        "front_us_per_token": used / tokens * 1e6 if way == "process" else None,
        "tokens_per_output": tokens / outputs,
    }


def measure(args: EngineArgs, streams: int, max_tokens: int, rounds: int) -> list[dict[str, Any]]:
    rows = [whole(args, streams, max_tokens, rounds)]
    for way, make in (("thread", AsyncLLM.from_engine_args), ("process", AsyncLLM.launch)):
        llm = make(args)
        try:
            rows.append(asyncio.run(streamed(llm, way, streams, max_tokens, rounds)))
        finally:
            llm.shutdown()
    for row in rows:
        row["of_LLM"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="the best counts")
    parser.add_argument("--output", type=Path, default=RESULTS / "stream_cost.json")
    options = parser.parse_args()

    args = EngineArgs(model=options.model, disable_log_stats=True, kv_cache_memory_bytes=512 << 20)
    rows = [row for streams in options.streams for row in measure(args, streams, options.max_tokens, options.rounds)]
    columns = ["way", "streams", "tokens_per_s", "of_LLM", "front_us_per_token", "tokens_per_output"]
    print_table(columns, [[row.get(column) for column in columns] for row in rows])
    write_results(options.output, rows=rows)


if __name__ == "__main__":
    logging.getLogger("nanovllm").setLevel(logging.ERROR)
    main()
