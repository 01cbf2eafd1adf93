"""A message as Anthropic's events, and what they share with a message sent at once."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from nanovllm.entrypoints.serve.chat import ChatTurn
from nanovllm.entrypoints.serve.generation import Usage
from nanovllm.entrypoints.serve.sse import json_bytes
from nanovllm.entrypoints.serve.turns import AnswerReader
from nanovllm.parsers import Content, Event, Reasoning, ToolCallArguments, ToolCallStart


def stop_fields(reader: AnswerReader, called: bool) -> dict[str, Any]:
    """Why a message ended."""
    sequence = reader.stop_reason if isinstance(reader.stop_reason, str) else None
    if reader.finish_reason == "length":
        reason = "max_tokens"
    elif sequence is not None:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if called else "end_turn"
    return {"stop_reason": reason, "stop_sequence": sequence}


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Tokens of a message; those of the prompt that were cached are counted apart, if the server tells of them."""
    cached = usage.cached if usage.with_details else 0
    return {
        "input_tokens": usage.prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion,
    }


def signature(thinking: str) -> str:
    """What a client sends back with the thinking. Nothing is hidden in it, and it is not checked."""
    return hashlib.sha256(thinking.encode()).hexdigest()


def tool_use_id() -> str:
    """An id for a call."""
    return f"toolu_{uuid.uuid4().hex[:24]}"


class MessageStream:
    """The events of one message.

    ::

        message_start, (content_block_start, content_block_delta ..., content_block_stop) for each block,
        message_delta, message_stop
    """

    def __init__(self, turn: ChatTurn) -> None:
        self._turn = turn
        self._reader = AnswerReader(turn)
        self._index = 0  # of the open block, or the next one
        self._kind: str | None = None  # of the open block
        self._thinking: list[str] = []  # of the open block
        self._called = False

    async def events(self) -> AsyncIterator[bytes]:
        """Encoded events."""
        begun = False
        async with aclosing(self._reader.parts()) as outputs:
            async for parts in outputs:
                data = b"" if begun else self._begin()
                begun = True
                data += b"".join(self._part(part) for part in parts)
                if data:
                    yield data
        data = b"" if self._index or self._kind else self._open("text", {"text": "", "citations": None})
        data += self._close()
        delta = {**stop_fields(self._reader, self._called), "container": None}
        data += _event("message_delta", delta=delta, usage=usage_fields(self._reader.usage))
        yield data + _event("message_stop")

    def _begin(self) -> bytes:
        message: dict[str, Any] = {
            "id": self._turn.call_id,
            "type": "message",
            "role": "assistant",
            "model": self._turn.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_fields(self._reader.usage) | {"output_tokens": 0},
        }
        return _event("message_start", message=message)

    def _part(self, part: Event) -> bytes:
        if isinstance(part, ToolCallStart):
            self._called = True
            return self._close() + self._open("tool_use", {"id": tool_use_id(), "name": part.name, "input": {}})
        if isinstance(part, ToolCallArguments):
            return self._delta({"type": "input_json_delta", "partial_json": part.fragment})
        if isinstance(part, Reasoning):
            opened = self._switch("thinking", {"thinking": "", "signature": ""})
            self._thinking.append(part.text)
            return opened + self._delta({"type": "thinking_delta", "thinking": part.text})
        assert isinstance(part, Content)
        opened = self._switch("text", {"text": "", "citations": None})
        return opened + self._delta({"type": "text_delta", "text": part.text})

    def _switch(self, kind: str, empty: dict[str, Any]) -> bytes:
        return b"" if self._kind == kind else self._close() + self._open(kind, empty)

    def _open(self, kind: str, empty: dict[str, Any]) -> bytes:
        self._kind = kind
        return _event("content_block_start", index=self._index, content_block={"type": kind, **empty})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> bytes:
        """End the open block."""
        if self._kind is None:
            return b""
        data = b""
        if self._kind == "thinking":
            data = self._delta({"type": "signature_delta", "signature": signature("".join(self._thinking))})
            self._thinking = []
        data += _event("content_block_stop", index=self._index)
        self._kind = None
        self._index += 1
        return data


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + json_bytes({"type": kind, **fields}) + b"\n\n"
