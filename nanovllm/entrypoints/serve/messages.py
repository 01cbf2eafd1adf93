"""``/v1/messages`` and ``/v1/messages/count_tokens``: a chat turn in Anthropic's shape."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanovllm.entrypoints.serve.admission import Ticket, get_ticket
from nanovllm.entrypoints.serve.chat import ChatTurn, prepare_chat, render_messages
from nanovllm.entrypoints.serve.context import ServeContext, get_context, make_request_id
from nanovllm.entrypoints.serve.messages_input import chat_fields
from nanovllm.entrypoints.serve.messages_stream import MessageStream, signature, stop_fields, tool_use_id, usage_fields
from nanovllm.entrypoints.serve.protocol.errors import RESPONSES
from nanovllm.entrypoints.serve.protocol.messages import CountTokensRequest, MessagesRequest
from nanovllm.entrypoints.serve.sse import EventStream, answer_unless_gone, json_bytes
from nanovllm.entrypoints.serve.turns import AnswerReader, chat_request
from nanovllm.errors import ParameterError
from nanovllm.parsers import Answer

router = APIRouter()


@router.post("/v1/messages", responses=RESPONSES, response_model=None)
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Write the next message of a conversation."""
    context = get_context(request)
    turn = await _turn(context, body, make_request_id("msg", request), get_ticket(request))
    if body.stream:
        events = MessageStream(turn).events()
        return EventStream(events, request.url.path, context.args.sse_keep_alive_interval, b"")
    return await answer_unless_gone(request, _answer(turn))


@router.post("/v1/messages/count_tokens", responses=RESPONSES, response_model=None)
async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
    """Count the tokens of a conversation."""
    context = get_context(request)
    context.model_name(body.model)
    fields = chat_fields(body) | {"chat_template_kwargs": _thinking(context, body)[0]}
    prompt, _ = await render_messages(context, chat_request(fields, body.model_extra))
    return _json({"input_tokens": len(prompt["prompt_token_ids"])})


async def _turn(context: ServeContext, body: MessagesRequest, call_id: str, ticket: Ticket) -> ChatTurn:
    body.refuse_unsupported()
    variables, budget = _thinking(context, body)
    own = (body.model_extra or {}).get("chat_template_kwargs")
    fields = chat_fields(body) | {
        "max_completion_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "stop": body.stop_sequences,
        "stream": body.stream,
        "chat_template_kwargs": {**(variables or {}), **own} if isinstance(own, dict) else variables,
        "thinking_token_budget": budget,
        "response_format": _response_format(body),
        "user": (body.metadata or {}).get("user_id"),
    }
    return await prepare_chat(context, chat_request(fields, body.model_extra), call_id, ticket)


def _thinking(context: ServeContext, body: CountTokensRequest) -> tuple[dict[str, Any] | None, int | None]:
    """Variables of the chat template, and the most tokens to think."""
    thinking = body.thinking
    if thinking is None or thinking.type == "adaptive":
        return None, None
    if thinking.type == "disabled":
        return {"enable_thinking": False}, None
    if not context.args.reasoning_parser:
        raise ParameterError("thinking needs a server with --reasoning-parser", "thinking.type", thinking.type)
    return {"enable_thinking": True}, thinking.budget_tokens


def _response_format(body: CountTokensRequest) -> dict[str, Any] | None:
    config = body.output_config
    if config is None or config.format is None:
        return None
    if config.format.get("type") != "json_schema":
        raise ParameterError("must be 'json_schema'", "output_config.format.type", config.format.get("type"))
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": config.format.get("schema")}}


async def _answer(turn: ChatTurn) -> Response:
    reader = AnswerReader(turn)
    answer = await reader.whole()
    return _json(
        {
            "id": turn.call_id,
            "type": "message",
            "role": "assistant",
            "model": turn.model,
            "content": _blocks(answer),
            **stop_fields(reader, bool(answer.tool_calls)),
            "usage": usage_fields(reader.usage),
        }
    )


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    """Content blocks. A call that the token limit cut off is left out: its input is no object yet."""
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": signature(answer.reasoning)})
    if answer.content:
        blocks.append({"type": "text", "text": answer.content, "citations": None})
    for call in answer.tool_calls:
        try:
            arguments = json.loads(call.arguments)
        except ValueError:
            continue
        blocks.append({"type": "tool_use", "id": tool_use_id(), "name": call.name, "input": arguments})
    return blocks or [{"type": "text", "text": "", "citations": None}]


def _json(value: dict[str, Any]) -> Response:
    return Response(json_bytes(value), media_type="application/json")
