"""``/tokenize`` and ``/detokenize``: the model's tokenizer by itself."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanovllm.entrypoints.serve.chat import render_messages
from nanovllm.entrypoints.serve.context import ServeContext, get_context
from nanovllm.entrypoints.serve.errors import ServeError
from nanovllm.entrypoints.serve.prompts import encode
from nanovllm.entrypoints.serve.protocol.chat import ChatCompletionRequest
from nanovllm.entrypoints.serve.protocol.errors import RESPONSES
from nanovllm.entrypoints.serve.protocol.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from nanovllm.entrypoints.serve.sse import json_bytes
from nanovllm.errors import ParameterError

router = APIRouter()


@router.post("/tokenize", responses=RESPONSES, response_model=TokenizeResponse)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a prompt or a conversation."""
    context = get_context(request)
    context.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ParameterError("give either a prompt or messages", "prompt", body.prompt)
    if body.messages is None:
        assert body.prompt is not None
        token_ids = await encode(context, body.prompt, body.add_special_tokens is not False)
    else:
        token_ids = await _conversation(context, body)
    names = None
    if body.return_token_strs:
        names = await asyncio.to_thread(lambda: [context.tokenizer.token_text(token_id) for token_id in token_ids])
    answer = {"count": len(token_ids), "max_model_len": context.max_model_len, "tokens": token_ids, "token_strs": names}
    return Response(json_bytes(answer), media_type="application/json")


@router.post("/detokenize", responses=RESPONSES)
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeResponse:
    """The text of tokens."""
    context = get_context(request)
    context.model_name(body.model)
    size = context.engine.model_config.vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < size:
            raise ParameterError(f"Token id {token_id} is out of vocabulary (0 <= id < {size}).", "tokens", token_id)
    text = await asyncio.to_thread(context.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return DetokenizeResponse(prompt=text)


@router.get("/tokenizer_info", responses={404: {"description": "the server does not tell"}})
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What the tokenizer is, with ``--enable-tokenizer-info-endpoint``."""
    context = get_context(request)
    if not context.args.enable_tokenizer_info_endpoint:
        raise ServeError(404, "this needs --enable-tokenizer-info-endpoint")
    tokenizer = context.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": len(tokenizer),
        "max_model_len": context.max_model_len,
        **tokenizer.special_tokens,
        "chat_template": tokenizer.chat_template,
    }


async def _conversation(context: ServeContext, body: TokenizeRequest) -> list[int]:
    fields = body.model_dump(exclude_none=True, exclude={"prompt", "return_token_strs"})
    prompt, _ = await render_messages(context, ChatCompletionRequest(**fields))
    return prompt["prompt_token_ids"]
