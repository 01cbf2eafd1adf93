"""A response and its output items as JSON."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from nanovllm.entrypoints.serve.chat import ChatTurn
from nanovllm.entrypoints.serve.generation import Usage
from nanovllm.entrypoints.serve.protocol.responses import ResponsesRequest
from nanovllm.parsers import Answer

Item = dict[str, Any]


def reasoning_item(text: str, status: str = "completed") -> Item:
    """What the model thought."""
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {
        "id": _item_id("rs"),
        "type": "reasoning",
        "summary": [],
        "content": content,
        "encrypted_content": None,
        "status": status,
    }


def message_item(text: str | None, status: str = "completed") -> Item:
    """What it said; None: nothing yet."""
    content = [] if text is None else [text_part(text)]
    return {"id": _item_id("msg"), "type": "message", "role": "assistant", "status": status, "content": content}


def text_part(text: str) -> dict[str, Any]:
    """The content of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(name: str, arguments: str, status: str = "completed") -> Item:
    """A function it calls."""
    return {
        "id": _item_id("fc"),
        "type": "function_call",
        "call_id": _item_id("call"),
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def output_items(answer: Answer, finished: bool) -> list[Item]:
    """The items of a whole answer; the last one is incomplete if the answer is not ``finished``."""
    items = [reasoning_item(answer.reasoning)] if answer.reasoning else []
    if answer.content is not None:
        items.append(message_item(answer.content))
    items += [call_item(call.name, call.arguments) for call in answer.tool_calls]
    if not items:
        items.append(message_item(""))
    if not finished:
        items[-1]["status"] = "incomplete"
    return items


@dataclass
class ResponseHead:
    """What all JSON of one response repeats."""

    body: ResponsesRequest
    turn: ChatTurn
    response_id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def as_json(
        self,
        status: str,
        output: list[Item] | None = None,
        usage: Usage | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The response in one of its states: queued, in_progress, completed, incomplete, failed or cancelled."""
        body, params = self.body, self.turn.params
        text, reasoning = body.text, body.reasoning
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": bool(body.background),
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": self.turn.model,
            "output": output or [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": params.temperature,
            "text": {"format": text.format.model_dump(by_alias=True) if text and text.format else {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": body.user,
        }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached if usage.with_details else 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0},
        "total_tokens": usage.prompt + usage.completion,
    }


def _item_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
