"""The grammar of tool calls admits what the parser reads back as calls of the schema, and nothing else."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

import nanovllm
from nanovllm.engine.structured import to_grammar
from nanovllm.errors import ParameterError
from nanovllm.parsers import TOOL_PARSERS, make_answer_parser, tool_constraint
from nanovllm.sampling_params import StructuredOutputsParams

DEMO = Path(nanovllm.__file__).parent / "assets" / "demo" / "tokenizer.json"
FORMATS = sorted(set(TOOL_PARSERS) - {"qwen3_xml"})
MISTRAL_TOKENS = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
END = "<|im_end|>"


class Vocabulary:
    """The demo model's tokens, with tags as tokens of their own or without."""

    def __init__(self, tags: bool) -> None:
        content = json.loads(DEMO.read_text(encoding="utf-8"))
        added = [token for token in content["added_tokens"] if tags or token["special"]]
        if tags:
            first = max(token["id"] for token in added) + 1
            added += [added[0] | {"id": first + i, "content": text} for i, text in enumerate(MISTRAL_TOKENS)]
        content["added_tokens"] = added
        text = json.dumps(content)
        self.tokens = tokenizers.Tokenizer.from_str(text)
        self.size = max(token["id"] for token in added) + 1
        self.guidance = LLTokenizer(text, n_vocab=self.size, eos_token=self.tokens.token_to_id(END))

    def constraint(self, *args: Any, **options: Any):
        tags = ("<tool_call>", "</tool_call>", *MISTRAL_TOKENS)
        ids = {tag: self.tokens.token_to_id(tag) for tag in tags}
        return tool_constraint(*args, token_id=ids.get, **options)

    def matcher(self, constraint: Any) -> LLMatcher:
        matcher = LLMatcher(self.guidance, to_grammar(constraint), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def admits(self, constraint: Any, text: str) -> bool:
        matcher = self.matcher(constraint)
        for token in self.tokens.encode(text, add_special_tokens=False).ids:
            if not matcher.consume_token(token):
                return False
        return matcher.is_accepting()


@cache
def vocabulary(tags: bool) -> Vocabulary:
    return Vocabulary(tags)


def tool(name: str, parameters: dict[str, Any] | None = None, strict: bool | None = None) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name}
    if parameters is not None:
        function["parameters"] = parameters
    if strict is not None:
        function["strict"] = strict
    return {"type": "function", "function": function}


def fields(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties) if required is None else required}


WEATHER = tool("get_weather", fields(["city"], city={"type": "string"}, days={"type": "integer"}))
NOW = tool("now", fields())


def written(form: str, *calls: tuple[str, dict[str, Any]], args_token: bool = True) -> str:
    """Calls in a parser's form."""
    if form == "hermes":
        bodies = (json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) for name, arguments in calls)
        return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)
    if form == "llama3_json":
        return "; ".join(
            json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False) for name, arguments in calls
        )
    if form == "mistral":
        if args_token:
            return "".join(
                f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments, ensure_ascii=False)}" for name, arguments in calls
            )
        objects = [{"name": name, "arguments": arguments} for name, arguments in calls]
        return "[TOOL_CALLS]" + json.dumps(objects, ensure_ascii=False)
    texts = []
    for name, arguments in calls:
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
        inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        texts.append(f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>")
    return "\n".join(texts)


PARIS = ("get_weather", {"city": "Paris"})
GOOD = [[PARIS], [("get_weather", {"city": 'a "b" \\ 雨', "days": 3})], [("now", {})], [PARIS, ("now", {})]]
BAD = [
    [("get_weather", {})],  # a parameter is missing
    [("get_weather", {"city": "Paris", "days": "many"})],  # of another type
    [("get_weather", {"city": "Paris", "other": 1})],  # unknown
    [("get_time", {})],
]


@pytest.mark.parametrize("tags", [True, False], ids=["tags are tokens", "tags are text"])
@pytest.mark.parametrize("form", FORMATS)
def test_required_calls_follow_their_schemas(form: str, tags: bool):
    words = vocabulary(tags)
    constraint = words.constraint(form, [WEATHER, NOW], "required")
    for calls in GOOD:
        assert words.admits(constraint, written(form, *calls, args_token=tags)), calls
        assert words.admits(constraint, "\n\n" + written(form, *calls, args_token=tags)), "after reasoning"
    for calls in BAD:
        assert not words.admits(constraint, written(form, *calls, args_token=tags)), calls
    for text in ("", "Hello.", written(form, PARIS, args_token=tags)[:-1], written(form, PARIS, args_token=tags) + "!"):
        assert not words.admits(constraint, text), text


@pytest.mark.parametrize("form", FORMATS)
def test_parallel_calls_can_be_ruled_out(form: str):
    words = vocabulary(True)
    constraint = words.constraint(form, [WEATHER, NOW], "required", False)
    assert words.admits(constraint, written(form, PARIS))
    assert not words.admits(constraint, written(form, PARIS, PARIS))


@pytest.mark.parametrize("form", FORMATS)
def test_a_named_function_is_called_once(form: str):
    words = vocabulary(True)
    constraint = words.constraint(form, [WEATHER, NOW], {"type": "function", "function": {"name": "now"}})
    assert words.admits(constraint, written(form, ("now", {})))
    assert not words.admits(constraint, written(form, PARIS))
    assert not words.admits(constraint, written(form, ("now", {}), ("now", {})))


@pytest.mark.parametrize("tags", [True, False], ids=["tags are tokens", "tags are text"])
@pytest.mark.parametrize("form", FORMATS)
def test_strict_functions_are_held_to_their_schemas_when_the_model_calls_them(form: str, tags: bool):
    words = vocabulary(tags)
    strict = tool("get_weather", WEATHER["function"]["parameters"], strict=True)
    free = tool("search", fields(q={"type": "integer"}))
    constraint = words.constraint(form, [strict, free], "auto")
    for text in ("", "Hello, <world>.", written(form, PARIS, args_token=tags)):
        assert words.admits(constraint, text), text
    if form != "llama3_json":  # there a call is all of the answer
        assert words.admits(constraint, "I will look.\n" + written(form, PARIS, args_token=tags))
    if form != "qwen3_coder":  # which must know the names to write them
        assert words.admits(constraint, written(form, ("search", {"any": ["thing"]}), args_token=tags))
    for calls in BAD:
        assert not words.admits(constraint, written(form, *calls, args_token=tags)), calls


@pytest.mark.parametrize("form", sorted({*FORMATS} - {"llama3_json"}))
def test_an_answer_beside_tools_follows_its_own_schema(form: str):
    words = vocabulary(True)
    content = StructuredOutputsParams(json=fields(a={"type": "integer"}))
    constraint = words.constraint(form, [WEATHER, NOW], "auto", content=content)
    for text in ('{"a": 1}', written(form, PARIS), written(form, PARIS, ("now", {}))):
        assert words.admits(constraint, text), text
    for text in ("Hello.", '{"a": "1"}', '{"a": 1}' + written(form, PARIS), written(form, ("get_weather", {}))):
        assert not words.admits(constraint, text), text
    required = words.constraint(form, [WEATHER, NOW], "required", content=content)
    assert not words.admits(required, '{"a": 1}')  # there is no content then
    with pytest.raises(ParameterError, match="JSON schema only"):
        words.constraint(form, [WEATHER], "auto", content=StructuredOutputsParams(regex="a+"))


def test_calls_that_look_like_json_content_are_not_mixed_with_it():
    content = StructuredOutputsParams(json_object=True)
    with pytest.raises(ParameterError, match="cannot be told"):
        tool_constraint("llama3_json", [WEATHER], "auto", content=content)
    assert tool_constraint("llama3_json", [WEATHER], "required", content=content) is not None


def test_nothing_is_asked_where_the_model_is_free():
    assert tool_constraint("hermes", [WEATHER], "auto") is None
    assert tool_constraint("hermes", [WEATHER], None) is None
    assert tool_constraint("hermes", [tool("f", fields(), strict=True)], "none") is None
    assert tool_constraint("hermes", None, None) is None


SCHEMAS: dict[str, dict[str, Any]] = {
    "no parameters": fields(),
    "nullable": fields(a={"type": ["string", "null"]}, b={"type": ["integer", "null"]}),
    "enum": fields(unit={"enum": ["celsius", "fahrenheit"]}, level={"enum": [1, 2]}),
    "array": fields(names={"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3}),
    "nested": fields(
        point={
            "type": "object",
            "properties": {"x": {"type": "number"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    ),
    "reference": {
        **fields(color={"$ref": "#/$defs/Color"}, box={"$ref": "#/$defs/Box"}),
        "$defs": {
            "Color": {"enum": ["red", "green"]},
            "Box": {**fields(side={"type": "integer", "minimum": 0}), "additionalProperties": False},
        },
    },
    "any of": fields(a={"anyOf": [{"type": "boolean"}, {"type": "null"}]}),
    "lengths": fields(a={"type": "string", "minLength": 2, "maxLength": 5}),
    "pattern": fields(a={"type": "string", "pattern": "^[a-z]{1,8}/[0-9]{2}$"}),
    "optional": fields([], a={"type": "boolean"}, b={"type": "integer"}),
    "range": fields(a={"type": "integer", "minimum": 3, "maximum": 12}),
}


def random_text(words: Vocabulary, constraint: Any, seed: int) -> str:
    """An answer drawn from what the grammar admits; it ends as soon as it may after 150 tokens."""
    choose = random.Random(seed)
    matcher = words.matcher(constraint)
    end = words.tokens.token_to_id(END)
    endings = [words.tokens.encode(text, add_special_tokens=False).ids for text in ('"', "\n</parameter>", "}")]
    mask = allocate_token_bitmask(1, words.size)
    token_ids: list[int] = []
    while not matcher.is_stopped() and len(token_ids) < 500:
        fill_next_token_bitmask(matcher, mask, 0)
        bits = mask.view("uint32")[0]
        allowed = [token for token in range(words.size) if bits[token >> 5] >> (token & 31) & 1 and token != end]
        if matcher.is_accepting() and (not allowed or choose.random() < 0.4 or len(token_ids) > 150):
            break
        possible = [ids for ids in endings if matcher.validate_tokens(ids) == len(ids)]
        chosen = choose.choice(possible) if possible and choose.random() < 0.3 else [choose.choice(allowed)]
        assert matcher.consume_tokens(chosen)
        token_ids += chosen
    return words.tokens.decode(token_ids, skip_special_tokens=False)


def fits(value: Any, schema: Any, root: dict[str, Any]) -> bool:
    """Whether ``value`` follows the keywords that `SCHEMAS` has."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rsplit("/")[-1]], root)
    if "anyOf" in schema:
        return any(fits(value, choice, root) for choice in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    python = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list,
              "object": dict}  # fmt: skip
    if not any(isinstance(value, python[kind]) and (kind == "boolean" or value is not True) for kind in kinds):
        return False
    if isinstance(value, str):
        return bool(
            schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**6)
            and re.search(schema.get("pattern", ""), value)
        )
    if isinstance(value, int):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if isinstance(value, list):
        return len(value) <= schema["maxItems"] and all(fits(item, schema["items"], root) for item in value)
    if isinstance(value, dict):
        properties = schema["properties"]
        known = set(schema["required"]) <= value.keys() <= properties.keys()
        return known and all(fits(item, properties[name], root) for name, item in value.items())
    return True


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("form", FORMATS)
def test_whatever_the_grammar_admits_is_read_as_calls_of_the_schema(form: str, name: str):
    tools = [tool("f", SCHEMAS[name])]
    for seed, tags in ((1, True), (2, True), (3, False)):
        words = vocabulary(tags)
        text = random_text(words, words.constraint(form, tools, "required"), seed)
        answer = make_answer_parser(tool_parser=form, tools=tools).parse(text)
        assert answer.tool_calls and answer.content is None, text
        for call in answer.tool_calls:
            assert call.name == "f"
            assert fits(json.loads(call.arguments), SCHEMAS[name], SCHEMAS[name]), text


@pytest.mark.parametrize(
    "form, parameters",
    [
        ("hermes", {"type": "string"}),
        ("qwen3_coder", {"type": "object", "anyOf": [fields(a={"type": "string"})]}),
        ("qwen3_coder", {**fields(), "required": ["a"]}),
    ],
)
def test_schemas_that_a_form_cannot_hold_are_refused(form: str, parameters: dict[str, Any]):
    with pytest.raises(ParameterError) as error:
        tool_constraint(form, [tool("f", parameters)], "required")
    assert error.value.parameter == "tools"


def test_an_unknown_parser_is_refused():
    with pytest.raises(ParameterError) as error:
        tool_constraint("klingon", [NOW], "required")
    assert error.value.parameter == "tool_call_parser"
