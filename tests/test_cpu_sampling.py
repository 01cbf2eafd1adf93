"""The C++ sampling kernels against the sampler on torch and against exact arithmetic, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovllm.engine.plan import RowStart
from nanovllm.ops.cpu import library as cpu_library
from nanovllm.ops.cpu.sampling import Sampling
from nanovllm.runner.sampler import Sampler, mark_invalid
from nanovllm.runner.uniform import uniforms
from nanovllm.sampling_params import SamplingParams

INSTRUCTION_SETS = cpu_library.supported_instruction_sets()
pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="the C++ kernels are not built")

BLOCK = 128
SEEDS = st.integers(0, 2**31)
WIDTHS = st.one_of(st.integers(1, 700), st.sampled_from([BLOCK, 4 * BLOCK, 20_011]))


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Sampling]:
    library = cpu_library.load_library(request.param)
    assert library is not None
    library.set_threads(2)
    yield Sampling(library)
    library.set_threads(1)


def normal(seed: int, rows: int, width: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread


def sample(
    logits: torch.Tensor,
    params: list[SamplingParams],
    kernels: Sampling | None,
    seeds: list[int] | None = None,
    positions: list[int] | None = None,
) -> torch.Tensor:
    """What the sampler chooses with the kernels, or (None) with torch."""
    own = (None, None) if kernels is None else (kernels.choose, kernels.penalise)
    sampler = Sampler(len(params), logits.shape[1], "raw_logprobs", *own)
    for row, param in enumerate(params):
        sampler.start(RowStart(row, [0], 1, param, row if seeds is None else seeds[row], (), ()))
    where = np.ones(len(params), np.int64) if positions is None else np.array(positions)
    table = torch.zeros(len(params), 8, dtype=torch.int32)
    return sampler.sample(logits.clone(), np.arange(len(params)), where, table)[0]


# ---- exact arithmetic ---------------------------------------------------------------------------------------------

CLOSE = 1e-5  # relative to a row's total weight: nearer to an edge than this, rounding may decide


class Exact:
    """The choice in float64, and how near to an edge its decisions were."""

    def __init__(self) -> None:
        self.margin = 1.0

    def less(self, values: np.ndarray, bound: float, scale: float) -> np.ndarray:
        self.margin = min(self.margin, float(np.abs(values - bound).min(initial=np.inf)) / scale)
        return values < bound

    def draw(self, weights: np.ndarray, uniform: np.ndarray) -> int:
        blocks = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK))
        first = BLOCK * self.column(blocks, uniform[0])
        return first + self.column(weights[first : first + BLOCK], uniform[1])

    def column(self, weights: np.ndarray, uniform: float) -> int:
        reached = np.cumsum(weights)
        total = reached[-1]
        # What is reached with the last weight is the total, however it was rounded.
        self.less(reached[reached < total], float(uniform) * total, total)
        return int(np.argmax(reached > float(uniform) * total))

    def choose(self, z: np.ndarray, top_k: int, top_p: float, min_p: float, seed: int, position: int) -> int:
        seeds, positions = np.array([seed], np.uint64), np.array([position])
        weights = np.exp(z - z.max())
        weights[self.less(weights, min_p, 1.0) & (z < z.max()) if min_p else np.zeros(len(z), bool)] = 0.0
        if 0 < top_k < len(z):
            order = np.argsort(-z, kind="stable")
            order = order[z[order] >= z[order[top_k - 1]]]
            weights, values = weights[order], z[order]
            if top_p < 1.0:
                reached, limit = np.cumsum(weights), top_p * weights.sum()
                last = int(self.less(reached[:-1], limit, weights.sum()).sum())
                weights[values < values[last]] = 0.0
            return int(order[self.draw(weights, uniforms(seeds, positions)[0])])
        limit, attempt = top_p * weights.sum() if top_p < 1.0 else np.inf, 0
        total = weights.sum()
        while True:
            token = self.draw(weights, uniforms(seeds, positions, attempt)[0])
            weights = np.where(z > z[token], weights, 0.0)
            above = weights.sum()
            if above == 0.0 or (self.less(np.array([above]), limit, total)[0] if limit < np.inf else True):
                return token
            attempt += 1


limits = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 2.0]),
        "top_k": st.one_of(st.just(0), st.integers(1, 200), st.integers(1, 5000)),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 0.999), st.sampled_from([1e-6, 1e-300])),
        "min_p": st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    }
)


@settings(max_examples=60, deadline=None)
@given(width=WIDTHS, limit=limits, spread=st.sampled_from([0.01, 1.0, 5.0, 40.0]), ties=st.booleans(), seed=SEEDS)
@example(
    width=151_936, limit={"temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_p": 0.0}, spread=2.0, ties=False, seed=1
)
@example(
    width=151_936, limit={"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.0}, spread=2.0, ties=True, seed=2
)
@example(
    width=3_000, limit={"temperature": 1.0, "top_k": 64, "top_p": 0.5, "min_p": 0.0}, spread=0.01, ties=True, seed=3
)
def test_tokens_are_those_of_torch_and_of_exact_arithmetic(kernels, width, limit, spread, ties, seed) -> None:
    rows = 4
    logits = normal(seed, rows, width, spread)
    if ties:
        logits = logits.round()
    params = [SamplingParams(**limit)] * rows
    seeds, positions = [seed, seed + 1, 2**64 - 1 - seed, 7], [1, 5, 900, 2**39 + seed]
    found = sample(logits, params, kernels, seeds, positions)
    on_torch = sample(logits, params, None, seeds, positions)
    scaled = (logits / np.float32(limit["temperature"])).double().numpy()
    top_p, min_p = float(np.float32(limit["top_p"])), float(np.float32(limit["min_p"]))
    for row in range(rows):
        exact = Exact()
        token = exact.choose(scaled[row], limit["top_k"], top_p, min_p, seeds[row], positions[row])
        if exact.margin < CLOSE:
            continue
        assert found[row] == token
        # Which of several equal candidates comes first, torch's selection leaves open.
        assert on_torch[row] == token or (limit["top_k"] and logits[row, on_torch[row]] == logits[row, token])


def test_hardly_a_draw_is_so_near_to_an_edge_that_rounding_decides(kernels) -> None:
    """Nor is the test above empty: of a thousand draws from a large vocabulary, nearly all are torch's."""
    rows, width = 200, 20_011
    logits = normal(1, rows, width)
    for limit in ({}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 300, "top_p": 0.8}, {"min_p": 0.02}):
        params = [SamplingParams(**limit)] * rows
        assert (sample(logits, params, kernels) == sample(logits, params, None)).sum() >= rows - 2


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 5), width=WIDTHS, seed=SEEDS)
def test_greedy_is_the_first_of_the_largest(kernels, rows, width, seed) -> None:
    logits = normal(seed, rows, width).round()
    neutral = np.ones(rows, np.float32), np.zeros(rows, np.float32), np.zeros(rows, np.uint64)
    tokens = kernels.choose(logits, np.zeros(rows, np.float32), np.zeros(rows, np.int64), *neutral, np.arange(rows))
    assert torch.equal(tokens, logits.argmax(-1))


def test_equal_logits_show_the_random_numbers_of_the_runner(kernels) -> None:
    blocks = 37
    seeds, positions = [0, 1, 2**63 + 5, 2**64 - 1], [0, 7, 123_456, 2**39]
    tokens = sample(torch.zeros(4, blocks * BLOCK), [SamplingParams()] * 4, kernels, seeds, positions)
    block, column = uniforms(np.array(seeds, np.uint64), np.array(positions)).astype(np.float64).T
    assert tokens.tolist() == (np.floor(block * blocks) * BLOCK + np.floor(column * BLOCK)).tolist()


def test_limits_that_leave_one_token_or_all(kernels) -> None:
    logits = normal(5, 40, 1000)
    best = logits.argmax(-1)
    for limit in ({"top_k": 1}, {"top_p": 1e-300}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 900, "top_p": 1e-9}):
        assert torch.equal(sample(logits, [SamplingParams(**limit)] * 40, kernels), best)
    free = sample(logits, [SamplingParams()] * 40, kernels)
    assert torch.equal(sample(logits, [SamplingParams(top_k=1000)] * 40, kernels), free)
    assert not torch.equal(free, best)


def test_ties_with_the_top_k_boundary_are_all_kept_however_many_there_are(kernels) -> None:
    logits = torch.zeros(1, 2_000)
    logits[0, :3] = 1.0
    rows = 3_000
    for k in (3, 4, 64):
        chosen = set(sample(logits.repeat(rows, 1), [SamplingParams(top_k=k)] * rows, kernels).tolist())
        assert chosen == {0, 1, 2} if k == 3 else len(chosen) > 1_000


MANY = [
    {},
    {"temperature": 0.0},
    {"top_k": 20, "top_p": 0.95},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"temperature": 0.6, "top_k": 2000, "min_p": 0.01},
]


def test_a_row_draws_the_same_in_any_batch_on_any_number_of_threads(kernels) -> None:
    rows, width = 36, 20_011
    logits = normal(2, rows, width, 0.7)
    params = [SamplingParams(**MANY[i % len(MANY)]) for i in range(rows)]
    seeds = [1000 + i for i in range(rows)]
    kernels._library.set_threads(1)
    alone = [int(sample(logits[i : i + 1], [params[i]], kernels, [seeds[i]])) for i in range(rows)]
    for threads in (1, 3):
        kernels._library.set_threads(threads)
        order = np.random.default_rng(threads).permutation(rows)
        together = sample(logits[order], [params[i] for i in order], kernels, [seeds[i] for i in order])
        assert together.tolist() == [alone[i] for i in order]
    kernels._library.set_threads(2)


@pytest.mark.parametrize("limit", MANY, ids=str)
def test_rows_that_are_not_finite_are_found_and_leave_the_others_alone(kernels, limit) -> None:
    logits = normal(3, 7, 300)
    healthy = sample(logits, [SamplingParams(**limit)] * 7, kernels)
    broken = logits.clone()
    broken[1, 299] = torch.nan
    broken[2] = -torch.inf
    broken[3, 140] = torch.inf
    broken[4] = torch.nan
    broken[5, torch.arange(300) != 9] = -torch.inf  # one finite number suffices
    tokens = sample(broken, [SamplingParams(**limit)] * 7, kernels)
    assert mark_invalid(tokens, broken).tolist() == [int(healthy[0]), -1, -1, -1, -1, 9, int(healthy[6])]


def test_choosing_leaves_the_logits_as_they_are_and_takes_them_contiguous_only(kernels) -> None:
    logits = normal(4, 2, 500)
    before = logits.clone()
    arguments = (np.ones(2, np.float32), np.array([5, 0]), np.array([1.0, 0.9], np.float32), np.zeros(2, np.float32))
    kernels.choose(logits, *arguments, np.zeros(2, np.uint64), np.arange(2))
    assert torch.equal(logits, before)
    for wrong in (logits[:, ::2], logits.double()):
        with pytest.raises(ValueError, match="contiguous logits of float32"):
            kernels.choose(wrong, *arguments, np.zeros(2, np.uint64), np.arange(2))


# ---- penalties ----------------------------------------------------------------------------------------------------

histories = st.lists(st.integers(0, 30), max_size=40)
penalties = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.5, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
    },
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(penalties, histories.filter(bool), histories), min_size=1, max_size=5), SEEDS)
def test_penalties_have_the_bits_of_torch(kernels, batch, seed) -> None:
    """As seen in the processed logits of every row; the table holds other tokens behind a row's own."""
    vocab, generator = 31, np.random.default_rng(seed)
    logits = normal(seed, len(batch), vocab)
    rows = generator.permutation(len(batch) + 2)[: len(batch)]
    tokens = torch.from_numpy(generator.integers(0, vocab, (len(batch) + 2, 96))).int()
    found = []
    for penalise in (None, kernels.penalise):
        sampler = Sampler(len(batch) + 2, vocab, "processed_logits", None, penalise)
        for row, (options, prompt, output) in zip(rows.tolist(), batch, strict=True):
            params = SamplingParams(temperature=0, logprobs=-1, **options)
            sampler.start(RowStart(row, prompt + output, len(prompt), params, 0, (), ()))
            tokens[row, : len(prompt + output)] = torch.tensor(prompt + output, dtype=torch.int32)
        positions = np.array([len(prompt) + len(output) for _, prompt, output in batch])
        penalised = logits.clone()
        _, logprobs = sampler.sample(penalised, rows, positions, tokens)
        found.append((penalised, [logprobs[i].logprobs.tobytes() for i in range(len(batch))]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_penalties_of_many_rows_and_long_histories(kernels) -> None:
    """Divided among threads; tokens outside the vocabulary (there are none in a healthy table) touch nothing."""
    rows, vocab, length = 40, 3_000, 4_000
    logits = normal(6, rows, vocab)
    tokens = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.1, presence_penalty=-0.4)
    results = []
    for penalise in (None, kernels.penalise):
        sampler = Sampler(rows, vocab, "raw_logits", None, penalise)
        for row in range(rows):
            sampler.start(RowStart(row, [], 100 * row, params, 0, (), ()))
        results.append(logits.clone())
        sampler.sample(results[-1], np.arange(rows), np.full(rows, length), tokens)
    assert torch.equal(*results)
    tokens[:, ::2] = torch.tensor([-1, vocab, 2**31 - 1, -(2**31)]).int().repeat(rows, length // 8)
    neutral = np.arange(rows), np.arange(rows), np.full(rows, length), np.zeros(rows, np.int64)
    untouched = results[-1].clone()
    kernels.penalise(results[-1], tokens, *neutral, *(np.full(rows, x, np.float32) for x in (1.0, 0.0, 0.0)))
    assert torch.equal(results[-1], untouched)
    kernels.penalise(results[-1], tokens, *neutral, *(np.full(rows, x, np.float32) for x in (1.5, 0.1, 0.1)))
    assert torch.isfinite(results[-1]).all() and not torch.equal(results[-1], untouched)
