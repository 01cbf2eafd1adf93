"""The tool calls of Hermes, Qwen2.5 and Qwen3: a JSON object between tags.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Several calls follow each other. Tags inside the JSON strings are text, since a call ends where its object does; a
missing last tag is tolerated.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.parsers.calls import attempt, read_json_call
from nanovllm.parsers.emitter import Emitter
from nanovllm.parsers.grammar import LINE_BREAK, Envelope, Grammar
from nanovllm.parsers.source import Source, Steps
from nanovllm.parsers.tools import Function, Tools

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def read(source: Source, emit: Emitter, tools: Tools) -> Steps[None]:
    """Read an answer to its end."""
    marker = yield from source.copy_until((OPEN,), emit.content)
    while marker:
        called = yield from attempt(source, emit, _call(source, emit))
        if called:
            yield from source.skip_space()
        marker = yield from source.copy_until((OPEN, CLOSE) if called else (OPEN,), emit.content)
        if marker == CLOSE:
            source.skip(len(CLOSE))
            marker = yield from source.copy_until((OPEN,), emit.content)


def _call(source: Source, emit: Emitter) -> Steps[None]:
    yield from source.expect(OPEN)
    yield from source.skip_space()
    yield from read_json_call(source, emit)


def envelope(grammar: Grammar, functions: Sequence[Function], parallel: bool) -> Envelope:
    """Calls as `read` finds them, written as the models were taught."""
    call = f"{LINE_BREAK} {grammar.json_call(functions, 'arguments')} {LINE_BREAK} {grammar.mark(CLOSE)}"
    return Envelope((OPEN,), call, LINE_BREAK, parallel)
