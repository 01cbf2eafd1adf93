"""The tool calls of Llama 3.x: the answer is a JSON object and nothing else.

    {"name": "get_weather", "parameters": {"city": "Paris"}}

A ``<|python_tag|>`` may stand before it, several calls are separated by semicolons, and the arguments are called
``parameters`` or ``arguments``. Since no tag tells a call from an answer that happens to be JSON, only the names of
functions that were offered make a call.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.parsers.calls import attempt, read_json_call
from nanovllm.parsers.emitter import Emitter
from nanovllm.parsers.grammar import Envelope, Grammar
from nanovllm.parsers.source import Source, Steps
from nanovllm.parsers.tools import Function, Tools

PYTHON_TAG = "<|python_tag|>"
SEPARATOR = ";"


def read(source: Source, emit: Emitter, tools: Tools) -> Steps[None]:
    """Read an answer to its end."""
    before = PYTHON_TAG
    while (yield from attempt(source, emit, _call(source, emit, tools, before))):
        before = SEPARATOR
    yield from source.copy_until((), emit.content)


def _call(source: Source, emit: Emitter, tools: Tools, before: str) -> Steps[None]:
    yield from source.skip_space()
    yield from source.accept(before)
    yield from source.skip_space()
    yield from read_json_call(source, emit, ("parameters", "arguments"), tools)


def envelope(grammar: Grammar, functions: Sequence[Function], parallel: bool) -> Envelope:
    """Calls as `read` finds them; nothing marks their beginning."""
    call = grammar.json_call(functions, "parameters")
    return Envelope((), f"{call} ({grammar.text(SEPARATOR + ' ')} {call})*" if parallel else call)
