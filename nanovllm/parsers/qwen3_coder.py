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
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.errors import ParameterError
from nanovllm.parsers.calls import attempt
from nanovllm.parsers.emitter import Emitter
from nanovllm.parsers.grammar import ANY_TEXT, LINE_BREAK, Envelope, Grammar, pattern_of
from nanovllm.parsers.json_text import canonical_json
from nanovllm.parsers.schema import allowed_values, resolved, type_of
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
        yield from _copy_value(source, emit, tools.get(name).types(parameter))
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
    kind = type_of(value)
    if kind in types or (kind == "integer" and "number" in types):
        return canonical_json(written)
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def envelope(grammar: Grammar, functions: Sequence[Function], parallel: bool) -> Envelope:
    """Calls as `read` finds them, parameters in the schema's order.

    Raises:
        ParameterError: a schema that does not list its parameters, or says of a text what tags cannot hold.
    """
    any_call = grammar.rule(" | ".join(grammar.rule(_call_rule(grammar, function)) for function in functions))
    call = f"{LINE_BREAK} {any_call} {LINE_BREAK} {grammar.mark(CLOSE)}"
    return Envelope((OPEN, FUNCTION), call, LINE_BREAK, parallel)


def _call_rule(grammar: Grammar, function: Function) -> str:
    required = function.parameters.get("required") or ()
    missing = [name for name in required if name not in function.properties]
    if missing or any(key in function.parameters for key in ("$ref", "anyOf", "oneOf", "allOf")):
        raise ParameterError(
            f"the parameters of the function {function.name!r} must be listed in properties", "tools", missing or "..."
        )
    parts = [grammar.text(f"{FUNCTION}{function.name}>\n")]
    for name, schema in function.properties.items():
        part = grammar.rule(grammar.text(f"{PARAMETER}{name}>\n") + " " + _value_rule(grammar, function, name, schema))
        parts.append(part if name in required else part + "?")
    return " ".join([*parts, grammar.text(FUNCTION_END)])


def _value_rule(grammar: Grammar, function: Function, name: str, schema: Any) -> str:
    """A parameter's value and its end: as text if it may be a string, else as JSON."""
    schema = resolved(schema, function.parameters)
    types = function.types(name)
    end = "\n" + PARAMETER_END
    if types and "string" not in types:
        definitions = {key: function.parameters[key] for key in ("$defs", "definitions") if key in function.parameters}
        return f"{grammar.json({**schema, **definitions})} {grammar.text(end)} {LINE_BREAK}"
    values = allowed_values(schema) if isinstance(schema, Mapping) else None
    if values is not None:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        return f"({' | '.join(grammar.text(text + end) for text in texts)}) {LINE_BREAK}"
    body = _text_pattern(schema) if isinstance(schema, Mapping) else ANY_TEXT
    text = grammar.text_without(_VALUE_ENDS, body)
    return f"{grammar.rule(f'{text} /{pattern_of(end)}/', '[lazy]')} {LINE_BREAK}"


def _text_pattern(schema: Mapping[str, Any]) -> str:
    """The regular expression of a string's schema."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    body = ANY_TEXT if not least and most == "" else rf"/(.|\n){{{least},{most}}}/"
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        slashed = re.sub(r"(?<!\\)/", r"\/", pattern)
        before = "" if slashed.startswith("^") else r"(.|\n)*"
        after = "" if slashed.endswith("$") and not slashed.endswith(r"\$") else r"(.|\n)*"
        body += f" & /{before}({slashed.removeprefix('^').removesuffix('' if after else '$')}){after}/"
    return body
