"""The penalty kernel against the sampler's own way with torch, under Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_device import DEVICE, ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from nanovllm import SamplingParams
from nanovllm.engine.plan import RowStart
from nanovllm.ops.cuda import penalties
from nanovllm.runner.logit_rules import apply_logit_rules
from nanovllm.runner.sampling_state import SamplingState

VOCAB = 70


@pytest.fixture(autouse=not ON_GPU)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a history has several."""
    monkeypatch.setattr(penalties, "_PIECE", 16)


ROW = st.fixed_dictionaries(
    {
        "prompt": st.integers(1, 40),
        "output": st.integers(0, 40),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.7]),
        "frequency_penalty": st.sampled_from([0.0, 0.5, -1.0]),
        "presence_penalty": st.sampled_from([0.0, 0.25]),
    }
)


@settings(max_examples=30)
@given(rows=st.lists(ROW, min_size=1, max_size=4), words=st.sampled_from([2, 9, VOCAB]), seed=st.integers(0, 999))
def test_penalties(rows: list[dict[str, Any]], words: int, seed: int) -> None:
    """Rows in another order than their logits, with leftovers behind their histories."""
    generator = torch.Generator().manual_seed(seed)
    state = SamplingState(len(rows) + 2, VOCAB)
    order = torch.randperm(len(rows) + 2, generator=generator)[: len(rows)].numpy()
    for row, options in zip(order, rows, strict=True):
        given = {name: value for name, value in options.items() if name not in ("prompt", "output")}
        params = SamplingParams(**given)
        state.start(RowStart(int(row), [0] * options["prompt"], options["prompt"], params, 0, ()))
    tokens = torch.randint(0, words, (len(rows) + 2, 90), generator=generator, dtype=torch.int32)
    logits = torch.randn(len(rows), VOCAB, generator=generator)
    positions = np.array([options["prompt"] + options["output"] for options in rows])
    wanted = logits.clone()
    apply_logit_rules(wanted, state, order, positions, tokens)
    ours = logits.to(DEVICE)
    apply_logit_rules(ours, state, order, positions, tokens.to(DEVICE), penalties.penalise)
    torch.testing.assert_close(ours.cpu(), wanted, atol=2e-6, rtol=2e-6)


def test_a_row_is_penalised_the_same_in_any_batch() -> None:
    """Bit for bit, however often a token occurs."""
    tokens = torch.tensor([[3, 3, 5] * 20, [5, 3, 3] * 20], dtype=torch.int32, device=DEVICE)
    logits = torch.linspace(-2, 2, VOCAB, device=DEVICE).expand(2, -1).contiguous()
    settings = SimpleNamespace(prompt=np.array([6, 6]), end=np.array([60, 60]), amount=np.full(2, 0.1, np.float32))
    both = logits.clone()
    which = np.arange(2)
    penalties.penalise(both, tokens, which, which, settings.end, settings.prompt, *[settings.amount] * 3)
    assert torch.equal(both[0], both[1])
    alone = logits[:1].clone()
    first = which[:1]
    penalties.penalise(alone, tokens, first, first, settings.end[:1], settings.prompt[:1], *[settings.amount[:1]] * 3)
    assert torch.equal(alone[0], both[0])
    assert not torch.equal(both[0, [3, 5]], logits[0, [3, 5]])
