"""Vectors of prompts: what is gathered of a prompt's hidden states while its chunks are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nanovllm.engine.plan import RowStart, StepPlan


class Pooler:
    """Pools the rows that ask for it: "last" takes the last token's hidden state, "mean" the mean over all tokens."""

    def __init__(self) -> None:
        self._methods: dict[int, str] = {}  # row -> method
        self._sums: dict[int, Tensor] = {}  # row -> float32 [hidden], over the chunks so far

    def start(self, start: RowStart) -> None:
        """A request takes a row."""
        self._sums.pop(start.row, None)
        if start.pooling is None:
            self._methods.pop(start.row, None)
        else:
            self._methods[start.row] = start.pooling

    def pool(self, plan: StepPlan, hidden: Tensor, begins: Sequence[int]) -> Tensor | None:
        """Take a step's hidden states [T, hidden], those of row i from ``begins[i]`` on.

        Returns float32 [P, hidden], a vector for each of ``plan.pooled``; None if there are none.
        """
        if not self._methods:
            return None
        for index, row in enumerate(plan.rows):
            if self._methods.get(row) == "mean":
                chunk = hidden[begins[index] : begins[index] + plan.num_new[index]].sum(0, dtype=torch.float32)
                self._sums[row] = self._sums[row] + chunk if row in self._sums else chunk
        if not plan.pooled:
            return None
        return torch.stack([self._vector(plan, hidden, begins, index) for index in plan.pooled])

    def _vector(self, plan: StepPlan, hidden: Tensor, begins: Sequence[int], index: int) -> Tensor:
        row, count = plan.rows[index], plan.num_new[index]
        if self._methods[row] == "mean":
            return self._sums.pop(row) / (plan.num_computed[index] + count)
        return hidden[begins[index] + count - 1].float()
