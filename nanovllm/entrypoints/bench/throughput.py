"""Offline throughput: how long many requests take that are all there at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanovllm.entrypoints.bench.datasets import SampleRequest
from nanovllm.errors import ParameterError
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.async_llm import AsyncLLM
    from nanovllm.entrypoints.llm import LLM


@dataclass(frozen=True, slots=True)
class ThroughputResult:
    """What was measured.

    Attributes:
        elapsed_time: seconds.
        num_requests: requests; each may have had several outputs.
        num_prompt_tokens: tokens of all prompts.
        num_output_tokens: tokens of all outputs.
    """

    elapsed_time: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens

    def __str__(self) -> str:
        """vLLM's three lines."""
        return (
            f"Throughput: {self.num_requests / self.elapsed_time:.2f} requests/s, "
            f"{self.num_tokens / self.elapsed_time:.2f} total tokens/s, "
            f"{self.num_output_tokens / self.elapsed_time:.2f} output tokens/s\n"
            f"Total num prompt tokens:  {self.num_prompt_tokens}\n"
            f"Total num output tokens:  {self.num_output_tokens}"
        )

    def to_json(self, model_id: str) -> dict[str, Any]:
        """vLLM's keys."""
        return {
            "model_id": model_id,
            "elapsed_time": self.elapsed_time,
            "num_requests": self.num_requests,
            "total_num_tokens": self.num_tokens,
            "requests_per_second": self.num_requests / self.elapsed_time,
            "tokens_per_second": self.num_tokens / self.elapsed_time,
        }


def measure_throughput(
    llm: LLM,
    requests: Sequence[SampleRequest],
    *,
    n: int = 1,
    detokenize: bool = True,
    num_warmups: int = 0,
    use_tqdm: bool = True,
) -> ThroughputResult:
    """Run all requests as one batch.

    Args:
        n: outputs per request.
        detokenize: make text of the outputs.
        num_warmups: so many of the requests are run before, and not counted; the prefix cache then forgets them.

    Raises:
        ParameterError: a request does not fit the context, or a parameter is out of range.
    """
    check_lengths(requests, llm.llm_engine.model_config.max_model_len)
    prompts = [request.prompt for request in requests]
    params = _params(requests, n, detokenize)
    if num_warmups:
        llm.generate(prompts[:num_warmups], params[:num_warmups], use_tqdm=False)
        llm.reset_prefix_cache()
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=use_tqdm)
    elapsed_time = time.perf_counter() - start
    return ThroughputResult(
        elapsed_time,
        len(outputs),
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(len(completion.token_ids) for output in outputs for completion in output.outputs),
    )


async def measure_async_throughput(
    llm: AsyncLLM,
    requests: Sequence[SampleRequest],
    *,
    n: int = 1,
    detokenize: bool = True,
    num_warmups: int = 0,
    use_tqdm: bool = True,
) -> ThroughputResult:
    """The same, every request a stream of its own."""
    from tqdm import tqdm

    check_lengths(requests, llm.model_config.max_model_len)
    params = _params(requests, n, detokenize)

    async def run(name: str, indices: range, show: bool) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of the requests with these indices."""
        with tqdm(total=len(indices), desc="Processed prompts", dynamic_ncols=True, disable=not show) as bar:

            async def one(index: int) -> tuple[int, int]:
                streaming = params[index].clone()
                streaming.output_kind = RequestOutputKind.DELTA
                num_prompt_tokens = num_output_tokens = 0
                async for output in llm.generate(requests[index].prompt, streaming, f"{name}-{index}"):
                    num_prompt_tokens = len(output.prompt_token_ids)
                    num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
                bar.update()
                return num_prompt_tokens, num_output_tokens

            return await asyncio.gather(*map(one, indices))

    if num_warmups:
        await run("warmup", range(min(num_warmups, len(requests))), False)
        await llm.reset_prefix_cache()
    start = time.perf_counter()
    counts = await run("request", range(len(requests)), use_tqdm)
    elapsed_time = time.perf_counter() - start
    return ThroughputResult(elapsed_time, len(counts), sum(p for p, _ in counts), sum(o for _, o in counts))


def check_lengths(requests: Sequence[SampleRequest], max_model_len: int) -> None:
    """Refuse requests that would be cut short: their figures would mean nothing.

    Raises:
        ParameterError: prompt and output of a request do not fit the context.
    """
    longest = max(request.prompt_len + request.expected_output_len for request in requests)
    if longest > max_model_len:
        raise ParameterError(
            f"the longest request needs {longest} tokens for prompt and output; give it a longer context, or ask for "
            "less with --input-len and --output-len",
            "max_model_len",
            max_model_len,
        )


def _params(requests: Sequence[SampleRequest], n: int, detokenize: bool) -> list[SamplingParams]:
    return [
        SamplingParams(
            n=n, temperature=1.0, ignore_eos=True, max_tokens=request.expected_output_len, detokenize=detokenize
        )
        for request in requests
    ]
