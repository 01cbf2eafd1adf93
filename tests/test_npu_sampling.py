"""Choosing tokens by sorting: never a question to the device, and the meaning of runner/choice.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.runner.choice import choose_by_sorting, keep_likeliest, sample_plain

Array = np.ndarray[Any, Any]


def settings(rows: int, **changes: Any) -> dict[str, Array]:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **changes}
    kinds = {"top_k": np.int64}
    arrays = {name: np.broadcast_to(np.array(value, kinds.get(name, np.float32)), rows).copy()
              for name, value in values.items()}  # fmt: skip
    return {**arrays, "seeds": np.arange(rows, dtype=np.uint64), "positions": np.arange(rows, dtype=np.int64) + 5}


def logits(rows: int, vocab: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def test_greedy_rows_take_the_likeliest_token_beside_others() -> None:
    x = logits(4)
    tokens = choose_by_sorting(x, **settings(4, temperature=[0.0, 0.9, 0.0, 1.5], top_p=0.7))
    assert tokens[[0, 2]].tolist() == x.argmax(-1)[[0, 2]].tolist()
    assert choose_by_sorting(x, **settings(4, temperature=0.0)).tolist() == x.argmax(-1).tolist()


def test_rows_without_filters_draw_what_they_draw_elsewhere() -> None:
    x = logits(50)
    chosen = settings(50)
    wanted = sample_plain(x.clone(), chosen["seeds"], chosen["positions"])
    assert choose_by_sorting(x, **chosen).tolist() == wanted.tolist()
    assert torch.equal(x, logits(50))  # the logits stay as they are


@pytest.mark.parametrize(
    "limits", [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8, "min_p": 0.02}]
)
def test_only_what_filters_keep_is_drawn_and_all_of_it(limits: dict[str, float]) -> None:
    rows = 2000
    x = logits(1).expand(rows, -1)
    chosen = settings(rows, **limits)
    drawn = set(choose_by_sorting(x, **chosen).tolist())
    kept = keep_likeliest(x[:1], *(chosen[name][:1] for name in ("top_k", "top_p", "min_p"))).isfinite()[0]
    assert drawn <= set(kept.nonzero()[:, 0].tolist())
    weights = x[0].masked_fill(~kept, -torch.inf).softmax(-1)
    assert {int(i) for i in (weights > 10 / rows).nonzero()} <= drawn


def test_a_request_draws_the_same_alone_and_in_a_batch() -> None:
    x = logits(6)
    chosen = settings(
        6, temperature=[0.0, 0.7, 1.0, 1.0, 0.5, 2.0], top_k=[0, 5, 0, 50, 0, 0], top_p=[1, 1, 1, 0.9, 0.5, 1]
    )
    together = choose_by_sorting(x, **chosen).tolist()
    for row in range(6):
        alone = {name: values[row : row + 1] for name, values in chosen.items()}
        assert choose_by_sorting(x[row : row + 1], **alone).tolist() == together[row : row + 1]


class NoQuestions(TorchDispatchMode):
    """Fails where an accelerator would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::item"), name
        return func(*args, **(kwargs or {}))


def test_the_device_is_asked_nothing() -> None:
    x = logits(5)
    with NoQuestions():
        choose_by_sorting(x, **settings(5, temperature=[0, 1, 1, 1, 1], top_k=[0, 3, 0, 0, 0], top_p=0.9, min_p=0.01))
    with pytest.raises(AssertionError), NoQuestions():
        x.sum().item()
