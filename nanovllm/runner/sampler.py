"""The sampler: from the logits of the sampled rows to one token each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.plan import RowStart, TokenLogprobs
from nanovllm.ops.operators import Choose, Penalise
from nanovllm.ops.reference import keep_likeliest
from nanovllm.runner.blocks import argmax
from nanovllm.runner.choice import sample_plain, sample_top_k, sample_top_p
from nanovllm.runner.logit_rules import apply_logit_rules
from nanovllm.runner.logprobs import LateLogprobs, Reader, gather_logprobs
from nanovllm.runner.ragged import Array, to_device
from nanovllm.runner.sampling_state import GREEDY, LOGPROBS, PLAIN, TOP_P, SamplingState


class Sampler:
    """Chooses tokens for rows whose parameters ``start`` has recorded.

    Args:
        max_rows: number of rows.
        vocab_size: V.
        logprobs_mode: what logprobs hold: "raw_logprobs" and "raw_logits" are the model's own, "processed_logprobs"
            and "processed_logits" those after penalties, temperature and filters.
        choose, penalise: the device's own way of choosing and of applying penalties, operators; None: ours.
    """

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        logprobs_mode: str,
        choose: Choose | None = None,
        penalise: Penalise | None = None,
    ) -> None:
        self._choose_on_device, self._penalise = choose, penalise
        self.state = SamplingState(max_rows, vocab_size)
        self.vocab_size = vocab_size
        stage, self._scale = logprobs_mode.split("_")
        self._processed = stage == "processed"

    def start(self, start: RowStart) -> None:
        """A request takes a row."""
        self.state.start(start)

    def sample(
        self, logits: Tensor, rows: Array, positions: Array, tokens: Tensor, forced: Tensor | None = None
    ) -> tuple[Tensor, Mapping[int, TokenLogprobs]]:
        """Choose one token per row.

        Args:
            logits: float32 [S, V], contiguous; overwritten.
            rows: int64 [S], whose parameters apply.
            positions: int64 [S], where the chosen token will stand.
            tokens: the token table [max_rows, width]; row r holds the tokens before the position.
            forced: int64, flat indices of the only logits of their rows that are not -inf: no rule changes that.

        Returns:
            Token ids int64 [S], and the log-probabilities of the rows that asked, by index into S. A row without a
            finite logit gets some valid token; the others do not notice.
        """
        features = self.state.features[rows]
        wanted = np.flatnonzero(features & LOGPROBS)
        scores = None
        if len(wanted) and not self._processed:
            scores = logits.index_select(0, to_device(wanted, logits.device))
        if (features & ~LOGPROBS).any():
            apply_logit_rules(logits, self.state, rows, positions, tokens, self._penalise)
        if forced is not None:
            logits.view(-1).index_fill_(0, forced, 0.0)
        if len(wanted) and self._processed:
            scores = self._process(logits.index_select(0, to_device(wanted, logits.device)), rows[wanted])
        chosen = self._choose(logits, rows, positions)
        return chosen, {} if scores is None else self._logprobs(scores, chosen, rows, wanted)

    def _choose(self, logits: Tensor, rows: Array, positions: Array) -> Tensor:
        state, methods = self.state, self.state.method[rows]
        if self._choose_on_device is not None:
            temperature = np.where(methods == GREEDY, np.float32(0.0), state.temperature[rows])
            return self._choose_on_device(
                logits,
                temperature,
                state.top_k[rows],
                state.top_p[rows],
                state.min_p[rows],
                state.seed[rows],
                positions,
            )
        first = int(methods[0])
        if (methods == first).all():
            return self._choose_alike(first, logits, rows, positions)
        chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for method in np.unique(methods).tolist():
            which = np.flatnonzero(methods == method)
            index = to_device(which, logits.device)
            chosen[index] = self._choose_alike(method, logits.index_select(0, index), rows[which], positions[which])
        return chosen

    def _choose_alike(self, method: int, logits: Tensor, rows: Array, positions: Array) -> Tensor:
        """Choose for rows of one method; ``logits`` are overwritten."""
        if method == GREEDY:
            return argmax(logits)
        state = self.state
        logits.div_(to_device(state.temperature[rows], logits.device).unsqueeze(1))
        seeds = state.seed[rows]
        if method == PLAIN:
            return sample_plain(logits, seeds, positions)
        if method == TOP_P:
            return sample_top_p(logits, state.top_p[rows], state.min_p[rows], seeds, positions)
        return sample_top_k(logits, state.top_k[rows], state.top_p[rows], state.min_p[rows], seeds, positions)

    def _process(self, logits: Tensor, rows: Array) -> Tensor:
        """The logits the tokens are drawn from; greedy rows have temperature 1 and no filters."""
        state = self.state
        logits.div_(to_device(state.temperature[rows], logits.device).unsqueeze(1))
        filtered = np.flatnonzero(state.method[rows] > PLAIN)
        if len(filtered):
            index, rows = to_device(filtered, logits.device), rows[filtered]
            logits[index] = keep_likeliest(logits[index], state.top_k[rows], state.top_p[rows], state.min_p[rows])
        return logits

    def to_scores(self, logits: Tensor) -> Tensor:
        """Logits [n, V] as the mode wants them: overwritten by their log-probabilities, or as they are."""
        return torch.log_softmax(logits, dim=-1, out=logits) if self._scale == "logprobs" else logits

    def _logprobs(self, logits: Tensor, chosen: Tensor, rows: Array, wanted: Array) -> LateLogprobs:
        scores = self.to_scores(logits)
        chosen = chosen.index_select(0, to_device(wanted, logits.device))
        parts: list[tuple[list[int], Reader]] = []
        counts = self.state.num_logprobs[rows[wanted]]
        named = [self.state.named[row] for row in rows[wanted]]
        plain = np.array([ids is None for ids in named])
        # One selection per distinct count, not the largest for all: ties must not depend on the batch.
        for count in np.unique(counts).tolist():
            which = np.flatnonzero((counts == count) & plain)
            if not len(which):
                continue
            index = to_device(which, logits.device)
            read = gather_logprobs(scores.index_select(0, index), chosen.index_select(0, index), count)
            parts.append((wanted[which].tolist(), read))
        for i in np.flatnonzero(~plain).tolist():
            ids = to_device(named[i], scores.device)
            read = gather_logprobs(scores[i : i + 1], chosen[i : i + 1], int(counts[i]), ids)
            parts.append(([int(wanted[i])], read))
        return LateLogprobs(parts)


def mark_invalid(token_ids: Tensor, logits: Tensor) -> Tensor:
    """-1 instead of the tokens [S] of rows that are NaN, or have nothing but -inf.

    Only the chosen tokens' values are looked at: in such a row all values are the same, in the logits [S, V] as the
    model gave them and in what the choice has left of them.
    """
    sizes = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1).abs_()
    return torch.where(sizes < torch.inf, token_ids, -1)  # NaN is not less either
