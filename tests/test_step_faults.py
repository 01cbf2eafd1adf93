"""Steps that raise: their requests are computed again, whoever makes them raise ends alone, and the rest goes on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_executor import FakeExecutor, FakeHandle, engine_config, make_request
from tiny_models import make_checkpoint
from tiny_tokenizers import qwen

from nanovllm import LLM, SamplingParams
from nanovllm.engine.core import EngineCore
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.plan import StepPlan
from nanovllm.engine.suspects import RETRIES
from nanovllm.errors import EngineDeadError, StepError
from nanovllm.sampling_params import StructuredOutputsParams


class Faulty(FakeExecutor):
    """Its steps raise what ``fault`` returns for them."""

    fault: Callable[[StepPlan], Exception | None] = staticmethod(lambda plan: None)
    num_faults = 0
    num_recoveries = 0

    def submit(self, plan: StepPlan) -> Any:
        handle, error = super().submit(plan), self.fault(plan)
        if error is None:
            return handle
        self.num_faults += 1
        return Failed(plan, self, error)

    def recover(self) -> None:
        self.num_recoveries += 1


class Failed(FakeHandle):
    def __init__(self, plan: StepPlan, executor: Faulty, error: Exception) -> None:
        super().__init__(plan, executor)
        self.error = error

    def result(self) -> Any:
        raise self.error


def make_core(executor: Faulty, **options: Any) -> EngineCore:
    core = EngineCore(engine_config(**options), executor)
    core.checker = InvariantChecker(core.scheduler)
    return core


def run(core: EngineCore) -> tuple[dict[str, list[int]], dict[str, str | None], list[StepError]]:
    """Step until all is done: tokens and ends by request, and what `step` raised."""
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str | None] = {}
    errors = []
    while core.has_work:
        try:
            for output in core.step():
                assert output.request_id not in ends
                tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                if output.finish_reason is not None:
                    ends[output.request_id] = output.finish_reason
        except StepError as error:
            errors.append(error)
    assert core.checker is not None
    core.checker.idle()
    return tokens, ends, errors


def expected(executor: FakeExecutor, seed: int, prompt: int, count: int) -> list[int]:
    return [executor.token(seed, position) for position in range(prompt, prompt + count)]


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("failing", [(0,), (2,), (5,), (2, 3), (1, 2, 3)])
def test_a_fault_that_passes_costs_nothing_but_time(
    in_flight: int, failing: tuple[int, ...], caplog: pytest.LogCaptureFixture
):
    executor = Faulty()
    executor.fault = lambda plan: RuntimeError("on fire") if plan.step in failing else None
    core = make_core(executor, in_flight=in_flight, max_num_batched_tokens=16)
    for seed in range(4):
        core.add(make_request(str(seed), [seed + 1] * (3 + 4 * seed), 9, seed=seed))
    with caplog.at_level(logging.WARNING):
        tokens, ends, errors = run(core)
    assert not errors and set(ends.values()) == {"length"}
    assert tokens == {str(seed): expected(executor, seed, 3 + 4 * seed, 9) for seed in range(4)}
    assert executor.num_recoveries and core.scheduler.num_retries
    assert sum("computed again" in record.message for record in caplog.records) == 1
    stats = core.meter.take()
    assert stats.faults == ["step_failed"] * executor.num_recoveries and stats.num_retries == core.scheduler.num_retries


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_who_makes_every_step_fail_ends_alone(in_flight: int, count: int):
    executor = Faulty(num_blocks=400)
    guilty = count // 2
    executor.poison = {guilty: 12}  # the third token and all after it
    core = make_core(executor, in_flight=in_flight, max_num_seqs=32)
    for seed in range(count):
        core.add(make_request(str(seed), [seed + 1] * 10, 20, seed=seed))
    tokens, ends, errors = run(core)
    assert ends == {str(seed): "error" if seed == guilty else "length" for seed in range(count)}
    for seed in range(count):
        assert tokens[str(seed)] == expected(executor, seed, 10, 3 if seed == guilty else 20)
    (error,) = errors
    assert isinstance(error.__cause__, RuntimeError) and "on fire" in str(error)
    # Halves until it is alone, and then as often as it is retried at most.
    assert executor.num_recoveries == max(RETRIES + 1, (count - 1).bit_length() + 1)


def test_others_run_with_newcomers_once_the_guilty_is_found():
    executor = Faulty()
    executor.poison = {0: 0, 1: 0}
    core = make_core(executor, max_num_seqs=4)
    for seed in range(12):
        core.add(make_request(str(seed), [seed + 1] * 6, 5, seed=seed))
    tokens, ends, _ = run(core)
    assert Counter(ends.values()) == {"error": 2, "length": 10} and ends["0"] == ends["1"] == "error"
    assert all(tokens[str(seed)] == expected(executor, seed, 6, 5) for seed in range(2, 12))


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_long_prompt_that_gets_on_survives_any_number_of_faults(in_flight: int):
    executor = Faulty(num_blocks=100)
    executor.fault = lambda plan: RuntimeError("on fire") if plan.step % 4 == 3 else None
    core = make_core(executor, in_flight=in_flight, max_num_batched_tokens=6)
    core.add(make_request("0", [7] * 120, 3, seed=1))
    tokens, ends, errors = run(core)
    assert not errors and ends == {"0": "length"} and tokens == {"0": expected(executor, 1, 120, 3)}
    assert executor.num_faults > RETRIES + 1


@pytest.mark.parametrize("chunk", [1, 3, 6, 17, 64])
def test_a_long_prompt_that_always_fails_at_the_same_place_ends_soon(chunk: int):
    executor = Faulty(num_blocks=100)
    executor.poison = {1: 77}
    core = make_core(executor, max_num_batched_tokens=chunk)
    core.add(make_request("0", [7] * 120, 3, seed=1))
    _, ends, errors = run(core)
    assert ends == {"0": "error"} and len(errors) == 1
    assert executor.num_recoveries <= 3 * RETRIES


@pytest.mark.parametrize("in_flight", [1, 2])
def test_where_memory_does_not_suffice_steps_become_smaller_and_all_goes_on(in_flight: int):
    executor = Faulty(num_blocks=200)
    executor.fault = lambda plan: MemoryError("no room") if plan.num_tokens > 5 else None
    core = make_core(executor, in_flight=in_flight, max_num_seqs=16, max_num_batched_tokens=64)
    for seed in range(16):
        core.add(make_request(str(seed), [seed + 1] * 20, 12, seed=seed))
    tokens, ends, errors = run(core)
    assert not errors and set(ends.values()) == {"length"}
    assert tokens == {str(seed): expected(executor, seed, 20, 12) for seed in range(16)}
    assert executor.num_faults < len(executor.plans) / 4  # it has learned
    assert set(core.meter.take().faults) == {"out_of_memory"}


def test_memory_that_comes_back_is_used_again():
    executor = Faulty(num_blocks=200)
    executor.fault = lambda plan: MemoryError("no room") if plan.step == 8 else None
    core = make_core(executor, max_num_seqs=16, max_num_batched_tokens=64)
    for seed in range(64):
        core.add(make_request(str(seed), [seed + 1] * 20, 20, seed=seed))
    _, ends, _ = run(core)
    assert set(ends.values()) == {"length"}
    sizes = [plan.num_tokens for plan in executor.plans]
    assert max(sizes[9:12]) <= sizes[8] // 2 and max(sizes[20:]) > 2 * sizes[8]


def test_a_request_that_memory_never_suffices_for_ends_alone():
    executor = Faulty()
    executor.fault = lambda plan: MemoryError("no room") if 0 in executor.lengths[plan.step] else None
    core = make_core(executor)
    for seed in range(3):
        core.add(make_request(str(seed), [seed + 1] * 20, 5, seed=seed))
    _, ends, errors = run(core)
    assert ends == {"0": "error", "1": "length", "2": "length"} and "no room" in str(errors[0])
    assert core.scheduler._most_tokens == 64  # it was not the others' fault


def test_an_abort_while_on_trial_leaves_nothing_behind():
    executor = Faulty()
    executor.fault = lambda plan: RuntimeError("on fire") if plan.step in (2, 3) else None
    core = make_core(executor)
    for seed in range(4):
        core.add(make_request(str(seed), [seed + 1] * 6, 9, seed=seed))
    while not core.scheduler.suspects:
        core.step()
    core.finish(["0", "3"], "abort")
    assert core.checker is not None
    core.checker.check()
    _, ends, _ = run(core)
    assert ends == {"1": "length", "2": "length"}


def test_a_device_that_is_lost_ends_the_engine():
    class Lost(Faulty):
        def recover(self) -> None:
            raise RuntimeError("illegal memory access")

    executor = Lost()
    executor.failing_steps = frozenset({1})
    core = make_core(executor)
    core.add(make_request("a", [1, 2], 5))
    with pytest.raises(EngineDeadError, match=r"on fire.*illegal memory access"):
        run(core)


# -- with a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3", vocab_size=337, eos_token_id=332)
    qwen(path)
    return path


@pytest.mark.parametrize("error", [ZeroDivisionError("on purpose"), torch.OutOfMemoryError("on purpose")])
def test_answers_are_the_same_after_a_fault(folder: Path, error: Exception):
    prompts = [f"prompt number {number} " * (number + 1) for number in range(5)]
    nines = StructuredOutputsParams(regex="a{9}")
    params = [
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=4, max_tokens=12, structured_outputs=nines),
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, repetition_penalty=1.3, logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, prompt_logprobs=1),
    ]
    options: dict[str, Any] = {"num_gpu_blocks_override": 200, "block_size": 4}
    with LLM(str(folder), **options) as llm:
        want = llm.generate(prompts, params, use_tqdm=False)
    with LLM(str(folder), **options) as llm:
        core = llm.llm_engine.core
        core.checker = InvariantChecker(core.scheduler)
        runner: Any = core.executor._runner  # type: ignore[attr-defined]
        forward, calls = runner.forward, iter(range(1000))

        def failing(*arguments: Any) -> Any:
            if next(calls) in (0, 4, 9):
                raise error
            return forward(*arguments)

        runner.forward = failing
        got = llm.generate(prompts, params, use_tqdm=False)
        core.checker.idle()
    for one, two in zip(want, got, strict=True):
        first, second = one.outputs[0], two.outputs[0]
        assert (first.text, first.token_ids, first.finish_reason) == (second.text, second.token_ids, "length") or (
            first.text == second.text == "a" * 9
        )
        assert len(one.prompt_logprobs or ()) == len(two.prompt_logprobs or ())
        assert len(first.logprobs or ()) == len(second.logprobs or ())


def test_that_the_cpu_has_no_memory_is_seen_as_such(folder: Path):
    with LLM(str(folder), num_gpu_blocks_override=50, block_size=4) as llm:
        core = llm.llm_engine.core
        runner: Any = core.executor._runner  # type: ignore[attr-defined]
        forward, calls = runner.forward, iter(range(1000))

        def failing(*arguments: Any) -> Any:
            if next(calls) == 0:
                torch.empty(1 << 60, dtype=torch.uint8)
            return forward(*arguments)

        runner.forward = failing
        for output in llm.generate(["hello", "you"], SamplingParams(max_tokens=6, ignore_eos=True), use_tqdm=False):
            assert output.outputs[0].finish_reason == "length"
        assert core.scheduler._most_tokens < core.scheduler.config.max_num_batched_tokens
