"""The model runner and its executor, driven by hand-made plans, against transformers."""

from __future__ import annotations

import dataclasses
import gc
import logging
import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_checkpoint, reference_greedy, reference_logits

from nanovllm.config import EngineArgs, EngineConfig
from nanovllm.engine.plan import RowStart, StepPlan, StepResult
from nanovllm.errors import EngineDeadError, ParameterError
from nanovllm.executor import create_executor
from nanovllm.executor.in_process import InProcessExecutor
from nanovllm.platforms import get_platform
from nanovllm.runner import kv_cache, model_runner
from nanovllm.runner.input_batch import InputBatch
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.sampling_params import SamplingParams

torch.set_num_threads(1)

BLOCK_SIZE = 4
PROMPTS = [[5], [11, 3, 120], list(range(20, 28)), list(range(40, 63)), [7, 7, 7, 99, 2, 64, 31, 8, 15]]
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("qwen3")
    return path, make_checkpoint(path, "qwen3", max_position_embeddings=1024)


def make_config(path: Path, **options: Any) -> EngineConfig:
    settings = {"block_size": BLOCK_SIZE, "max_num_seqs": 8, "num_gpu_blocks_override": 200, "dtype": "float32"}
    return EngineArgs.from_kwargs(model=str(path), skip_tokenizer_init=True, **{**settings, **options}).build()


class Driver:
    """Requests in rows, with blocks handed out in random order; makes plans and keeps the tokens that came out."""

    def __init__(self, executor: Any, seed: int = 0) -> None:
        self.executor = executor
        self.free_blocks = list(range(1, executor.num_blocks))
        random.Random(seed).shuffle(self.free_blocks)
        self.blocks: dict[int, list[int]] = {}  # row -> its block table
        self.computed: dict[int, int] = {}
        self.length: dict[int, int] = {}  # known tokens and those in flight
        self.out: dict[int, list[int]] = {}
        self.new_starts: list[RowStart] = []
        self.steps = 0

    def start(
        self, row: int, prompt: list[int], params: SamplingParams = GREEDY, *, output: Any = (), **options: Any
    ) -> None:
        known = [*prompt, *output]
        options = {"seed": 0, "stop_token_ids": (), **options}
        self.new_starts.append(RowStart(row, known, len(prompt), params, **options))
        self.blocks[row], self.computed[row], self.length[row], self.out[row] = [], 0, len(known), []

    def submit(self, rows: dict[int, int | None], copies: Any = ()) -> tuple[StepPlan, Any]:
        """Plan ``rows`` (row -> tokens to compute; None: all that lack) and submit it."""
        plan = StepPlan(self.steps, starts=self.new_starts, copies=list(copies))
        self.new_starts, self.steps = [], self.steps + 1
        counts = {r: self.length[r] - self.computed[r] if n is None else n for r, n in rows.items()}
        for row in sorted(counts, key=lambda r: counts[r] != 1):
            begin, count = self.computed[row], counts[row]
            have, need = len(self.blocks[row]), -(-(begin + count) // BLOCK_SIZE)
            if need > have:
                self.blocks[row] += [self.free_blocks.pop() for _ in range(need - have)]
            first = 0 if row in {s.row for s in plan.starts} else have
            if need > first:
                plan.block_updates.append((row, first, self.blocks[row][first:]))
            self.computed[row] = begin + count
            if self.computed[row] == self.length[row]:
                plan.sampled.append(len(plan.rows))
                self.length[row] += 1
            plan.rows.append(row)
            plan.num_computed.append(begin)
            plan.num_new.append(count)
        plan.num_tokens = sum(plan.num_new)
        return plan, self.executor.submit(plan)

    def take(self, submitted: tuple[StepPlan, Any]) -> StepResult:
        plan, handle = submitted
        result = handle.result()
        assert len(result.token_ids) == len(plan.sampled)
        for index, token in zip(plan.sampled, result.token_ids, strict=True):
            self.out[plan.rows[index]].append(token)
        return result

    def step(self, rows: dict[int, int | None], copies: Any = ()) -> StepResult:
        return self.take(self.submit(rows, copies))


@pytest.fixture()
def executor(checkpoint: tuple[Path, Any]) -> Any:
    executor = InProcessExecutor(make_config(checkpoint[0]))
    yield executor
    executor.shutdown()


# ---- forward passes -----------------------------------------------------------------------------------------------


def test_a_ragged_batch_continues_like_transformers(executor: Any, checkpoint: tuple[Path, Any]) -> None:
    driver = Driver(executor)
    for row, prompt in enumerate(PROMPTS):
        driver.start(row, prompt)
    for _ in range(9):
        driver.step(dict.fromkeys(range(len(PROMPTS))))
    assert [driver.out[r] for r in range(len(PROMPTS))] == [reference_greedy(checkpoint[1], p, 9) for p in PROMPTS]


@pytest.mark.parametrize("chunk", [1, 3, 4, 7])
def test_chunked_prefill_beside_decodes_continues_like_transformers(
    executor: Any, checkpoint: tuple[Path, Any], chunk: int
) -> None:
    driver = Driver(executor)
    driver.start(3, PROMPTS[1])
    driver.step({3: None})
    driver.start(0, PROMPTS[3])
    done = 0
    while done < len(PROMPTS[3]):
        count = min(chunk, len(PROMPTS[3]) - done)
        done += count
        result = driver.step({0: count, 3: 1})
        assert len(result.token_ids) == 1 + (done == len(PROMPTS[3]))
    for _ in range(5):
        driver.step({0: 1, 3: 1})
    assert driver.out[0] == reference_greedy(checkpoint[1], PROMPTS[3], 6)
    assert driver.out[3] == reference_greedy(checkpoint[1], PROMPTS[1], len(driver.out[3]))


def test_plans_submitted_before_results_are_taken_see_each_others_tokens(
    executor: Any, checkpoint: tuple[Path, Any]
) -> None:
    """Penalties and bad words too: their history is what has been sampled, reported or not."""
    params = SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.7)
    expected = reference_greedy(checkpoint[1], PROMPTS[4], 3)
    options: dict[str, Any] = {"bad_words_ids": ((expected[0], expected[1]),)}  # so the second token must be another
    runs = []
    for depth in (1, 2, 4):
        driver = Driver(executor)
        driver.start(0, PROMPTS[2])
        driver.start(1, PROMPTS[3], params)
        driver.start(2, PROMPTS[4], **options)
        in_flight: list[Any] = []
        for _ in range(8):
            in_flight.append(driver.submit(dict.fromkeys(range(3))))
            if len(in_flight) == depth:
                driver.take(in_flight.pop(0))
        for submitted in in_flight:
            driver.take(submitted)
        runs.append(driver.out)
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][0] == reference_greedy(checkpoint[1], PROMPTS[2], 8)
    assert runs[0][1] != reference_greedy(checkpoint[1], PROMPTS[3], 8)
    assert runs[0][2][0] == expected[0] and runs[0][2][1] != expected[1]


def test_a_row_is_reused_and_a_request_resumes_after_preemption(executor: Any, checkpoint: tuple[Path, Any]) -> None:
    model = checkpoint[1]
    driver = Driver(executor)
    driver.start(2, PROMPTS[3])
    for _ in range(3):
        driver.step({2: None})
    first = driver.out[2]
    driver.start(2, PROMPTS[1])  # shorter: leftovers lie behind its tokens and its block table
    for _ in range(6):
        driver.step({2: None})
    assert driver.out[2] == reference_greedy(model, PROMPTS[1], 6)
    driver.start(5, PROMPTS[3], output=first)  # the first request again, in another row, recomputed in one step
    for _ in range(3):
        driver.step({5: None})
    assert first + driver.out[5] == reference_greedy(model, PROMPTS[3], 6)


def test_copied_blocks_let_a_fork_go_its_own_way(executor: Any, checkpoint: tuple[Path, Any]) -> None:
    model, prompt = checkpoint[1], PROMPTS[4]  # two full blocks and one token of a third
    driver = Driver(executor)
    driver.start(0, prompt)
    driver.step({0: None})
    first = driver.out[0][0]
    other = (first + 1) % 100
    # The fork knows one token more than is computed; it shares full blocks and copies the third.
    driver.start(1, prompt, output=[other])
    target = driver.free_blocks.pop()
    driver.blocks[1] = [*driver.blocks[0][:2], target]
    driver.computed[1] = len(prompt)
    driver.step({0: 1, 1: 1}, copies=[(driver.blocks[0][2], target)])
    for _ in range(4):
        driver.step({0: 1, 1: 1})
    assert driver.out[0] == reference_greedy(model, prompt, 6)
    assert driver.out[1] == reference_greedy(model, [*prompt, other], 5)


def test_nothing_is_read_from_slots_that_were_never_written(executor: Any, checkpoint: tuple[Path, Any]) -> None:
    for caches in executor._runner.kv_caches:
        for cache in caches:
            cache[1:].fill_(torch.nan)
    driver = Driver(executor)
    for row, prompt in enumerate(PROMPTS):
        driver.start(row, prompt)
    for _ in range(4):
        driver.step(dict.fromkeys(range(len(PROMPTS))))
    assert [driver.out[r] for r in range(len(PROMPTS))] == [reference_greedy(checkpoint[1], p, 4) for p in PROMPTS]


@pytest.mark.parametrize("length", [255, 256, 510])
def test_tables_grow_with_long_requests(executor: Any, checkpoint: tuple[Path, Any], length: int) -> None:
    generator = random.Random(0)
    long = [generator.randrange(130) for _ in range(length)]
    driver = Driver(executor)
    driver.start(1, PROMPTS[0])
    driver.step({1: None})
    driver.start(0, long)
    driver.step({0: 200, 1: 1})
    for _ in range(3):
        driver.step({0: None, 1: 1})
    assert driver.out[0] == reference_greedy(checkpoint[1], long, 3)
    assert driver.out[1] == reference_greedy(checkpoint[1], PROMPTS[0], 5)


def test_step_input_is_what_loops_over_tokens_would_make() -> None:
    batch = InputBatch(6, BLOCK_SIZE, torch.device("cpu"), 61)
    generator = random.Random(1)
    known = {row: [generator.randrange(100) for _ in range(n)] for row, n in ((4, 9), (1, 6), (3, 30))}
    blocks = {4: [17, 5, 9], 1: [3, 8], 3: [20, 1, 2, 11, 30, 6, 7, 40]}
    batch.start(4, [99] * 50)
    batch.update_blocks([(4, 0, list(range(50, 60)))])
    for row, ids in known.items():
        batch.start(row, ids)
        batch.update_blocks([(row, 0, blocks[row][:1]), (row, 1, blocks[row][1:])])
    plan = StepPlan(0, rows=[4, 1, 3], num_computed=[8, 5, 3], num_new=[1, 1, 20], sampled=[0, 1], num_tokens=22)
    inputs = batch.prepare(plan)
    expected = [
        (known[row][p], p, blocks[row][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE)
        for row, begin, count in zip(plan.rows, plan.num_computed, plan.num_new, strict=True)
        for p in range(begin, begin + count)
    ]
    meta = inputs.meta
    found = zip(inputs.input_ids.tolist(), inputs.positions.tolist(), meta.slot_mapping.tolist(), strict=True)
    assert list(found) == expected
    assert (meta.query_start_loc, meta.seq_lens, meta.num_decodes) == ([0, 1, 2, 22], [9, 6, 23], 2)
    assert (meta.max_query_len, meta.max_seq_len, meta.block_size) == (20, 23, BLOCK_SIZE)
    assert meta.block_table.tolist() == [[17, 5, 9, 0, 0, 0], [3, 8, 0, 0, 0, 0], blocks[3][:6]]
    assert inputs.sampled_tokens is not None and inputs.sampled_tokens.tolist() == [0, 1]
    assert (inputs.sampled_rows.tolist(), inputs.sampled_positions.tolist()) == ([4, 1], [9, 6])
    batch.append(inputs.sampled_rows, inputs.sampled_positions, torch.tensor([77, 78]))
    decode = batch.prepare(StepPlan(1, rows=[1, 4], num_computed=[6, 9], num_new=[1, 1], sampled=[0, 1]))
    assert decode.input_ids.tolist() == [78, 77]
    assert decode.sampled_tokens is None and decode.meta.num_decodes == 2


# ---- sampling and log-probabilities -------------------------------------------------------------------------------


def test_random_tokens_depend_on_the_request_not_on_its_row_batch_or_chunks(executor: Any) -> None:
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.9)
    alone = Driver(executor)
    alone.start(0, PROMPTS[2], params, seed=99)
    for _ in range(8):
        alone.step({0: None})
    crowd = Driver(executor, seed=1)
    for row, prompt in enumerate(PROMPTS):
        crowd.start(row, prompt, SamplingParams(temperature=0.8), seed=row)
    crowd.start(6, PROMPTS[2], params, seed=99)
    crowd.start(7, PROMPTS[2], params, seed=100)
    crowd.step({**dict.fromkeys(range(5)), 6: 3, 7: None})
    for _ in range(8):
        crowd.step(dict.fromkeys([0, 1, 2, 3, 4, 6, 7]))
    assert crowd.out[6] == alone.out[0]
    assert crowd.out[7][:8] != alone.out[0]


def test_logprobs_are_those_of_the_model(executor: Any, checkpoint: tuple[Path, Any]) -> None:
    driver = Driver(executor)
    driver.start(0, PROMPTS[2], SamplingParams(temperature=0.0, logprobs=3))
    driver.start(1, PROMPTS[1], GREEDY)
    driver.start(2, PROMPTS[3], SamplingParams(temperature=1.0, logprobs=0), seed=3)
    known = {0: list(PROMPTS[2]), 2: list(PROMPTS[3])}
    for _ in range(3):
        result = driver.step(dict.fromkeys(range(3)))
        assert set(result.logprobs) == {0, 2}
        for row, sequence in known.items():
            exact = torch.log_softmax(reference_logits(checkpoint[1], sequence)[-1], -1)
            found, token = result.logprobs[row], result.token_ids[row]
            assert found.token_ids[0] == token and len(found.token_ids) == (4 if row == 0 else 1)
            np.testing.assert_allclose(found.logprobs, exact[found.token_ids].numpy(), atol=1e-4)
            assert found.rank == 1 + int((exact > exact[token]).sum())
            sequence.append(token)


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_prompt_logprobs_equal_those_of_transformers_however_the_prompt_is_cut(
    executor: Any, checkpoint: tuple[Path, Any], chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "PROMPT_ROWS", 3)  # a prompt is scored in several parts
    prompt = PROMPTS[3]
    exact = torch.log_softmax(reference_logits(checkpoint[1], prompt), -1)
    for count in (0, 2, -1):
        driver = Driver(executor)
        driver.start(0, PROMPTS[0])
        driver.start(4, prompt, SamplingParams(temperature=0.0, prompt_logprobs=count))
        collected: list[Any] = []
        while driver.computed[4] < len(prompt):
            left = len(prompt) - driver.computed[4]
            plan, handle = driver.submit({4: left if chunk is None else min(chunk, left), 0: None})
            result = driver.take((plan, handle))
            assert set(result.prompt_logprobs) <= {plan.rows.index(4)}
            found = result.prompt_logprobs.get(plan.rows.index(4), [])
            begin = plan.num_computed[plan.rows.index(4)]
            assert len(collected) == min(begin, len(prompt) - 1)
            collected += found
        assert len(collected) == len(prompt) - 1
        for position, found in enumerate(collected, start=1):
            expected = exact[position - 1]
            best = expected.argsort(descending=True)[: len(expected) if count == -1 else count].tolist()
            assert found.token_ids.tolist() == [prompt[position], *best]
            np.testing.assert_allclose(found.logprobs, expected[found.token_ids].numpy(), atol=1e-4)
        assert not driver.step({0: 1, 4: 1}).prompt_logprobs  # the output is none of the prompt's business


def test_a_new_request_in_a_row_does_not_inherit_prompt_logprobs(executor: Any) -> None:
    driver = Driver(executor)
    driver.start(0, PROMPTS[2], SamplingParams(temperature=0.0, prompt_logprobs=1))
    driver.step({0: None})
    driver.start(0, PROMPTS[3])
    assert not driver.step({0: None}).prompt_logprobs


# ---- the executor -------------------------------------------------------------------------------------------------


def test_a_failed_step_raises_at_its_result_and_the_executor_goes_on(
    executor: Any, checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(executor)
    driver.start(0, PROMPTS[2])
    driver.step({0: None})
    with monkeypatch.context() as patch:
        patch.setattr(executor._runner, "forward", lambda *_: 1 / 0)
        driver.start(1, PROMPTS[1])
        _, handle = driver.submit({1: None})
        with pytest.raises(ZeroDivisionError):
            handle.result()
    driver.start(1, PROMPTS[4])
    for _ in range(3):
        driver.step({0: None, 1: None})
    assert driver.out[0] == reference_greedy(checkpoint[1], PROMPTS[2], 4)
    assert driver.out[1] == reference_greedy(checkpoint[1], PROMPTS[4], 3)


def test_shutdown_frees_weights_and_cache_at_once(checkpoint: tuple[Path, Any]) -> None:
    executor = InProcessExecutor(make_config(checkpoint[0]))
    runner = executor._runner
    assert runner is not None
    driver = Driver(executor)
    driver.start(0, PROMPTS[2])
    driver.step({0: None})
    watched = [weakref.ref(x) for x in (runner, runner.model, runner.kv_caches[0][0], runner.batch.tokens)]
    assert executor.kv_cache_bytes == sum(k.nbytes + v.nbytes for k, v in runner.kv_caches)
    assert executor.kv_bytes_per_block * executor.num_blocks == executor.kv_cache_bytes
    del runner
    gc.disable()  # without the cycle collector's help
    try:
        executor.shutdown()
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()
    executor.shutdown()
    with pytest.raises(EngineDeadError):
        executor.submit(StepPlan(0))


def test_two_executors_live_in_one_process(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path, "llama", seed=5)
    models = [checkpoint[1], other]
    executors = [InProcessExecutor(make_config(p)) for p in (checkpoint[0], tmp_path)]
    drivers = [Driver(e) for e in executors]
    for driver in drivers:
        driver.start(0, PROMPTS[3])
    for _ in range(5):
        for driver in drivers:
            driver.step({0: None})
    executors[0].shutdown()
    drivers[1].step({0: None})
    assert drivers[0].out[0] == reference_greedy(models[0], PROMPTS[3], 5)
    assert drivers[1].out[0] == reference_greedy(models[1], PROMPTS[3], 6)
    assert drivers[0].out[0] != drivers[1].out[0][:5]


def test_several_ranks_are_refused(checkpoint: tuple[Path, Any]) -> None:
    config = dataclasses.replace(make_config(checkpoint[0]), tensor_parallel_size=2)
    with pytest.raises(ParameterError, match="tensor_parallel_size"):
        create_executor(config)


# ---- the size of the cache ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(checkpoint: tuple[Path, Any]) -> Any:
    return ModelRunner(make_config(checkpoint[0])).model


def memory(num_bytes: int) -> Any:
    return SimpleNamespace(
        available_memory=lambda: num_bytes,
        memory_budget=lambda utilization: int(num_bytes * utilization),
        peak_memory=lambda work: None,
    )


def test_cache_size_comes_from_the_override_then_from_bytes_then_from_memory(
    checkpoint: tuple[Path, Any], model: Any
) -> None:
    per_block = kv_cache.bytes_per_block(model, BLOCK_SIZE)
    assert per_block == 2 * 2 * BLOCK_SIZE * 2 * 10 * 4  # K and V, layers, tokens, KV heads, head_dim, float32
    count = kv_cache.count_blocks
    config = make_config(checkpoint[0], kv_cache_memory_bytes=10 * per_block + 1)
    assert count(config, model, memory(0)) == 200
    config = make_config(checkpoint[0], kv_cache_memory_bytes=10 * per_block + 1, num_gpu_blocks_override=None)
    assert count(config, model, memory(0)) == 10
    config = make_config(checkpoint[0], num_gpu_blocks_override=None, max_model_len=100, max_num_seqs=3)
    assert count(config, model, memory(2**40)) == 3 * 25 + 1  # more could never be used
    config = make_config(checkpoint[0], num_gpu_blocks_override=None, gpu_memory_utilization=0.5)
    overhead = kv_cache.activation_bytes(config, model) + kv_cache._RESERVE
    assert count(config, model, memory(2 * (overhead + 100 * per_block))) == 100


def test_the_largest_step_may_be_tried_instead(checkpoint: tuple[Path, Any], model: Any) -> None:
    """On a device where that is quick, what it took counts, not the bound from shapes."""
    tried = []
    platform = memory(2**32)
    taken = 2**32 - kv_cache._RESERVE - 100 * kv_cache.bytes_per_block(model, BLOCK_SIZE)
    platform.peak_memory = lambda work: (tried.append(work()), taken)[1]
    config = make_config(
        checkpoint[0], num_gpu_blocks_override=None, gpu_memory_utilization=1.0, max_num_batched_tokens=1030
    )
    assert kv_cache.count_blocks(config, model, platform) == 100
    assert len(tried) == 1


def test_no_room_for_the_cache_is_an_error_with_the_remedy(checkpoint: tuple[Path, Any], model: Any) -> None:
    for options in ({}, {"kv_cache_memory_bytes": 100}):
        config = make_config(checkpoint[0], num_gpu_blocks_override=None, **options)
        with pytest.raises(ParameterError, match="kv_cache_memory_bytes"):
            kv_cache.count_blocks(config, model, memory(2**20))


def test_the_cache_takes_memory_only_where_it_is_written(
    checkpoint: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    platform = get_platform("cpu")
    before = platform.memory_used_by_process()
    logging.getLogger("nanovllm").propagate = True
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        config = make_config(
            checkpoint[0], num_gpu_blocks_override=None, kv_cache_memory_bytes=2**30, max_model_len=1024
        )
        executor = InProcessExecutor(config)
    assert executor.kv_cache_bytes > 0.99 * 2**30
    assert platform.memory_used_by_process() - before < 100 * 2**20
    tokens = (executor.num_blocks - 1) * BLOCK_SIZE
    expected = f"KV cache size: {tokens:,} tokens (1.00 GiB), block size 4, maximum concurrency for 1,024 tokens per"
    assert any(expected in record.message for record in caplog.records)
    executor.shutdown()
