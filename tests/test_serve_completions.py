"""``/v1/completions``: what goes over the wire, streamed and not."""

from __future__ import annotations

from typing import Any

import pytest
from serving import Served, shared_server

PATH = "/v1/completions"
FRANCE: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Served:
    return shared_server()


def without_id(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The answer without what differs from call to call, which is checked here."""
    assert value["id"].startswith(prefix) and len(value["id"]) == len(prefix) + 16
    assert isinstance(value["created"], int)
    return {key: item for key, item in value.items() if key not in ("id", "created")}


def test_an_answer_has_the_fields_of_openai_and_vllm(server: Served):
    answer = server.ask(PATH, FRANCE)
    text = answer["choices"][0]["text"]
    assert text
    assert without_id(answer, "cmpl-") == {
        "object": "text_completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "text": text,
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": answer["system_fingerprint"],
        "usage": {
            "prompt_tokens": 5,
            "total_tokens": 9,
            "completion_tokens": 4,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
        "kv_transfer_params": None,
    }


def test_a_stream_carries_the_same_text_in_chunks(server: Served):
    whole = server.ask(PATH, FRANCE)["choices"][0]
    chunks = server.stream(PATH, FRANCE)
    assert [without_id(chunk, "cmpl-") for chunk in chunks] == [
        {
            "object": "text_completion",
            "model": "demo",
            "choices": [
                {
                    "index": 0,
                    "text": chunk["choices"][0]["text"],
                    "logprobs": None,
                    "finish_reason": "length" if chunk is chunks[-1] else None,
                    "stop_reason": None,
                    "prompt_token_ids": None,
                    "token_ids": None,
                }
            ],
            "usage": None,
        }
        for chunk in chunks
    ]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert len({chunk["id"] for chunk in chunks}) == 1
