"""Rows whose tokens must follow a grammar or a budget of reasoning: what they may sample, worked out beside the model.

    main thread   launch(n):   begin, forward pass .................... apply_limits, sample
    worker                     tokens of step n - 1 -> guides -> masks ^

The worker waits for the last step's tokens, feeds them to the guides and computes the masks while the forward pass
runs. So a constrained row is sampled in every step, however many steps are in flight, and the others in its batch pay
for nothing but the application of the masks. A batch without such rows does not come here.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.structured import GrammarCompiler, Guide, Limiter, Limits
from nanovllm.ops.transfer import HostCopy
from nanovllm.runner.ragged import Array, to_device

if TYPE_CHECKING:
    from nanovllm.config import ModelConfig
    from nanovllm.engine.plan import RowStart, StepPlan

Rows = list[tuple[int, int]]  # (index among a step's sampled rows, row)


@dataclass(slots=True)
class StepGuidance:
    """The limits of a step, under way, and the rows they concern."""

    rows: Rows
    limits: Future[Limits]


class Guidance:
    """Guides by row.

    Attributes:
        compiler: compiles grammars for the model's tokens; any thread may use it.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.compiler = GrammarCompiler(model)
        self._limiter = Limiter(self.compiler, model.vocab_size)
        self._rows: set[int] = set()
        self._unread: tuple[Rows, HostCopy] | None = None  # the last step's, which the guides have not seen
        self._guides: dict[int, Guide] = {}  # by row; only the worker touches them
        self._worker: ThreadPoolExecutor | None = None

    def start(self, start: RowStart) -> None:
        """A request takes a row. What it has generated already is followed again."""
        if start.guide is None:
            self._rows.discard(start.row)
            return
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "nanovllm-guidance")
        self._read()  # for those who held the row before
        self._rows.add(start.row)
        self._worker.submit(self._make, start)

    def begin(self, plan: StepPlan) -> StepGuidance | None:
        """Have a step's limits worked out; None if it samples no row that has any."""
        if not self._rows:
            return None
        rows = [(i, plan.rows[index]) for i, index in enumerate(plan.sampled) if plan.rows[index] in self._rows]
        if not rows:
            return None
        assert self._worker is not None
        self._read()
        return StepGuidance(rows, self._worker.submit(self._limits, rows))

    def end(self, step: StepGuidance, token_ids: HostCopy) -> None:
        """The step's tokens, int64 [S], one for each sampled row; they may still be on their way."""
        free = set(step.limits.result().free)
        self._rows.difference_update(row for index, row in step.rows if index in free)
        self._unread = [pair for pair in step.rows if pair[0] not in free], token_ids

    def _read(self) -> None:
        if self._unread is not None:
            assert self._worker is not None
            self._worker.submit(self._accept, *self._unread)
            self._unread = None

    # -- on the worker, in the order of submission ---------------------------------------------------------------

    def _make(self, start: RowStart) -> None:
        assert start.guide is not None
        self._guides[start.row] = Guide(start.guide, self.compiler, start.token_ids[start.guided_from :])

    def _accept(self, rows: Rows, token_ids: HostCopy) -> None:
        tokens = token_ids.wait().tolist()
        for index, row in rows:
            self._guides[row].accept(tokens[index])

    def _limits(self, rows: Rows) -> Limits:
        return self._limiter.limits([(index, self._guides[row]) for index, row in rows])


def apply_limits(logits: Tensor, limits: Limits) -> Tensor:
    """Make of ``logits`` [S, V] (contiguous) -inf what may not come, in place.

    Returns the flat indices of the logits that must be chosen whatever rules come later.
    """
    if logits.device.type == "cpu":  # numpy is as fast here, and wakes no thread
        _mask_on_host(logits.numpy(), limits)
    else:
        mask_on_device(logits, limits)
    return to_device(limits.forced, logits.device)


def _mask_on_host(logits: Array, limits: Limits) -> None:
    flat = logits.reshape(-1)
    kept = flat[limits.allowed]
    logits[limits.closed] = -np.inf
    flat[limits.allowed] = kept
    flat[limits.banned] = -np.inf


def mask_on_device(logits: Tensor, limits: Limits) -> None:
    """`apply_limits` by operators that every device has."""
    flat, device = logits.view(-1), logits.device
    allowed = to_device(limits.allowed, device)
    kept = flat.index_select(0, allowed)
    logits.index_fill_(0, to_device(limits.closed, device), -torch.inf)
    flat.index_copy_(0, allowed, kept)
    flat.index_fill_(0, to_device(limits.banned, device), -torch.inf)
