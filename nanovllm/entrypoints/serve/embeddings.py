"""``/v1/embeddings``: vectors of texts, by the loaded model."""

from __future__ import annotations

import base64
import time
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanovllm.entrypoints.serve.admission import get_ticket
from nanovllm.entrypoints.serve.chat import render_messages
from nanovllm.entrypoints.serve.context import ServeContext, get_context, make_request_id
from nanovllm.entrypoints.serve.generation import final_outputs
from nanovllm.entrypoints.serve.prompts import encode
from nanovllm.entrypoints.serve.protocol.chat import ChatCompletionRequest
from nanovllm.entrypoints.serve.protocol.embeddings import EmbeddingRequest, EmbeddingResponse
from nanovllm.entrypoints.serve.protocol.errors import RESPONSES
from nanovllm.entrypoints.serve.sse import answer_unless_gone, json_bytes
from nanovllm.errors import ParameterError
from nanovllm.outputs import PoolingRequestOutput
from nanovllm.pooling_params import PoolingParams

router = APIRouter()


@router.post("/v1/embeddings", responses={200: {"model": EmbeddingResponse}, **RESPONSES}, response_model=None)
async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
    """Vectors of texts."""
    return await answer_unless_gone(request, _answer(get_context(request), body, request))


async def _answer(context: ServeContext, body: EmbeddingRequest, request: Request) -> Response:
    model = context.model_name(body.model)
    context.warn_unknown(body.model_extra)
    context.check_priority(body.priority)
    ticket = get_ticket(request)
    priority = ticket.priority(body.priority)
    call_id = make_request_id("embd", request, body.request_id)
    scaled = body.normalize if body.use_activation is None else body.use_activation
    params = PoolingParams(dimensions=body.dimensions, use_activation=scaled)
    ticket.expect(1 if body.input is None else len(_separate(body.input)))
    prompts = await _prompts(context, body)
    context.log_request(call_id, body.input, params, {"user": body.user})
    streams = [
        context.engine.encode(cast(Any, prompt), params, context.engine_id(call_id), priority=priority, caller=ticket)
        for prompt in prompts
    ]
    outputs = cast("list[PoolingRequestOutput]", await final_outputs(cast(Any, streams)))
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    details = None
    if context.args.enable_prompt_tokens_details:
        details = {"cached_tokens": sum(output.num_cached_tokens for output in outputs)}
    answer = {
        "id": call_id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [
            {"index": index, "object": "embedding", "embedding": _encoded(output, body.encoding_format)}
            for index, output in enumerate(outputs)
        ],
        "usage": {
            "prompt_tokens": num_tokens,
            "total_tokens": num_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": details,
        },
    }
    return Response(json_bytes(answer), media_type="application/json")


def _encoded(output: PoolingRequestOutput, encoding_format: str) -> list[float] | str:
    """The vector as numbers, or as base64 of its float32, little-endian."""
    data = output.outputs.data
    return data.tolist() if encoding_format == "float" else base64.b64encode(data.astype("<f4").tobytes()).decode()


async def _prompts(context: ServeContext, body: EmbeddingRequest) -> list[dict[str, Any]]:
    """The prompts of a request.

    Raises:
        ParameterError: there is none, or both kinds are given, or one cannot be tokenised.
    """
    if (body.input is None) == (body.messages is None):
        raise ParameterError("give either input or messages", "input", body.input)
    if body.messages is not None:
        names = {"messages", "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"}
        fields = body.model_dump(include=names, exclude_none=True)
        chat = ChatCompletionRequest(**fields, add_special_tokens=bool(body.add_special_tokens))
        prompt, _ = await render_messages(context, chat, any_length=body.truncate_prompt_tokens is not None)
        all_ids = [prompt["prompt_token_ids"]]
    else:
        all_ids = [await _token_ids(context, body, text) for text in _separate(body.input)]
    salt = {} if body.cache_salt is None else {"cache_salt": body.cache_salt}
    return [{"prompt_token_ids": _truncated(context, body, token_ids), **salt} for token_ids in all_ids]


def _separate(given: Any) -> list[str | list[int]]:
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise ParameterError("input must not be empty", "input", given)
    return list(given)


async def _token_ids(context: ServeContext, body: EmbeddingRequest, text: str | list[int]) -> list[int]:
    if isinstance(text, list):
        return text
    any_length = body.truncate_prompt_tokens is not None
    return await encode(context, text, body.add_special_tokens is not False, any_length)


def _truncated(context: ServeContext, body: EmbeddingRequest, token_ids: list[int]) -> list[int]:
    """At most ``truncate_prompt_tokens``, by default the beginning; -1 stands for the context."""
    limit = body.truncate_prompt_tokens
    if limit is None:
        return token_ids
    if limit == 0 or limit > context.max_model_len:
        raise ParameterError(f"must be 1 to {context.max_model_len}, or -1", "truncate_prompt_tokens", limit)
    limit = context.max_model_len if limit == -1 else limit
    return token_ids[-limit:] if body.truncation_side == "left" else token_ids[:limit]
