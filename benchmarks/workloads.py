"""The three CPU workloads, Nano-vLLM's requests, and the model they run on: Qwen3-0.6B's shape, random weights."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}

# To see that the benchmark runs; its figures mean nothing.
TINY = {
    **QWEN3_0_6B,
    "vocab_size": 12_000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

SHAPES = {"qwen3-0.6b": QWEN3_0_6B, "tiny": TINY}


@dataclass(frozen=True)
class Workload:
    """Requests that arrive at once.

    Attributes:
        prompts: token ids.
        output_lens: tokens to generate for each prompt.
        temperature: 0 is greedy.
        counts_prompt: the figure is prompt tokens per second instead of output tokens per second.
    """

    prompts: list[list[int]]
    output_lens: list[int]
    temperature: float
    counts_prompt: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that the figure counts."""
        return sum(map(len, self.prompts)) if self.counts_prompt else sum(self.output_lens)


def workloads(scale: float = 1.0) -> dict[str, Workload]:
    """The workloads by name; ``scale`` below 1 shortens all of them in proportion."""

    def scaled(count: int) -> int:
        return max(1, round(count * scale))

    draw = random.Random(0)
    prompts = [[draw.randint(100, 10_000) for _ in range(draw.randint(64, 256))] for _ in range(32)]
    output_lens = [draw.randint(32, 96) for _ in range(32)]
    long = [(position * 7) % 9000 + 100 for position in range(1024)]
    return {
        "bs1": Workload([prompts[0][: scaled(32)]], [scaled(64)], 0.0),
        "prefill": Workload([long[: scaled(1024)]], [1], 0.0, counts_prompt=True),
        "batch": Workload([p[: scaled(len(p))] for p in prompts], [scaled(n) for n in output_lens], 0.6),
    }


Requests = tuple[list[list[int]], list[int]]  # prompts, output lengths


def nano_requests(count: int, longest: int) -> Requests:
    """Requests of Nano-vLLM's own benchmark: prompts and outputs of 100 .. 1024 tokens, seed 0."""
    draw = random.Random(0)
    shortest = min(100, longest)
    prompts = [[draw.randint(0, 10_000) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]
    return prompts, [draw.randint(shortest, longest) for _ in range(count)]


def parameters(shape: dict[str, Any]) -> tuple[int, int]:
    """Number of weights of the decoder layers, and of the (tied) embedding."""
    hidden, head_dim = shape["hidden_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * shape["intermediate_size"]
    return layer * shape["num_hidden_layers"], shape["vocab_size"] * hidden


def time_workloads(generate: Callable[[Workload], None], works: dict[str, Workload]) -> dict[str, float]:
    """Seconds by workload, after a short one that does not count."""
    generate(Workload(next(iter(works.values())).prompts, [4], 0.0))
    seconds = {}
    for name, work in works.items():
        start = time.perf_counter()
        generate(work)
        seconds[name] = time.perf_counter() - start
    return seconds


def limits(shape: dict[str, Any], scale: float, bandwidth: float, flops: float, bits: float = 16.0) -> dict[str, float]:
    """The most tokens per second that memory and arithmetic allow, by workload.

    ``bs1`` reads every weight once per token. The other two are bound by arithmetic: two operations per weight and
    token (the head only where a token is sampled), four per head dimension and pair of tokens in causal attention.

    Args:
        bandwidth: bytes per second of reading memory.
        flops: operations per second of a bfloat16 matrix product.
        bits: of a weight.
    """
    layers, head = parameters(shape)
    pair = 4 * shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
    result = {}
    for name, work in workloads(scale).items():
        operations = 0
        for prompt, output_len in zip(work.prompts, work.output_lens, strict=True):
            tokens = len(prompt) + output_len - 1  # the last one is never computed
            operations += 2 * layers * tokens + 2 * head * output_len + pair * tokens * (tokens + 1) // 2
        seconds = operations / flops
        if name == "bs1":
            seconds = max(seconds, work.output_lens[0] * bits / 8 * (layers + head) / bandwidth)
        result[name] = work.num_tokens / seconds
    return result
