"""The sampler against plain references: distributions, filters, penalties, bans, log-probabilities, independence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.plan import RowStart
from nanovllm.runner.blocks import BLOCK, argmax, block_max, block_sum, top_k
from nanovllm.runner.choice import draw, keep_likeliest
from nanovllm.runner.ragged import ragged_ranges
from nanovllm.runner.sampler import Sampler
from nanovllm.runner.uniform import uniforms
from nanovllm.sampling_params import SamplingParams

torch.set_num_threads(1)

VOCAB = 300  # two whole blocks and a short one


def make_sampler(
    params: list[SamplingParams],
    histories: list[tuple[list[int], list[int]]] | None = None,
    *,
    vocab: int = VOCAB,
    mode: str = "raw_logprobs",
    seeds: list[int] | None = None,
    rows: list[int] | None = None,
    stop_ids: tuple[int, ...] = (),
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> tuple[Sampler, np.ndarray, np.ndarray, torch.Tensor]:
    """A sampler whose rows hold ``params`` and (prompt, output) ``histories``, and the arguments of ``sample``."""
    rows = list(range(len(params))) if rows is None else rows
    histories = histories or [([1], [])] * len(params)
    sampler = Sampler(max(rows) + 1, vocab, mode)
    tokens = torch.full((max(rows) + 1, 64), vocab - 1, dtype=torch.int32)  # stale ids behind the history
    for index, (row, param, (prompt, output)) in enumerate(zip(rows, params, histories, strict=True)):
        known = prompt + output
        seed = index if seeds is None else seeds[index]
        sampler.start(RowStart(row, known, len(prompt), param, seed, stop_ids, bad_words))
        tokens[row, : len(known)] = torch.tensor(known)
    positions = np.array([len(prompt) + len(output) for prompt, output in histories])
    return sampler, np.array(rows), positions, tokens


def sample(logits: torch.Tensor, params: list[SamplingParams], *args: Any, **options: Any) -> list[int]:
    sampler, rows, positions, tokens = make_sampler(params, *args, vocab=logits.shape[1], **options)
    return sampler.sample(logits.clone(), rows, positions, tokens)[0].tolist()


def random_logits(rows: int, vocab: int = VOCAB, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def reference_probabilities(
    logits: np.ndarray, temperature: float = 1.0, k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """The distribution in float64, filters by a full sort, ties with a boundary kept."""
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    p[p < min_p] = 0.0
    if 0 < k < len(z):
        p[z < np.sort(z)[-k]] = 0.0
    p /= p.sum()
    if top_p < 1.0:
        order = np.argsort(-z, kind="stable")
        reached = np.cumsum(p[order])
        boundary = z[order[min(np.searchsorted(reached, top_p), len(z) - 1)]]
        p[z < boundary] = 0.0
        p /= p.sum()
    return p


def chi_square_p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Upper tail of the chi-square statistic (Wilson and Hilferty 1931), cells of under 5 expected counts merged."""
    expected = probabilities * counts.sum()
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    if expected[-1] < 1e-9:
        assert observed[-1] == 0, "a token of probability zero was drawn"
        observed, expected = observed[:-1], expected[:-1]
    freedom = len(observed) - 1
    statistic = ((observed - expected) ** 2 / expected).sum() / freedom
    z = (statistic ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


# ---- building blocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3, 40 * BLOCK])
def test_blockwise_reductions_equal_whole_row_ones(width: int) -> None:
    x = random_logits(5, width)
    torch.testing.assert_close(block_sum(x).sum(-1), x.sum(-1), rtol=1e-5, atol=1e-4)
    assert torch.equal(block_max(x).amax(-1), x.amax(-1))
    assert torch.equal(argmax(x), x.argmax(-1))
    for k in {1, min(3, width), width}:
        values, columns = top_k(x, k)
        assert torch.equal(values, x.sort(-1, descending=True).values[:, :k])
        assert torch.equal(x.gather(1, columns), values)


def test_argmax_takes_the_first_of_equal_maxima() -> None:
    x = torch.zeros(1, 4 * BLOCK)
    x[0, [200, 140, 300]] = 1.0
    assert argmax(x).tolist() == [140]


def test_ragged_ranges_equal_concatenated_aranges() -> None:
    starts, lengths = np.array([5, 0, 7, 2]), np.array([3, 0, 1, 4])
    expected = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    assert np.array_equal(ragged_ranges(starts, lengths), expected)


def test_uniforms_are_uniform_and_independent_across_seeds_positions_halves_and_attempts() -> None:
    n = 20_000
    streams = [
        uniforms(np.full(n, 7, np.uint64), np.arange(n)),  # one request, consecutive positions
        uniforms(np.arange(n).astype(np.uint64), np.full(n, 3)),  # consecutive seeds, one position
        uniforms(np.full(n, 7, np.uint64), np.arange(n), attempt=1),
    ]
    columns = np.concatenate(streams, axis=1).T
    assert columns.min() >= 0.0 and columns.max() < 1.0
    for column in columns:
        assert chi_square_p_value(np.bincount((column * 100).astype(int), minlength=100), np.full(100, 0.01)) > 1e-3
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4 / math.sqrt(n)
    assert np.abs(np.corrcoef(columns[0][:-1], columns[0][1:])[0, 1]) < 4 / math.sqrt(n)


def test_draw_never_yields_a_column_of_weight_zero() -> None:
    weights = torch.zeros(400, 3 * BLOCK + 17)
    weights[:, [0, 130, 131, 3 * BLOCK + 16]] = torch.tensor([1e-30, 1.0, 1e-20, 1e-3])
    extremes = np.array([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24], [0.0, 1 - 2**-24], [1 - 2**-24, 0.0]], np.float32)
    uniform = np.concatenate([extremes, uniforms(np.arange(396).astype(np.uint64), np.arange(396))])
    columns, _ = draw(weights, torch.from_numpy(uniform))
    assert set(columns.tolist()) <= {0, 130, 131, 3 * BLOCK + 16}


# ---- the distribution ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_k": 70},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"min_p": 0.1},
        {"min_p": 0.02, "top_p": 0.8},
        {"top_k": 20, "top_p": 0.95, "temperature": 0.7},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 1.5},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(options: dict[str, Any]) -> None:
    draws, rows = 20_000, 500
    logits = random_logits(1, scale=1.5, seed=3)
    names = {"top_k": "k", "temperature": "temperature", "top_p": "top_p", "min_p": "min_p"}
    expected = reference_probabilities(logits[0].numpy(), **{names[key]: value for key, value in options.items()})
    sampler, row_index, positions, tokens = make_sampler([SamplingParams(**options)] * rows)
    counts = np.zeros(VOCAB)
    for step in range(draws // rows):
        chosen, _ = sampler.sample(logits.repeat(rows, 1), row_index, positions + step, tokens)
        counts += np.bincount(chosen.numpy(), minlength=VOCAB)
    assert chi_square_p_value(counts, expected) > 1e-3


def test_a_flat_nucleus_of_a_large_vocabulary_is_drawn_exactly() -> None:
    """Rejection must not favour likely tokens when most of the vocabulary is in the nucleus, or little of it."""
    vocab, rows = 5_000, 2_000
    logits = random_logits(1, vocab, scale=0.5, seed=5)
    for top_p in (0.1, 0.95):
        expected = reference_probabilities(logits[0].numpy(), top_p=top_p)
        order = np.argsort(-expected, kind="stable")
        sampler, row_index, positions, tokens = make_sampler([SamplingParams(top_p=top_p)] * rows, vocab=vocab)
        counts = np.zeros(vocab)
        for step in range(4):
            chosen, _ = sampler.sample(logits.repeat(rows, 1), row_index, positions + step, tokens)
            counts += np.bincount(chosen.numpy(), minlength=vocab)
        # Cells of similar probability together: 8,000 draws do not fill 5,000 cells.
        groups = np.array_split(order, 50)
        grouped = np.array([counts[g].sum() for g in groups]), np.array([expected[g].sum() for g in groups])
        assert chi_square_p_value(*grouped) > 1e-3


# Coarse values make ties, at boundaries too. Where the limits fall exactly on a token's share, rounding decides: then
# what is kept must be what slightly wider limits keep.
tied_logits = st.lists(st.integers(-8, 8).map(float), min_size=1, max_size=2 * BLOCK + 5)
limits = st.fixed_dictionaries(
    {
        "k": st.one_of(st.just(0), st.integers(1, 80)),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
        "min_p": st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    }
)


@settings(max_examples=150, deadline=None)
@given(tied_logits, limits)
def test_filters_keep_what_a_sorted_reference_keeps(values: list[float], limit: dict[str, Any]) -> None:
    logits = torch.tensor([values])
    expected = reference_probabilities(logits[0].numpy(), **limit) > 0
    nudged = {**limit, "top_p": limit["top_p"] * (1 + 1e-5), "min_p": limit["min_p"] * (1 - 1e-5)}
    nudged = reference_probabilities(logits[0].numpy(), **nudged) > 0
    arrays = [np.array([limit["k"]]), *(np.array([limit[n]], np.float32) for n in ("top_p", "min_p"))]
    kept = (keep_likeliest(logits, *arrays) > -torch.inf)[0].numpy()
    assert (kept == expected).all() or (kept == nudged).all()
    # What is drawn lies in what is kept.
    rows = 64
    params = SamplingParams(top_k=limit["k"], top_p=limit["top_p"], min_p=limit["min_p"])
    chosen = sample(logits.repeat(rows, 1), [params] * rows)
    assert kept[chosen].all()


def test_top_p_keeps_the_boundary_token_and_a_tiny_top_p_keeps_one() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().unsqueeze(0)
    arguments = np.array([0]), np.array([0.6], np.float32), np.array([0.0], np.float32)
    assert (keep_likeliest(logits, *arguments) > -torch.inf).tolist() == [[True, True, False]]
    rows = 300
    assert set(sample(logits.repeat(rows, 1), [SamplingParams(top_p=0.6)] * rows)) == {0, 1}
    for tiny in (1e-6, 1e-300):  # the latter is 0 in float32
        assert set(sample(logits.repeat(rows, 1), [SamplingParams(top_p=tiny)] * rows)) == {0}
        assert set(sample(logits.repeat(rows, 1), [SamplingParams(top_p=tiny, top_k=2)] * rows)) == {0}


def test_ties_with_the_top_k_boundary_are_all_kept_however_many_there_are() -> None:
    logits = torch.zeros(1, 2_000)
    logits[0, :3] = 1.0
    rows = 3_000
    for k in (3, 4, 64):
        chosen = set(sample(logits.repeat(rows, 1), [SamplingParams(top_k=k)] * rows))
        assert chosen == {0, 1, 2} if k == 3 else len(chosen) > 1_000


def test_top_k_beyond_the_vocabulary_and_one_token_vocabularies() -> None:
    logits = random_logits(2)
    assert sample(logits, [SamplingParams(top_k=10_000)] * 2) == sample(logits, [SamplingParams()] * 2)
    assert sample(torch.zeros(1, 1), [SamplingParams(top_k=1, top_p=0.5)]) == [0]


# ---- independence -------------------------------------------------------------------------------------------------


def varied_params(index: int) -> SamplingParams:
    choices: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_k": 20, "top_p": 0.95},
        {"top_k": 200},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 0.6},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
        {"logprobs": 3},
        {"logit_bias": {5: 3.0, 6: -200.0}, "top_p": 0.5},
        {"allowed_token_ids": [3, 4, 5, 250], "logprobs": 5},
    ]
    return SamplingParams(**choices[index % len(choices)])


@pytest.mark.parametrize(("vocab", "scale"), [(VOCAB, 3.0), (20_011, 0.7)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_request_samples_the_same_alone_and_anywhere_in_a_batch(vocab: int, scale: float, threads: int) -> None:
    count = 32
    torch.set_num_threads(threads)
    try:
        logits = random_logits(count, vocab, scale, seed=1)
        params = [varied_params(i) for i in range(count)]
        histories = [([i + 1, 2], [3 + i] * (i % 4)) for i in range(count)]
        seeds = [1000 + i for i in range(count)]
        alone = []
        for i in range(count):
            sampler, rows, positions, tokens = make_sampler([params[i]], [histories[i]], vocab=vocab, seeds=[seeds[i]])
            chosen, logprobs = sampler.sample(logits[i : i + 1].clone(), rows, positions, tokens)
            alone.append((int(chosen[0]), logprobs.get(0)))
        generator = np.random.default_rng(0)
        for _ in range(4):
            order = generator.permutation(count)
            sampler, rows, positions, tokens = make_sampler(
                [params[i] for i in order],
                [histories[i] for i in order],
                vocab=vocab,
                seeds=[seeds[i] for i in order],
                rows=generator.permutation(count + 5)[:count].tolist(),
            )
            chosen, logprobs = sampler.sample(logits[order].contiguous(), rows, positions, tokens)
            for place, i in enumerate(order.tolist()):
                token, own = alone[i]
                assert int(chosen[place]) == token
                assert (own is None) == (place not in logprobs)
                if own is not None:
                    assert np.array_equal(own.token_ids, logprobs[place].token_ids)
                    assert np.array_equal(own.logprobs, logprobs[place].logprobs)
    finally:
        torch.set_num_threads(1)


def test_seed_and_position_both_matter() -> None:
    logits = torch.zeros(1, VOCAB)
    sampler, rows, positions, tokens = make_sampler([SamplingParams()])
    by_position = {int(sampler.sample(logits.clone(), rows, positions + i, tokens)[0]) for i in range(40)}
    by_seed = {sample(logits, [SamplingParams()], seeds=[seed])[0] for seed in range(40)}
    assert len(by_position) > 20 and len(by_seed) > 20
    assert sample(logits, [SamplingParams()], seeds=[2**64 - 1]) == sample(logits, [SamplingParams()], seeds=[-1])


def test_rows_without_finite_logits_get_a_valid_token_and_leave_the_others_alone() -> None:
    logits = random_logits(6)
    params = [SamplingParams(), SamplingParams(top_k=5, top_p=0.9), SamplingParams(top_p=0.9, min_p=0.1)] * 2
    params += [SamplingParams(temperature=0)] * 2
    logits = random_logits(8)
    healthy = sample(logits, params)
    for fault in (-torch.inf, torch.inf, torch.nan):
        broken = logits.clone()
        broken[:3], broken[6] = fault, fault
        chosen = sample(broken, params)
        assert all(0 <= token < VOCAB for token in chosen)
        assert chosen[3:6] == healthy[3:6] and chosen[7] == healthy[7]


# ---- rules before the choice --------------------------------------------------------------------------------------


def expected_processed(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int], stop_ids: Any, bad_words: Any
) -> np.ndarray:
    z = logits.astype(np.float64).copy()
    if params.allowed_token_ids is not None:
        z[[t for t in range(len(z)) if t not in params.allowed_token_ids]] = -np.inf
    for *before, last in bad_words:
        if len(before) <= len(output) and output[len(output) - len(before) :] == before:
            z[last] = -np.inf
    if len(output) < params.min_tokens:
        z[list(stop_ids)] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        z[token] += max(-100.0, min(100.0, bias))
    for token in set(prompt + output):
        z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
    for token in set(output):
        z[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return z


tokens_lists = st.lists(st.integers(0, 9), max_size=12)
rules = st.fixed_dictionaries(
    {},
    optional={
        "allowed_token_ids": st.lists(st.integers(0, 19), min_size=1, max_size=8, unique=True),
        "min_tokens": st.integers(0, 12),
        "logit_bias": st.dictionaries(st.integers(0, 19), st.floats(-150, 150), max_size=4),
        "repetition_penalty": st.floats(0.5, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
    },
)
bad_word_lists = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple), max_size=4).map(tuple)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(rules, tokens_lists.filter(bool), tokens_lists, bad_word_lists), min_size=1, max_size=4),
    st.integers(0, 5),
)
def test_processed_logits_equal_the_rules_written_as_loops(batch: list[Any], seed: int) -> None:
    vocab, stop_ids = 20, (4, 17)
    logits = random_logits(len(batch), vocab, seed=seed)
    params = [SamplingParams(temperature=0, max_tokens=50, logprobs=-1, **options) for options, *_ in batch]
    sampler = Sampler(len(batch), vocab, "processed_logits")
    tokens = torch.randint(0, vocab, (len(batch), 32), dtype=torch.int32)
    for row, (param, (_, prompt, output, words)) in enumerate(zip(params, batch, strict=True)):
        sampler.start(RowStart(row, prompt + output, len(prompt), param, 0, stop_ids, words))
        tokens[row, : len(prompt + output)] = torch.tensor(prompt + output)
    positions = np.array([len(prompt) + len(output) for _, prompt, output, _ in batch])
    chosen, logprobs = sampler.sample(logits.clone(), np.arange(len(batch)), positions, tokens)
    for row, (_, prompt, output, words) in enumerate(batch):
        expected = expected_processed(logits[row].numpy(), params[row], prompt, output, stop_ids, words)
        found = np.empty(vocab)
        found[logprobs[row].token_ids] = logprobs[row].logprobs
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        assert (
            np.isclose(expected[int(chosen[row])], expected.max(), rtol=1e-5, atol=1e-4) or np.isneginf(expected).all()
        )


def test_min_tokens_lets_stop_ids_through_when_the_output_is_long_enough() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 10.0
    params = SamplingParams(temperature=0, min_tokens=2)
    for output, expected in (([], 0), ([5], 0), ([5, 5], 7)):
        assert sample(logits, [params], [([1, 2, 3], output)], stop_ids=(7,)) == [expected]


def test_a_bad_word_begins_in_the_output_not_in_the_prompt() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 10.0
    for prompt, output, allowed in (([1, 5, 6], [], True), ([1, 5], [6], True), ([1], [5, 6], False)):
        chosen = sample(logits, [SamplingParams(temperature=0)], [(prompt, output)], bad_words=((5, 6, 7),))
        assert (chosen == [7]) == allowed


def test_a_row_forgets_the_rules_of_the_request_before() -> None:
    sampler, rows, positions, tokens = make_sampler(
        [SamplingParams(temperature=0, allowed_token_ids=[3], logprobs=2, repetition_penalty=2.0, min_tokens=3)],
        stop_ids=(9,),
        bad_words=((8,),),
    )
    sampler.start(RowStart(0, [1], 1, SamplingParams(temperature=0), 0, (9,)))
    for winner in (8, 9, 1):
        logits = torch.zeros(1, VOCAB)
        logits[0, winner] = 1.0
        chosen, logprobs = sampler.sample(logits, rows, positions, tokens)
        assert chosen.tolist() == [winner] and not logprobs


# ---- log-probabilities --------------------------------------------------------------------------------------------


def test_logprobs_hold_the_token_first_then_the_likeliest_and_the_rank() -> None:
    logits = random_logits(3)
    params = [SamplingParams(logprobs=k, seed=1) for k in (0, 4, -1)]
    sampler, rows, positions, tokens = make_sampler(params)
    chosen, found = sampler.sample(logits.clone(), rows, positions, tokens)
    exact = torch.log_softmax(logits.double(), -1)
    for row, count in enumerate((0, 4, VOCAB)):
        token = int(chosen[row])
        order = exact[row].argsort(descending=True)
        assert found[row].token_ids.tolist() == [token, *order[:count].tolist()]
        np.testing.assert_allclose(found[row].logprobs, exact[row][found[row].token_ids].numpy(), atol=1e-5)
        assert found[row].logprobs.dtype == np.float32 and found[row].token_ids.dtype == np.int64
        assert found[row].rank == order.tolist().index(token) + 1


def test_raw_logprobs_ignore_what_the_sampler_does_and_processed_ones_show_it() -> None:
    logits = random_logits(2)
    params = [
        SamplingParams(logprobs=5, temperature=0.5, top_k=3, logit_bias={7: 50.0}),
        SamplingParams(logprobs=5, temperature=0, allowed_token_ids=[2, 3]),
    ]
    raw = torch.log_softmax(logits, -1)
    biased = logits[0].clone()
    biased[7] += 50.0
    kept = torch.log_softmax(torch.tensor(reference_probabilities(biased.numpy(), 0.5, 3)).log(), -1)
    for mode in ("raw_logprobs", "raw_logits", "processed_logprobs"):
        sampler, rows, positions, tokens = make_sampler(params, mode=mode)
        chosen, found = sampler.sample(logits.clone(), rows, positions, tokens)
        for row in (0, 1):
            ids, values = found[row].token_ids, found[row].logprobs
            if mode == "raw_logprobs":
                np.testing.assert_allclose(values, raw[row][ids].numpy(), rtol=1e-5)
            elif mode == "raw_logits":
                np.testing.assert_allclose(values, logits[row][ids].numpy(), rtol=1e-5)
        if mode == "processed_logprobs":
            np.testing.assert_allclose(found[0].logprobs, kept[found[0].token_ids].numpy(), atol=1e-4)
            assert np.isneginf(found[0].logprobs[4:]).all() and int(chosen[0]) == 7
            assert np.isneginf(found[1].logprobs[3:]).all()
