"""Constrained answers over HTTP: every way to ask for one is honoured, what cannot be honoured is a 400."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import Served, shared_server

SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["yes", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
QUESTION = [{"role": "user", "content": "Is it so, and how often?"}]
AT_ONCE = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def server() -> Served:
    return shared_server("--reasoning-parser", "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
                         "--enable-tokenizer-info-endpoint")  # fmt: skip


def follows(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"yes", "count"} and type(value["yes"]) is bool and 0 <= value["count"] <= 99


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": FORMAT}, None),
        ({"structured_outputs": {"json": SCHEMA}}, None),
        ({"guided_json": SCHEMA}, None),
        ({"guided_json": json.dumps(SCHEMA)}, None),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]'}}, "x[0-9]"),
        ({"guided_grammar": 'start: "x" /[0-9]/'}, "x[0-9]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_every_name_of_a_constraint_is_honoured(server: Served, fields: dict, pattern: str | None):
    chat = server.ask("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 60, **AT_ONCE, **fields})
    text = server.ask("/v1/completions", {"prompt": "So:", "max_tokens": 60, "seed": 1, **fields})
    for found in (chat["choices"][0]["message"]["content"], text["choices"][0]["text"]):
        assert follows(found) if pattern is None else re.fullmatch(pattern, found)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [0, 4])
def test_the_answer_follows_the_schema_behind_the_reasoning(server: Served, stream: bool, budget: int):
    messages = [*QUESTION, {"role": "assistant", "content": "<think>"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True, "max_tokens": 80,
            "thinking_token_budget": budget, "response_format": FORMAT, "temperature": 1.0, "seed": 4}  # fmt: skip
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in server.stream("/v1/chat/completions", body)]
        content = "".join(delta.get("content") or "" for delta in deltas)
    else:
        content = server.ask("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert follows(content)


def test_json_object_is_any_object(server: Served):
    body = {"messages": QUESTION, "max_tokens": 120, "response_format": {"type": "json_object"}, **AT_ONCE}
    choice = server.ask("/v1/chat/completions", body)["choices"][0]
    content = choice["message"]["content"]
    assert content.startswith("{") and (choice["finish_reason"] == "length" or isinstance(json.loads(content), dict))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ({"guided_regex": "(?=a)b"}, "look-around"),
        ({"guided_grammar": "nonsense"}, "grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "only use one kind"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"structured_outputs": {"json": '{"items":' * 200 + "{}" + "}" * 200}}, "nested"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_a_400_and_never_ignored(server: Served, fields: dict, named: str):
    for path, prompt in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": QUESTION})):
        answer = server.post(path, {**prompt, "max_tokens": 5, **fields})
        assert answer.status_code == 400 and named in answer.text
    server.wait_until_idle()


def test_constrained_and_free_requests_share_the_engine(server: Served):
    def ask(number: int) -> Any:
        fields = {"guided_json": {**SCHEMA, "title": str(number)}} if number % 2 else {"ignore_eos": True}
        body = {"prompt": f"{number}:", "max_tokens": 40, "temperature": 1.0, "seed": number, **fields}
        return number, server.ask("/v1/completions", body)["choices"][0]

    with ThreadPoolExecutor(16) as pool:
        for number, choice in pool.map(ask, range(24)):
            assert follows(choice["text"]) if number % 2 else choice["finish_reason"] == "length"
    server.wait_until_idle()


def test_tokens_asked_for_by_id_are_in_the_logprobs(server: Served):
    ids = server.ask("/tokenize", {"prompt": "&'"})["tokens"]
    named = [server.ask("/detokenize", {"tokens": [token]})["prompt"] for token in ids]
    body: dict[str, Any] = {"max_tokens": 2, "logprob_token_ids": ids, "temperature": 0}
    text = server.ask("/v1/completions", {"prompt": "x", "logprobs": 1, **body})["choices"][0]["logprobs"]
    assert all(set(named) < set(top) for top in text["top_logprobs"])
    chat = server.ask("/v1/chat/completions", {"messages": QUESTION, "logprobs": True, "top_logprobs": 1, **body})
    for position in chat["choices"][0]["logprobs"]["content"]:
        assert [entry["token"] for entry in position["top_logprobs"]][-len(named) :] == named
    assert server.post("/v1/completions", {"prompt": "x", **body}).status_code == 400
