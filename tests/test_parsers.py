"""Reasoning and tool calls are found in an answer's text, however it is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovllm.errors import ParameterError
from nanovllm.parsers import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    Answer,
    Content,
    Event,
    Reasoning,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
    collect,
    make_answer_parser,
)
from nanovllm.parsers.json_text import JsonScanner, canonical_json

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": "boolean"},
                "size": {"type": ["number", "null"]},
                "places": {"type": "array"},
                "options": {"anyOf": [{"type": "object"}, {"type": "null"}]},
                "level": {"enum": [1, 2, "high"]},
            },
        },
    },
}
SEARCH = {"type": "function", "function": {"name": "search"}}
TOOLS = [WEATHER, SEARCH]


def parser(tool_parser: str | None = "hermes", **options: Any):
    tools = TOOLS if tool_parser else None
    return make_answer_parser(tool_parser=tool_parser, **{"tools": tools, **options})


def stream(pieces: list[str], **options: Any) -> list[Event]:
    answer = parser(**options)
    return [event for piece in pieces for event in answer.feed(piece)] + answer.finish()


def joined(events: list[Event]) -> list[tuple[Any, ...]]:
    """Events with neighbours of a kind joined: what a client sees, whatever the pieces."""
    result: list[list[Any]] = []
    for event in events:
        kind = (type(event).__name__, getattr(event, "index", None))
        text = getattr(event, "name", None) or getattr(event, "fragment", None) or getattr(event, "text", "")
        assert text, "no event is empty"
        if result and result[-1][0] == kind and not isinstance(event, ToolCallStart):
            result[-1][1] += text
        else:
            result.append([kind, text])
    return [(*kind, text) for kind, text in result]


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({place % (len(text) + 1) for place in cuts})
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


# What answers are made of, well and badly.
TOKENS = """
    <tool_call> </tool_call> <tool_c <think> </think> <|python_tag|> [TOOL_CALLS] [ARGS] [CALL_ID]
    <function= <function=search> </function> <parameter=city> <parameter=days> </parameter>
    [ ] { } : , ; " \\ \\" \\u00e9 \\u12 \\x 1 -2.5e3 0 true nul null text é 雨 🙂
    "name" "arguments" "parameters" "search" "get_weather" search {"name":"search","arguments":{"q":"x"}}
    {"name":"get_weather","parameters":{"city":"</tool_call>"}}
"""
PIECES = st.sampled_from(TOKENS.split()) | st.sampled_from(
    [" ", "\n", "\n\n", "\t", '{"name": "search", "arguments": {', '{"a": [1, {"b": "}"}]}}']
)
MESSY = st.lists(PIECES, max_size=14).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(max_size=6), JSON, max_size=3)
NAMES = st.sampled_from(["get_weather", "search"])
CUTS = st.lists(st.integers(0, 1000), max_size=8)


@settings(max_examples=400)
@given(
    MESSY,
    CUTS,
    st.sampled_from(sorted(TOOL_PARSERS)),
    st.sampled_from([None, *REASONING_PARSERS]),
    st.booleans(),
)
def test_what_is_found_does_not_depend_on_the_pieces(text, cuts, tool_parser, reasoning_parser, hold_calls):
    options = dict(tool_parser=tool_parser, reasoning_parser=reasoning_parser, hold_calls=hold_calls)
    whole = joined(stream([text], **options))
    assert joined(stream(list(text), **options)) == whole
    assert joined(stream(cut(text, cuts), **options)) == whole


def hermes(calls, **style):
    bodies = [json.dumps({"name": name, "arguments": arguments}, **style) for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def llama(calls, **style):
    return "; ".join(json.dumps({"name": name, "parameters": arguments}, **style) for name, arguments in calls)


def mistral_old(calls, **style):
    return "[TOOL_CALLS]" + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], **style)


def mistral_new(calls, **style):
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments, **style)}" for name, arguments in calls)


FORMS = {"hermes": hermes, "llama3_json": llama, "mistral old": mistral_old, "mistral new": mistral_new}
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3)


@settings(max_examples=150)
@given(CALLS, st.sampled_from(sorted(FORMS)), st.booleans(), st.sampled_from([None, 1, "\t"]), CUTS, st.booleans())
@example([("search", {"q": '</tool_call>{"name": "]'})], "hermes", False, None, [3], False)
def test_calls_come_back_as_they_were_written(calls, form, ascii_only, indent, cuts, hold_calls):
    text = FORMS[form](calls, ensure_ascii=ascii_only, indent=indent)
    found = collect(stream(cut(text, cuts), tool_parser=form.split()[0], hold_calls=hold_calls))
    assert found.content is None
    assert [(call.name, json.loads(call.arguments)) for call in found.tool_calls] == calls


@given(ARGUMENTS, st.sampled_from([None, 2]))
def test_arguments_are_streamed_as_the_model_writes_them(arguments, indent):
    written = json.dumps(arguments, indent=indent)
    events = stream(list(f'<tool_call>{{"name": "search", "arguments": {written}}}</tool_call>'))
    assert events[0] == ToolCallStart(0, "search")
    assert "".join(event.fragment for event in events[1:]) == written
    assert len(events) == 1 + len(written)  # nothing of them was held back


@given(st.text(alphabet='ab 雨🙂\n{}[]"', min_size=1))
def test_text_that_begins_no_marker_is_not_held_back(text):
    answer = parser("hermes")
    seen = ""
    for length, char in enumerate(text, 1):
        seen += "".join(event.text for event in answer.feed(char))
        assert seen == text[:length] or text[:length].isspace()


def test_only_a_possible_marker_is_held_back():
    answer = parser("hermes")
    assert answer.feed("if a <") == [Content("if a ")]
    assert answer.feed("tool_") == []
    assert answer.feed("box> b <tool_cal") == [Content("<tool_box> b ")]
    assert answer.feed("l") == []
    assert answer.finish() == [Content("<tool_call")]


CALL = '<tool_call>\n{"name": "search", "arguments": {"q": 1}}\n</tool_call>'
FOUND = ToolCall("search", '{"q": 1}')


@pytest.mark.parametrize(
    "text, content, calls",
    [
        ("Let me look.\n" + CALL, "Let me look.\n", 1),
        ("\n\n" + CALL, None, 1),  # layout
        (CALL + "\n" + CALL + "\n", None, 2),
        (CALL + CALL, None, 2),
        (CALL + "\nDone.", "\nDone.", 1),
        (CALL.removesuffix("</tool_call>"), None, 1),
        (CALL.removesuffix("\n</tool_call>"), None, 1),
        (CALL.removesuffix("</tool_call>") + CALL, None, 2),
        ("<tool_call>{'name': 'search'}</tool_call>", "<tool_call>{'name': 'search'}</tool_call>", 0),
        ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', 0),
        ('<tool_call>\n{"name": "sea', '<tool_call>\n{"name": "sea', 0),
        ('<tool_call>{"name": "f", "arguments": 5}', '<tool_call>{"name": "f", "arguments": 5}', 0),
        ('<tool_call>{"name": "", "arguments": {}}', '<tool_call>{"name": "", "arguments": {}}', 0),
        ("<tool_call>broken</tool_call>\n" + CALL, "<tool_call>broken</tool_call>\n", 1),
        ('<tool_call>{"name": "search", "arguments": [1]}', '<tool_call>{"name": "search", "arguments": [1]}', 0),
        ("  \n", "  \n", 0),
        ("", None, 0),
    ],
)  # fmt: skip
def test_hermes_answers(text, content, calls):
    assert parser("hermes", hold_calls=True).parse(text) == Answer(None, content, [FOUND] * calls)


def test_keys_of_a_call_come_in_any_order_and_arguments_may_be_missing():
    late = '<tool_call>{"arguments": {"q": [1]}, "id": {"x": 2}, "name": "search"}</tool_call>'
    assert parser().parse(late).tool_calls == [ToolCall("search", '{"q": [1]}')]
    assert parser().parse('<tool_call>{"name": "search"}</tool_call>').tool_calls == [ToolCall("search", "{}")]


def test_a_call_cut_off_by_the_token_limit_stands_with_the_arguments_it_has():
    for hold_calls in (False, True):
        answer = parser("hermes", hold_calls=hold_calls).parse(
            '<tool_call>\n{"name": "search", "arguments": {"q": "par'
        )
        assert answer == Answer(None, None, [ToolCall("search", '{"q": "par')])


@pytest.mark.parametrize("length", range(0, 30, 3))
def test_of_a_required_call_cut_off_no_head_is_left(length):
    named = {"type": "function", "function": {"name": "search"}}
    for choice in ("required", named):
        assert parser("hermes", tool_choice=choice).parse(CALL[:length]) == Answer()
    assert parser("hermes", tool_choice="required").parse(CALL) == Answer(None, None, [FOUND])


def test_arguments_that_turn_invalid_midway_stay_incomplete_when_streamed_and_are_content_when_not():
    text = 'So: <tool_call>{"name": "search", "arguments": {"q": oops}}</tool_call>'
    assert parser("hermes", hold_calls=True).parse(text) == Answer(None, text, [])
    streamed = collect(stream(list(text)))
    assert streamed == Answer(None, "So: oops}}", [ToolCall("search", '{"q": ')])


def test_line_breaks_in_argument_strings_are_escaped():
    (call,) = parser().parse('<tool_call>{"name": "search", "arguments": {"code": "a\n\tb"}}</tool_call>').tool_calls
    assert json.loads(call.arguments) == {"code": "a\n\tb"}


def test_arguments_are_written_without_escapes_but_stay_encodable():
    assert canonical_json('{"a":"\\u00e9\\u96e8",\n"b":[1.0,1e2]}') == '{"a": "é雨", "b": [1.0, 100.0]}'
    for text in ('{"a": 1e999}', '{"a": 12', "[" * 100_000, '{"a": "\\ud83d"}', '{"a": ' + "9" * 5000 + "}"):
        canonical_json(text).encode()
    assert canonical_json('{"a": 1e999}') == '{"a": 1e999}'


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"name": "search", "parameters": {}}', Answer(None, None, [ToolCall("search", "{}")])),
        (
            ' <|python_tag|>{"type": "function", "name": "search", "arguments": {"q": 2}}',
            Answer(None, None, [ToolCall("search", '{"q": 2}')]),
        ),
        ('{"name": "Ada", "parameters": {}}', Answer(None, '{"name": "Ada", "parameters": {}}')),
        ('{"answer": 42}', Answer(None, '{"answer": 42}')),
        ("It rains.", Answer(None, "It rains.")),
        ('{"name": "search"}; and so on', Answer(None, "; and so on", [ToolCall("search", "{}")])),
    ],
)
def test_llama_answers(text, expected):
    assert parser("llama3_json", hold_calls=True).parse(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ('Well. [TOOL_CALLS]search{"q": 1}', Answer(None, "Well. ", [FOUND])),
        ('[TOOL_CALLS]search[CALL_ID]a1B2[ARGS]{"q": 1}', Answer(None, None, [FOUND])),
        ('[TOOL_CALLS] [{"name": "search", "arguments": {"q": 1}}', Answer(None, None, [FOUND])),
        ('[TOOL_CALLS] {"name": "search", "arguments": {"q": 1}}', Answer(None, None, [FOUND])),
        ("[TOOL_CALLS] no call at all", Answer(None, "[TOOL_CALLS] no call at all")),
        ('[TOOL_CALLS][{"name": "search", "arguments": {"q": 1}}, 5]', Answer(None, ", 5]", [FOUND])),
    ],
)
def test_mistral_answers(text, expected):
    assert parser("mistral", hold_calls=True).parse(text) == expected


def coder(name: str, *parameters: tuple[str, str]) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def coder_arguments(*parameters: tuple[str, str], pieces: bool = True) -> dict[str, Any]:
    (call,) = collect(stream(list(coder("get_weather", *parameters)), tool_parser="qwen3_coder")).tool_calls
    assert call.name == "get_weather"
    return json.loads(call.arguments)


def test_coder_parameters_have_the_types_of_the_schema():
    found = coder_arguments(
        ("city", "12"), ("days", "3"), ("exact", "True"), ("size", "2.5"), ("places", '["a", 1]'), ("options", "null"),
        ("level", "2"), ("other", "7"),
    )  # fmt: skip
    assert found == {
        "city": "12", "days": 3, "exact": True, "size": 2.5, "places": ["a", 1], "options": None,
        "level": 2, "other": "7",
    }  # fmt: skip


def test_coder_text_that_is_no_value_of_its_type_is_a_string():
    found = coder_arguments(("days", "many"), ("exact", "yes"), ("size", "NaN"), ("places", "{}"), ("level", "high"))
    assert found == {"days": "many", "exact": "yes", "size": "NaN", "places": "{}", "level": "high"}
    assert coder_arguments(("days", "4.0"), ("size", "1e3")) == {"days": 4, "size": 1000.0}


@given(st.text(alphabet='ab\n "\\<>{}é🙂/parmet').filter(lambda text: "</parameter>" not in text))
def test_coder_strings_come_back_as_they_were_written(text):
    assert coder_arguments(("city", text)) == {"city": text}


def test_coder_strings_are_streamed():
    answer = parser("qwen3_coder")
    assert answer.feed("<tool_call>\n<function=get_weather>\n<parameter=city>\n") == [
        ToolCallStart(0, "get_weather"),
        ToolCallArguments(0, '{"city": "'),
    ]
    assert answer.feed("Par") == [ToolCallArguments(0, "Par")]
    assert answer.feed("is\n") == [ToolCallArguments(0, "is")]  # the line break may belong to the tag
    assert answer.feed("</parameter>") == [ToolCallArguments(0, '"')]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<function=search></function>", Answer(None, None, [ToolCall("search", "{}")])),
        (coder("search", ("a", "x")) + "\n" + coder("search"),
         Answer(None, None, [ToolCall("search", '{"a": "x"}'), ToolCall("search", "{}")])),
        ("Hm.<tool_call>\n<function=search>\n<parameter=a>\nx\n<parameter=b>\ny\n</function>",
         Answer(None, "Hm.", [ToolCall("search", '{"a": "x", "b": "y"}')])),
        ("<tool_call>\n<function=search>\nnothing", Answer(None, "<tool_call>\n<function=search>\nnothing")),
        ("<tool_call>\n<function=search>\n<parameter=a>\nx", Answer(None, None, [ToolCall("search", '{"a": "x')])),
        ("<tool_call>{}</tool_call>", Answer(None, "<tool_call>{}</tool_call>")),
    ],
)  # fmt: skip
def test_coder_answers(text, expected):
    assert parser("qwen3_coder", hold_calls=True).parse(text) == expected


@pytest.mark.parametrize("name", sorted(REASONING_PARSERS))
@pytest.mark.parametrize(
    "text, reasoning, content",
    [
        ("<think>\nWhy?\n</think>\n\nSo.", "\nWhy?\n", "\n\nSo."),
        ("Why?</think>So.", "Why?", "So."),  # the prompt opened it
        ("\n <think>Why?", "Why?", None),
        ("Why? So.", "Why? So.", None),  # cut off
        ("</think>So.", None, "So."),
        ("a <think> b</think>c</think>d", "a <think> b", "c</think>d"),
        ("", None, None),
    ],
)
def test_reasoning_ends_at_its_marker(name, text, reasoning, content):
    assert parser(None, reasoning_parser=name).parse(text) == Answer(reasoning, content)
    assert collect(stream(list(text), tool_parser=None, reasoning_parser=name)) == Answer(reasoning, content)


def test_a_call_ends_the_reasoning_of_qwen3():
    assert parser("hermes", reasoning_parser="qwen3").parse("I call it." + CALL) == Answer("I call it.", None, [FOUND])
    thought = parser("hermes", reasoning_parser="deepseek_r1").parse("I call it." + CALL)
    assert thought == Answer("I call it." + CALL, None)


def test_reasoning_then_content_then_calls():
    answer = parser("hermes", reasoning_parser="qwen3").parse("<think>Why?</think>\n\nSo: " + CALL)
    assert answer == Answer("Why?", "\n\nSo: ", [FOUND])
    assert parser("hermes", reasoning_parser="qwen3").parse("<think>Why?</think>\n\n" + CALL) == Answer(
        "Why?", None, [FOUND]
    )


def test_reasoning_that_is_switched_off_is_content():
    off = {"enable_thinking": False}
    assert parser(None, reasoning_parser="qwen3", chat_template_kwargs=off).parse("So.") == Answer(None, "So.")
    assert parser(None, reasoning_parser="qwen3", chat_template_kwargs={"enable_thinking": True}).parse("So.").reasoning
    assert parser(None, reasoning_parser="deepseek_r1", chat_template_kwargs=off).parse("So.").reasoning == "So."


def test_reasoning_that_the_prompt_has_closed_is_over():
    def content(prompt: str, **options: Any) -> str | None:
        return parser(None, reasoning_parser="qwen3", prompt=prompt, **options).parse("So.").content

    assert content("user: ?\nassistant: <think>\n\n</think>\n\n") == "So."
    assert content("user: ?\nassistant: <think>\n") is None
    assert content("assistant: <think>a</think>b\nuser: ?\nassistant: ") is None  # an earlier message's
    assert content("assistant: <think>a</think>b", continue_final_message=True) == "So."
    assert content("assistant: b", continue_final_message=True) == "So."
    assert content("assistant: <think>a", continue_final_message=True) is None


def test_the_end_of_reasoning_is_held_back_until_it_is_whole():
    answer = parser(None, reasoning_parser="qwen3")
    assert answer.feed("Why?</thi") == [Reasoning("Why?")]
    assert answer.feed("nk>So.") == [Content("So.")]


def test_without_tools_calls_are_content():
    assert parser("hermes", tool_choice="none").parse(CALL).content == CALL
    assert parser("hermes", tools=[]).parse(CALL).content == CALL
    assert parser(None).parse(CALL).content == CALL


@pytest.mark.parametrize(
    "options, parameter",
    [
        ({"tool_parser": "klingon"}, "tool_call_parser"),
        ({"reasoning_parser": "klingon"}, "reasoning_parser"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function"),
        ({"tools": [SEARCH, SEARCH]}, "tools"),
        ({"tools": [{"function": {"name": "f", "parameters": [1]}}]}, "tools[0].function.parameters"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(options, parameter):
    with pytest.raises(ParameterError) as error:
        parser(**{"tool_parser": "hermes", **options})
    assert error.value.parameter == parameter


def scan(text: str, cuts: list[int]) -> str | None:
    """The JSON the scanner reads from ``text`` alone, None if it is not one value."""
    scanner = JsonScanner()
    accepted = ""
    for piece in cut(text, cuts):
        part, count = scanner.feed(piece)
        accepted += part
        if count < len(piece):
            return None
    return accepted if scanner.complete and not scanner.failed else None


SCRAPS = st.lists(st.sampled_from([*'{}[]:,"01-+.eEtrufalsn \n\\', "true", "null", '"a"', "\\u00", "é"]), max_size=12)


@settings(max_examples=600)
@given(SCRAPS.map("".join) | JSON.map(json.dumps), CUTS)
@example("-", [])
@example("01", [])
@example('"a\nb"', [])
@example("[1,]", [])
def test_the_scanner_takes_what_is_json(text, cuts):
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        value = json.loads(text.strip(" \n"), strict=False, parse_constant=refuse)
    except ValueError:
        value = refuse
    found = scan(text.strip(" \n"), cuts)
    assert (found is None) == (value is refuse)
    if found is not None:
        assert json.loads(found) == value
