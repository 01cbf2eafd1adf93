"""What the server refuses, and how it says so; keys, limits and origins."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Served, served, shared_server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Served:
    return shared_server()


@pytest.fixture(scope="module")
def guarded() -> Iterator[Served]:
    with served(
        "--api-key", "first", "second", "--max-request-body-size", "2000", "--allowed-origins", '["https://page.example"]',
        "--enable-request-id-headers", "--served-model-name", "main", "other", "--root-path", "/proxy",
    ) as server:  # fmt: skip
        yield server


def refusal(server: Served, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    return error


def test_an_unknown_model_is_a_404_that_lists_the_aliases(server: Served):
    for path, body in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": MESSAGES})):
        error = refusal(server, path, {**body, "model": "nope"}, 404)
        assert error["message"] == "The model `nope` does not exist. Valid aliases: demo."
        assert (error["type"], error["param"]) == ("NotFoundError", "model")
        for same in (None, "", "demo"):
            assert server.post(path, {**body, "model": same, "max_tokens": 1}).status_code == 200


SAMPLING_ERRORS = [
    ({"temperature": -1.0}, "temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)"),
    ({"top_p": 0}, "top_p must be in (0, 1], got 0.0."),
    ({"n": 0}, "n must be at least 1, got 0."),
    ({"max_tokens": 5000}, "max_tokens=5000 cannot be greater than max_model_len=2048. Please request fewer"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens must be less than or equal to max_tokens=3"),
    ({"stop": [""]}, "stop cannot contain an empty string."),
    ({"logit_bias": {"x": 1}}, "logit_bias contains key(s) that cannot be converted to integer token IDs: ['x']"),
    ({"allowed_token_ids": []}, "allowed_token_ids is not None and empty!"),
    ({"priority": 3}, "--scheduling-policy priority"),
    ({"best_of": 3}, "ask for n=3 outputs"),
    ({"cache_salt": ""}, "non-empty string"),
    ({"stream_options": {"include_usage": True}}, "Stream options can only be defined when `stream=True`."),
    ({"stream": True, "prompt_logprobs": 1}, "`prompt_logprobs` are not available when `stream=True`."),
    ({"prompt_logprobs": 21}, "Requested prompt logprobs of 21, which is greater than max allowed: 20"),
    ({"truncate_prompt_tokens": 5000}, "cannot be greater than max_model_len=2048"),
    ({"stream": True, "use_beam_search": True}, "Streaming is not currently supported with beam search"),
    ({"use_beam_search": True, "stop": "x"}, "not supported with beam search (parameter=stop"),
    ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params is not supported by this version"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs is not supported by this version"),
    ({"repetition_detection": {"max_pattern_size": 3, "min_count": 1}}, "min_count must be >= 2"),
    ({"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
    ({"guided_regex": "a", "structured_outputs": {"regex": "b"}}, "give one constraint on the output"),
    ({"structured_outputs": {"regex": "b", "choice": ["c"]}}, "multiple are specified: regex, choice"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), SAMPLING_ERRORS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_value_out_of_range_is_refused_by_name(server: Served, path: str, fields: dict[str, Any], message: str):
    body = {"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES}
    error = refusal(server, path, {**body, **fields})
    assert message in error["message"] and error["type"] == "BadRequestError" and error["param"]


COMPLETION_ERRORS = [
    ({"prompt": "x", "logprobs": 21}, "Requested sample logprobs of 21, which is greater than max allowed: 20"),
    ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1, got 0."),
    ({"prompt": []}, "prompt must be provided and non-empty"),
    ({}, "prompt must be provided and non-empty"),
    ({"prompt": ""}, "The prompt cannot be empty"),
    ({"prompt": [9999999]}, "Token id 9999999 is out of vocabulary"),
    ({"prompt": ["x", ""]}, "The prompt cannot be empty"),
    ({"prompt": "x\ud800"}, "Unicode"),
    ({"prompt": "x", "prompt_embeds": "AAAA"}, "prompt_embeds is not supported by this version"),
]


@pytest.mark.parametrize(("body", "message"), COMPLETION_ERRORS, ids=lambda value: ascii(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_that_cannot_be_is_refused(server: Served, body: dict[str, Any], message: str, stream: bool):
    data = json.dumps({**body, "stream": stream})  # escapes what is not Unicode
    answer = server.client.post(COMPLETIONS, content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


CHAT_ERRORS = [
    ({"top_logprobs": 2}, "`logprobs` must be set to true"),
    ({"logprobs": True, "top_logprobs": 21}, "Requested sample logprobs of 21"),
    ({"continue_final_message": True}, "not compatible"),
    ({"chat_template": "{{ messages }}"}, "--trust-request-chat-template"),
    ({"chat_template_kwargs": {"chat_template": "/etc/passwd"}}, "--trust-request-chat-template"),
    ({"chat_template_kwargs": {"messages": []}}, "must not hold 'messages'"),
    ({"chat_template_kwargs": {"chat_template": [1]}}, "--trust-request-chat-template"),
    ({"chat_template_kwargs": {"template": 1}}, "the chat template fails on this request: TypeError"),
    ({"tool_choice": "required"}, "needs tools"),
    ({"tools": [{"type": "function", "function": {"x": 1}}], "tool_choice": "required"}, "a function with a name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "what"}, "tool_choice must be"),
    ({"functions": [{"name": "f"}]}, "use tools"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text"),
    ({"messages": [{"role": "user", "content": "x\ud800"}]}, "Unicode"),
    ({"mm_processor_kwargs": {"a": 1}}, "the model reads text only"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), CHAT_ERRORS, ids=lambda value: ascii(value)[:40])
def test_a_conversation_that_cannot_be_is_refused(server: Served, fields: dict[str, Any], message: str):
    data = json.dumps({"messages": MESSAGES, **fields})
    answer = server.client.post(CHAT, content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


def test_a_prompt_longer_than_the_context_is_refused_in_the_words_clients_look_for(server: Served):
    long = "word " * 3000
    for path, body in ((COMPLETIONS, {"prompt": long}), (CHAT, {"messages": [{"role": "user", "content": long}]})):
        for stream in (False, True):
            error = refusal(server, path, {**body, "stream": stream})
            assert error["message"].startswith("This model's maximum context length is 2048 tokens. However, your")
            assert error["param"] == "input_tokens"


def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenised(server: Served):
    long, text = (
        "word " * 5_000_000,
        "This model's maximum context length is 2048 tokens. However, your prompt contains at ",
    )
    for path, body in (
        (COMPLETIONS, {"prompt": long}),
        (COMPLETIONS, {"prompt": long, "add_special_tokens": False}),
        (CHAT, {"messages": [{"role": "user", "content": long}]}),
    ):
        error = refusal(server, path, body)
        assert error["message"].startswith(text + "least ") and error["param"] == "input_tokens"
    cut = server.ask(COMPLETIONS, {"prompt": "word " * 50_000, "truncate_prompt_tokens": 5, "max_tokens": 1})
    assert cut["usage"]["prompt_tokens"] == 5


def test_a_body_of_the_wrong_form_names_the_place(server: Served):
    error = refusal(server, COMPLETIONS, {"prompt": "x", "max_tokens": "many"})
    assert error["type"] == "Bad Request" and error["param"] == "body.max_tokens"
    assert error["message"].startswith("1 validation error:\n  {'type': 'int_parsing'")
    assert refusal(server, CHAT, {})["param"] == "body.messages"
    for content, kind in ((b"{", "application/json"), (b'{"prompt": "x"}', "text/plain"), (b"[]", "application/json")):
        answer = server.client.post(COMPLETIONS, content=content, headers={"content-type": kind})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "Bad Request"


def test_unknown_fields_are_taken_and_named_once_in_the_log(server: Served):
    for _ in range(3):
        assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1, "frobnicate": 1}).status_code == 200
    assert server.log.count("frobnicate") == 1


def test_unknown_routes_and_methods_are_told_in_both_shapes(server: Served):
    answer = server.client.get("/v1/nothing")
    assert answer.status_code == 404 and answer.json()["detail"] == "Not Found"
    assert answer.json()["error"]["type"] == "NotFoundError"
    assert server.client.get(COMPLETIONS).status_code == 405


# -- protection -------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_runs_the_model(guarded: Served):
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/v1/messages"):
        answer = guarded.post(path, {"prompt": "x"})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["message"].startswith("Unauthorized")
    assert guarded.client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert guarded.client.get("/v1/models", headers={"Authorization": "Basic first"}).status_code == 401
    for path in ("/health", "/ping", "/version"):
        assert guarded.client.get(path).status_code == 200


@pytest.mark.parametrize("headers", [{"Authorization": "Bearer first"}, {"authorization": "bearer second"},
                                     {"x-api-key": "second"}])  # fmt: skip
def test_any_key_opens_in_either_header(guarded: Served, headers: dict[str, str]):
    answer = guarded.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}, headers=headers)
    assert answer.status_code == 200, answer.text


def test_a_body_too_large_is_refused_whether_announced_or_not(guarded: Served):
    key = {"Authorization": "Bearer first", "content-type": "application/json"}
    body = b'{"prompt": "' + b"x" * 3000 + b'"}'
    assert guarded.client.post(COMPLETIONS, content=body, headers=key).status_code == 413
    assert guarded.client.post(COMPLETIONS, content=iter([body]), headers=key).status_code == 413
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port)
    connection.putrequest("POST", COMPLETIONS)
    for name, value in {**key, "content-length": str(10**12)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_web_pages_may_call_only_from_the_origins_allowed(server: Served, guarded: Served):
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    allowed = guarded.client.options(COMPLETIONS, headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = guarded.client.options(COMPLETIONS, headers={**asked, "Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in server.client.options(COMPLETIONS, headers=asked).headers


def test_request_ids_come_back(guarded: Served):
    key = {"x-api-key": "first"}
    assert len(guarded.client.get("/v1/models", headers=key).headers["x-request-id"]) == 32
    answer = guarded.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}, headers={**key, "X-Request-Id": "mine"})
    assert answer.headers["x-request-id"] == "mine" and answer.json()["id"] == "cmpl-mine"
    named = guarded.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1, "request_id": "ours"}, headers=key)
    assert named.json()["id"] == "cmpl-ours"


def test_the_first_served_name_is_the_one_answers_carry(guarded: Served):
    key = {"x-api-key": "first"}
    cards = guarded.client.get("/v1/models", headers=key).json()["data"]
    assert [card["id"] for card in cards] == ["main", "other"] and cards[0]["root"] == "demo"
    for asked, name in (("other", "other"), (None, "main")):
        body = {"prompt": "x", "max_tokens": 1, "model": asked}
        assert guarded.post(COMPLETIONS, body, headers=key).json()["model"] == name
    assert guarded.post(COMPLETIONS, {"prompt": "x", "model": "demo"}, headers=key).status_code == 404
    assert guarded.client.get("/v1/models/other", headers=key).json()["id"] == "other"


def test_the_document_describes_every_endpoint(server: Served):
    document = server.client.get("/openapi.json").json()
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/health", "/version",
            "/load", "/metrics", "/v1/responses", "/v1/messages",
            "/v1/messages/count_tokens"} <= set(document["paths"])  # fmt: skip
    for path in ("/v1/completions", "/v1/chat/completions"):
        operation = document["paths"][path]["post"]
        assert {"200", "400", "401", "404", "413", "500", "503"} <= set(operation["responses"])
    assert "swagger" in server.client.get("/docs").text.lower()
