"""``/v1/chat/completions``: what goes over the wire, streamed and not; tools, reasoning, templates."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import Served, chained, parsing_server, shared_server

PATH = "/v1/chat/completions"
SUM: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "temperature": 0}
WEATHER: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "temperature": 0,
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Weather of a city",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
    ],
}
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.fixture(scope="module")
def server() -> Served:
    """Without parsers: every answer is content."""
    return shared_server()


@pytest.fixture(scope="module")
def clever() -> Served:
    """With parsers for reasoning and tools."""
    return parsing_server()


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The message that the deltas of one choice add up to, with its finish reason."""
    message: dict[str, Any] = {"calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            for key, value in choice["delta"].items():
                if key == "tool_calls":
                    for call in value:
                        if "id" in call:
                            assert call["type"] == "function" and call["id"].startswith("chatcmpl-tool-")
                            message["calls"].append([call["function"]["name"], ""])
                        assert call["index"] == len(message["calls"]) - 1
                        message["calls"][-1][1] += call["function"].get("arguments") or ""
                elif value is not None:
                    message[key] = message.get(key, "") + value
            if choice["finish_reason"] is not None:
                assert "finish_reason" not in message
                message["finish_reason"] = choice["finish_reason"]
    return message


def test_an_answer_has_the_fields_of_openai_and_vllm(server: Served):
    answer = server.ask(PATH, SUM)
    assert answer["id"].startswith("chatcmpl-") and len(answer["id"]) == 25
    assert {key: value for key, value in answer.items() if key not in ("id", "created", "system_fingerprint")} == {
        "object": "chat.completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "2 + 3 = 5.",
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "reasoning": None,
                    "reasoning_content": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
                "routed_experts": None,
            }
        ],
        "service_tier": None,
        "usage": {
            "prompt_tokens": 20,
            "total_tokens": 29,
            "completion_tokens": 9,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "kv_transfer_params": None,
    }


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(server: Served):
    lines = server.stream_lines(PATH, SUM)
    assert all(line == "" or line.startswith("data: ") for line in lines)
    chunks = server.stream(PATH, SUM)
    head = {key: chunks[0][key] for key in ("id", "object", "created", "model")}
    assert head["object"] == "chat.completion.chunk" and head["model"] == "demo"
    first, *middle, last = chunks
    delta = {"role": "assistant", "content": ""}
    assert first == {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}
    for chunk in middle:
        choice = chunk["choices"][0]
        rest = {"index": 0, "logprobs": None, "finish_reason": None, "token_ids": None}
        assert chunk == {**head, "choices": [{**rest, "delta": {"content": choice["delta"]["content"]}}]}
    end = {"index": 0, "logprobs": None, "finish_reason": "stop", "stop_reason": None, "token_ids": None}
    assert [{**choice, "delta": None} for choice in last["choices"]] == [{**end, "delta": None}]
    assert last["system_fingerprint"].startswith("nanovllm-")
    assert joined(chunks)["content"] == "2 + 3 = 5."


def test_usage_of_a_stream(server: Served):
    usage = server.ask(PATH, SUM)["usage"]
    chunks = server.stream(PATH, {**SUM, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == usage
    assert all("usage" not in chunk for chunk in chunks[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.stream(PATH, {**SUM, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == usage["completion_tokens"]


def test_n_answers_stream_side_by_side(server: Served):
    body = {**SUM, "n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 12}
    answer = server.ask(PATH, body)
    chunks = server.stream(PATH, body)
    for choice in answer["choices"]:
        message = joined(chunks, choice["index"])
        assert message["content"] == choice["message"]["content"] and message["role"] == "assistant"
        assert message["finish_reason"] == choice["finish_reason"]


def test_log_probabilities_name_token_bytes_and_alternatives(server: Served):
    body = {**SUM, "logprobs": True, "top_logprobs": 2}
    choice = server.ask(PATH, body)["choices"][0]
    entries = choice["logprobs"]["content"]
    shown = bytes(chained(entry["bytes"] for entry in entries)).decode()
    assert shown.removesuffix("<|im_end|>") == "2 + 3 = 5."
    for entry in entries:
        assert entry["token"] == entry["top_logprobs"][0]["token"] and len(entry["top_logprobs"]) == 2
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0
    chunks = server.stream(PATH, body)
    streamed = [c["choices"][0]["logprobs"]["content"] for c in chunks if c["choices"][0]["logprobs"]]
    assert chained(streamed) == entries
    none = server.ask(PATH, {**SUM, "logprobs": True})["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in none] == [[]] * len(entries)


def test_bytes_of_log_probabilities_are_the_tokens_own(server: Served):
    body = {**SUM, "logprobs": True, "temperature": 2.0, "top_k": 0, "top_p": 1.0, "seed": 1, "max_tokens": 200}
    choice = server.ask(PATH, {**body, "ignore_eos": True, "skip_special_tokens": False})["choices"][0]
    shown = bytes(chained(entry["bytes"] for entry in choice["logprobs"]["content"]))
    assert shown.decode(errors="replace") == choice["message"]["content"]


def test_max_completion_tokens_is_the_newer_name(server: Served):
    assert server.ask(PATH, {**SUM, "max_completion_tokens": 2})["usage"]["completion_tokens"] == 2
    assert server.ask(PATH, {**SUM, "max_tokens": 9, "max_completion_tokens": 2})["usage"]["completion_tokens"] == 2
    assert server.ask(PATH, {**SUM, "max_tokens": 3})["choices"][0]["finish_reason"] == "length"


def test_content_may_be_parts_and_the_system_may_be_a_developer(server: Served):
    parts = [{"type": "text", "text": "What is 2 + 3?"}]
    assert server.ask(PATH, {**SUM, "messages": [{"role": "user", "content": parts}]})["usage"]["prompt_tokens"] == 20
    system, developer = (
        server.ask("/tokenize", {"messages": [{"role": role, "content": "Be brief."}, *SUM["messages"]]})["tokens"]
        for role in ("system", "developer")
    )
    assert system == developer


def test_the_final_message_can_be_continued_and_echoed(server: Served):
    messages = [*SUM["messages"], {"role": "assistant", "content": "2 + 3 ="}]
    body = {**SUM, "messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    content = server.ask(PATH, body)["choices"][0]["message"]["content"]
    assert "5" in content and not content.startswith("2 + 3 =")
    echoed = {**body, "echo": True}
    assert server.ask(PATH, echoed)["choices"][0]["message"]["content"] == "2 + 3 =" + content
    assert joined(server.stream(PATH, echoed))["content"] == "2 + 3 =" + content


def test_token_ids_come_back_if_asked_for(server: Served):
    body = {**SUM, "return_token_ids": True}
    answer = server.ask(PATH, body)
    assert answer["prompt_token_ids"] == server.ask("/tokenize", {"messages": SUM["messages"]})["tokens"]
    chunks = server.stream(PATH, body)
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    token_ids = chained(chunk["choices"][0].get("token_ids") or [] for chunk in chunks)
    assert token_ids == answer["choices"][0]["token_ids"]


def test_cached_tokens_are_told_if_the_server_is_to(clever: Served):
    body = {
        **SUM,
        "messages": [{"role": "user", "content": "Tell me about " + "paged attention, " * 30}],
        "max_tokens": 2,
    }
    first, second = (clever.ask(PATH, {**body, "cache_salt": "one"})["usage"] for _ in range(2))
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert 0 < second["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"]
    other = clever.ask(PATH, {**body, "cache_salt": "two"})["usage"]
    assert other["prompt_tokens_details"] == {"cached_tokens": 0}


# -- reasoning --------------------------------------------------------------------------------------------------------


def test_reasoning_is_given_under_both_names(clever: Served):
    body = {**SUM, **THINK}
    answer = clever.ask(PATH, body)
    message = answer["choices"][0]["message"]
    assert message["reasoning"] and message["reasoning"] == message["reasoning_content"]
    assert "5" in message["content"] and "think>" not in message["content"] + message["reasoning"]
    reasoning_tokens = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < reasoning_tokens < answer["usage"]["completion_tokens"]
    chunks = clever.stream(PATH, {**body, "stream_options": {"include_usage": True}})
    streamed = joined(chunks)
    for key in ("reasoning", "reasoning_content", "content"):
        assert streamed[key] == message[key]
    assert chunks[-1]["usage"] == answer["usage"]


def test_reasoning_can_be_switched_and_hidden(clever: Served):
    plain = clever.ask(PATH, SUM)["choices"][0]["message"]
    assert plain["reasoning"] is None and plain["content"] == "2 + 3 = 5."
    by_effort = clever.ask(PATH, {**SUM, "reasoning_effort": "low"})["choices"][0]["message"]
    assert by_effort["reasoning"] == clever.ask(PATH, {**SUM, **THINK})["choices"][0]["message"]["reasoning"]
    assert clever.ask(PATH, {**SUM, "reasoning_effort": "none"})["choices"][0]["message"]["reasoning"] is None
    hidden = {**SUM, **THINK, "include_reasoning": False}
    message = clever.ask(PATH, hidden)["choices"][0]["message"]
    assert message["reasoning"] is None and message["content"] == by_effort["content"]
    assert "reasoning" not in joined(clever.stream(PATH, hidden))


def test_an_answer_cut_within_its_reasoning_has_no_content(clever: Served):
    choice = clever.ask(PATH, {**SUM, **THINK, "max_tokens": 5})["choices"][0]
    assert choice["message"]["content"] is None and choice["message"]["reasoning"]
    assert choice["finish_reason"] == "length"


def test_without_a_parser_reasoning_is_content(server: Served):
    assert "</think>" in server.ask(PATH, {**SUM, **THINK})["choices"][0]["message"]["content"]


# -- tools ------------------------------------------------------------------------------------------------------------


def test_a_tool_call_is_not_text(clever: Served):
    choice = clever.ask(PATH, WEATHER)["choices"][0]
    message = choice["message"]
    assert message["content"] is None and choice["finish_reason"] == "tool_calls"
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert call["type"] == "function" and call["id"].startswith("chatcmpl-tool-")
    streamed = joined(clever.stream(PATH, WEATHER))
    assert [name for name, _ in streamed["calls"]] == ["get_weather"]
    assert json.loads(streamed["calls"][0][1]) == {"city": "Paris"} and streamed["finish_reason"] == "tool_calls"
    assert not streamed.get("content")


def test_tool_choice_none_offers_no_tools(clever: Served):
    choice = clever.ask(PATH, {**WEATHER, "tool_choice": "none"})["choices"][0]
    assert "tool_calls" not in choice["message"] and "tool_call" not in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"


def test_a_result_of_a_tool_is_part_of_the_conversation(clever: Served):
    call = clever.ask(PATH, WEATHER)["choices"][0]["message"]["tool_calls"][0]
    messages = [
        *WEATHER["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": '{"weather": "sunny"}'},
    ]
    choice = clever.ask(PATH, {**WEATHER, "messages": messages})["choices"][0]
    assert choice["message"]["content"] and choice["finish_reason"] == "stop"


def test_auto_needs_the_server_to_allow_it(server: Served):
    answer = server.post(PATH, WEATHER)
    assert answer.status_code == 400 and "--enable-auto-tool-choice" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_required_and_named_tools_are_called_with_arguments_of_their_schema(server: Served, stream: bool):
    """Without a parser of the server's, and of a model that would rather not."""
    schema = {
        "type": "object",
        "properties": {"level": {"enum": [7, 8]}, "loud": {"type": "boolean"}},
        "required": ["level", "loud"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("play", "stop")]
    named = {"type": "function", "function": {"name": "stop"}}
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        body = {**SUM, "tools": tools, "tool_choice": choice, "temperature": 1.0, "seed": 3, "max_tokens": 200}
        body["parallel_tool_calls"] = False
        if stream:
            message = joined(server.stream(PATH, body))
            calls, finish = message["calls"], message["finish_reason"]
            assert not message.get("content")
        else:
            answer = server.ask(PATH, body)["choices"][0]
            calls = [list(call["function"].values()) for call in answer["message"]["tool_calls"]]
            finish = answer["finish_reason"]
            assert not answer["message"]["content"]
        assert finish == reason and len(calls) == 1
        name, arguments = calls[0]
        assert name == "stop" if choice is named else name in ("play", "stop")
        values = json.loads(arguments)
        assert values["level"] in (7, 8) and values["loud"] in (True, False) and len(values) == 2


# -- structured output ------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def follows_schema(text: str) -> bool:
    value = json.loads(text)
    return isinstance(value["a"], int) and value["b"] in ("x", "y") and len(value) == 2


CONSTRAINTS = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, follows_schema),
    ({"structured_outputs": {"json": SCHEMA}}, follows_schema),
    ({"guided_json": SCHEMA}, follows_schema),
    ({"guided_json": json.dumps(SCHEMA)}, follows_schema),
    ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}}, lambda text: text[3] == "-" and len(text) == 6),
    ({"guided_regex": "[0-9]{3}"}, lambda text: text.isdigit() and len(text) == 3),
    ({"guided_choice": ["north", "south"]}, lambda text: text in ("north", "south")),
    ({"structured_outputs": {"choice": ["up", "down"]}}, lambda text: text in ("up", "down")),
    ({"guided_grammar": 'start: "(" end ")"\nend: "z" | "y" "z"'}, lambda text: text in ("(z)", "(yz)")),
]


@pytest.mark.parametrize(("fields", "holds"), CONSTRAINTS, ids=lambda value: str(value)[:45])
def test_the_form_of_an_answer_can_be_prescribed(server: Served, fields: dict[str, Any], holds: Any):
    sampling = {"temperature": 1.0, "seed": 11, "max_tokens": 200}
    text = server.ask(PATH, {**SUM, **sampling, **fields})["choices"][0]["message"]["content"]
    assert holds(text), text
    assert joined(server.stream(PATH, {**SUM, **sampling, **fields}))["content"] == text
    completion = server.ask("/v1/completions", {"prompt": "x", **sampling, **fields})["choices"][0]["text"]
    assert holds(completion), completion


def test_json_mode_gives_an_object(server: Served):
    body = {**SUM, "temperature": 1.0, "seed": 2, "max_tokens": 400, "response_format": {"type": "json_object"}}
    choice = server.ask(PATH, body)["choices"][0]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert choice["message"]["content"].lstrip().startswith("{")


def test_a_schema_that_cannot_be_enforced_is_refused(server: Served):
    for fields in (
        {"guided_json": {"type": "object", "properties": {"a": {"type": "no such type"}}}},
        {"guided_regex": "("},
        {"guided_grammar": "start: undefined_rule"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": 3}}}},
    ):
        for stream in (False, True):
            answer = server.post(PATH, {**SUM, **fields, "stream": stream})
            assert answer.status_code == 400, answer.text


def test_a_constraint_begins_after_the_reasoning(clever: Served):
    body = {**SUM, **THINK, "structured_outputs": {"choice": ["five", "six"]}}
    message = clever.ask(PATH, body)["choices"][0]["message"]
    assert message["reasoning"] and message["content"].strip() in ("five", "six")


def test_a_thinking_budget_ends_the_reasoning(clever: Served):
    free = clever.ask(PATH, {**SUM, **THINK})["usage"]["completion_tokens_details"]["reasoning_tokens"]
    answer = clever.ask(PATH, {**SUM, **THINK, "thinking_token_budget": 5})
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 6 < free
    assert answer["choices"][0]["message"]["content"]
