"""``/v1/messages``: Anthropic's blocks, events, stop reasons, errors and token counts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import Served, named_events, parsing_server, served, shared_server

PATH = "/v1/messages"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


SUM: dict[str, Any] = {"max_tokens": 200, "temperature": 0, "messages": [user("What is 2 + 3?")]}
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL: dict[str, Any] = {**SUM, "messages": [user("What is the weather in Paris?")], "tools": [WEATHER]}
THINK: dict[str, Any] = {"thinking": {"type": "enabled", "budget_tokens": 100}}


@pytest.fixture(scope="module")
def server() -> Served:
    return parsing_server()


def stream(server: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream; every one is named like its data."""
    return named_events(server, PATH, body)


def shape(events: list[dict[str, Any]]) -> list[str]:
    """Types of the events, of deltas their own, in a row once."""
    found = [event.get("delta", {}).get("type") or event["type"] for event in events]
    return [kind for kind, before in zip(found, [None, *found], strict=False) if kind != before]


def test_a_message_has_the_fields_of_anthropic(server: Served):
    message = server.ask(PATH, SUM)
    usage = message["usage"]
    assert message.pop("id").startswith("msg")
    assert usage.pop("input_tokens") + usage.pop("cache_read_input_tokens") == 20
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "demo",
        "content": [{"type": "text", "text": "2 + 3 = 5.", "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"cache_creation_input_tokens": 0, "output_tokens": 9},
    }


def test_the_events_of_a_text_come_in_order_and_add_up(server: Served):
    events = stream(server, SUM)
    assert shape(events) == [
        "message_start", "content_block_start", "text_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert "".join(event["delta"].get("text", "") for event in events if "delta" in event) == "2 + 3 = 5."
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["output_tokens"] == 0
    assert events[-2]["delta"]["stop_reason"] == "end_turn"
    assert events[-2]["usage"]["output_tokens"] == 9


def test_thinking_is_a_block_before_the_text(server: Served):
    message = server.ask(PATH, {**SUM, **THINK})
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert message["content"][0]["signature"]
    events = stream(server, {**SUM, **THINK})
    assert shape(events) == [
        "message_start", "content_block_start", "thinking_delta", "signature_delta", "content_block_stop",
        "content_block_start", "text_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1]
    (signed,) = [event["delta"] for event in events if event.get("delta", {}).get("type") == "signature_delta"]
    assert signed["signature"] == message["content"][0]["signature"]
    assert [block["type"] for block in server.ask(PATH, {**SUM, "thinking": {"type": "disabled"}})["content"]] == [
        "text"
    ]


def test_the_budget_limits_the_thinking(server: Served):
    short = server.ask(PATH, {**SUM, "thinking": {"type": "enabled", "budget_tokens": 4}})
    assert len(short["content"][0]["thinking"].split()) <= 5


def test_a_call_is_a_block_with_its_input(server: Served):
    message = server.ask(PATH, CALL)
    (block,) = message["content"]
    assert block.pop("id").startswith("toolu_")
    assert block == {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}}
    assert message["stop_reason"] == "tool_use"
    events = stream(server, CALL)
    assert shape(events) == [
        "message_start", "content_block_start", "input_json_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    start = events[1]["content_block"]
    assert (start["type"], start["name"], start["input"]) == ("tool_use", "get_weather", {})
    assert json.loads("".join(event["delta"].get("partial_json", "") for event in events if "delta" in event)) == {
        "city": "Paris"
    }
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_the_result_of_a_call_is_read(server: Served):
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": [{"type": "text", "text": '{"temperature": 21}'}],
    }
    said = [*CALL["messages"], {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert "21" in server.ask(PATH, {**CALL, "messages": said})["content"][0]["text"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_can_be_required(server: Served, choice: dict[str, Any]):
    message = server.ask(PATH, {**CALL, "messages": [user("Hello!")], "tool_choice": choice})
    if message["stop_reason"] != "max_tokens":
        assert message["stop_reason"] == "tool_use"
        assert [list(block["input"]) for block in message["content"]] == [["city"]]


def test_a_call_can_be_ruled_out(server: Served):
    message = server.ask(PATH, {**CALL, "tool_choice": {"type": "none"}})
    assert [block["type"] for block in message["content"]] == ["text"]


def test_stop_sequences_and_limits_are_told(server: Served):
    stopped = server.ask(PATH, {**SUM, "stop_sequences": ["= 5"]})
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "= 5")
    assert stopped["content"][0]["text"] == "2 + 3 "
    cut = server.ask(PATH, {**SUM, "max_tokens": 3})
    assert (cut["stop_reason"], cut["stop_sequence"], cut["usage"]["output_tokens"]) == ("max_tokens", None, 3)
    assert stream(server, {**SUM, "max_tokens": 3})[-2]["delta"]["stop_reason"] == "max_tokens"


def test_a_call_that_the_limit_cuts_off_is_not_handed_out_whole(server: Served):
    whole = server.ask(PATH, CALL)["usage"]["output_tokens"]
    message = server.ask(PATH, {**CALL, "max_tokens": whole - 6})
    assert message["stop_reason"] == "max_tokens"
    assert all(block["type"] == "text" for block in message["content"])


def test_the_beginning_of_an_answer_is_continued(server: Served):
    begun = [*SUM["messages"], {"role": "assistant", "content": "2 + 3 ="}]
    assert server.ask(PATH, {**SUM, "messages": begun})["content"][0]["text"] == " 5."


def test_system_text_comes_as_a_string_or_as_blocks(server: Served):
    system = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    counts = {
        server.ask(f"{PATH}/count_tokens", {"messages": SUM["messages"], "system": given})["input_tokens"]
        for given in ("Be short.", system)
    }
    assert len(counts) == 1 and counts.pop() > 20


def test_tokens_are_counted_as_they_will_be_used(server: Served):
    for body in (SUM, CALL, {**SUM, **THINK}):
        counted = server.ask(
            f"{PATH}/count_tokens", {key: body[key] for key in body if key not in ("max_tokens", "temperature")}
        )
        usage = server.ask(PATH, body)["usage"]
        assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type, value='image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "nope"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"system": [IMAGE]}, "system[0].type"),
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"max_tokens": None}, "max_tokens"),
        ({"n": 3}, "n is not supported"),
    ],
)
def test_errors_have_the_shape_of_anthropic(server: Served, fields: dict[str, Any], named: str):
    for path in (PATH, *([f"{PATH}/count_tokens"] if {"system", "messages"} & fields.keys() else [])):
        answer = server.post(path, {**SUM, **fields})
        assert answer.status_code == 400, answer.text
        error = answer.json()
        assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
        assert named in error["error"]["message"]


def test_an_unknown_model_is_not_found(server: Served):
    answer = server.post(PATH, {**SUM, "model": "nope"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_who_leaves_a_stream_ends_its_message(server: Served):
    body = {**SUM, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", PATH, json=body) as answer:
        next(answer.iter_lines())
    server.wait_until_idle()


def test_thinking_needs_a_reasoning_parser():
    server = shared_server()
    answer = server.post(PATH, {**SUM, **THINK})
    assert answer.status_code == 400
    assert "--reasoning-parser" in answer.json()["error"]["message"]


def test_the_key_may_come_in_anthropics_header():
    with served("--api-key", "secret") as server:
        refused = server.post(PATH, SUM)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        for header in ({"x-api-key": "secret"}, {"Authorization": "Bearer secret"}):
            assert server.ask(PATH, SUM, headers=header)["stop_reason"] == "end_turn"
