"""A chat answer as chunks. What a chunk repeats is encoded once per stream, and plain text takes a short way."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from nanovllm.entrypoints.serve.chat import ChatTurn, make_call_id
from nanovllm.entrypoints.serve.context import FINGERPRINT
from nanovllm.entrypoints.serve.generation import Usage
from nanovllm.entrypoints.serve.logprobs import chat_logprobs
from nanovllm.entrypoints.serve.reasoning import count_reasoning
from nanovllm.entrypoints.serve.sse import DONE, event, json_bytes, json_text
from nanovllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from nanovllm.parsers import AnswerParser, Content, Event, Reasoning, ToolCallArguments, ToolCallStart


@dataclass
class _Choice:
    """One of the n answers while it grows."""

    parser: AnswerParser | None
    reasoning: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # kept only where reasoning is counted
    held_ids: list[int] = field(default_factory=list)  # not sent yet, because their text is held back
    held_logprobs: list[PositionLogprobs] = field(default_factory=list)


class ChatStream:
    """The chunks of one answer to `ChatTurn`."""

    def __init__(self, turn: ChatTurn) -> None:
        context, request = turn.context, turn.request
        self._turn = turn
        self._usage = Usage(with_details=context.args.enable_prompt_tokens_details)
        self._last_usage, self._every_usage = request.usage_wanted(context.args.enable_force_include_usage)
        self._counts_reasoning = bool(context.args.reasoning_parser)
        if self._counts_reasoning:
            self._usage.reasoning = 0
        self._plain = not (turn.parses or request.logprobs or request.return_token_ids or self._every_usage)
        self._choices = [_Choice(turn.make_parser() if turn.parses else None) for _ in range(turn.params.n)]
        self._head = {
            "id": turn.call_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": turn.model,
        }
        self._prefix = "data: " + json_bytes(self._head).decode()[:-1] + ',"choices":[{"index":'

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        source = self._turn.generate()
        begun = False
        try:
            async for output in source:
                if not begun:
                    begun = True
                    self._usage.add_prompt(output)
                    yield self._first_chunks(output)
                chunks = ""
                for completion in output.outputs:
                    chunks += self._chunk(completion)
                if chunks:
                    yield chunks.encode()
        finally:
            await source.aclose()
        if self._last_usage:
            if self._counts_reasoning:
                self._count_reasoning()
            yield event(
                {**self._head, "choices": [], "usage": self._usage.as_json(), "system_fingerprint": FINGERPRINT}
            )
        yield DONE

    def _first_chunks(self, output: RequestOutput) -> bytes:
        """The role of every answer, and the text that ``echo`` repeats."""
        turn = self._turn
        chunks = []
        for text in ["", turn.prefix] if turn.prefix else [""]:
            for index in range(len(self._choices)):
                delta = {"role": turn.role, "content": ""} if not text else {"content": text}
                choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                chunk: dict[str, Any] = {**self._head, "choices": [choice]}
                if turn.request.return_token_ids and not text:
                    chunk["prompt_token_ids"] = output.prompt_token_ids
                if self._every_usage:
                    chunk["usage"] = self._usage.as_json()
                chunks.append(event(chunk))
        return b"".join(chunks)

    def _chunk(self, completion: CompletionOutput) -> str:
        if not self._plain:
            return self._rich_chunk(completion)
        self._usage.completion += len(completion.token_ids)
        index, text, finish = completion.index, completion.text, completion.finish_reason
        if finish is None:
            return f'{self._prefix}{index},"delta":{{"content":{json_text(text)}}}{_GOES_ON}'
        return f'{self._prefix}{index},"delta":{{"content":{json_text(text)}}},"logprobs":null{self._end(completion)}'

    def _rich_chunk(self, completion: CompletionOutput) -> str:
        """A chunk of an answer that is taken apart, or that carries more than text; nothing if all is held back."""
        turn, request = self._turn, self._turn.request
        choice = self._choices[completion.index]
        token_ids = list(completion.token_ids)
        self._usage.completion += len(token_ids)
        choice.held_ids += token_ids
        if self._counts_reasoning:
            choice.token_ids += token_ids
        if completion.logprobs:
            choice.held_logprobs += completion.logprobs
        delta = self._delta(choice, completion)
        if not delta and completion.finish_reason is None:
            return ""
        logprobs = None
        if request.logprobs and choice.held_logprobs:
            as_ids = turn.context.names_tokens_by_id(request.return_tokens_as_token_ids)
            logprobs = chat_logprobs(
                choice.held_ids, choice.held_logprobs, request.top_logprobs or 0, turn.context.tokenizer, as_ids
            )
        sent_ids = json_bytes(choice.held_ids if request.return_token_ids else None).decode()
        choice.held_ids, choice.held_logprobs = [], []
        begin = f'{self._prefix}{completion.index},"delta":{json_bytes(delta).decode()}'
        begin += f',"logprobs":{json_bytes(logprobs).decode()}'
        if completion.finish_reason is not None:
            return begin + self._end(completion, sent_ids)
        usage = f',"usage":{json_bytes(self._usage.as_json()).decode()}' if self._every_usage else ""
        return f'{begin},"finish_reason":null,"token_ids":{sent_ids}}}]{usage}}}\n\n'

    def _delta(self, choice: _Choice, completion: CompletionOutput) -> dict[str, Any]:
        """What is new in an answer."""
        if choice.parser is None:
            return {"content": completion.text}
        events = choice.parser.feed(completion.text) if completion.text else []
        if completion.finish_reason is not None:
            events = [*events, *choice.parser.finish()]
        return self._delta_of(choice, events)

    def _delta_of(self, choice: _Choice, events: list[Event]) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        limit = self._turn.max_calls()
        for each in events:
            if isinstance(each, Content):
                delta["content"] = delta.get("content", "") + each.text
            elif isinstance(each, Reasoning):
                choice.reasoning.append(each.text)
                if self._turn.request.include_reasoning:
                    delta["reasoning"] = delta.get("reasoning", "") + each.text
            elif isinstance(each, ToolCallStart):
                if limit is None or each.index < limit:
                    function = {"name": each.name, "arguments": ""}
                    calls.append({"id": make_call_id(), "type": "function", "index": each.index, "function": function})
            elif isinstance(each, ToolCallArguments) and (limit is None or each.index < limit):
                if calls and calls[-1]["index"] == each.index:
                    calls[-1]["function"]["arguments"] += each.fragment
                else:
                    calls.append({"index": each.index, "function": {"arguments": each.fragment}})
        if "reasoning" in delta and self._turn.context.args.reasoning_content_field:
            delta["reasoning_content"] = delta["reasoning"]
        if calls:
            if "id" in calls[0]:
                delta.setdefault("content", None)
            delta["tool_calls"] = calls
        return delta

    def _end(self, completion: CompletionOutput, token_ids: str = "null") -> str:
        """The rest of an answer's last chunk."""
        parser = self._choices[completion.index].parser
        reason = self._turn.finish_reason(completion.finish_reason, parser.num_calls if parser else 0)
        usage = f',"usage":{json_bytes(self._usage.as_json()).decode()}' if self._every_usage else ""
        fingerprint = "" if self._last_usage else f',"system_fingerprint":"{FINGERPRINT}"'
        return (
            f',"finish_reason":"{reason}","stop_reason":{json_bytes(completion.stop_reason).decode()}'
            f',"token_ids":{token_ids}}}]{usage}{fingerprint}}}\n\n'
        )

    def _count_reasoning(self) -> None:
        self._usage.reasoning = sum(
            count_reasoning(self._turn.context, "".join(choice.reasoning), choice.token_ids) for choice in self._choices
        )


_GOES_ON = ',"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
