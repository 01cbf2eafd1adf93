"""Constraints as grammars: what they accept, what is refused, and what one request's next token may be."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_tokenizers

from nanovllm.config import StructuredOutputsConfig
from nanovllm.engine.structured import GrammarCompiler, Guide, GuideBuilder, GuideSpec, Limiter
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ParameterError
from nanovllm.sampling_params import GuidedDecodingParams, SamplingParams, StructuredOutputsParams

IM_END = 332
VOCAB = 337  # of tiny_tokenizers.qwen
SIZE = VOCAB + 3  # of the model's, padded
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "string"}}},
    "required": ["a", "b"],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizers.qwen(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def builder(tokenizer: Tokenizer) -> GuideBuilder:
    return make_builder(tokenizer)


def make_builder(tokenizer: Tokenizer | None, **config: Any) -> GuideBuilder:
    model: Any = SimpleNamespace(vocab_size=SIZE, eos_token_ids=(IM_END,), tokenizer=None, tokenizer_mode="auto")
    compiler = GrammarCompiler(model)
    compiler.use(tokenizer)
    return GuideBuilder(StructuredOutputsConfig(**config), tokenizer, compiler)


def build(builder: GuideBuilder, prompt: str = "hi", ended: bool = False, **options: Any) -> GuideSpec | None:
    """The spec of a request; ``options`` are those of the constraint, or ``params`` with those of the request."""
    params = SamplingParams(**options.pop("params", {}))
    if options:
        params.structured_outputs = StructuredOutputsParams(**options)
    assert builder._tokenizer is not None
    return builder.build(params, builder._tokenizer.encode(prompt), frozenset({IM_END}), reasoning_ended=ended)


def accepts(builder: GuideBuilder, text: str, **constraint: Any) -> bool:
    """Whether the whole text is let through, token by token, and the output may end behind it."""
    spec = build(builder, **constraint)
    assert spec is not None and builder._tokenizer is not None
    guide = Guide(spec, builder.compiler)
    limiter = Limiter(builder.compiler, SIZE)
    for token in builder._tokenizer.encode(text):
        if token not in allowed(limiter, guide):
            return False
        guide.accept(token)
    return IM_END in allowed(limiter, guide)


def allowed(limiter: Limiter, guide: Guide) -> set[int]:
    """The tokens that may come next, from the limits of a step in which the guide's row is the first."""
    limits = limiter.limits([(0, guide)])
    assert not limits.failed
    if len(limits.closed):
        return set(limits.allowed.tolist())
    return set(range(SIZE)) - set(limits.banned.tolist())


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ({"json": SCHEMA}, ['{"a": 1, "b": ["x"]}', '{"a":-10,"b":[]}'], ['{"a": "1", "b": []}', '{"b": []}', "[]"]),
        ({"json": json.dumps(SCHEMA)}, ['{"a": 1, "b": []}'], ['{"a": 1.5, "b": []}']),
        ({"json": {}}, ["1", "null", '{"x": [1, {"y": true}]}'], ["x", "01"]),
        ({"json_object": True}, ["{}", '{"x": [1, {"y": "é"}]}'], ["[]", "1", '{"x": }']),
        ({"regex": r"\d{3}-[a-z]+"}, ["123-a", "000-zz"], ["12-a", "123-", "123-A", "٣٣٣-a"]),
        ({"regex": "a|(bc)*"}, ["a", "", "bcbc"], ["ab", "b"]),
        ({"choice": ["yes", "no", "yes please", 'q"\\\n']}, ["yes", "no", "yes please", 'q"\\\n'], ["ye", "yes ", "n"]),
        ({"grammar": 'start: "a" b\nb: "c"+'}, ["ac", "acc"], ["a", "ab"]),
        ({"grammar": 'root ::= x "!"\nx ::= "a" | "b" x'}, ["a!", "bba!"], ["!", "b!"]),
        ({"grammar": f'start: "<" %json {json.dumps(SCHEMA)}'}, ['<{"a": 1, "b": []}'], ['<{"a":  1, "b": []}']),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_constraint_lets_through_what_it_describes(builder: GuideBuilder, constraint: dict, good: list, bad: list):
    assert all(accepts(builder, text, **constraint) for text in good)
    assert not any(accepts(builder, text, **constraint) for text in bad)


def test_white_space_between_json_tokens_is_bounded_unless_asked_for(builder: GuideBuilder):
    spaced, compact, wide = '{"a": 1, "b": ["x", "y"]}', '{"a":1,"b":["x","y"]}', '{"a":  1,\n"b": []}'
    pretty = '{\n  "a": 1,\n  "b": []\n}'
    assert accepts(builder, spaced, json=SCHEMA) and accepts(builder, compact, json=SCHEMA)
    assert not accepts(builder, wide, json=SCHEMA) and not accepts(builder, pretty, json=SCHEMA)
    assert not accepts(builder, '{"x":\n1}', json_object=True)
    assert accepts(builder, compact, json=SCHEMA, disable_any_whitespace=True)
    assert not accepts(builder, spaced, json=SCHEMA, disable_any_whitespace=True)
    assert accepts(builder, pretty, json=SCHEMA, whitespace_pattern=r"[ \n]{0,4}")
    assert not accepts(builder, '{"a":     1,"b":[]}', json=SCHEMA, whitespace_pattern=r"[ \n]{0,4}")


def test_additional_properties_can_be_switched_off(builder: GuideBuilder, tokenizer: Tokenizer):
    more = '{"a": 1, "b": [], "c": 2}'
    assert accepts(builder, more, json=SCHEMA)
    assert not accepts(builder, more, json=SCHEMA, disable_additional_properties=True)
    for_all = make_builder(tokenizer, disable_additional_properties=True, disable_any_whitespace=True)
    assert not accepts(for_all, more, json=SCHEMA)
    assert not accepts(for_all, '{"a": 1,"b":[]}', json=SCHEMA) and accepts(for_all, '{"a":1,"b":[]}', json=SCHEMA)
    kept = {"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}}
    assert accepts(for_all, '{"x":1}', json=kept)


TAGS = {
    "structures": [
        {"begin": "<f=get>", "schema": SCHEMA, "end": "</f>"},
        {"begin": "<f=put>", "schema": {"type": "object", "properties": {}}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}
TREE = {
    "type": "structural_tag",
    "format": {
        "type": "sequence",
        "elements": [
            {"type": "const_string", "value": "n="},
            {"type": "or", "elements": [{"type": "regex", "pattern": r"\d+"}, {"type": "const_string", "value": "no"}]},
            {"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"},
        ],
    },
}
CALLS = {
    "format": {
        "type": "triggered_tags",
        "triggers": ["<|im_start|>"],
        "tags": [
            {
                "begin": "<|im_start|>\n",
                "content": {"type": "json_schema", "json_schema": SCHEMA},
                "end": "<|im_start|>",
            }
        ],
        "at_least_one": True,
    }
}


@pytest.mark.parametrize(
    ("tag", "good", "bad"),
    [
        (TAGS, ["text", 'a <f=get>{"a": 1, "b": []}</f> b', "<f=put>{}</f>"], ["<f=foo>", '<f=get>{"a":  1', "x <f="]),
        (TREE, ["n=12<a>any</a>", "n=no<a></a>"], ["n=x", "n=1<a>"]),
        (CALLS, ['so <|im_start|>\n{"a": 1, "b": []}<|im_start|> it is'], ["so it is", "<|im_start|>{}"]),
    ],
    ids=["triggers", "tree", "tokens"],
)
def test_structural_tags_hold_their_parts_to_a_form(builder: GuideBuilder, tag: dict, good: list, bad: list):
    assert all(accepts(builder, text, structural_tag=json.dumps(tag)) for text in good)
    assert not any(accepts(builder, text, structural_tag=json.dumps(tag)) for text in bad)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "constraint",
    [
        {"json": {"type": "strin"}},
        {"json": {"type": "array", "uniqueItems": True}},
        {"json": {"not": {"type": "string"}}},
        {"json": {"type": "integer", "minimum": 5, "maximum": 3}},
        {"json": {"$ref": "http://example.com/schema"}},
        {"json": {"$ref": "#"}},
        {"json": {"allOf": [{"$ref": "#"}]}},
        {"json": "{"},
        {"json": "[1]"},
        {"json": "false"},
        {"json": nested(200)},
        {"json": json.dumps(nested(100))},
        {"json": '{"items":' * 50000 + "1" + "}" * 50000},
        {"regex": "(?=a)b"},
        {"regex": "["},
        {"regex": "(" * 5000 + "a" + ")" * 5000},
        {"grammar": "nonsense"},
        {"grammar": "root ::= ("},
        {"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000},
        {"grammar": "start: missing"},
        {"structural_tag": "{}"},
        {"structural_tag": "x"},
        {"structural_tag": '{"format": {"type": "unknown"}}'},
        {"structural_tag": '{"structures": [{"begin": "a", "schema": {}, "end": ""}], "triggers": ["b"]}'},
        {"json_object": False},
    ],
    ids=lambda constraint: f"{next(iter(constraint))}-{str(next(iter(constraint.values())))[:40]}",
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(builder: GuideBuilder, constraint: dict):
    with pytest.raises(ParameterError, match="structured_outputs") as caught:
        build(builder, **constraint)
    assert caught.value.parameter is not None and caught.value.parameter.startswith("structured_outputs.")


def test_a_thousand_choices_are_as_good_as_two(builder: GuideBuilder):
    choices = [f"item {number} of many" for number in range(3000)]
    assert accepts(builder, choices[1234], choice=choices)
    assert not accepts(builder, "item 3000 of many", choice=choices)


def test_a_schema_may_refer_to_itself(builder: GuideBuilder):
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}
    assert accepts(builder, '{"a": {"a": {}}}', json=schema)
    assert not accepts(builder, '{"a": 1}', json=schema)


def test_without_a_fast_tokenizer_a_constraint_is_refused():
    with pytest.raises(ParameterError, match="skip_tokenizer_init"):
        make_builder(None).build(
            SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")), [1], frozenset({2}), False
        )


@pytest.mark.parametrize("fields", [{}, {"regex": "a", "choice": ["b"]}, {"regex": ""}, {"choice": []}, {"json": 1}])
def test_exactly_one_well_formed_constraint_is_needed(fields: dict):
    with pytest.raises(ParameterError):
        StructuredOutputsParams(**fields)


def test_the_old_name_is_taken_with_a_warning(caplog: pytest.LogCaptureFixture):
    params = SamplingParams(guided_decoding=GuidedDecodingParams(regex="a+", backend="outlines"))
    assert params.structured_outputs is not None and params.structured_outputs.regex == "a+"
    assert "structured_outputs" in caplog.text
    with pytest.raises(ParameterError, match="structured_outputs"):
        SamplingParams(guided_decoding={"regex": "a"})


# -- the state between tokens ------------------------------------------------------------------------------------------


def test_eos_may_come_exactly_where_the_grammar_accepts(builder: GuideBuilder, tokenizer: Tokenizer):
    spec = build(builder, regex="a{2,3}")
    assert spec is not None
    guide, limiter = Guide(spec, builder.compiler), Limiter(builder.compiler, SIZE)
    (a,) = tokenizer.encode("a")
    for count in range(4):
        assert (IM_END in allowed(limiter, guide)) == (count >= 2)
        assert (a in allowed(limiter, guide)) == (count < 3)
        assert guide.complete == (count == 3)
        guide.accept(a)
    assert guide.error is not None and limiter.limits([(0, guide)]).failed


def test_a_special_stop_id_may_come_where_eos_may(builder: GuideBuilder, tokenizer: Tokenizer):
    (start,) = tokenizer.encode("<|im_start|>")
    spec = build(builder, regex="a+", params={"stop_token_ids": [start, *tokenizer.encode("b")]})
    assert spec is not None and spec.end_ids == (IM_END, start)
    guide, limiter = Guide(spec, builder.compiler), Limiter(builder.compiler, SIZE)
    assert not {start, IM_END} & allowed(limiter, guide)
    guide.accept(tokenizer.encode("a")[0])
    assert {start, IM_END} <= allowed(limiter, guide)


def test_ignore_eos_goes_on_until_nothing_may_follow(builder: GuideBuilder, tokenizer: Tokenizer):
    spec = build(builder, regex="a{1,3}", params={"ignore_eos": True})
    assert spec is not None
    guide, limiter = Guide(spec, builder.compiler), Limiter(builder.compiler, SIZE)
    for _ in range(3):
        assert IM_END not in allowed(limiter, guide)
        guide.accept(tokenizer.encode("a")[0])
    limits = limiter.limits([(0, guide)])
    assert limits.forced.tolist() == [IM_END] and limits.complete == [0]


def test_ids_behind_the_tokenizers_own_never_come(builder: GuideBuilder):
    spec = build(builder, regex="(.|\n)*")
    assert spec is not None
    assert not set(range(VOCAB, SIZE)) & allowed(Limiter(builder.compiler, SIZE), Guide(spec, builder.compiler))


def test_limits_of_several_rows_are_those_of_each_alone(builder: GuideBuilder):
    specs = [build(builder, regex="a+"), build(builder, regex="(.|\n)*"), build(builder, choice=["x", "y"])]
    guides = [Guide(spec, builder.compiler) for spec in specs if spec is not None]
    limiter = Limiter(builder.compiler, SIZE)
    alone = [allowed(limiter, guide) for guide in guides]
    limits = limiter.limits([(2 * i, guide) for i, guide in enumerate(guides)])
    for i, want in enumerate(alone):
        row = range(2 * i * SIZE, (2 * i + 1) * SIZE)
        banned = {place % SIZE for place in limits.banned.tolist() if place in row}
        got = {place % SIZE for place in limits.allowed.tolist() if place in row}
        assert (got if 2 * i in limits.closed else set(range(SIZE)) - banned) == want
    tokens = np.zeros(5, int)
    tokens[[0, 2, 4]] = [min(each) for each in alone]
    assert limits.judge(tokens.tolist()) == {}
    tokens[4] = IM_END
    assert list(limits.judge(tokens.tolist())) == [4]


def test_a_grammar_is_compiled_once_by_many_threads(builder: GuideBuilder, monkeypatch: pytest.MonkeyPatch):
    from concurrent.futures import ThreadPoolExecutor

    compiled: list[str] = []
    compile_ = GrammarCompiler._compile
    monkeypatch.setattr(GrammarCompiler, "_compile", lambda self, text: compiled.append(text) or compile_(self, text))
    spec = None
    with ThreadPoolExecutor(8) as pool:
        for spec in pool.map(lambda _: build(builder, regex="once (only )*"), range(8)):
            assert spec is not None
    assert spec is not None and compiled == [spec.grammar]
    with pytest.raises(ParameterError):
        build(builder, regex="once (")
    assert re.search("once", compiled[-1])


# -- reasoning ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinker(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> GuideBuilder:
    return make_builder(tokenizer, reasoning_parser="qwen3")


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ("<|im_start|>assistant\n", None),
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n<think>a</think>b<|im_end|>\n<|im_start|>assistant\n", None),
        ("<|im_start|>assistant\n<think>a</think>The answer", False),
        ("plain", None),
    ],
)
def test_the_answer_begins_behind_the_reasoning_unless_the_prompt_has_closed_it(
    thinker: GuideBuilder, prompt: str, thinking: bool | None
):
    for ended in (False, True):  # decides where the prompt does not say
        spec = build(thinker, prompt, ended, regex="a+")
        assert spec is not None and bool(spec.think_end) == (not ended if thinking is None else thinking)


def test_the_grammar_begins_behind_the_end_marker(thinker: GuideBuilder, tokenizer: Tokenizer):
    spec = build(thinker, regex="a+")
    assert spec is not None
    guide, limiter = Guide(spec, thinker.compiler), Limiter(thinker.compiler, SIZE)
    for token in tokenizer.encode("<think>so b</think>"):
        assert guide.thinking and guide.matcher is not None
        assert token in allowed(limiter, guide)
        guide.accept(token)
    assert not guide.thinking and guide.error is None
    assert IM_END not in allowed(limiter, guide)
    guide.accept(tokenizer.encode("a")[0])
    assert IM_END in allowed(limiter, guide)


@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("opened", [True, False])
def test_a_spent_budget_forces_the_end_marker(thinker: GuideBuilder, tokenizer: Tokenizer, budget: int, opened: bool):
    prompt = "<|im_start|>assistant\n" + ("<think>" if opened else "")
    spec = build(thinker, prompt, params={"thinking_token_budget": budget})
    assert spec is not None and spec.grammar is None
    guide, limiter = Guide(spec, thinker.compiler), Limiter(thinker.compiler, SIZE)
    (word,) = tokenizer.encode("x")
    output: list[int] = [] if opened or budget == 0 else tokenizer.encode("<think>")
    for token in output:
        guide.accept(token)
    while guide.thinking:
        token = word if guide.forced is None else guide.forced
        assert len(limiter.limits([(0, guide)]).forced) == (guide.forced is not None)
        output.append(token)
        guide.accept(token)
    end = tokenizer.encode("</think>")
    assert output[-len(end) :] == end and output.count(word) == budget
    assert guide.free and limiter.limits([(0, guide)]).free == [0]
    again = Guide(spec, thinker.compiler, output[:-1])  # as after a preemption
    assert again.forced == end[-1]


def test_a_budget_without_a_reasoning_parser_is_refused(builder: GuideBuilder):
    with pytest.raises(ParameterError, match="reasoning_parser"):
        build(builder, params={"thinking_token_budget": 5})


def test_without_a_limit_there_is_no_guide(thinker: GuideBuilder):
    assert build(thinker) is None
    assert build(thinker, params={"thinking_token_budget": -1}) is None
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert build(thinker, closed, params={"thinking_token_budget": 5}) is None


def test_the_constraint_can_hold_in_the_reasoning_too(tokenizer: Tokenizer):
    spec = build(make_builder(tokenizer, reasoning_parser="qwen3", enable_in_reasoning=True), regex="a+")
    assert spec is not None and not spec.think_end


def test_a_spec_is_plain_data():
    from nanovllm.engine.plain import from_plain, to_plain

    spec = GuideSpec("grammar", (1, 2), True, (3,), (4,), (5,), 6)
    assert from_plain(GuideSpec, json.loads(json.dumps(to_plain(spec)))) == spec
