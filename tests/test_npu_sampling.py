"""Choosing tokens by sorting: never a question to the device, and the meaning of runner/choice.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from npu_substitutes import Substitutes
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nanovllm.ops import torch_operators
from nanovllm.ops.npu.sampling import NpuSampling
from nanovllm.ops.reference import keep_likeliest
from nanovllm.runner.choice import choose_by_sorting, sample_plain

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


# ---- through torch_npu's operator -----------------------------------------------------------------------------------

ROWS: dict[str, Any] = {  # every way a row can go
    "top_k": [0, 5, 0, 1500, 40, 0, 1, 1024, 3000, 0, 20],
    "top_p": [1.0, 1.0, 0.6, 0.9, 0.5, 1.0, 0.3, 1.0, 0.8, 0.999, 1e-6],
    "min_p": [0.0, 0.0, 0.0, 0.01, 0.05, 0.1, 0.0, 0.0, 0.0, 0.02, 0.0],
}


def limits(rows: int) -> list[Array]:
    return [settings(rows, **{name: values[:rows] for name, values in ROWS.items()})[name] for name in ROWS]


@pytest.mark.parametrize("ties", [False, True])
def test_the_operator_of_npus_keeps_what_the_definition_keeps(ties: bool) -> None:
    library = Substitutes()
    keep = NpuSampling(torch_operators(), library).keep_likeliest
    for seed in range(5):
        x = logits(11, 3000, seed)
        x = x.bfloat16().float() if ties else x  # many logits are equal
        before = x.clone()
        kept = keep(x, *limits(11))
        assert torch.equal(kept, keep_likeliest(x, *limits(11)))
        assert torch.equal(x, before)
    assert library.calls["top_k_top_p"] == 2 * 5  # one for rows with top_k, one for those without


def test_what_a_row_keeps_does_not_depend_on_its_neighbours() -> None:
    keep = NpuSampling(torch_operators(), Substitutes()).keep_likeliest
    x = logits(11, 3000)
    together = keep(x, *limits(11))
    for row in range(11):
        alone = keep(x[row : row + 1], *(values[row : row + 1] for values in limits(11)))
        assert torch.equal(alone[0], together[row])


def test_the_operator_is_called_for_those_alone_who_need_it() -> None:
    library = Substitutes()
    keep = NpuSampling(torch_operators(), library).keep_likeliest
    x = logits(2)
    arrays = settings(2, top_k=[0, 300], top_p=1.0, min_p=0.0)  # off, and all there are
    assert keep(x, arrays["top_k"], arrays["top_p"], arrays["min_p"]) is x and not library.calls
    right = library.top_k_top_p

    def on_the_device(*tensors: Any) -> torch.Tensor:
        with _disable_current_modes():
            return right(*tensors)

    library.top_k_top_p = on_the_device  # type: ignore[method-assign]
    with NoQuestions():
        choose_by_sorting(x, **settings(2, top_k=[0, 3], top_p=0.9, min_p=0.01), keep=keep)
    assert library.calls["top_k_top_p"] == 2


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_row_without_numbers_harms_no_other(bad: float) -> None:
    keep = NpuSampling(torch_operators(), Substitutes()).keep_likeliest
    x = logits(3)
    wanted = keep(x, *limits(3))
    x[1] = bad
    kept = keep(x, *limits(3))
    assert torch.equal(kept[[0, 2]], wanted[[0, 2]])
    tokens = choose_by_sorting(x, **settings(3, top_k=[0, 5, 0], top_p=[1.0, 1.0, 0.6]), keep=keep)
    assert 0 <= int(tokens[1]) < 300


def test_seeds_draw_the_tokens_they_draw_by_sorting() -> None:
    x = logits(11, 3000)
    chosen = settings(11, temperature=[0.0, *[0.8] * 10], **ROWS)
    keep = NpuSampling(torch_operators(), Substitutes()).keep_likeliest
    for _ in range(5):
        chosen["positions"] += 1
        assert torch.equal(choose_by_sorting(x, **chosen, keep=keep), choose_by_sorting(x, **chosen))
