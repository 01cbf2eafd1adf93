"""How many tokens of an answer are reasoning."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.entrypoints.serve.context import ServeContext
from nanovllm.parsers import REASONING_PARSERS


def count_reasoning(context: ServeContext, reasoning: str | None, token_ids: Sequence[int]) -> int:
    """Tokens of an answer before its reasoning ends, the marks left out.

    Args:
        reasoning: the text that was found to be reasoning.
        token_ids: the answer's tokens.
    """
    if not reasoning:
        return 0
    parser = REASONING_PARSERS[context.args.reasoning_parser or ""]
    start, end = context.token_id(parser.start), context.token_id(parser.end)
    if end is None or end not in token_ids:  # the mark is several tokens, or the answer ends within the reasoning
        return min(len(token_ids), len(context.tokenizer.encode(reasoning, add_special_tokens=False)))
    return token_ids.index(end) - (token_ids[0] == start)
