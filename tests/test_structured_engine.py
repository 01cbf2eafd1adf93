"""Constrained outputs of the whole engine: valid under random weights, however the work is cut, and nobody else's
business."""

from __future__ import annotations

import gc
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_checkpoint
from tiny_tokenizers import qwen

from nanovllm import LLM, BeamSearchParams, SamplingParams
from nanovllm.engine.invariants import InvariantChecker
from nanovllm.engine.structured import Limits
from nanovllm.errors import ParameterError
from nanovllm.runner.guidance import apply_limits, mask_on_device
from nanovllm.sampling_params import StructuredOutputsParams

VOCAB_SIZE, IM_END = 337, 332  # of tiny_tokenizers.qwen
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3", vocab_size=VOCAB_SIZE + 3, eos_token_id=IM_END)
    qwen(path)
    return path


def make_llm(folder: Path, **options: Any) -> LLM:
    llm = LLM(str(folder), **{"num_gpu_blocks_override": 256, "block_size": 8, "max_model_len": 256, **options})
    llm.llm_engine.core.checker = InvariantChecker(llm.llm_engine.core.scheduler)
    return llm


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with make_llm(folder) as llm:
        yield llm
        assert llm.llm_engine.core.checker is not None
        llm.llm_engine.core.checker.idle()


def constrained(max_tokens: int = 120, temperature: float = 1.0, seed: int = 0, **constraint: Any) -> SamplingParams:
    params = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**constraint), **params)


def generate(llm: LLM, prompts: Any, params: Any) -> list[Any]:
    return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]


# -- what comes out ----------------------------------------------------------------------------------------------------

names = st.text("abcxyz_", min_size=1, max_size=4)
leaves = st.one_of(
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, st.integers(-50, 50),
              st.integers(0, 99)),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(names, st.integers(-9, 9)), min_size=1, max_size=3,
                                                        unique_by=repr)),
    st.just({"type": "string", "pattern": "^[ab]{1,3}$"}),
)  # fmt: skip


def _object(properties: dict[str, Any], optional: int) -> dict[str, Any]:
    required = [name for number, name in enumerate(properties) if number != optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 2)),
        st.builds(_object, st.dictionaries(names, inner, max_size=3), st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=5,
)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether the value follows the schema: an independent check of the keywords drawn above."""
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(option) and value == option for option in schema["enum"])
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema.get("maxLength", 99) and bool(
            re.search(schema.get("pattern", ""), value)
        )  # fmt: skip
    if kind == "array":
        return isinstance(value, list) and len(value) <= schema["maxItems"] and all(
            fits(item, schema["items"]) for item in value
        )  # fmt: skip
    if kind == "object":
        return isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(schema["properties"]) and all(
            fits(item, schema["properties"][name]) for name, item in value.items()
        )  # fmt: skip
    return value is None if kind == "null" else type(value) is bool


@settings(max_examples=60)
@given(schema=schemas, seed=st.integers(0, 1000), temperature=st.sampled_from([0.0, 1.0, 2.0]))
def test_random_weights_yield_valid_json_for_any_schema(llm: LLM, schema: dict, seed: int, temperature: float):
    (output,) = generate(llm, "x", constrained(250, temperature, seed, json=schema))
    assert output.finish_reason == "stop", output.text
    assert fits(json.loads(output.text), schema), output.text
    assert output.token_ids[-1] == IM_END and not re.search(r"\s{2}|\n", re.sub(r'"[^"]*"', "", output.text))


@pytest.mark.parametrize("regex", [r"\d{3}-\d{4}", r"(ab|c)?x{2,5}", r"[^a]{1,8}", r"\w+@\w{1,4}\.(com|org)"])
def test_a_regex_matches_the_whole_output(llm: LLM, regex: str):
    outputs = generate(llm, ["x"] * 4, [constrained(200, seed=seed, regex=regex) for seed in range(4)])
    for output in outputs:
        assert output.finish_reason == "length" or re.fullmatch(regex, output.text, re.ASCII), output.text
    assert any(output.finish_reason == "stop" for output in outputs)


def test_a_choice_is_one_of_the_list_and_all_can_come(llm: LLM):
    choices = ["yes", "no", "maybe not", "maybe"]
    outputs = generate(llm, ["x"] * 40, [constrained(9, 2.0, seed, choice=choices) for seed in range(40)])
    assert {output.text for output in outputs} == set(choices)


def test_a_grammar_holds(llm: LLM):
    balanced = 'root ::= "(" root? ")" root?'
    for output in generate(llm, ["x"] * 8, [constrained(60, seed=seed, grammar=balanced) for seed in range(8)]):
        text = output.text
        while "()" in text:
            text = text.replace("()", "")
        assert text == "" if output.finish_reason == "stop" else set(text) == {"("}, output.text


def test_an_output_cut_short_is_the_beginning_of_a_valid_one(llm: LLM):
    (whole,) = generate(llm, "x", constrained(json=PERSON))
    (cut,) = generate(llm, "x", constrained(7, json=PERSON))
    assert cut.finish_reason == "length" and whole.token_ids[:7] == cut.token_ids


# -- together with other parameters ------------------------------------------------------------------------------------


def test_stop_strings_and_ids_end_a_constrained_output(llm: LLM):
    (output,) = generate(llm, "x", SamplingParams(
        max_tokens=60, seed=1, stop=['"age'], structured_outputs=StructuredOutputsParams(json=PERSON)
    ))  # fmt: skip
    assert output.finish_reason == "stop" and output.stop_reason == '"age' and '"name"' in output.text
    (quote,) = llm.get_tokenizer().encode('"')
    (output,) = generate(llm, "x", SamplingParams(
        max_tokens=60, seed=1, stop_token_ids=[quote], structured_outputs=StructuredOutputsParams(json=PERSON)
    ))  # fmt: skip
    assert output.stop_reason == quote


def test_ignore_eos_and_min_tokens_yield_to_a_complete_output(llm: LLM):
    for options in ({"ignore_eos": True}, {"min_tokens": 30}):
        params = SamplingParams(
            max_tokens=60, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]), **options
        )
        (output,) = generate(llm, "x", params)
        assert output.text in ("yes", "no") and output.finish_reason == "stop", options
    longer = SamplingParams(max_tokens=60, min_tokens=9, structured_outputs=StructuredOutputsParams(regex="a*b?"))
    (output,) = generate(llm, "x", longer)
    assert len(output.token_ids) >= 9 or output.text.endswith("b")


def test_all_outputs_of_n_are_valid_and_differ(llm: LLM):
    params = SamplingParams(n=4, max_tokens=120, seed=3, structured_outputs=StructuredOutputsParams(json=PERSON))
    (request,) = llm.generate("x", params, use_tqdm=False)
    values = [json.loads(output.text) for output in request.outputs]
    assert all(fits(value, PERSON | {"properties": PERSON["properties"]}) for value in values)
    assert len({json.dumps(value) for value in values}) > 1


def test_contradicting_rules_end_the_request_alone_with_an_error(llm: LLM):
    (a,) = llm.get_tokenizer().encode("a")
    bad = SamplingParams(allowed_token_ids=[a], structured_outputs=StructuredOutputsParams(regex="b+"))
    outputs = generate(llm, ["x", "x"], [bad, constrained(choice=["yes"])])
    assert outputs[0].finish_reason == "error" and "allowed_token_ids" in str(outputs[0].stop_reason)
    assert outputs[0].token_ids == [] and outputs[1].text == "yes"


def test_logprobs_are_those_among_the_tokens_that_may_come(llm: LLM):
    params = SamplingParams(
        temperature=0.0, logprobs=5, max_tokens=5, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])
    )
    (output,) = generate(llm, "x", params)
    assert output.logprobs is not None
    first = output.logprobs[0]
    assert 2 <= len(first) <= 5 and all(entry.logprob > -1e9 for entry in first.values())
    assert sum(2.718281828**entry.logprob for entry in first.values()) == pytest.approx(1.0, abs=1e-4)


def test_beam_search_follows_the_constraint(llm: LLM):
    constraint = StructuredOutputsParams(choice=["yes", "no", "maybe"])
    (output,) = llm.beam_search("x", BeamSearchParams(beam_width=3, max_tokens=8, structured_outputs=constraint))
    assert sorted(str(sequence.text) for sequence in output.sequences) == ["maybe", "no", "yes"]
    (output,) = llm.beam_search(
        "x",
        BeamSearchParams(beam_width=2, max_tokens=100, structured_outputs=StructuredOutputsParams(json=PERSON)),
    )
    for sequence in output.sequences:
        if sequence.finish_reason == "stop":
            assert fits(json.loads(str(sequence.text)), PERSON)


def test_a_refused_constraint_queues_nothing(llm: LLM):
    with pytest.raises(ParameterError, match="uniqueItems"):
        generate(llm, ["x", "x"], [constrained(regex="a"), constrained(json={"type": "array", "uniqueItems": True})])
    assert not llm.llm_engine.core.scheduler.requests


def test_limits_change_nothing_but_the_logits_they_name():
    rows, vocab = 5, 40
    limits = Limits(
        closed=np.array([1, 4]),
        allowed=np.array([vocab + 3, vocab + 7, 4 * vocab]),
        banned=np.array([2 * vocab + 1, 2 * vocab + 39]),
        forced=np.array([4 * vocab]),
    )
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    want = logits.clone()
    want[1, [i for i in range(vocab) if i not in (3, 7)]] = -torch.inf
    want[4, 1:] = -torch.inf
    want[2, [1, 39]] = -torch.inf
    on_host, on_device = logits.clone(), logits.clone()
    assert apply_limits(on_host, limits).tolist() == [4 * vocab]
    mask_on_device(on_device, limits)
    assert torch.equal(on_host, want) and torch.equal(on_device, want)
    unchanged = logits.clone()
    assert not len(apply_limits(unchanged, Limits()))
    mask_on_device(unchanged, Limits())
    assert torch.equal(unchanged, logits)


# -- however the work is cut -------------------------------------------------------------------------------------------

PROMPTS = ["a long prompt " * 4, "x", "hello", "another one", "yes and no"]


def mixture() -> list[SamplingParams]:
    free = SamplingParams(max_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    return [
        constrained(60, seed=1, json=PERSON),
        free,
        constrained(60, seed=2, regex="(ab|c)+d"),
        constrained(60, temperature=0.0, json=PERSON),
        free,
    ]


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    return [generate(llm, prompt, params)[0].token_ids for prompt, params in zip(PROMPTS, mixture(), strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": True},
        {"max_num_batched_tokens": 16, "max_num_seqs": 8},
        {"max_num_batched_tokens": 16, "max_num_seqs": 8, "async_scheduling": True},
        {"num_gpu_blocks_override": 24, "max_model_len": 128},
        {"num_gpu_blocks_override": 24, "max_model_len": 128, "async_scheduling": True},
        {"max_num_seqs": 2, "max_num_batched_tokens": 64},
        {"enable_prefix_caching": False},
    ],
    ids=lambda options: "-".join(options) or "together",
)
def test_constrained_tokens_are_the_same_however_the_work_is_cut(folder: Path, options: dict, expected: list):
    with make_llm(folder, **options) as llm:
        for _ in range(2):  # the second time with a warm prefix cache
            outputs = generate(llm, PROMPTS, mixture())
            assert [output.token_ids for output in outputs] == expected
        scheduler = llm.llm_engine.core.scheduler
        assert scheduler.num_preemptions > 0 or "num_gpu_blocks_override" not in options
        assert llm.llm_engine.core.max_steps_in_flight == (2 if "async_scheduling" in options else 1)


def test_a_row_is_free_again_for_whoever_comes_next(folder: Path):
    with make_llm(folder, max_num_seqs=1) as llm:
        free = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        before = generate(llm, "hello", free)[0].token_ids
        generate(llm, "x", constrained(json=PERSON))
        assert generate(llm, "hello", free)[0].token_ids == before
        assert generate(llm, "x", constrained(choice=["yes"]))[0].text == "yes"


def test_closing_the_engine_ends_its_threads(folder: Path):
    def ours() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("nanovllm")}

    before = ours()
    with make_llm(folder) as llm:
        generate(llm, "x", constrained(choice=["yes"]))
        assert ours() > before
    del llm
    gc.collect()
    deadline = time.monotonic() + 10
    while ours() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ours() == before


# -- reasoning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [False, True])
def test_the_answer_follows_the_constraint_behind_the_budgeted_reasoning(folder: Path, in_flight: bool):
    with make_llm(folder, reasoning_parser="qwen3", async_scheduling=in_flight) as llm:
        prompt = "<|im_start|>assistant\n<think>"
        for budget in (0, 1, 10):
            params = constrained(150, seed=budget, json=PERSON)
            params.thinking_token_budget = budget
            params.ignore_eos = True
            (output,) = generate(llm, prompt, params)
            reasoning, marker, answer = output.text.partition("</think>")
            assert marker and fits(json.loads(answer), PERSON) and output.finish_reason == "stop"
            assert len(llm.get_tokenizer().encode(reasoning)) <= budget or "\ufffd" in reasoning
        closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert fits(json.loads(generate(llm, closed, constrained(json=PERSON))[0].text), PERSON)


def test_a_budget_alone_leaves_the_answer_free(folder: Path):
    with make_llm(folder, reasoning_parser="qwen3") as llm:
        params = SamplingParams(max_tokens=40, thinking_token_budget=3, ignore_eos=True, temperature=0.0)
        (output,) = generate(llm, "<|im_start|>assistant\n<think>", params)
        end = llm.get_tokenizer().encode("</think>")
        assert output.token_ids[3 : 3 + len(end)] == end and len(output.token_ids) == 40


def test_a_budget_needs_a_reasoning_parser(llm: LLM):
    with pytest.raises(ParameterError, match="reasoning_parser"):
        generate(llm, "x", SamplingParams(thinking_token_budget=3))
