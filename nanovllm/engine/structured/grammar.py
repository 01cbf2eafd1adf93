"""A user's constraint as the text of a grammar: JSON schema, regular expression, choice, Lark, GBNF, tags.

White space between JSON tokens is bounded unless the user asks for more: at most one space behind a comma or a colon.
Left free, a model that has nothing to say may print line breaks until its tokens run out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nanovllm.engine.structured.structural_tag import tags_to_lark
from nanovllm.errors import ParameterError
from nanovllm.sampling_params import StructuredOutputsParams

MAX_DEPTH = 100  # containers inside each other in a schema; two for each level of an object
MAX_LENGTH = 1 << 20  # characters of a constraint

Options = dict[str, Any]

_SPARSE: Options = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_COMPACT: Options = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


def to_grammar(params: StructuredOutputsParams, tokens: Mapping[str, int] | None = None) -> str:
    """The constraint in llguidance's own notation, not compiled yet.

    Args:
        tokens: texts that are tokens of their own wherever they stand (added to the tokenizer), and their ids.

    Raises:
        ParameterError: it is malformed; the parameter is ``structured_outputs`` and the kind.
    """
    kind = params.kind
    value = getattr(params, kind)
    if isinstance(value, str) and len(value) > MAX_LENGTH:
        raise _refusal(kind, f"longer than {MAX_LENGTH} characters", f"{len(value)} characters")
    try:
        if kind == "structural_tag":
            return _from_structural_tag(value, params, tokens or {})
        return _BUILDERS[kind](value, params)
    except RecursionError:
        raise _refusal(kind, f"nested more than {MAX_DEPTH} deep", "...") from None


def _from_json(value: str | dict[str, Any] | bool, params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    schema: Any = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except ValueError as error:
            raise _refusal("json", f"not JSON: {error}", value) from None
    return LLMatcher.grammar_from_json_schema(json.dumps(_prepared("json", schema, params)))


def _from_json_object(value: bool, params: StructuredOutputsParams) -> str:
    if value is not True:
        raise _refusal("json_object", "must be True, or left out", value)
    return _from_json({"type": "object"}, params)


def _from_regex(value: str, params: StructuredOutputsParams) -> str:
    """Python's notation without look-around and back references; with ``re.ASCII``."""
    from llguidance import regex_to_lark

    return _from_lark(f"start: /{regex_to_lark(value, 'dws')}/")


def _from_choice(value: list[str], params: StructuredOutputsParams) -> str:
    """One terminal, not as many as there are choices: a parser follows all of those that go on alike."""
    return _from_lark("start: CHOICE\nCHOICE: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in value))


def _from_grammar(value: str, params: StructuredOutputsParams) -> str:
    """GBNF is told by its ``::=``; everything else is taken for Lark."""
    if re.search(r"^\s*[\w-]+\s*::=", value, re.MULTILINE):
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return _from_lark(any_to_lark(value))
        except Exception as error:  # the converter has kinds of its own
            raise _refusal("grammar", f"not GBNF (llama.cpp's form of EBNF): {error}", value) from None
    return _from_lark(_with_bounded_json("grammar", value, params))


def _from_structural_tag(value: str, params: StructuredOutputsParams, tokens: Mapping[str, int]) -> str:
    try:
        tag = json.loads(value)
    except ValueError as error:
        raise _refusal("structural_tag", f"not JSON: {error}", value) from None
    check_depth("structural_tag", tag)
    return _from_lark(_with_bounded_json("structural_tag", tags_to_lark(tag, tokens), params))


def _from_lark(text: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(text)


_BUILDERS: dict[str, Any] = {
    "json": _from_json,
    "json_object": _from_json_object,
    "regex": _from_regex,
    "choice": _from_choice,
    "grammar": _from_grammar,
}


def _prepared(kind: str, schema: Any, params: StructuredOutputsParams) -> dict[str, Any]:
    """A schema with its depth checked, closed if asked for, and the white space it allows written into it."""
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise _refusal(kind, "a JSON schema must be an object", schema)
    check_depth(kind, schema)
    if params.disable_additional_properties:
        schema = _closed(schema)
    options = _whitespace(params)
    asked = params.disable_any_whitespace or params.whitespace_pattern is not None
    own = schema.get("x-guidance", {})
    return {**schema, "x-guidance": {**own, **options} if asked else {**options, **own}}


def _whitespace(params: StructuredOutputsParams) -> Options:
    if params.disable_any_whitespace:
        return _COMPACT
    if params.whitespace_pattern is not None:
        return {"whitespace_pattern": params.whitespace_pattern, "item_separator": ",", "key_separator": ":"}
    return _SPARSE


def _closed(schema: Any) -> Any:
    """The schema with ``additionalProperties: false`` wherever it describes an object and does not say otherwise."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: value if name in ("const", "enum") else _closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) or schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def _with_bounded_json(kind: str, lark: str, params: StructuredOutputsParams) -> str:
    """A Lark grammar whose ``%json`` schemas have been prepared like any other."""
    parts, done = [], 0
    for match in re.finditer(r"%json\s*(?=\{)", lark):
        if match.end() < done:
            continue  # inside a schema
        try:
            schema, end = json.JSONDecoder().raw_decode(lark, match.end())
        except ValueError:
            continue  # not a schema; the compiler says what is wrong, if anything is
        parts += [lark[done : match.end()], json.dumps(_prepared(kind, schema, params))]
        done = end
    return "".join([*parts, lark[done:]])


def check_depth(kind: str, value: Any) -> None:
    """Raises ParameterError if containers are nested more than MAX_DEPTH deep."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _refusal(kind, f"nested more than {MAX_DEPTH} deep", "...")
        nested: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                nested += item.values()
            elif isinstance(item, (list, tuple)):
                nested += item
        level = [item for item in nested if isinstance(item, (dict, list, tuple))]


def _refusal(kind: str, message: str, value: Any) -> ParameterError:
    name = f"structured_outputs.{kind}"
    return ParameterError(f"{name} cannot be honoured: {message}", name, value)
