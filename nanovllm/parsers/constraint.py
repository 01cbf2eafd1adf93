"""The grammar of required tool calls: the envelope the parser reads, with the functions' schemas inside."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanovllm.errors import ParameterError
from nanovllm.parsers.formats import TOOL_PARSERS, lookup
from nanovllm.parsers.grammar import ANY_TEXT, Envelope, Grammar, pattern_of
from nanovllm.parsers.tools import Function, ToolChoice, Tools
from nanovllm.sampling_params import StructuredOutputsParams

NO_JSON = r"/([^ \t\r\n{](.|\n)*)?/"
LAYOUT = r"/\n{1,2}/"  # line breaks that models write between their reasoning and a call


def tool_constraint(
    tool_parser: str,
    tools: Sequence[Any] | None,
    tool_choice: Any = None,
    parallel_tool_calls: bool = True,
    token_id: Callable[[str], int | None] | None = None,
    content: StructuredOutputsParams | None = None,
) -> StructuredOutputsParams | None:
    """What a request's tools ask of the form of its answer.

    With "required" or a named function, the answer is calls in the parser's form, and every call's arguments follow
    their function's schema, whether it is called strict or not. With "auto" the answer is free until the model begins
    a call; if any function is strict, the call's name is then one of the functions', and the arguments of strict ones
    follow their schemas. Functions without strictness take any object there. If the content is to follow a schema too,
    the answer is either such content or calls, and these follow their schemas.

    Args:
        tool_parser: a name in `TOOL_PARSERS`.
        tools, tool_choice: the request's.
        parallel_tool_calls: False: at most one call. A named function is always called once.
        token_id: the id of the token that a text is, None if it is not one; for tags that are tokens.
        content: what the request asks of the form of an answer that is no call.

    Returns:
        None if nothing is asked.

    Raises:
        ParameterError: malformed tools or choice, or a schema that the format cannot hold. Whether the grammar's
            compiler takes the schemas is found when the request is made.
    """
    functions = Tools.read(tools)
    choice = ToolChoice.read(tool_choice, functions)
    offered = [function for function in functions if choice.name in (None, function.name)]
    free = choice.mode == "auto" and content is None
    if choice.mode == "none" or (free and not any(function.strict for function in offered)):
        return None
    if free:
        offered = [function if function.strict else replace(function, parameters={}) for function in offered]
    schemas = {function.name: _arguments_schema(function) for function in offered}
    offered = [replace(function, parameters=schemas[function.name]) for function in offered]
    grammar = Grammar(token_id)
    parallel = parallel_tool_calls and choice.mode != "named"
    envelope = lookup(TOOL_PARSERS, tool_parser, "tool_call_parser").envelope(grammar, offered, parallel)
    if content is None or choice.mode != "auto":
        start = _free(grammar, envelope) if free else _required(grammar, envelope)
        return StructuredOutputsParams(grammar=grammar.written(start))
    if not envelope.markers:
        raise ParameterError(
            f"calls in the form of {tool_parser} cannot be told from JSON content: use another tool_choice",
            "tool_choice",
            "auto",
        )
    start = f"{grammar.json(_content_schema(content))} | {_required(grammar, envelope)}"
    return replace(content, json=None, json_object=None, grammar=grammar.written(start))


def _required(grammar: Grammar, envelope: Envelope) -> str:
    opening = grammar.mark(envelope.markers[0]) if envelope.markers else ""
    again = f"({envelope.separator} {opening} {envelope.call})*" if envelope.repeats else ""
    return f"{grammar.terminal(LAYOUT)}? {opening} {envelope.call} {again}"


def _free(grammar: Grammar, envelope: Envelope) -> str:
    if not envelope.markers:
        # What begins like JSON is taken for a call by the parser, so it must be one.
        return f"{grammar.terminal(NO_JSON)} | {envelope.call}"
    marker = envelope.markers[0]
    text = grammar.text_without(envelope.markers)
    token = grammar.token(marker)
    if token is not None:
        opening = f"{text} {token}"
    else:  # lazy: the text ends where the marker first occurs
        opening = grammar.rule(f"{ANY_TEXT} /{pattern_of(marker)}/", "[lazy]")
    return f"({opening} {envelope.call}){'*' if envelope.repeats else '?'} {text}"


def _content_schema(content: StructuredOutputsParams) -> Mapping[str, Any]:
    """The schema of an answer that is no call."""
    if content.json_object:
        return {"type": "object"}
    if content.json is None:
        raise ParameterError(
            "beside tools, content can follow a JSON schema only: use tool_choice 'none'", "structured_outputs", "..."
        )
    try:
        schema = json.loads(content.json) if isinstance(content.json, str) else content.json
    except ValueError as error:
        raise ParameterError(f"not JSON: {error}", "structured_outputs.json", content.json) from None
    return schema if isinstance(schema, dict) else {}


def _arguments_schema(function: Function) -> Mapping[str, Any]:
    """The function's schema as that of an object, with no properties beside those it names unless it says otherwise."""
    schema = dict(function.parameters)
    kind = schema.setdefault("type", "object")
    if kind != "object" and kind != ["object"]:
        raise ParameterError(
            f"the parameters of the function {function.name!r} must be an object's schema", "tools", kind
        )
    own_rules = {
        "additionalProperties",
        "unevaluatedProperties",
        "patternProperties",
        "$ref",
        "anyOf",
        "oneOf",
        "allOf",
    }
    if "properties" in schema and not own_rules & schema.keys():
        schema["additionalProperties"] = False
    return schema
