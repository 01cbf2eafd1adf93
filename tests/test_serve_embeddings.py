"""``/v1/embeddings``: the wire format, every form of input, what is refused, and the official client."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import openai
import pytest
from serving import Served, shared_server

PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def server() -> Served:
    return shared_server()


def vectors(server: Served, **body: Any) -> list[list[float]]:
    return [each["embedding"] for each in server.ask(PATH, body)["data"]]


def test_the_answer_has_openais_form(server: Served):
    answer = server.ask(PATH, {"model": "demo", "input": ["one", "two words"], "request_id": "7"})
    assert list(answer) == ["id", "object", "created", "model", "data", "usage"]
    assert (answer["id"], answer["object"], answer["model"]) == ("embd-7", "list", "demo")
    assert [(each["index"], each["object"]) for each in answer["data"]] == [(0, "embedding"), (1, "embedding")]
    counts = [server.ask("/tokenize", {"prompt": text})["count"] for text in ("one", "two words")]
    assert answer["usage"] == {
        "prompt_tokens": sum(counts),
        "total_tokens": sum(counts),
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
    for each in answer["data"]:
        assert np.linalg.norm(each["embedding"]) == pytest.approx(1.0, abs=1e-5)


def test_text_tokens_and_lists_of_them_mean_the_same(server: Served):
    ids = server.ask("/tokenize", {"prompt": "What is a block?"})["tokens"]
    forms: list[Any] = ["What is a block?", ids, ["What is a block?"], [ids]]
    (first,), *others = [vectors(server, input=form) for form in forms]
    assert all(np.allclose(other[0], first, atol=1e-6) for other in others)
    assert len(vectors(server, input=["What is a block?", "x", "x"])) == 3


def test_base64_holds_the_same_numbers(server: Served):
    (numbers,) = vectors(server, input="hello")
    (packed,) = vectors(server, input="hello", encoding_format="base64")
    assert np.array_equal(np.frombuffer(base64.b64decode(str(packed)), "<f4"), np.array(numbers, np.float32))


def test_dimensions_and_length_can_be_chosen(server: Served):
    (raw,) = vectors(server, input="hello", use_activation=False)
    (old,) = vectors(server, input="hello", normalize=False)
    (cut,) = vectors(server, input="hello", dimensions=10)
    assert raw == old and not np.isclose(np.linalg.norm(raw), 1.0)
    assert np.allclose(cut, np.array(raw[:10]) / np.linalg.norm(raw[:10]), atol=1e-6)


def test_a_conversation_is_rendered_by_the_chat_template(server: Served):
    messages = [{"role": "user", "content": "What is a block?"}]
    for generate in (False, True):
        body = {"messages": messages, "add_generation_prompt": generate}
        tokens = server.ask("/tokenize", body)["tokens"]
        assert np.allclose(vectors(server, **body), vectors(server, input=tokens), atol=1e-6)


def test_long_inputs_can_be_cut(server: Served):
    ids = server.ask("/tokenize", {"prompt": "one two three four five six"})["tokens"]
    cut = vectors(server, input=[ids], truncate_prompt_tokens=2)
    assert np.allclose(cut, vectors(server, input=ids[:2]), atol=1e-6)
    cut = vectors(server, input=[ids], truncate_prompt_tokens=2, truncation_side="left")
    assert np.allclose(cut, vectors(server, input=ids[-2:]), atol=1e-6)
    assert len(vectors(server, input=[7] * 100_000, truncate_prompt_tokens=-1)) == 1


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "prompt"),
        ({"input": ["a", ""]}, 400, "prompt"),
        ({"input": [[]]}, 400, "input"),
        ({"input": [-1]}, 400, "prompt_token_ids"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "input"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions"),
        ({"input": "a", "dimensions": 100_000}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
        ({"input": "a", "priority": 3}, 400, "priority"),
        ({"input": "a", "model": "other"}, 404, "model"),
        ({"input": [7] * 100_000}, 400, "input_tokens"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused_by_name(server: Served, body: dict, status: int, named: str):
    answer = server.post(PATH, body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == status and named in (error["param"] or "") + error["message"]
    server.wait_until_idle()


def test_the_official_client_reads_the_vectors(server: Served):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    found = client.embeddings.create(model="demo", input=["hello", "world"], dimensions=16)  # asks for base64 by itself
    assert [len(each.embedding) for each in found.data] == [16, 16]
    assert found.data[0].embedding == pytest.approx(vectors(server, input="hello", dimensions=16)[0], abs=1e-6)
