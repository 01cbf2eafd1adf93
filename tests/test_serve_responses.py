"""``/v1/responses``: events in their order, responses that are kept, continued, run in the background and cancelled."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from serving import Served, named_events, parsing_server

from nanovllm.entrypoints.serve.errors import ServeError
from nanovllm.entrypoints.serve.generation import Usage
from nanovllm.entrypoints.serve.responses_input import conversation, with_instructions
from nanovllm.entrypoints.serve.responses_store import ResponseStore, StoredResponse
from nanovllm.entrypoints.serve.responses_stream import ResponseStream
from nanovllm.errors import EngineGenerateError, ParameterError
from nanovllm.parsers import Content

PATH = "/v1/responses"
SUM: dict[str, Any] = {"input": "What is 2 + 3?", "temperature": 0}
THINK: dict[str, Any] = {"reasoning": {"effort": "low"}}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL: dict[str, Any] = {"input": "What is the weather in Paris?", "temperature": 0, "tools": [WEATHER]}


@pytest.fixture(scope="module")
def server() -> Served:
    return parsing_server()


def stream(server: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream: every one is named like its data, and they are numbered."""
    events = named_events(server, PATH, body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Types of the events, deltas in a row once."""
    found = [event["type"].removeprefix("response.") for event in events]
    return [kind for kind, before in zip(found, [None, *found], strict=False) if kind != before]


def test_a_response_has_the_fields_of_openai(server: Served):
    response = server.ask(PATH, {**SUM, "metadata": {"run": "7"}})
    item = response["output"][0]
    assert response["id"].startswith("resp_") and item.pop("id").startswith("msg_")
    del response["id"], response["created_at"]
    assert response == {
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {"run": "7"},
        "model": "demo",
        "output": [
            {
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "2 + 3 = 5.", "annotations": [], "logprobs": []}],
            }
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": True,
        "temperature": 0.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 20,
            "input_tokens_details": {"cached_tokens": response["usage"]["input_tokens_details"]["cached_tokens"]},
            "output_tokens": 9,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 29,
        },
        "user": None,
    }


def test_the_events_of_a_message_come_in_order_and_add_up(server: Served):
    events = stream(server, SUM)
    assert kinds(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    text = "".join(event["delta"] for event in events if event["type"].endswith("delta"))
    done = {event["type"].removeprefix("response."): event for event in events}
    assert text == "2 + 3 = 5." == done["output_text.done"]["text"] == done["content_part.done"]["part"]["text"]
    (item,) = done["completed"]["response"]["output"]
    assert item == done["output_item.done"]["item"]
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}
    assert done["created"]["response"]["status"] == "in_progress"
    assert done["completed"]["response"]["usage"]["output_tokens"] == 9


def test_reasoning_is_an_item_of_its_own(server: Served):
    events = stream(server, {**SUM, **THINK})
    assert kinds(events) == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done",
        "completed",
    ]  # fmt: skip
    reasoning, message = events[-1]["response"]["output"]
    assert [reasoning["type"], message["type"]] == ["reasoning", "message"]
    whole = server.ask(PATH, {**SUM, **THINK})
    assert [item["content"][0]["text"] for item in whole["output"]] == [
        item["content"][0]["text"] for item in (reasoning, message)
    ]
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 5


def test_a_call_is_streamed_as_its_arguments(server: Served):
    events = stream(server, CALL)
    assert kinds(events) == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    arguments = "".join(event["delta"] for event in events if event["type"].endswith("delta"))
    (item,) = events[-1]["response"]["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "get_weather", "completed")
    assert json.loads(arguments) == {"city": "Paris"} == json.loads(item["arguments"])


def test_a_response_cut_off_is_incomplete(server: Served):
    limit = {**SUM, "max_output_tokens": 3}
    for response in (server.ask(PATH, limit), stream(server, limit)[-1]["response"]):
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][-1]["status"] == "incomplete"
    assert stream(server, limit)[-1]["type"] == "response.incomplete"


def test_a_response_can_be_fetched_and_continued(server: Served):
    first = server.ask(PATH, {**SUM, "instructions": "Be short."})
    assert server.client.get(f"{PATH}/{first['id']}").json() == first
    second = server.ask(PATH, {"input": "And a block?", "temperature": 0, "previous_response_id": first["id"]})
    repeated = [
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": "2 + 3 = 5."},
        {"role": "user", "content": "And a block?"},
    ]
    same = server.ask(PATH, {"input": repeated, "temperature": 0})
    assert second["usage"]["input_tokens"] == same["usage"]["input_tokens"]  # the instructions are not carried over
    assert second["output"][0]["content"] == same["output"][0]["content"]
    assert second["previous_response_id"] == first["id"]


def test_a_streamed_response_is_kept_too(server: Served):
    last = stream(server, SUM)[-1]["response"]
    assert server.client.get(f"{PATH}/{last['id']}").json() == last


def test_a_response_that_is_not_to_be_stored_is_gone(server: Served):
    response = server.ask(PATH, {**SUM, "store": False})
    answer = server.client.get(f"{PATH}/{response['id']}")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "NotFoundError"
    answer = server.post(PATH, {**SUM, "previous_response_id": response["id"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "previous_response_id")


def test_the_result_of_a_call_is_given_back_by_its_id(server: Served):
    called = server.ask(PATH, CALL)
    (call,) = called["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": '{"temperature": 21}'}
    by_id = server.ask(PATH, {**CALL, "input": [result], "previous_response_id": called["id"]})
    asked = {"role": "user", "content": CALL["input"]}
    by_items = server.ask(PATH, {**CALL, "input": [asked, call, result]})
    for response in (by_id, by_items):
        assert "21" in response["output"][0]["content"][0]["text"]


def test_a_response_runs_in_the_background(server: Served):
    queued = server.ask(PATH, {**SUM, "background": True})
    assert (queued["status"], queued["output"]) == ("queued", [])
    deadline = time.monotonic() + 20
    while (response := server.client.get(f"{PATH}/{queued['id']}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert response["status"] == "completed"
    assert response["output"][0]["content"][0]["text"] == "2 + 3 = 5."


def test_a_response_in_the_background_can_be_cancelled(server: Served):
    body = {"input": "Count.", "background": True, "ignore_eos": True, "max_output_tokens": 1900}
    queued = server.ask(PATH, body)
    continued = server.post(PATH, {**SUM, "previous_response_id": queued["id"]})
    assert (continued.status_code, continued.json()["error"]["param"]) == (400, "previous_response_id")
    cancelled = server.ask(f"{PATH}/{queued['id']}/cancel", {})
    assert cancelled["status"] == "cancelled"
    assert server.client.get(f"{PATH}/{queued['id']}").json()["status"] == "cancelled"
    server.wait_until_idle()
    finished = server.ask(PATH, SUM)
    assert server.post(f"{PATH}/{finished['id']}/cancel", {}).status_code == 400


def test_a_response_in_the_background_tells_of_its_failure(server: Served):
    queued = server.ask(PATH, {"input": "word " * 3000, "background": True})
    deadline = time.monotonic() + 20
    while (response := server.client.get(f"{PATH}/{queued['id']}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert response["status"] == "failed"
    assert "maximum context length" in response["error"]["message"]


def test_text_follows_its_schema(server: Served):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "sum", "schema": schema, "strict": True}}
    response = server.ask(PATH, {**SUM, "text": form, "max_output_tokens": 60})
    assert list(json.loads(response["output"][0]["content"][0]["text"])) == ["a"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_can_be_required(server: Served, choice: Any):
    response = server.ask(PATH, {**CALL, "input": "Hello!", "tool_choice": choice, "max_output_tokens": 200})
    call = response["output"][0]
    assert call["type"] == "function_call" and call["name"] == "get_weather"
    if response["status"] == "completed":
        assert list(json.loads(call["arguments"])) == ["city"]


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments"),
        ({"input": []}, "input"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["web_search_call.results"]}, "include"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "concise"}}, "reasoning.summary"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "store"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"n": 2}, "n"),
        ({"temperature": 9}, "temperature"),
        ({"top_k": "many"}, "top_k"),
        ({"model": "nope"}, "model"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(server: Served, fields: dict[str, Any], param: str):
    answer = server.post(PATH, {**SUM, **fields})
    assert answer.status_code == (404 if "model" in fields else 400)
    assert answer.json()["error"]["param"] == param


def test_who_leaves_a_stream_ends_its_response(server: Served):
    body = {"input": "Count.", "ignore_eos": True, "stream": True}
    with server.client.stream("POST", PATH, json=body) as answer:
        next(answer.iter_lines())
    server.wait_until_idle()


class FailingReader:
    """An answer that breaks off."""

    usage = Usage()

    async def parts(self) -> Any:
        yield [Content("2 + ")]
        raise EngineGenerateError("the step failed")


def test_a_fault_in_a_stream_is_told_as_a_failed_response():
    class Head:
        def as_json(self, status: str, output: Any = None, usage: Any = None, error: Any = None) -> dict[str, Any]:
            return {"status": status, "output": output, "error": error}

    kept: list[Any] = []

    async def main() -> bytes:
        stream = ResponseStream(Head(), FailingReader(), kept.append)  # type: ignore[arg-type]
        return b"".join([data async for data in stream.events()])

    last = json.loads(asyncio.run(main()).rpartition(b"data: ")[2])
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "the step failed"}
    (item,) = last["response"]["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "2 + ")
    assert kept == [last["response"]]


def test_items_of_the_assistant_in_a_row_become_one_message():
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
        call,
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": "y"},
        {"type": "reasoning", "content": [], "summary": [{"type": "summary_text", "text": "so"}]},
        {"role": "assistant", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": name, "type": "function", "function": function} for name in ("1", "2")]
    assert conversation(items) == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c", "reasoning": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "2", "content": "y"},
        {"role": "assistant", "content": "d", "reasoning": "so"},
        {"role": "assistant", "content": "e"},
    ]
    with pytest.raises(ParameterError):
        conversation([{"role": "user", "content": 5}])


def test_instructions_are_the_first_message():
    user = {"role": "user", "content": "u"}
    assert with_instructions(None, [user]) == [user]
    assert with_instructions("i", [user]) == [{"role": "system", "content": "i"}, user]
    assert with_instructions("i", [{"role": "developer", "content": "d"}, user]) == [
        {"role": "developer", "content": "i\n\nd"},
        user,
    ]


def test_the_store_forgets_what_was_used_longest_ago():
    async def main() -> None:
        store = ResponseStore(max_responses=3, max_characters=100)

        def put(name: str, size: int = 10, task: Any = None) -> None:
            store.put(StoredResponse({"id": name}, [], size, task))

        running = asyncio.create_task(asyncio.sleep(60))
        put("a", task=running)
        put("b")
        put("c")
        store.get("b")
        put("d")  # c goes: a is under way, b was just used
        assert [name in store for name in "abcd"] == [True, True, False, True]
        put("e", size=75)  # too many characters
        assert [name in store for name in "abde"] == [True, False, True, True]
        put("f", task=running)
        put("g", task=running)
        with pytest.raises(ServeError) as error:
            put("h")
        assert error.value.status == 503
        with pytest.raises(ServeError) as error:
            store.get("b")
        assert error.value.status == 404
        running.cancel()

    asyncio.run(main())
