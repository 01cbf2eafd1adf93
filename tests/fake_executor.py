"""An executor without a model: its tokens are a function of position, so runs can be compared."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from nanovllm.engine.plan import StepPlan, StepResult
from nanovllm.engine.request import Request
from nanovllm.sampling_params import SamplingParams


@dataclass
class FakeHandle:
    plan: StepPlan
    executor: FakeExecutor

    def result(self) -> StepResult:
        plan, tables = self.plan, self.executor.lengths
        time.sleep(self.executor.seconds)
        tokens = []
        for index in plan.sampled:
            position = plan.num_computed[index] + plan.num_new[index]
            tokens.append(self.executor.token(tables[plan.step][index], position))
        if plan.step in self.executor.failing_steps or self._poisoned():
            raise RuntimeError("the device is on fire")
        ends = [plan.num_computed[index] + plan.num_new[index] for index in plan.pooled]
        vectors = [np.array([tables[plan.step][index], end]) for index, end in zip(plan.pooled, ends, strict=True)]
        return StepResult(tokens, pooled=vectors)

    def _poisoned(self) -> bool:
        """Whether the step computes, for one of the poisoned, the position from which on that fails."""
        plan, poison = self.plan, self.executor.poison
        seeds = self.executor.lengths[plan.step] if poison else ()
        ends = zip(seeds, plan.num_computed, plan.num_new, strict=True) if poison else ()
        return any(seed in poison and start + new > poison[seed] for seed, start, new in ends)


@dataclass
class FakeExecutor:
    """Samples ``token(seed of the request, position)``; a vector is the seed and the length of the prompt.

    Remembers every plan.
    """

    num_blocks: int = 64
    grammars: None = None
    vocab_size: int = 97
    failing_steps: frozenset[int] = frozenset()
    poison: dict[int, int] = field(default_factory=dict)  # seed -> position at which every step with it fails
    seconds: float = 0.0  # that a step takes
    plans: list[StepPlan] = field(default_factory=list)
    seeds: dict[int, int] = field(default_factory=dict)  # row -> seed
    lengths: dict[int, list[int]] = field(default_factory=dict)  # step -> seed of every row

    def token(self, seed: int, position: int) -> int:
        return (seed * 31 + position * 7) % self.vocab_size + 3

    def submit(self, plan: StepPlan) -> FakeHandle:
        self.plans.append(plan)
        for start in plan.starts:
            self.seeds[start.row] = start.seed
        self.lengths[plan.step] = [self.seeds[row] for row in plan.rows]
        return FakeHandle(plan, self)

    def recover(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def engine_config(
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    block_size: int = 4,
    max_model_len: int = 128,
    chunked: bool = True,
    policy: str = "fcfs",
    threshold: int = 0,
    in_flight: int = 1,
    prefix_caching: bool = True,
) -> EngineConfig:
    """A configuration for `EngineCore` that needs no model folder."""
    scheduler = SchedulerConfig(max_num_seqs, max_num_batched_tokens, chunked, policy, threshold, in_flight)
    cache = CacheConfig(block_size, None, None, 0.9, prefix_caching, "auto")
    model = ModelConfig(
        model="fake",
        path=Path("fake"),
        hf_config={},
        architecture="Fake",
        dtype="float32",
        max_model_len=max_model_len,
        vocab_size=100,
        load_format="dummy",
        quantization=None,
        seed=0,
        tokenizer=None,
        tokenizer_mode="auto",
        skip_tokenizer_init=True,
        trust_remote_code=False,
        chat_template=None,
        eos_token_ids=(),
        generation_defaults={},
        max_logprobs=20,
        logprobs_mode="raw_logprobs",
    )
    return EngineConfig(model, cache, scheduler, "cpu", None, 0, True, 1)


def make_request(
    request_id: str,
    prompt: list[int],
    max_tokens: int = 8,
    *,
    seed: int = 0,
    max_model_len: int = 128,
    **options: object,
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id, prompt, params, max_model_len=max_model_len, seed=seed, **options)  # type: ignore[arg-type]
