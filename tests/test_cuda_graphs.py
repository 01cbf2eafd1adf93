"""Recorded decode steps on a device that replays exactly what was recorded (fake_gpu.py)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fake_gpu import HARDWARE, FakeCapture, FakeGpu, fake_operators, nothing_waits
from paged import load_model, make_metadata
from tiny_models import make_checkpoint

from nanovllm import LLM, SamplingParams
from nanovllm.models import Decoder
from nanovllm.ops import graphs
from nanovllm.ops.cuda import attention
from nanovllm.ops.cuda.attention import Tiles, TritonAttention
from nanovllm.ops.cuda.graphs import CudaCapture, DecodePlans
from nanovllm.ops.graphs import BUCKETS, DecodeGraphs
from nanovllm.runner.model_runner import is_out_of_memory

BLOCK = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    make_checkpoint(path, "qwen3", num_hidden_layers=1)
    return path


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "decode_tiles", lambda *_: Tiles(16, 16, 4, 2))
    monkeypatch.setattr(attention, "long_tiles", lambda *_: Tiles(16, 16, 4, 2))


class Steps:
    """Decode steps of a model over caches of its own; ``forward`` may be recorded."""

    def __init__(self, model: Decoder, capture: FakeCapture | None, wrap: bool = True, max_tokens: int = 8) -> None:
        self.model = model
        shape = (40, BLOCK, model.num_kv_heads, model.head_dim)
        generator = torch.Generator().manual_seed(0)
        self.caches = [
            (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
            for _ in range(model.num_layers)
        ]
        planner = TritonAttention(HARDWARE.multiprocessors, HARDWARE.shared_memory)
        self.forward: Callable[..., Tensor] = self._plain
        if wrap:
            self.forward = DecodeGraphs(self._plain, DecodePlans(planner), capture, max_tokens, BLOCK)

    def _plain(self, ids: Tensor, positions: Tensor, meta: Any) -> Tensor:
        return self.model.forward(ids, positions, self.caches, meta)

    @torch.inference_mode()
    def run(self, tables: list[list[int]], contexts: list[int], news: list[int] | None = None) -> Tensor:
        news = news or [1] * len(tables)
        meta = make_metadata(tables, contexts, news, BLOCK)
        positions = torch.cat([torch.arange(c, c + n) for c, n in zip(contexts, news, strict=True)])
        ids = (positions * 7 + torch.arange(len(positions))) % 100
        return self.forward(ids, positions, meta).clone()

    def cells(self) -> list[Tensor]:
        """What the caches hold, but for the padding block."""
        return [cache[1:] for pair in self.caches for cache in pair]


def tables(*sizes: int, seed: int = 0) -> list[list[int]]:
    ids = list(range(1, 40))
    random.Random(seed).shuffle(ids)
    return [[ids.pop() for _ in range(size)] for size in sizes]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Decoder:
    return load_model(checkpoint, ops=fake_operators("cuda"))


def test_replays_give_what_launches_give_bit_for_bit(model: Decoder) -> None:
    """Batches that grow, shrink and move: full and padded buckets, other lengths, other blocks."""
    capture = FakeCapture()
    recorded, launched, unpadded = Steps(model, capture), Steps(model, None), Steps(model, None, wrap=False)
    steps = [
        (tables(3, 1, 5, 2), [9, 0, 17, 5]),  # 4 rows: a bucket of their size
        (tables(3, 1, 5, 2)[:0:-1], [5, 18, 3]),  # 3 of 4: the slot of the fourth row is now the first one's
        (tables(6), [20]),
        (tables(1, 2, 3, 4, 5, 6, 7, seed=2), [1, 7, 8, 13, 16, 23, 25]),  # 7 of 8
        (tables(2, 2, 2, 2, seed=3), [4, 5, 6, 7]),
    ]
    for table, contexts in steps:
        hidden = recorded.run(table, contexts)
        assert torch.equal(hidden, launched.run(table, contexts))
        torch.testing.assert_close(hidden, unpadded.run(table, contexts), atol=1e-5, rtol=1e-4)
        for ours, theirs, wanted in zip(recorded.cells(), launched.cells(), unpadded.cells(), strict=True):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
    assert (capture.captures, capture.replays) == (3, 5)  # one for each size, none twice


@pytest.mark.parametrize(("sizes", "news"), [((3, 3), [1, 5]), ((2,) * 9, None), ((4,), [6])])
def test_other_steps_are_launched(model: Decoder, sizes: tuple[int, ...], news: list[int] | None) -> None:
    capture = FakeCapture()
    recorded, plain = Steps(model, capture), Steps(model, None, wrap=False)
    contexts = [2] * len(sizes)
    assert torch.equal(recorded.run(tables(*sizes), contexts, news), plain.run(tables(*sizes), contexts, news))
    assert capture.captures == 0


class FullMemory(FakeCapture):
    """Raises for the first captures, in the middle of recording."""

    def __init__(self, error: Exception, times: int) -> None:
        super().__init__()
        self.errors = [error] * times

    def __call__(self, work: graphs.Work, plan: object = None) -> tuple[Callable[[], None], Tensor]:
        if self.errors:
            work()
            raise self.errors.pop()
        return super().__call__(work)


def test_what_memory_does_not_suffice_to_record_is_launched(model: Decoder) -> None:
    capture = FullMemory(torch.OutOfMemoryError("full"), times=1)
    recorded, launched = Steps(model, capture), Steps(model, None)
    for contexts in ([2, 5], [3, 6]):
        table = tables(3, 3)
        assert torch.equal(recorded.run(table, contexts), launched.run(table, contexts))
    assert capture.captures == capture.replays == 0
    recorded.forward.release()  # type: ignore[attr-defined]
    assert torch.equal(recorded.run(table, [4, 7]), launched.run(table, [4, 7]))
    assert capture.captures == capture.replays == 1  # with memory freed it is recorded


def test_a_recording_that_failed_is_not_replayed(model: Decoder) -> None:
    capture = FullMemory(RuntimeError("the device is on fire"), times=1)
    recorded, launched = Steps(model, capture), Steps(model, None)
    table = tables(3, 3)
    with pytest.raises(RuntimeError, match="on fire"):
        recorded.run(table, [2, 5])
    assert torch.equal(recorded.run(table, [2, 5]), launched.run(table, [2, 5]))


class TorchGraphs:
    """As much of torch.cuda as recording takes. A pool is given up with its last graph, and cannot be used again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools: list[int] = []
        self.live: dict[int, int] = {}  # graphs of every pool
        fake = self

        class Graph:
            pool: int | None = None

            def replay(self) -> None:
                """Nothing to replay."""

            def __del__(self) -> None:
                if self.pool is not None:
                    fake.live[self.pool] -= 1

        @contextmanager
        def record(graph: Graph, pool: int, stream: Any, capture_error_mode: str) -> Iterator[None]:
            assert stream is side, "libraries would take their workspace of another stream from the pool"
            assert fake.live.get(pool, 1) > 0, "this pool has been given up"
            yield
            graph.pool = pool
            fake.live[pool] = fake.live.get(pool, 0) + 1

        side, current = (SimpleNamespace(wait_stream=lambda other: None) for _ in range(2))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self.new_pool)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", record)

    def new_pool(self) -> int:
        self.pools.append(len(self.pools))
        return self.pools[-1]


def test_graphs_share_a_pool_until_the_last_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = TorchGraphs(monkeypatch)
    capture = CudaCapture()

    def record() -> Callable[[], None]:
        return capture(lambda: torch.ones(1), torch.zeros(1))[0]

    kept = [record(), record(), record()]
    assert cuda.live == {0: 3}
    kept.pop()
    kept.append(record())
    assert cuda.live == {0: 3}
    kept.clear()  # a wider block table, or memory that had to be given back
    kept.append(record())
    assert cuda.live == {0: 0, 1: 1}


def test_a_wider_block_table_is_recorded_anew(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_TABLE_WIDTH", 3)
    capture = FakeCapture()
    recorded, launched = Steps(model, capture), Steps(model, None)
    for sizes, contexts in (((2, 2), [3, 4]), ((9, 2), [30, 4]), ((2, 2), [5, 1])):
        assert torch.equal(recorded.run(tables(*sizes), contexts), launched.run(tables(*sizes), contexts))
    assert capture.captures == 2


def test_buckets_waste_at_most_a_third_from_16_rows_on() -> None:
    assert BUCKETS[0] == 1 and all(b <= 2 * a for a, b in pairwise(BUCKETS))
    assert all(2 * b <= 3 * a for a, b in pairwise(BUCKETS) if a >= 16)


def test_the_fake_device_notices_what_cuda_would_not_forgive() -> None:
    counter, place = torch.zeros(1), torch.zeros(3)
    capture = FakeCapture()
    lengths = [1]

    def work() -> Tensor:
        return place * 2 + counter + sum(lengths)

    replay, result = capture(work)
    assert result.isnan().all()  # nothing has been computed
    counter.fill_(5)
    lengths[0] = 100  # the host's numbers are those of the recording
    replay()
    assert result.tolist() == [6, 6, 6]
    with pytest.raises(AssertionError, match="waits for the device"):
        capture(lambda: place + place.sum().item())


# ---- the whole engine -----------------------------------------------------------------------------------------------


@pytest.fixture
def engine(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """Makes an engine on the fake GPU."""
    monkeypatch.setattr("nanovllm.platforms.get_platform", lambda device: FakeGpu())
    monkeypatch.setattr("nanovllm.runner.model_runner.get_platform", lambda device: FakeGpu())
    monkeypatch.setattr("nanovllm.runner.model_runner.operator_table", fake_operators)
    monkeypatch.setattr("nanovllm.ops.cuda.graphs.CudaCapture", FakeCapture)
    settings = {"block_size": BLOCK, "max_num_seqs": 3, "dtype": "float32", "skip_tokenizer_init": True}

    def make(**options: Any) -> LLM:
        return LLM(str(checkpoint), **{**settings, "num_gpu_blocks_override": 200, **options})

    return make


PROMPTS = [[5], [11, 3, 120], list(range(20, 33)), list(range(20, 31)), [7, 7, 7, 99, 2, 64]]


def generate(llm: LLM) -> list[list[int]]:
    with llm:
        params = [
            SamplingParams(temperature=0.0, max_tokens=3 + i, ignore_eos=True, detokenize=False)
            for i in range(len(PROMPTS))
        ]
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_requests_of_every_kind_side_by_side(engine: Callable[..., LLM]) -> None:
    """Drawn tokens depend on a request's seed and place, not on its batch; log-probabilities arrive with them."""
    kinds = [{"temperature": 0.0}, {"top_p": 0.8, "logprobs": 2}, {"top_k": 5, "min_p": 0.05}, {"temperature": 1.3}]
    params = [
        SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False, **{"temperature": 0.9, "seed": i, **kind})
        for i, kind in enumerate(kinds)
    ]
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:4]]
    with engine(max_num_seqs=4) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        alone = llm.generate(prompts[1:2], params[1:2], use_tqdm=False)
    assert alone[0].outputs[0].token_ids == together[1].outputs[0].token_ids
    scored = together[1].outputs[0].logprobs
    assert scored is not None and [len(position) >= 2 for position in scored] == [True] * 3
    for token, position in zip(together[1].outputs[0].token_ids, scored, strict=True):
        assert position[token].logprob <= 0.0


def test_launching_a_step_waits_for_nothing(engine: Callable[..., LLM]) -> None:
    """Whatever its requests ask for: the next step can be planned while it runs."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "prompt_logprobs": 1},
        {"top_p": 0.3, "min_p": 0.01},
        {"top_k": 2},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.1},
        {"logprobs": 2, "logit_bias": {5: 1.0}},
        {"allowed_token_ids": [5, 6, 7], "min_tokens": 2, "stop_token_ids": [6]},
    ]
    params = [
        SamplingParams(max_tokens=2, detokenize=False, **{"temperature": 0.9, "seed": i, **kind})
        for i, kind in enumerate(kinds)
    ]
    with engine(max_num_seqs=len(kinds)) as llm:
        runner: Any = llm.llm_engine.core.executor._runner  # type: ignore[attr-defined]
        launch, launched = runner.launch, []

        def watched(plan: Any) -> Any:
            launched.append(plan)
            with nothing_waits():
                return launch(plan)

        runner.launch = watched
        prompts: Any = [{"prompt_token_ids": [3 + i, 4, 5]} for i in range(len(kinds))]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert len(launched) >= 2 and all(len(output.outputs[0].token_ids) == 2 for output in outputs)
    with pytest.raises(AssertionError, match="tolist waits"), nothing_waits():
        torch.ones(2).tolist()
    with pytest.raises(AssertionError, match="nonzero waits"), nothing_waits():
        torch.ones(2).nonzero()


class LittleMemory:
    """A forward pass that has no memory for steps of more than 6 tokens, nor to record steps of 2 rows at first."""

    def __init__(self, forward: DecodeGraphs) -> None:
        self.forward = forward
        self.failures = self.releases = 0

    def __call__(self, input_ids: Tensor, positions: Tensor, meta: Any) -> Tensor:
        decodes = len(positions) == meta.num_decodes
        if len(positions) > 6 or (decodes and len(positions) == 2 and not self.releases):
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.forward(input_ids, positions, meta)

    def release(self) -> None:
        self.releases += 1
        self.forward.release()


def test_where_memory_runs_out_smaller_steps_give_the_same_tokens(engine: Callable[..., LLM]) -> None:
    wanted = generate(engine())
    llm = engine()
    runner: Any = llm.llm_engine.core.executor._runner  # type: ignore[attr-defined]
    runner.forward = memory = LittleMemory(runner.forward)
    assert generate(llm) == wanted
    assert memory.failures == memory.releases > 0


def test_memory_that_runs_out_behind_another_error_is_seen() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert is_out_of_memory(error)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_keys_and_values_of_eight_bits(engine: Callable[..., LLM]) -> None:
    llm = engine(kv_cache_dtype="fp8")
    executor: Any = llm.llm_engine.core.executor
    assert {cache.dtype for pair in executor._runner.kv_caches for cache in pair} == {torch.float8_e4m3fn}
    assert executor.kv_bytes_per_block * 4 == 2 * 1 * BLOCK * 2 * 10 * 4  # a quarter of float32
    assert generate(llm) == generate(engine(kv_cache_dtype="fp8", enforce_eager=True))


def test_the_engine_gives_the_tokens_of_a_cpu(
    checkpoint: Path, engine: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = generate(engine())
    assert recorded == generate(engine(enforce_eager=True))
    assert recorded == generate(engine(num_gpu_blocks_override=8, max_num_batched_tokens=8))  # preemption, chunks
    monkeypatch.undo()
    with_cpu = LLM(str(checkpoint), block_size=BLOCK, max_num_seqs=3, dtype="float32", skip_tokenizer_init=True,
                   device="cpu", num_gpu_blocks_override=200)  # fmt: skip
    assert recorded == generate(with_cpu)
