"""The tool calls of Mistral's models, all after the token ``[TOOL_CALLS]``.

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, ...]          up to tokenizer version 7
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]...                       from version 11 on

In the second form ``[ARGS]`` may be missing, and ``[CALL_ID]`` with an id may stand before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.parsers.calls import attempt, read_json_call
from nanovllm.parsers.emitter import Emitter
from nanovllm.parsers.grammar import Envelope, Grammar
from nanovllm.parsers.json_text import copy_json
from nanovllm.parsers.source import Malformed, Source, Steps
from nanovllm.parsers.tools import Function, Tools

TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def read(source: Source, emit: Emitter, tools: Tools) -> Steps[None]:
    """Read an answer to its end."""
    while (yield from source.copy_until((TOOL_CALLS,), emit.content)):
        start = source.mark()
        source.skip(len(TOOL_CALLS))
        yield from source.skip_space()
        if (yield from source.accept("[")):
            called = yield from attempt(source, emit, _listed_call(source, emit), start)
            while called:
                called = yield from _next_listed(source, emit)
        else:
            yield from attempt(source, emit, _named_call(source, emit), start)


def _listed_call(source: Source, emit: Emitter) -> Steps[None]:
    yield from source.skip_space()
    yield from read_json_call(source, emit)


def _next_listed(source: Source, emit: Emitter) -> Steps[bool]:
    yield from source.skip_space()
    if (yield from source.accept("]")):
        return False
    start = source.mark()
    if not (yield from source.accept(",")):
        source.release()
        return False
    return (yield from attempt(source, emit, _listed_call(source, emit), start))


def _named_call(source: Source, emit: Emitter) -> Steps[None]:
    if (yield from source.peek()) == "{":
        yield from read_json_call(source, emit)
        return
    name = yield from source.read_until(("{", "[", " ", "\n"))
    if not name:
        raise Malformed
    yield from source.skip_space()
    if (yield from source.accept(CALL_ID)):
        yield from source.read_until((ARGS, "{"))
    yield from source.accept(ARGS)
    yield from source.skip_space()
    if (yield from source.peek()) != "{":
        raise Malformed
    emit.call(name)
    yield from copy_json(source, emit.arguments)


def envelope(grammar: Grammar, functions: Sequence[Function], parallel: bool) -> Envelope:
    """Calls as `read` finds them: in the second form if the tokenizer has its token."""
    args = grammar.token(ARGS)
    if args is not None:
        calls = [f"{grammar.text(function.name)} {args} {grammar.json(function.parameters)}" for function in functions]
        return Envelope((TOOL_CALLS,), grammar.rule(" | ".join(calls)), repeats=parallel)
    call = grammar.json_call(functions, "arguments")
    more = f"({grammar.text(', ')} {call})*" if parallel else ""
    return Envelope((TOOL_CALLS,), f"{grammar.text('[')} {call} {more} {grammar.text(']')}")
