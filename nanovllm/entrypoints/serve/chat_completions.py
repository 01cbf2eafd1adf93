"""``/v1/chat/completions``: the next message of a conversation, streamed or not."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanovllm.entrypoints.serve.admission import get_ticket
from nanovllm.entrypoints.serve.beam import beam_outputs
from nanovllm.entrypoints.serve.chat import ChatTurn, make_call_id, prepare_chat
from nanovllm.entrypoints.serve.chat_stream import ChatStream
from nanovllm.entrypoints.serve.context import FINGERPRINT, get_context, make_request_id
from nanovllm.entrypoints.serve.generation import Usage, final_outputs
from nanovllm.entrypoints.serve.logprobs import chat_logprobs, prompt_logprobs
from nanovllm.entrypoints.serve.protocol.chat import ChatCompletionRequest
from nanovllm.entrypoints.serve.protocol.errors import RESPONSES
from nanovllm.entrypoints.serve.reasoning import count_reasoning
from nanovllm.entrypoints.serve.sse import EventStream, answer_unless_gone, json_bytes
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.parsers import Answer

router = APIRouter()


@router.post("/v1/chat/completions", responses=RESPONSES, response_model=None)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Continue a conversation."""
    context = get_context(request)
    call_id = make_request_id("chatcmpl", request, body.request_id)
    turn = await prepare_chat(context, body, call_id, get_ticket(request))
    if body.stream:
        events = ChatStream(turn).events()
        return EventStream(events, request.url.path, context.args.sse_keep_alive_interval)
    return await answer_unless_gone(request, _answer(turn))


async def _answer(turn: ChatTurn) -> Response:
    created = int(time.time())
    request, context = turn.request, turn.context
    if request.use_beam_search:
        found = await beam_outputs(context, turn.call_id, [turn.prompt], turn.params, request, turn.ticket)
        output = found[0]
    else:
        output = (await final_outputs([turn.generate()]))[0]
    usage = Usage(with_details=context.args.enable_prompt_tokens_details)
    usage.add_prompt(output)
    choices = [_choice(turn, completion, usage) for completion in output.outputs]
    return Response(
        json_bytes(
            {
                "id": turn.call_id,
                "object": "chat.completion",
                "created": created,
                "model": turn.model,
                "choices": choices,
                "service_tier": None,
                "system_fingerprint": FINGERPRINT,
                "usage": usage.as_json(),
                **_prompt_part(turn, output),
                "kv_transfer_params": None,
            }
        ),
        media_type="application/json",
    )


def _prompt_part(turn: ChatTurn, output: RequestOutput) -> dict[str, Any]:
    return {
        "prompt_logprobs": prompt_logprobs(output.prompt_logprobs),
        "prompt_token_ids": output.prompt_token_ids if turn.request.return_token_ids else None,
    }


def _choice(turn: ChatTurn, completion: CompletionOutput, usage: Usage) -> dict[str, Any]:
    request, context = turn.request, turn.context
    token_ids = list(completion.token_ids)
    usage.completion += len(token_ids)
    answer = turn.make_parser().parse(completion.text) if turn.parses else Answer(content=completion.text)
    if context.args.reasoning_parser:
        usage.reasoning = (usage.reasoning or 0) + count_reasoning(context, answer.reasoning, token_ids)
    logprobs = None
    if request.logprobs and completion.logprobs is not None:
        as_ids = context.names_tokens_by_id(request.return_tokens_as_token_ids)
        logprobs = chat_logprobs(token_ids, completion.logprobs, request.top_logprobs or 0, context.tokenizer, as_ids)
    return {
        "index": completion.index,
        "message": _message(turn, answer),
        "logprobs": logprobs,
        "finish_reason": turn.finish_reason(completion.finish_reason, len(answer.tool_calls)),
        "stop_reason": completion.stop_reason,
        "token_ids": token_ids if request.return_token_ids else None,
        "routed_experts": None,
    }


def _message(turn: ChatTurn, answer: Answer) -> dict[str, Any]:
    content = answer.content
    if turn.prefix:
        content = turn.prefix + (content or "")
    message: dict[str, Any] = {
        "role": turn.role,
        "content": content,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
    }
    if answer.tool_calls:
        message["tool_calls"] = [
            {"id": make_call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.tool_calls[: turn.max_calls()]
        ]
    reasoning = answer.reasoning if turn.request.include_reasoning else None
    message["reasoning"] = reasoning
    if turn.context.args.reasoning_content_field:
        message["reasoning_content"] = reasoning
    return message
