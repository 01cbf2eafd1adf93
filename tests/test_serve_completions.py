"""``/v1/completions``: what goes over the wire, streamed and not."""

from __future__ import annotations

from typing import Any

import pytest
from serving import Served, chained, shared_server

PATH = "/v1/completions"
# Its answer is longer than four tokens.
CACHE: dict[str, Any] = {"prompt": "What is a KV cache?", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Served:
    return shared_server()


def without_id(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The answer without what differs from call to call, which is checked here."""
    assert value["id"].startswith(prefix) and len(value["id"]) == len(prefix) + 16
    assert isinstance(value["created"], int)
    return {key: item for key, item in value.items() if key not in ("id", "created")}


def test_an_answer_has_the_fields_of_openai_and_vllm(server: Served):
    answer = server.ask(PATH, CACHE)
    text = answer["choices"][0]["text"]
    assert text
    prompt_tokens = server.ask("/tokenize", {"prompt": CACHE["prompt"]})["count"]
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
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + 4,
            "completion_tokens": 4,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
        "kv_transfer_params": None,
    }


def test_a_stream_carries_the_same_text_in_chunks(server: Served):
    whole = server.ask(PATH, CACHE)["choices"][0]
    chunks = server.stream(PATH, CACHE)
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


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


def test_token_ids_are_a_prompt_and_come_back_if_asked_for(server: Served):
    tokens = server.ask("/tokenize", {"prompt": CACHE["prompt"]})["tokens"]
    plain = server.ask(PATH, CACHE)["choices"][0]
    choice = server.ask(PATH, {**CACHE, "prompt": tokens, "return_token_ids": True})["choices"][0]
    assert choice["text"] == plain["text"] and choice["prompt_token_ids"] == tokens
    assert server.ask("/detokenize", {"tokens": choice["token_ids"]})["prompt"] == plain["text"]
    chunks = server.stream(PATH, {**CACHE, "prompt": tokens, "return_token_ids": True})
    assert chunks[0]["choices"][0]["prompt_token_ids"] == tokens
    assert all(chunk["choices"][0]["prompt_token_ids"] is None for chunk in chunks[1:])
    assert chained(chunk["choices"][0]["token_ids"] for chunk in chunks) == choice["token_ids"]


def test_several_prompts_are_answered_in_their_order(server: Served):
    prompts = [CACHE["prompt"], "What is prefill?", "What is decode?"]
    single = [server.ask(PATH, {**CACHE, "prompt": prompt})["choices"][0]["text"] for prompt in prompts]
    body = {**CACHE, "prompt": prompts}
    answer = server.ask(PATH, body)
    assert [choice["text"] for choice in answer["choices"]] == single
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 12
    chunks = server.stream(PATH, body)
    assert [text_of(chunks, index) for index in range(3)] == single
    as_ids = [server.ask("/tokenize", {"prompt": prompt})["tokens"] for prompt in prompts]
    assert [c["text"] for c in server.ask(PATH, {**CACHE, "prompt": as_ids})["choices"]] == single


def test_n_outputs_of_several_prompts_are_numbered_prompt_by_prompt(server: Served):
    body = {"prompt": ["One", "Two"], "n": 2, "max_tokens": 5, "seed": 7, "temperature": 1.0}
    answer = server.ask(PATH, body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    chunks = server.stream(PATH, body)
    assert [text_of(chunks, index) for index in range(4)] == [choice["text"] for choice in answer["choices"]]


def test_usage_of_a_stream_comes_last_or_in_every_chunk(server: Served):
    usage = server.ask(PATH, CACHE)["usage"]
    chunks = server.stream(PATH, {**CACHE, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == usage
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.stream(PATH, {**CACHE, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 4 and chunks[-1]["usage"] == usage
    assert text_of(chunks) == server.ask(PATH, CACHE)["choices"][0]["text"]


def test_log_probabilities_have_four_lists_of_one_length(server: Served):
    choice = server.ask(PATH, {**CACHE, "logprobs": 2})["choices"][0]
    logprobs = choice["logprobs"]
    assert list(logprobs) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
    assert {len(values) for values in logprobs.values()} == {4}
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == [choice["text"].index(logprobs["tokens"][0]), *logprobs["text_offset"][1:]]
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == value == max(top.values()) and value <= 0 and len(top) == 2
    chunks = server.stream(PATH, {**CACHE, "logprobs": 2})
    joined = {key: chained(chunk["choices"][0]["logprobs"][key] for chunk in chunks) for key in logprobs}
    assert joined == logprobs


def test_log_probabilities_can_name_tokens_by_id(server: Served):
    body = {**CACHE, "logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = server.ask(PATH, body)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]


def test_echo_repeats_the_prompt_and_scores_it(server: Served):
    prompt = CACHE["prompt"]
    plain = server.ask(PATH, {**CACHE, "logprobs": 1})["choices"][0]
    for stream in (False, True):
        body = {**CACHE, "logprobs": 1, "echo": True}
        if stream:
            chunks = server.stream(PATH, body)
            text = text_of(chunks)
            tokens = chained(chunk["choices"][0]["logprobs"]["tokens"] for chunk in chunks)
            values = chained(chunk["choices"][0]["logprobs"]["token_logprobs"] for chunk in chunks)
        else:
            choice = server.ask(PATH, body)["choices"][0]
            text, tokens, values = choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
        assert text == prompt + plain["text"] == "".join(tokens)
        assert values[0] is None and all(value < 0 for value in values[1:])
        assert values[-4:] == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-4)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_echo_of_no_tokens_is_the_prompt_alone(server: Served, logprobs: int | None):
    body = {"prompt": ["One two three", "Four"], "max_tokens": 0, "echo": True, "logprobs": logprobs}
    answer = server.ask(PATH, body)
    assert [choice["text"] for choice in answer["choices"]] == ["One two three", "Four"]
    assert answer["usage"]["completion_tokens"] == 0
    if logprobs is not None:
        scored = answer["choices"][0]["logprobs"]
        assert "".join(scored["tokens"]) == "One two three" and scored["token_logprobs"][0] is None
    chunks = server.stream(PATH, body)
    assert [text_of(chunks, 0), text_of(chunks, 1)] == ["One two three", "Four"]


def test_prompt_logprobs_are_entries_by_token_id(server: Served):
    choice = server.ask(PATH, {**CACHE, "prompt_logprobs": 1, "return_token_ids": True})["choices"][0]
    scores = choice["prompt_logprobs"]
    assert scores[0] is None and len(scores) == len(choice["prompt_token_ids"])
    for token_id, entries in zip(choice["prompt_token_ids"][1:], scores[1:], strict=True):
        assert set(entries[str(token_id)]) == {"logprob", "rank", "decoded_token"}


def test_stop_reason_names_the_string_or_the_token(server: Served):
    free = server.ask(PATH, {**CACHE, "return_token_ids": True})["choices"][0]
    word = free["text"].strip()[1:3]
    stopped = server.ask(PATH, {**CACHE, "stop": [word, "never"]})["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["stop_reason"] == word and word not in stopped["text"]
    last = server.stream(PATH, {**CACHE, "stop": word})[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", word)
    token_id = free["token_ids"][1]
    stopped = server.ask(PATH, {**CACHE, "stop_token_ids": [token_id]})["choices"][0]
    assert stopped["stop_reason"] == token_id


def test_the_prompt_can_be_cut_to_its_last_or_first_tokens(server: Served):
    body = {"prompt": "one two three four five six", "max_tokens": 1, "return_token_ids": True}
    whole = server.ask(PATH, body)["choices"][0]["prompt_token_ids"]
    cut = server.ask(PATH, {**body, "truncate_prompt_tokens": 2})["choices"][0]
    assert cut["prompt_token_ids"] == whole[-2:]
    cut = server.ask(PATH, {**body, "truncate_prompt_tokens": 2, "truncation_side": "right"})["choices"][0]
    assert cut["prompt_token_ids"] == whole[:2]
    long = {**body, "prompt": "word " * 4000, "truncate_prompt_tokens": -1}
    assert server.ask(PATH, long)["usage"]["prompt_tokens"] == 2047


def test_a_beam_search_finds_at_least_what_greedy_search_finds(server: Served):
    body = {
        "prompt": "The capital of",
        "n": 3,
        "max_tokens": 6,
        "use_beam_search": True,
        "logprobs": 1,
        "temperature": 0,
    }
    beams = server.ask(PATH, body)["choices"]
    greedy = server.ask(PATH, {**body, "n": 1, "use_beam_search": False})["choices"][0]
    assert [beam["index"] for beam in beams] == [0, 1, 2] and len({beam["text"] for beam in beams}) == 3
    scores = [sum(beam["logprobs"]["token_logprobs"]) for beam in beams]
    lengths = [len(beam["logprobs"]["tokens"]) + 3 for beam in beams]
    greedy_score = sum(greedy["logprobs"]["token_logprobs"])
    assert scores[0] / lengths[0] >= greedy_score / (len(greedy["logprobs"]["tokens"]) + 3) - 1e-4


def test_the_length_penalty_of_a_beam_search_may_be_any_number(server: Served):
    body = {"prompt": "The capital of", "n": 2, "max_tokens": 6, "use_beam_search": True}
    for penalty in (-1e308, -2.0, 0.0, 2.0, 1e308):
        assert len(server.ask(PATH, {**body, "length_penalty": penalty})["choices"]) == 2


def test_defaults_are_those_of_the_generation_config_then_openai(server: Served):
    short = server.ask(PATH, {"prompt": "Count to one hundred: 1, 2, 3,", "ignore_eos": True})
    assert short["usage"]["completion_tokens"] == 16  # OpenAI's
    once, again = (server.ask(PATH, {"prompt": "Hello", "seed": 1})["choices"][0]["text"] for _ in range(2))
    assert once == again


def test_every_stream_event_is_one_line_of_json_after_data(server: Served):
    lines = server.stream_lines(PATH, CACHE)
    assert all(line == "" or line.startswith("data: ") for line in lines)
    assert lines[0].startswith("data: {") and lines[-3:] == ["data: [DONE]", "", ""]


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_of_random_bytes_is_the_whole_text(server: Served, seed: int):
    sampling = {"temperature": 2.0, "top_p": 1.0, "top_k": 0, "seed": seed, "ignore_eos": True, "max_tokens": 120}
    body = {"prompt": "你好，世界🙂", **sampling}
    whole = server.ask(PATH, body)["choices"][0]["text"]
    assert not whole.isascii()
    chunks = server.stream(PATH, {**body, "stream_interval": 1 + seed})
    assert text_of(chunks) == whole
    if seed:
        assert len(chunks) < 100
