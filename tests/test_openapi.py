"""Whatever the OpenAPI document allows, and much that it does not: no request makes a fault, and all are answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from serving import Served, served

LIMIT = 20.0  # seconds within which a request is answered
EXAMPLES = 6
QUESTION: list[Any] = [{"role": "user", "content": "Hi"}]
GOOD: dict[str, dict[str, Any]] = {  # requests that succeed
    "POST /v1/completions": {"prompt": "1, 2,", "max_tokens": 3},
    "POST /v1/chat/completions": {"messages": QUESTION, "max_tokens": 3},
    "POST /v1/responses": {"input": "Hi", "max_output_tokens": 3},
    "POST /v1/messages": {"messages": QUESTION, "max_tokens": 3},
    "POST /v1/messages/count_tokens": {"messages": QUESTION},
    "POST /tokenize": {"prompt": "Hi"},
    "POST /detokenize": {"tokens": [1, 2, 3]},
}


few = settings(
    max_examples=EXAMPLES, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """A context so short that no answer takes long."""
    with served(
        "--max-model-len", "96", "--max-num-seqs", "16", "--reasoning-parser", "qwen3",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def operations(server: Served) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


def test_every_endpoint_is_in_the_document(operations: list[Any]):
    assert {
        "GET /v1/models", "POST /v1/completions", "POST /v1/chat/completions", "POST /v1/responses",
        "GET /v1/responses/{response_id}", "POST /v1/responses/{response_id}/cancel", "POST /v1/messages",
        "POST /v1/messages/count_tokens", "POST /tokenize", "POST /detokenize", "GET /health", "GET /metrics",
    } <= {operation.label for operation in operations}  # fmt: skip


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfitting"])
def test_no_document_makes_a_fault(server: Served, operations: list[Any], mode: GenerationMode):
    for operation in operations:

        @few
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            answer = case.call(base_url=server.url, timeout=LIMIT)
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)

        try:
            ask()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # nothing can be wrong with a request that takes nothing
    server.wait_until_idle(LIMIT)


def test_no_field_of_a_good_request_makes_a_fault(server: Served, operations: list[Any]):
    """Requests as above fail early, for several reasons at once; one or two odd fields go further in."""
    statuses = Counter[int]()
    for operation in operations:
        good = GOOD.get(operation.label)
        if good is None:
            continue
        assert server.post(operation.path, good).status_code == 200

        @few
        @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE), data=st.data())
        def ask(case: Any, data: st.DataObject) -> None:
            names = sorted(case.body)
            odd = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)) if names else []
            case.body = {**good, **{name: case.body[name] for name in odd}}  # noqa: B023
            answer = case.call(base_url=server.url, timeout=LIMIT)
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)
            statuses[answer.status_code] += 1

        ask()
    server.wait_until_idle(LIMIT)
    assert statuses[200] > 5 and statuses[400] > 0
