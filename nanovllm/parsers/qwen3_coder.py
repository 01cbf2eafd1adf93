"""The tool calls of Qwen3-Coder and Qwen3.5: tags around plain text, typed by the function's schema.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

The arguments are made into JSON while they arrive: a string parameter is streamed, any other is read to its end and
written as its schema types say. The outer tags may be missing, and so may ``</parameter>`` where the next line
begins with a tag.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nanovllm.parsers.calls import attempt
from nanovllm.parsers.emitter import Emitter
from nanovllm.parsers.json_text import canonical_json
from nanovllm.parsers.source import Malformed, Source, Steps
from nanovllm.parsers.tools import Function, Tools

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"

_VALUE_ENDS = ("\n" + PARAMETER_END, PARAMETER_END, "\n" + PARAMETER, "\n" + FUNCTION_END)
_WORDS = {"true": True, "false": False, "null": None, "none": None}


def read(source: Source, emit: Emitter, tools: Tools) -> Steps[None]:
    """Read an answer to its end."""
    starts = (OPEN, FUNCTION)
    marker = yield from source.copy_until(starts, emit.content)
    while marker:
        called = yield from attempt(source, emit, _call(source, emit, tools))
        if called:
            yield from source.skip_space()
        marker = yield from source.copy_until((*starts, CLOSE) if called else starts, emit.content)
        if marker == CLOSE:
            source.skip(len(CLOSE))
            marker = yield from source.copy_until(starts, emit.content)


def _call(source: Source, emit: Emitter, tools: Tools) -> Steps[None]:
    if (yield from source.accept(OPEN)):
        yield from source.skip_space()
    yield from source.expect(FUNCTION)
    name = yield from _read_name(source)
    yield from source.skip_space()
    written = 0
    while not (yield from source.accept(FUNCTION_END)):
        yield from source.expect(PARAMETER)
        parameter = yield from _read_name(source)
        if not written:
            emit.call(name)
        emit.arguments(("{" if not written else ", ") + json.dumps(parameter, ensure_ascii=False) + ": ")
        yield from _copy_value(source, emit, _types(tools.get(name), parameter))
        written += 1
        yield from source.skip_space()
    if not written:
        emit.call(name)
    emit.arguments("}" if written else "{}")


def _read_name(source: Source) -> Steps[str]:
    name = (yield from source.read_until((">", "\n"))).strip()
    yield from source.expect(">")
    if not name:
        raise Malformed
    return name


def _copy_value(source: Source, emit: Emitter, types: frozenset[str]) -> Steps[None]:
    """Read a parameter's text and its end, and write it as JSON."""
    yield from source.accept("\n")
    if types <= {"string"}:
        emit.arguments('"')
        marker = yield from source.copy_until(_VALUE_ENDS, lambda text: emit.arguments(_escaped(text)))
        if not marker:
            return
        emit.arguments('"')
    else:
        text = yield from source.read_until(_VALUE_ENDS)
        emit.arguments(_typed(text, types))
    yield from source.skip_space()
    yield from source.accept(PARAMETER_END)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _types(function: Function, parameter: str) -> frozenset[str]:
    """The JSON types a parameter may have; none if its schema does not say."""
    return frozenset(_schema_types(function.parameter_schema(parameter)))


def _schema_types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    kinds = schema.get("type")
    types = {kinds} if isinstance(kinds, str) else set(kinds or ())
    for key in ("anyOf", "oneOf", "allOf"):
        for choice in schema.get(key) or ():
            types |= _schema_types(choice)
    for value in (*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else [])):
        types.add(_type_of(value))
    return types


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def _typed(text: str, types: frozenset[str]) -> str:
    """The JSON text of a parameter that may be something else than a string.

    Text that is no value of the types is a string: the function can say better what is wrong with it.
    """
    stripped = text.strip()
    written = stripped
    try:
        if stripped.lower() in _WORDS:
            value: Any = _WORDS[stripped.lower()]
            written = json.dumps(value)
        else:
            value = json.loads(stripped, parse_constant=_refuse)
            if isinstance(value, float) and value.is_integer() and "number" not in types:
                value = int(value)
                written = str(value)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    kind = _type_of(value)
    if kind in types or (kind == "integer" and "number" in types):
        return canonical_json(written)
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
