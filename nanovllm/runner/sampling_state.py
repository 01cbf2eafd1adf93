"""The sampling parameters of every row, as arrays kept between steps: a step gathers what it needs by one index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nanovllm.runner.choice import candidates_for
from nanovllm.runner.ragged import Array

if TYPE_CHECKING:
    from nanovllm.engine.plan import RowStart

GREEDY_BELOW = 1e-5  # temperatures under this mean argmax

# What a row asks for besides a plain choice; ``SamplingState.features`` holds the sum. A batch whose rows ask for
# nothing pays for nothing.
ALLOWED, BAD_WORDS, MIN_TOKENS, BIAS, REPETITION, FREQUENCY, LOGPROBS = (1 << i for i in range(7))

# How a row chooses: ``SamplingState.method``. A larger number means top-k with that many candidates.
GREEDY, PLAIN, TOP_P = 0, 1, 2


class SamplingState:
    """Sampling parameters by row; ``start`` fills a row, everything else reads.

    Attributes (arrays [max_rows]):
        features: sum of the feature bits above.
        method: GREEDY, PLAIN, TOP_P (top_p or min_p, no top_k), or the number of candidates of a top_k row.
        temperature, top_p, min_p, repetition, frequency, presence: float32.
        top_k, min_tokens, num_prompt: int64.
        seed: uint64.
        num_logprobs: int64, how many of the likeliest; the vocabulary's size for all of them.
    Lists [max_rows] (for rows with the feature):
        allowed, stop_ids, bias_ids: int64 arrays of token ids.
        bias: float32, aligned with bias_ids.
        bad_words: what may not come next; see BadWords.
        named: int64 arrays of token ids whose log-probabilities are asked for; None without.
    """

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.features = np.zeros(max_rows, np.int64)
        self.method = np.zeros(max_rows, np.int64)
        self.temperature, self.top_p, self.min_p = (np.zeros(max_rows, np.float32) for _ in range(3))
        self.repetition, self.frequency, self.presence = (np.zeros(max_rows, np.float32) for _ in range(3))
        self.top_k, self.min_tokens, self.num_prompt, self.num_logprobs = (
            np.zeros(max_rows, np.int64) for _ in range(4)
        )
        self.seed = np.zeros(max_rows, np.uint64)
        none = np.zeros(0, np.int64)
        self.allowed: list[Array] = [none] * max_rows
        self.stop_ids: list[Array] = [none] * max_rows
        self.bias_ids: list[Array] = [none] * max_rows
        self.bias: list[Array] = [none] * max_rows
        self.bad_words: list[BadWords | None] = [None] * max_rows
        self.named: list[Array | None] = [None] * max_rows

    def start(self, start: RowStart) -> None:
        """A request takes the row."""
        row, params = start.row, start.params
        features = 0
        self.num_prompt[row] = start.num_prompt_tokens
        self.seed[row] = start.seed & (2**64 - 1)
        if params.allowed_token_ids is not None:
            features |= ALLOWED
            self.allowed[row] = np.array(params.allowed_token_ids, np.int64)
        if start.bad_words_ids:
            features |= BAD_WORDS
            self.bad_words[row] = BadWords(start.bad_words_ids)
        if params.min_tokens > 0 and start.stop_token_ids:
            features |= MIN_TOKENS
            self.min_tokens[row] = params.min_tokens
            self.stop_ids[row] = np.array(start.stop_token_ids, np.int64)
        if params.logit_bias:
            features |= BIAS
            self.bias_ids[row] = np.fromiter(params.logit_bias, np.int64)
            self.bias[row] = np.fromiter(params.logit_bias.values(), np.float32)
        if params.repetition_penalty != 1.0:
            features |= REPETITION
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            features |= FREQUENCY
        self.repetition[row] = params.repetition_penalty
        self.frequency[row] = params.frequency_penalty
        self.presence[row] = params.presence_penalty
        if params.logprobs is not None:
            features |= LOGPROBS
            self.num_logprobs[row] = self._num_logprobs(params.logprobs)
            ids = params.logprob_token_ids
            self.named[row] = None if ids is None else np.array(ids, np.int64)
        self.features[row] = features
        self._start_choice(start)

    def _start_choice(self, start: RowStart) -> None:
        row, params = start.row, start.params
        greedy = params.temperature < GREEDY_BELOW
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else 0
        self.temperature[row] = 1.0 if greedy else params.temperature
        self.top_k[row] = 0 if greedy else top_k
        self.top_p[row] = 1.0 if greedy else params.top_p
        self.min_p[row] = 0.0 if greedy else params.min_p
        if greedy:
            self.method[row] = GREEDY
        elif top_k:
            self.method[row] = candidates_for(top_k, self.vocab_size)
        else:
            self.method[row] = TOP_P if params.top_p < 1.0 or params.min_p > 0.0 else PLAIN

    def _num_logprobs(self, asked: int) -> int:
        return self.vocab_size if asked == -1 else min(asked, self.vocab_size)


class BadWords:
    """Token sequences a row may not complete.

    Attributes:
        last: int64 [W], the token that would complete each.
        before: int64 [W, longest - 1], the tokens before it, right-aligned; -1 where a sequence is shorter.
        length: int64 [W], number of tokens before the last.
    """

    def __init__(self, sequences: tuple[tuple[int, ...], ...]) -> None:
        self.last = np.array([s[-1] for s in sequences], np.int64)
        self.length = np.array([len(s) - 1 for s in sequences], np.int64)
        self.before = np.full((len(sequences), int(self.length.max())), -1, np.int64)
        for line, sequence in zip(self.before, sequences, strict=True):
            if len(sequence) > 1:
                line[-(len(sequence) - 1) :] = sequence[:-1]
