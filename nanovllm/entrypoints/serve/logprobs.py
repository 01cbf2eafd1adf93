"""Log-probabilities in the three forms clients read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.outputs import Logprob, PositionLogprobs

FLOOR = -9999.0  # JSON has no minus infinity


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    count: int,
    tokenizer: Tokenizer | None,
    as_ids: bool,
    offset: int = 0,
) -> dict[str, Any]:
    """The four lists of ``/v1/completions``.

    Args:
        token_ids: tokens of the text.
        positions: what is known of each; None for the first of a prompt, which nothing predicts.
        count: likeliest tokens asked for.
        tokenizer: None names tokens ``token_id:7``.
        as_ids: so does this.
        offset: characters of text before the first token.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, position in zip(token_ids, positions, strict=True):
        text = _name(token_id, tokenizer, as_ids)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        if position is None:
            values.append(None)
            tops.append(None)
            continue
        values.append(max(position[token_id].logprob, FLOOR))
        named = [item for item in position.items() if item[1].rank is None]  # asked for by id
        best = [item for item in position.items() if item[1].rank is not None][: count + 1] + named
        tops.append({_name(other, tokenizer, as_ids): max(entry.logprob, FLOOR) for other, entry in best})
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def chat_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs],
    count: int,
    tokenizer: Tokenizer,
    as_ids: bool,
) -> dict[str, Any]:
    """The ``logprobs`` of a chat choice; ``count`` is ``top_logprobs``."""

    def shown(token_id: int, entry: Logprob) -> dict[str, Any]:
        text = _name(token_id, tokenizer, as_ids)
        return {
            "token": text,
            "logprob": max(entry.logprob, FLOOR),
            "bytes": list(text.encode() if as_ids else tokenizer.token_bytes(token_id)),
        }

    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        named = [item for item in position.items() if item[1].rank is None]  # asked for by id
        ranked = sorted(
            (item for item in position.items() if item[1].rank is not None), key=lambda item: item[1].rank or 0
        )
        top = [shown(other, entry) for other, entry in ranked[:count] + named]
        content.append({**shown(token_id, position[token_id]), "top_logprobs": top})
    return {"content": content}


def prompt_logprobs(positions: Sequence[PositionLogprobs | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's ``prompt_logprobs``: per token of the prompt, entries by id."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": max(entry.logprob, FLOOR),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in position.items()
        }
        for position in positions
    ]


def _name(token_id: int, tokenizer: Tokenizer | None, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids or tokenizer is None else tokenizer.token_text(token_id)
