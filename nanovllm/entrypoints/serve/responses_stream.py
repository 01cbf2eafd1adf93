"""A response as events: each names its type, and they are numbered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from nanovllm.entrypoints.serve.errors import as_serve_error
from nanovllm.entrypoints.serve.responses_output import (
    Item,
    ResponseHead,
    call_item,
    message_item,
    reasoning_item,
    text_part,
)
from nanovllm.entrypoints.serve.sse import json_bytes
from nanovllm.entrypoints.serve.turns import AnswerReader
from nanovllm.parsers import Content, Event, Reasoning, ToolCallArguments, ToolCallStart

TEXT_EVENTS = {"reasoning": "response.reasoning_text", "message": "response.output_text"}
CALL_EVENTS = "response.function_call_arguments"


class ResponseStream:
    """The events of one response, in OpenAI's order.

    ::

        created, in_progress, (output_item.added, content_part.added, *.delta ..., *.done, content_part.done,
        output_item.done) for each item, completed | incomplete | failed

    Args:
        head: of the response.
        reader: its answer.
        done: told of the finished response's JSON.
    """

    def __init__(self, head: ResponseHead, reader: AnswerReader, done: Callable[[dict[str, Any]], None]) -> None:
        self._head = head
        self._reader = reader
        self._done = done
        self._number = 0
        self._output: list[Item] = []  # finished items
        self._item: Item | None = None  # the open one
        self._pieces: list[str] = []  # of its text

    async def events(self) -> AsyncIterator[bytes]:
        """Encoded events."""
        begun = False
        try:
            async with aclosing(self._reader.parts()) as outputs:
                async for parts in outputs:
                    data = b"" if begun else self._begin()
                    begun = True
                    data += b"".join(self._part(part) for part in parts)
                    if data:
                        yield data
        except Exception as fault:
            if not begun:
                raise
            error = {"code": "server_error", "message": as_serve_error(fault).message}
            yield self._end("failed", error)
            return
        yield self._end("completed" if self._reader.finished else "incomplete")

    def _begin(self) -> bytes:
        response = self._head.as_json("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _part(self, part: Event) -> bytes:
        if isinstance(part, ToolCallStart):
            return self._close() + self._open(call_item(part.name, "", "in_progress"))
        if isinstance(part, ToolCallArguments):
            return self._delta(CALL_EVENTS, part.fragment)
        kind = "reasoning" if isinstance(part, Reasoning) else "message"
        opened = b""
        if self._item is None or self._item["type"] != kind:
            opened = self._close() + self._open(_empty_item(kind))
        assert isinstance(part, (Content, Reasoning))
        return opened + self._delta(TEXT_EVENTS[kind], part.text)

    def _open(self, item: Item) -> bytes:
        self._item, self._pieces = item, []
        data = self._event("response.output_item.added", **self._place(), item=item)
        if item["type"] in TEXT_EVENTS:
            part = self._content_part("")
            data += self._event("response.content_part.added", **self._place(item), content_index=0, part=part)
        return data

    def _delta(self, kind: str, text: str) -> bytes:
        assert self._item is not None
        self._pieces.append(text)
        extra: dict[str, Any] = {} if kind == CALL_EVENTS else {"content_index": 0}
        if kind == TEXT_EVENTS["message"]:
            extra["logprobs"] = []
        return self._event(f"{kind}.delta", **self._place(self._item), **extra, delta=text)

    def _close(self, status: str = "completed") -> bytes:
        """End the open item."""
        item = self._item
        if item is None:
            return b""
        text = "".join(self._pieces)
        place = self._place(item)
        if item["type"] == "function_call":
            item["arguments"] = text
            data = self._event(f"{CALL_EVENTS}.done", **place, name=item["name"], arguments=text)
        else:
            part = self._content_part(text)
            item["content"] = [part]
            extra: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            data = self._event(f"{TEXT_EVENTS[item['type']]}.done", **place, content_index=0, text=text, **extra)
            data += self._event("response.content_part.done", **place, content_index=0, part=part)
        item["status"] = status
        data += self._event("response.output_item.done", **self._place(), item=item)
        self._output.append(item)
        self._item = None
        return data

    def _end(self, status: str, error: dict[str, Any] | None = None) -> bytes:
        data = b""
        if self._item is None and not self._output:
            data += self._open(_empty_item("message"))
        data += self._close("completed" if status == "completed" else "incomplete")
        response = self._head.as_json(status, self._output, self._reader.usage, error)
        self._done(response)
        return data + self._event(f"response.{status}", response=response)

    def _content_part(self, text: str) -> dict[str, Any]:
        assert self._item is not None
        return text_part(text) if self._item["type"] == "message" else {"type": "reasoning_text", "text": text}

    def _place(self, item: Item | None = None) -> dict[str, Any]:
        place: dict[str, Any] = {"output_index": len(self._output)}
        return place if item is None else {"item_id": item["id"], **place}

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = json_bytes({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return f"event: {kind}\ndata: ".encode() + data + b"\n\n"


def _empty_item(kind: str) -> Item:
    return reasoning_item("", "in_progress") if kind == "reasoning" else message_item(None, "in_progress")
