"""``nanovllm bench serve``: arrivals, what is sent, what is measured, and the command."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import (
    FakeAnswer,
    FakeRequest,
    FakeServer,
    chat_events,
    completion_events,
    event,
    events,
    json_answer,
)
from tiny_tokenizers import qwen

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.entrypoints.bench.arrivals import RampUp, arrival_times
from nanovllm.entrypoints.bench.backends import RequestResult
from nanovllm.entrypoints.bench.datasets import SampleRequest, as_text, random_requests, text_token_ids
from nanovllm.entrypoints.bench.serve import Target, measure_serving, send, wait_until_ready
from nanovllm.entrypoints.cli.main import main
from nanovllm.errors import ParameterError

REQUEST = SampleRequest("Hello", 3, 5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen(tmp_path_factory.mktemp("tokenizer"))


def ask(server: FakeServer, **settings: Any) -> RequestResult:
    """One request, measured."""

    async def run() -> RequestResult:
        target = Target(server.url, "m", **settings)
        client = target.client()
        try:
            return await send(client, target, REQUEST, "7")
        finally:
            client.close()

    return asyncio.run(run())


# -- arrivals ----------------------------------------------------------------------------------------------------------


def test_an_infinite_rate_sends_everything_at_once():
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]


def test_intervals_are_exponential_and_the_rate_is_the_one_asked_for():
    times = arrival_times(4000, 8.0, seed=1)
    assert times[-1] == pytest.approx(500)
    intervals = np.diff([0.0, *times])
    assert (intervals >= 0).all()
    assert intervals.std() == pytest.approx(intervals.mean(), rel=0.08)  # as of an exponential distribution
    assert np.mean(intervals > 0.125) == pytest.approx(math.exp(-1), abs=0.03)


@pytest.mark.parametrize(("burstiness", "deviation"), [(0.25, 2.0), (4.0, 0.5), (math.inf, 0.0)])
def test_burstiness_is_the_shape_of_a_gamma_distribution(burstiness: float, deviation: float):
    intervals = np.diff(arrival_times(4000, 1.0, burstiness=burstiness, seed=2))
    assert intervals.std() / intervals.mean() == pytest.approx(deviation, rel=0.12, abs=1e-9)


@pytest.mark.parametrize(("strategy", "middle"), [("linear", 50.5), ("exponential", 10.0)])
def test_a_ramp_goes_from_one_rate_to_another(strategy: str, middle: float):
    ramp = RampUp(strategy, 1.0, 100.0)
    intervals = np.diff([0.0, *arrival_times(101, math.inf, burstiness=math.inf, ramp_up=ramp)])
    assert [1 / intervals[0], 1 / intervals[50], 1 / intervals[100]] == pytest.approx([1.0, middle, 100.0])


def test_the_same_seed_gives_the_same_arrivals():
    assert arrival_times(9, 2.0, seed=3) == arrival_times(9, 2.0, seed=3) != arrival_times(9, 2.0, seed=4)


@pytest.mark.parametrize("settings", [{"request_rate": 0.0}, {"request_rate": 1.0, "burstiness": -1.0}])
def test_rates_that_make_no_sense_are_refused(settings: dict[str, float]):
    with pytest.raises(ParameterError, match="must be positive"):
        arrival_times(3, **settings)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_random_text_has_the_tokens_it_claims_and_nearly_those_asked_for(tokenizer: Path):
    loaded = Tokenizer.load(tokenizer)
    ids = text_token_ids(loaded)
    assert not set(ids) & set(loaded.all_special_ids)
    requests = as_text(random_requests(ids, 20, 30, 4, seed=1), loaded, ids, seed=1)
    assert all(len(loaded.encode(str(request.prompt))) == request.prompt_len for request in requests)
    assert np.mean([abs(request.prompt_len - 30) for request in requests]) < 2


# -- one request -------------------------------------------------------------------------------------------------------


def test_a_completion_is_timed_and_its_tokens_are_those_of_the_servers_usage():
    with FakeServer(lambda _: completion_events("a", "b", "", "c", prompt_tokens=9, completion_tokens=8)) as server:
        result = ask(server, extra_body={"ignore_eos": True, "max_tokens": 6}, request_id_prefix="x-")
        posted = server.requests[0]
    assert (result.success, result.text, result.error) == (True, "abc", "")
    assert (result.prompt_len, result.output_len, len(result.itls)) == (9, 8, 3)
    assert 0 < result.ttft <= result.latency
    assert result.ttft + sum(result.itls) == pytest.approx(result.latency)
    assert posted.path == "/v1/completions"
    assert posted.headers["x-request-id"] == "x-7"
    assert posted.json() == {
        "model": "m", "prompt": "Hello", "max_tokens": 6, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }  # fmt: skip


def test_the_role_of_a_chat_is_not_its_first_token():
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    token = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]}
    with FakeServer(lambda _: events(role, token, token, delay=0.2)) as server:
        result = ask(server, backend="openai-chat")
        posted = server.requests[0].json()
    assert result.ttft > 0.2
    assert len(result.itls) == 1
    assert (posted["messages"], posted["max_completion_tokens"]) == ([{"role": "user", "content": "Hello"}], 5)


def test_reasoning_is_part_of_what_a_chat_generates():
    deltas = [{"reasoning": "hm", "reasoning_content": "hm"}, {"content": "yes"}]
    with FakeServer(lambda _: events(*({"choices": [{"delta": delta}]} for delta in deltas))) as server:
        assert ask(server, backend="openai-chat").text == "hmyes"


def test_embeddings_are_timed_as_a_whole():
    answer = json_answer({"data": [{"embedding": [1.0]}], "usage": {"prompt_tokens": 4, "total_tokens": 4}})
    with FakeServer(lambda _: answer) as server:
        result = ask(server, backend="openai-embeddings")
        assert server.requests[0].json() == {"model": "m", "input": "Hello"}
    assert (result.success, result.prompt_len, result.output_len) == (True, 4, 0)
    assert result.latency > 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda: json_answer({"error": {"message": "no such\nmodel", "code": 404}}, 404), "HTTP 404: no such model"),
        (lambda: json_answer({"error": "Unauthorized"}, 401), "HTTP 401: Unauthorized"),
        (lambda: FakeAnswer(b"<h1>Bad gateway</h1>", 502), "HTTP 502: <h1>Bad gateway</h1>"),
        (lambda: events({"error": {"message": "engine died"}}), "engine died"),
        (lambda: events(), "without a piece of an answer"),
        (lambda: events("{no json"), "Expecting property name"),
        (lambda: FakeAnswer(completion_events("a").body, cut=True), "lost before the end"),
    ],
)
def test_what_goes_wrong_is_noted(answer: Any, message: str):
    with FakeServer(lambda _: answer()) as server:
        result = ask(server)
    assert not result.success
    assert message in result.error


def test_a_server_that_is_not_there_is_noted():
    with FakeServer(lambda _: completion_events("a")) as server:
        pass
    assert "onnect" in ask(server).error


# -- many requests -----------------------------------------------------------------------------------------------------


def test_no_more_requests_are_under_way_than_allowed_and_all_are_answered():
    running, most = 0, 0

    def answer(_: FakeRequest) -> FakeAnswer:
        async def pieces() -> AsyncIterator[bytes]:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.02)
            running -= 1
            yield event({"choices": [{"text": "x"}]})

        return FakeAnswer(pieces())

    with FakeServer(answer) as server:
        results, duration = asyncio.run(
            measure_serving(Target(server.url, "m"), [REQUEST] * 9, [0.0] * 9, max_concurrency=3, use_tqdm=False)
        )
        assert server.num_connections == 3
    assert most == 3
    assert all(result.success for result in results)
    assert duration > 3 * 0.02
    assert results[0].queue_time < results[8].queue_time


def test_requests_are_sent_at_their_times():
    times = [0.0, 0.05, 0.2]
    with FakeServer(lambda _: completion_events("x")) as server:
        results, _ = asyncio.run(measure_serving(Target(server.url, "m"), [REQUEST] * 3, times, use_tqdm=False))
    starts = [result.start_time - results[0].start_time for result in results]
    assert all(start >= time - 0.01 for start, time in zip(starts, times, strict=True))


def test_the_ready_check_waits_for_an_answer_and_gives_up_at_last():
    answers = iter([json_answer({}, 503), json_answer({}, 503), completion_events("x")])
    with FakeServer(lambda _: next(answers)) as server:
        assert asyncio.run(wait_until_ready(Target(server.url, "m"), REQUEST, 30.0)) is None
    with FakeServer(lambda _: json_answer({"error": "loading"}, 503)) as server:
        assert asyncio.run(wait_until_ready(Target(server.url, "m"), REQUEST, 0.3)) == "HTTP 503: loading"
        assert len(server.requests) > 1


# -- the command -------------------------------------------------------------------------------------------------------


def serve(request: FakeRequest) -> FakeAnswer:
    """A server with one model."""
    if request.path == "/v1/models":
        return json_answer({"data": [{"id": "tiny", "root": request.headers["x-root"]}]})
    chat = request.path == "/v1/chat/completions"
    return chat_events("Hi", "!") if chat else completion_events("a", "b", prompt_tokens=12)


def run_bench(server: FakeServer, tokenizer: Path, *options: str) -> int:
    common = ["--port", str(server.port), "--header", f"x-root={tokenizer}", "--random-input-len", "12"]
    return main(["bench", "serve", *common, "--random-output-len", "2", "--num-prompts", "5", *options])


def test_the_command_finds_the_model_measures_and_writes_a_file(
    tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    options = ["--save-result", "--result-dir", str(tmp_path), "--metadata", "tp=1", "--max-concurrency", "2"]
    with FakeServer(serve) as server:
        assert run_bench(server, tokenizer, *options, "--ignore-eos", "--num-warmups", "2", "--temperature", "0") == 0
        posts = [request for request in server.requests if request.method == "POST"]
    assert len(posts) == 7
    assert all(request.headers["authorization"] == "Bearer sk-1" for request in server.requests)
    assert {key: posts[0].json()[key] for key in ("model", "max_tokens", "ignore_eos", "temperature")} == {
        "model": "tiny", "max_tokens": 2, "ignore_eos": True, "temperature": 0.0
    }  # fmt: skip
    output, errors = capfd.readouterr()
    assert "Warming up with 2 requests..." in output
    assert (
        "Traffic request rate: inf\nBurstiness factor: 1.0 (Poisson process)\nMaximum request concurrency: 2\n"
        in output
    )
    assert re.search(r"^Total input tokens: {21} 60 {8}$", output, re.MULTILINE)
    assert "WARNING" not in errors
    [file] = tmp_path.iterdir()
    assert re.fullmatch(r"openai-infqps-concurrency2-tiny-\d{8}-\d{6}\.json", file.name)
    written = json.loads(file.read_text())
    assert list(written)[:12] == [
        "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "tp", "request_rate",
        "burstiness", "max_concurrency", "duration",
    ]  # fmt: skip
    assert (written["request_rate"], written["completed"], written["tokenizer_id"]) == ("inf", 5, str(tokenizer))


def test_results_are_appended_and_named_as_asked(tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    options = ["--model", "served", "--tokenizer", str(tokenizer), "--result-dir", str(tmp_path / "new")]
    options += ["--append-result", "--result-filename", "all.json", "--backend", "openai-chat", "--save-detailed"]
    options += ["--chat-template-kwargs.enable_thinking", "false"]
    with FakeServer(serve) as server:
        assert run_bench(server, tokenizer, *options, "--request-rate", "200", "--goodput", "ttft:9000") == 0
        assert run_bench(server, tokenizer, *options, "--extra-body.top_k", "5", "--served-model-name", "other") == 0
        last = server.requests[-1].json()
    assert (last["model"], last["top_k"]) == ("other", 5)
    assert last["chat_template_kwargs"] == {"enable_thinking": False}
    first, second = map(json.loads, (tmp_path / "new" / "all.json").read_text().splitlines())
    assert (first["request_rate"], second["request_rate"]) == (200.0, "inf")
    assert first["generated_texts"] == ["Hi!"] * 5
    assert first["request_goodput"] == pytest.approx(first["request_throughput"])
    assert "WARNING: no temperature is sent" in capfd.readouterr().err


def test_failures_are_counted_and_shown(tokenizer: Path, capfd: pytest.CaptureFixture[str]):
    def answer(request: FakeRequest) -> FakeAnswer:
        if request.headers.get("x-request-id", "").endswith("3"):
            return completion_events("ok")
        return serve(request) if request.method == "GET" else json_answer({"error": {"message": "full"}}, 503)

    with FakeServer(answer) as server:
        assert run_bench(server, tokenizer) == 0
        output, errors = capfd.readouterr()
        assert re.search(r"Successful requests: +1 *\nFailed requests: +4 ", output)
        assert errors.count("HTTP 503: full") == 4
        assert run_bench(server, tokenizer, "--num-prompts", "2") == 1  # nothing was answered


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--goodput", "ttft"], "--goodput ttft: give ttft:MS, tpot:MS, e2el:MS"),
        (["--goodput", "itl:5"], "--goodput itl:5: give"),
        (["--goodput", "ttft:-1"], "a limit is not negative"),
        (["--percentile-metrics", "ttft,tpto"], "there is no metric 'tpto'; did you mean tpot?"),
        (["--metric-percentiles", "101"], "a percentage is from 0 to 100"),
        (["--metadata", "x"], "--metadata x: give KEY=VALUE"),
        (["--ramp-up-strategy", "linear"], "go together"),
        (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "2", "--request-rate", "3"],
         "contradict each other"),
        (["--dataset-name", "sharegpt"], "needs --dataset-path"),
        (["--base-url", "nowhere"], "--base-url: 'nowhere' is not a URL"),
        (["--chat-template-kwargs.x", "1"], "--chat-template-kwargs is for --backend openai-chat, not openai"),
        (["--request-rate", "0"], "must be positive (parameter=request_rate"),
        (["--base-url", "http://127.0.0.1:9"], "is it running?"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: list[str], message: str, capfd: pytest.CaptureFixture[str]):
    assert main(["bench", "serve", *options]) == 2
    assert message in capfd.readouterr().err


def test_a_sharegpt_file_is_sent(tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file = tmp_path / "sharegpt.json"
    turns = [{"value": f"Question number {number} of the file?"} for number in range(2)]
    file.write_text(json.dumps([{"conversations": turns}]))
    options = ["--dataset-path", str(file), "--sharegpt-output-len", "4", "--seed", "1"]
    with FakeServer(serve) as server:
        assert main(["bench", "serve", "--port", str(server.port), "--header", f"x-root={tokenizer}", *options,
                     "--num-prompts", "3"]) == 0  # fmt: skip
        posts = [request.json() for request in server.requests if request.method == "POST"]
    assert [(post["prompt"], post["max_tokens"]) for post in posts] == [("Question number 0 of the file?", 4)] * 3
