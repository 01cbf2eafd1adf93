"""From the ``prompt`` of a request to the prompts the engine takes."""

from __future__ import annotations

import asyncio
from typing import Any

from nanovllm.entrypoints.serve.context import ServeContext
from nanovllm.entrypoints.serve.protocol.completions import CompletionRequest
from nanovllm.entrypoints.serve.protocol.generation import GenerationRequest
from nanovllm.errors import ParameterError
from nanovllm.inputs import PromptType

LONG_PROMPT = 4000  # characters; what is longer is tokenised on a thread, so that streams do not wait for it


async def completion_prompts(context: ServeContext, request: CompletionRequest) -> list[PromptType]:
    """The prompts of a request.

    Raises:
        ParameterError: there is none, or it cannot be tokenised.
    """
    prompts = []
    for given in _separate(request.prompt):
        if isinstance(given, str) and (request.truncate_prompt_tokens is not None or not request.add_special_tokens):
            any_length = request.truncate_prompt_tokens is not None
            token_ids = await encode(context, given, request.add_special_tokens, any_length)
            prompts.append(_prompt(token_ids, request, context, given))
        else:
            prompts.append(_prompt(given, request, context))
    return prompts


def num_prompts(request: CompletionRequest) -> int:
    """How many prompts a request has.

    Raises:
        ParameterError: none.
    """
    return len(_separate(request.prompt))


async def encode(
    context: ServeContext, text: str, add_special_tokens: bool = True, any_length: bool = True
) -> list[int]:
    """Token ids of a text, which may be long.

    Args:
        any_length: tokenise also what is far too long for the context.

    Raises:
        ParameterError: it is.
    """
    tokenizer = context.tokenizer
    if not any_length:
        context.engine.input.refuse_by_size(text)
    if len(text) > LONG_PROMPT:
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
    return tokenizer.encode(text, add_special_tokens)


def truncated(token_ids: list[int], request: GenerationRequest, context: ServeContext) -> list[int]:
    """At most ``truncate_prompt_tokens`` of a prompt, by default its end; -1 stands for what the context takes."""
    limit = request.truncate_prompt_tokens
    if limit is None:
        return token_ids
    if limit > context.max_model_len:
        raise ParameterError(
            f"cannot be greater than max_model_len={context.max_model_len}", "truncate_prompt_tokens", limit
        )
    if limit == -1:
        limit = context.max_model_len - max(request.max_tokens or 1, 1)
    if limit < 1:
        raise ParameterError("leaves nothing of the prompt", "truncate_prompt_tokens", request.truncate_prompt_tokens)
    return token_ids[:limit] if request.truncation_side == "right" else token_ids[-limit:]


def _prompt(
    given: str | list[int], request: CompletionRequest, context: ServeContext, text: str | None = None
) -> PromptType:
    prompt: dict[str, Any] = (
        {"prompt": given} if isinstance(given, str) else {"prompt_token_ids": truncated(given, request, context)}
    )
    if text is not None and len(prompt["prompt_token_ids"]) == len(given):
        prompt["prompt"] = text
    if request.cache_salt is not None:
        prompt["cache_salt"] = request.cache_salt
    if request.thinking_token_budget is None:  # nothing is expected of a text but what it says itself
        prompt["reasoning_ended"] = True
    return prompt  # type: ignore[return-value]


def _separate(prompt: Any) -> list[str | list[int]]:
    if prompt is None or prompt == []:
        raise ParameterError("prompt must be provided and non-empty", "prompt", prompt)
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)
