"""The forms a prompt may take."""

from __future__ import annotations

from typing import TypedDict


class _TextPromptRequired(TypedDict):
    prompt: str


class TextPrompt(_TextPromptRequired, total=False):
    """A prompt as text, to be tokenised.

    Keys:
        prompt: the text.
        cache_salt: only prompts with the same salt share cached blocks.
        reasoning_ended: with a ``reasoning_parser``, the answer begins at once unless the prompt ends within reasoning.
    """

    cache_salt: str
    reasoning_ended: bool


class _TokensPromptRequired(TypedDict):
    prompt_token_ids: list[int]


class TokensPrompt(_TokensPromptRequired, total=False):
    """A prompt as token ids.

    Keys:
        prompt_token_ids: the ids, taken as they are.
        prompt: the text they stand for, handed back in the output.
        cache_salt: only prompts with the same salt share cached blocks.
        reasoning_ended: with a ``reasoning_parser``, the answer begins at once unless the prompt ends within reasoning.
    """

    prompt: str
    cache_salt: str
    reasoning_ended: bool


# Text, token ids, or one of the dicts above.
PromptType = str | list[int] | TextPrompt | TokensPrompt
