"""The OpenAPI document: complete, and whatever fits it (or nearly does) is answered without a fault of the server."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from serving import Served, shared_server

MOST_TOKENS = 4  # per answer: this is about the server, not the model


@pytest.fixture(scope="module")
def server() -> Served:
    return shared_server("--reasoning-parser", "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
                         "--enable-tokenizer-info-endpoint")  # fmt: skip


def test_no_request_makes_the_server_fail_or_hang(server: Served):
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) > 10
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
        def try_what_fits(case: Any) -> None:
            short(case)
            case.call_and_validate(checks=[not_a_server_error], timeout=30)

        @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
        def try_what_does_not(case: Any) -> None:
            short(case)
            case.call_and_validate(checks=[not_a_server_error], timeout=30)

        try_what_fits()
        if operation.body:
            try_what_does_not()
    server.wait_until_idle()


def short(case: Any) -> None:
    """Ask for few tokens."""
    body = case.body
    if not isinstance(body, dict) or not case.path.startswith("/v1/"):
        return
    names = ("max_output_tokens",) if "responses" in case.path else ("max_tokens", "max_completion_tokens")
    for name in names:
        if isinstance(body.get(name), int) and body[name] > MOST_TOKENS:
            body[name] = MOST_TOKENS
    if not any(isinstance(body.get(name), int) for name in names):
        body[names[0]] = MOST_TOKENS
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], 3)


def test_the_document_describes_every_endpoint(server: Served):
    document = server.client.get("/openapi.json").json()
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/health", "/version",
            "/load", "/metrics"} <= set(document["paths"])  # fmt: skip
    for path in ("/v1/completions", "/v1/chat/completions"):
        operation = document["paths"][path]["post"]
        assert {"200", "400", "401", "404", "413", "500", "503"} <= set(operation["responses"])
    assert "swagger" in server.client.get("/docs").text.lower()
