"""The sampling kernels: what they may choose, how often, and that nothing but a row's own numbers decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_device import DEVICE, ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from nanovllm.ops.cuda import sampling
from nanovllm.ops.cuda.sampling import Choices, choose
from nanovllm.runner.choice import keep_likeliest
from nanovllm.runner.uniform import uniforms


@pytest.fixture(autouse=not ON_GPU)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_PIECE", 32)


def choices(
    rows: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seeds: list[int] | None = None,
    positions: list[int] | None = None,
) -> Choices:
    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=DEVICE)

    seed = np.array(range(rows) if seeds is None else seeds, np.uint64).view(np.int64)
    position = np.arange(rows) if positions is None else np.array(positions)
    return Choices(
        full(temperature, torch.float32),
        full(top_k, torch.int32),
        full(top_p, torch.float32),
        full(min_p, torch.float32),
        torch.from_numpy(seed).to(DEVICE),
        torch.from_numpy(position.astype(np.int64)).to(DEVICE),
    )


def draw(rows: int, width: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread).to(DEVICE)


@settings(max_examples=10)
@given(st.integers(0, 4), st.integers(1, 150), st.integers(0, 99))
def test_greedy_is_the_first_of_the_largest(rows: int, width: int, seed: int) -> None:
    logits = draw(rows, width, seed).round()  # many ties
    assert torch.equal(choose(logits, choices(rows, temperature=0.0)).cpu(), logits.cpu().argmax(-1))


@settings(max_examples=14)
@given(
    width=st.sampled_from([5, 64, 100]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.1]),
    ties=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_only_what_the_filters_keep_is_drawn(
    width: int, temperature: float, top_k: int, top_p: float, min_p: float, ties: bool, seed: int
) -> None:
    rows = 3
    logits = draw(rows, width, seed)
    logits = logits.round() if ties else logits
    before = logits.clone()
    settings = (np.full(rows, top_k), np.full(rows, top_p, np.float32), np.full(rows, min_p, np.float32))
    # An edge of the nucleus may fall on either side of a sum's last bit.
    near = [
        keep_likeliest(logits.cpu() / temperature, settings[0], (settings[1] + shift).astype(np.float32), settings[2])
        for shift in (-1e-5, 1e-5)
    ]
    tokens = choose(logits, choices(rows, temperature, top_k, top_p, min_p, seeds=[seed, seed + 1, 2**64 - 1])).cpu()
    assert torch.equal(logits, before)
    for row, token in enumerate(tokens.tolist()):
        assert any(torch.isfinite(kept[row, token]) for kept in near)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 0.6, 0.0), (9, 0.8, 0.05)])
def test_frequencies_are_those_of_the_distribution(top_k: int, top_p: float, min_p: float) -> None:
    rows, width = 4000 if ON_GPU else 40, 20
    logits = draw(1, width, seed=5, spread=1.5).expand(rows, width).contiguous()
    tokens = choose(logits, choices(rows, 1.0, top_k, top_p, min_p)).cpu()
    kept = keep_likeliest(
        logits[:1].cpu(), np.array([top_k]), np.array([top_p], np.float32), np.array([min_p], np.float32)
    )
    p = kept.softmax(-1)[0].double()
    counts = torch.bincount(tokens, minlength=width).double()
    assert not counts[p == 0].any()
    inside = p > 0
    chi_squared = ((counts - rows * p)[inside] ** 2 / (rows * p[inside])).sum().item()
    degrees = int(inside.sum()) - 1
    assert chi_squared < degrees + 4 * (2 * degrees) ** 0.5


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits = draw(6, 100)
    options = {"temperature": 0.8, "top_k": 0, "top_p": 0.7}
    together = choose(logits, choices(6, **options, seeds=[9] * 6, positions=list(range(6))))
    for row in range(6):
        alone = choose(logits[row : row + 1], choices(1, **options, seeds=[9], positions=[row]))
        assert alone[0] == together[row]


def test_the_random_numbers_are_the_runners() -> None:
    """With equal logits in one piece, a draw is the second uniform number times the width."""
    seeds, positions = [0, 1, 2**63 + 5, 2**64 - 1], [0, 7, 123_456, 2**39]
    width = 32 if not ON_GPU else 4096
    tokens = choose(torch.zeros(4, width, device=DEVICE), choices(4, seeds=seeds, positions=positions)).cpu()
    expected = uniforms(np.array(seeds, np.uint64), np.array(positions))[:, 1] * width
    assert np.abs(tokens.numpy() - np.floor(expected)).max() <= 1


def test_rows_that_are_not_finite_say_so_and_leave_the_others_alone() -> None:
    logits = draw(5, 70)
    logits[1, 66] = torch.nan
    logits[2] = -torch.inf
    logits[3, 40] = torch.inf
    for options in ({"temperature": 0.0}, {"top_k": 3, "top_p": 0.5}):
        tokens = choose(logits, choices(5, **options)).tolist()
        assert tokens[1] == 66 and tokens[3] == 40 and 0 <= tokens[2] < 70
        for row in (0, 4):
            alone = choose(logits[row : row + 1], choices(1, **options, seeds=[row], positions=[row]))
            assert alone[0] == tokens[row]
