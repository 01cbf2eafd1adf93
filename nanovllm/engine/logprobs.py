"""Log-probabilities as users read them."""

from __future__ import annotations

import math

from nanovllm.engine.plan import TokenLogprobs
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.outputs import Logprob, PositionLogprobs


def position_logprobs(position: TokenLogprobs, tokenizer: Tokenizer | None, num_named: int = 0) -> PositionLogprobs:
    """One position's entries by token id: the token itself first, then the likeliest in descending order.

    The last ``num_named`` entries are those asked for by name, which have no rank. Tokens that could not come
    (logarithm of zero) are left out.
    """
    token_ids: list[int] = position.token_ids.tolist()
    values: list[float] = position.logprobs.tolist()
    num_ranked = len(token_ids) - num_named
    entries: PositionLogprobs = {}
    for rank, (token_id, value) in enumerate(zip(token_ids, values, strict=True)):
        if token_id not in entries and (rank == 0 or value > -math.inf):
            text = None if tokenizer is None else tokenizer.token_text(token_id)
            entries[token_id] = Logprob(value, (rank or position.rank) if rank < num_ranked else None, text)
    return entries
