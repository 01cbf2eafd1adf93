"""What changes logits before a token is chosen: allowed ids, bad words, min_tokens, logit bias, penalties.

All of it works on ``logits.view(-1)`` at the flat indices (row in the batch * vocabulary + token) that are concerned:
the cost follows the number of tokens named, not the vocabulary. History is read from the token table on the device, so
tokens sampled by a step that is still running are seen.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanovllm.ops.operators import Penalise
from nanovllm.runner.ragged import Array, ragged_ranges, to_device
from nanovllm.runner.sampling_state import ALLOWED, BAD_WORDS, BIAS, FREQUENCY, MIN_TOKENS, REPETITION, SamplingState


def apply_logit_rules(
    logits: Tensor,
    state: SamplingState,
    rows: Array,
    positions: Array,
    tokens: Tensor,
    penalise: Penalise | None = None,
) -> None:
    """Change ``logits`` [S, V] (float32, contiguous) in place, in vLLM's order.

    Args:
        rows: int64 [S], the table row of each row of logits.
        positions: int64 [S], position of the token to be chosen; the row's history is what comes before.
        tokens: the token table, [max_rows, width].
        penalise: the device's own way of applying penalties; None: ours.
    """
    features = state.features[rows]
    active = int(np.bitwise_or.reduce(features))
    batch = _Batch(logits, state, rows, positions, tokens)
    if active & ALLOWED:
        batch.allow_only(np.flatnonzero(features & ALLOWED))
    if active & BAD_WORDS:
        batch.ban_words(np.flatnonzero(features & BAD_WORDS))
    if active & MIN_TOKENS:
        young = positions - state.num_prompt[rows] < state.min_tokens[rows]
        batch.ban_stops(np.flatnonzero((features & MIN_TOKENS > 0) & young))
    if active & BIAS:
        batch.add_bias(np.flatnonzero(features & BIAS))
    if penalise is not None and active & (REPETITION | FREQUENCY):
        which = np.flatnonzero(features & (REPETITION | FREQUENCY))
        concerned = rows[which]
        penalise(
            logits,
            tokens,
            which,
            concerned,
            positions[which],
            state.num_prompt[concerned],
            state.repetition[concerned],
            state.frequency[concerned],
            state.presence[concerned],
        )
        return
    if active & REPETITION:
        batch.penalise_repetition(np.flatnonzero(features & REPETITION))
    if active & FREQUENCY:
        has_output = positions > state.num_prompt[rows]
        batch.penalise_frequency(np.flatnonzero((features & FREQUENCY > 0) & has_output))


class _Batch:
    """One call's arguments. Every method takes ``which``: int64 indices of the rows of logits it concerns."""

    def __init__(self, logits: Tensor, state: SamplingState, rows: Array, positions: Array, tokens: Tensor) -> None:
        self.logits, self.state, self.rows, self.positions, self.tokens = logits, state, rows, positions, tokens
        self.flat = logits.view(-1)
        self.vocab_size = logits.shape[1]

    def _places(self, which: Array, ids: list[Array]) -> Tensor:
        """Flat indices of ``ids[i]`` in row ``which[i]`` of the logits."""
        owner = np.repeat(which, [len(i) for i in ids])
        return to_device(owner * self.vocab_size + np.concatenate(ids), self.logits.device)

    def _history(self, which: Array, begin: Array) -> tuple[Tensor, Array]:
        """Flat indices of the tokens at ``begin[i] .. positions``, and how many they are for each row."""
        width = self.tokens.shape[1]
        length = self.positions[which] - begin
        table_index = to_device(ragged_ranges(self.rows[which] * width + begin, length), self.logits.device)
        offset = to_device(np.repeat(which * self.vocab_size, length), self.logits.device)
        return self.tokens.view(-1).index_select(0, table_index).to(torch.int64) + offset, length

    def _per_token(self, values: Array, length: Array) -> Tensor:
        return to_device(np.repeat(values, length), self.logits.device)

    def allow_only(self, which: Array) -> None:
        places = self._places(which, [self.state.allowed[r] for r in self.rows[which]])
        kept = self.flat.index_select(0, places)
        self.logits.index_fill_(0, to_device(which, self.logits.device), -torch.inf)
        self.flat.index_copy_(0, places, kept)

    def ban_words(self, which: Array) -> None:
        """Only output counts as the beginning of a bad word, as in vLLM."""
        words = [w for r in self.rows[which] if (w := self.state.bad_words[r]) is not None]
        count = np.array([len(w.last) for w in words])
        longest = max(w.before.shape[1] for w in words)
        before = np.concatenate([np.pad(w.before, ((0, 0), (longest - w.before.shape[1], 0)), constant_values=-1)
                                 for w in words])  # fmt: skip
        row, position = np.repeat(self.rows[which], count), np.repeat(self.positions[which], count)
        enough = position - self.state.num_prompt[row] >= np.concatenate([w.length for w in words])
        columns = np.maximum(position[:, None] + np.arange(-longest, 0), 0)
        index = to_device(row[:, None] * self.tokens.shape[1] + columns, self.logits.device)
        wanted = to_device(before, self.logits.device)
        matches = ((wanted < 0) | (self.tokens.view(-1)[index] == wanted)).all(-1)
        matches &= to_device(enough, self.logits.device)
        # Sequences may share their last token: adding -inf or 0 does not depend on their order.
        ban = torch.where(matches, -torch.inf, 0.0).to(self.logits.dtype)
        self.flat.index_add_(0, self._places(which, [w.last for w in words]), ban)

    def ban_stops(self, which: Array) -> None:
        if len(which):
            places = self._places(which, [self.state.stop_ids[r] for r in self.rows[which]])
            self.flat.index_fill_(0, places, -torch.inf)

    def add_bias(self, which: Array) -> None:
        rows = self.rows[which]
        bias = to_device(np.concatenate([self.state.bias[r] for r in rows]), self.logits.device)
        self.flat.index_add_(0, self._places(which, [self.state.bias_ids[r] for r in rows]), bias)

    def penalise_repetition(self, which: Array) -> None:
        """Every token of prompt and output once, however often it occurs (Keskar et al. 2019, CTRL, section 4.1)."""
        places, length = self._history(which, np.zeros(len(which), np.int64))
        penalty = self._per_token(self.state.repetition[self.rows[which]], length)
        values = self.flat.index_select(0, places)
        values = torch.where(values > 0, values / penalty, values * penalty)
        self.flat.index_copy_(0, places, values)  # a place that occurs twice is given the same value twice

    def penalise_frequency(self, which: Array) -> None:
        """logit -= frequency * occurrences + presence, over the output."""
        if not len(which):
            return
        rows = self.rows[which]
        places, length = self._history(which, self.state.num_prompt[rows])
        self.flat.index_add_(0, places, self._per_token(-self.state.frequency[rows], length))
        values = self.flat.index_select(0, places) - self._per_token(self.state.presence[rows], length)
        self.flat.index_copy_(0, places, values)
