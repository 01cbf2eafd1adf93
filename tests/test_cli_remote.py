"""``nanovllm chat --url`` and ``nanovllm complete``: what is sent to a server, what is shown, and what can go wrong."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeAnswer, FakeRequest, FakeServer, chat_events, completion_events, event, events, json_answer
from pseudo_terminal import PseudoTerminal
from tiny_models import make_checkpoint
from tiny_tokenizers import qwen

import nanovllm
from nanovllm.entrypoints.cli.main import main

ROOT = Path(nanovllm.__file__).parents[1]
MODELS = json_answer({"data": [{"id": "first", "max_model_len": 64}, {"id": "second"}]})


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def server_with(answer: Any) -> FakeServer:
    """A server that answers everything but the list of models with ``answer(request)``."""
    return FakeServer(lambda request: MODELS if request.path == "/v1/models" else answer(request))


def posts(server: FakeServer) -> list[Any]:
    return [request.json() for request in server.requests if request.method == "POST"]


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


# -- chat --------------------------------------------------------------------------------------------------------------


def test_a_message_is_answered_by_the_servers_first_model(capfd: pytest.CaptureFixture[str]):
    with server_with(lambda _: chat_events("Hel", "lo ü")) as server:
        options = ["--system-prompt", "Be brief.", "--temperature", "0.5", "--stop", "x", "--api-key", "sk-1"]
        assert main(["chat", "--url", server.url + "/v1/", "-q", "Hi?", *options, "--stats"]) == 0
        assert all(request.headers["authorization"] == "Bearer sk-1" for request in server.requests)
        assert posts(server) == [
            {
                "model": "first",
                "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}],
                "temperature": 0.5,
                "stop": ["x"],
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ]
    output, errors = capfd.readouterr()
    assert output == "Hello ü\n"
    assert "2 tokens; prompt 3 tokens]" in errors


def test_each_message_brings_the_conversation_so_far(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-2")
    pipe(monkeypatch, "one\ntwo\n/clear\nthree\n")
    answers = iter("ABC")
    with server_with(lambda _: chat_events(next(answers))) as server:
        thinking = ["--chat-template-kwargs.enable_thinking", "false"]
        assert main(["chat", "--url", server.url + "/v1", "--model-name", "second", *thinking]) == 0
        sent = posts(server)
        assert server.requests[-1].headers["authorization"] == "Bearer sk-2"
    assert [[message["content"] for message in body["messages"]] for body in sent] == [
        ["one"], ["one", "A", "two"], ["three"]
    ]  # fmt: skip
    assert sent[0]["model"] == "second"
    assert sent[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert capfd.readouterr().out == "A\nB\nC\n"


def test_reasoning_is_shown_beside_the_answer(capfd: pytest.CaptureFixture[str]):
    deltas = [{"reasoning": "hm ", "reasoning_content": "hm "}, {"reasoning": "so"}, {"content": "Yes."}]
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    with server_with(lambda _: events(*chunks, {"choices": [{"delta": {}, "finish_reason": "stop"}]})) as server:
        assert main(["chat", "--url", server.url + "/v1", "-q", "?"]) == 0
    assert capfd.readouterr() == ("Yes.\n", "hm so\n")


def test_a_conversation_that_outgrows_the_context_loses_its_oldest_turns(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    pipe(monkeypatch, "a\nb\nc\nd\n")

    def answer(request: FakeRequest) -> FakeAnswer:
        if len(request.json()["messages"]) > 5:
            return json_answer({"error": {"message": "This model's maximum context length is 64 tokens."}}, 400)
        return chat_events("x")

    with server_with(answer) as server:
        assert main(["chat", "--url", server.url + "/v1"]) == 0
        sent = [[message["content"] for message in body["messages"]] for body in posts(server)]
    assert sent[-2:] == [["a", "x", "b", "x", "c", "x", "d"], ["b", "x", "c", "x", "d"]]
    assert "1 of the oldest turns are forgotten" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (json_answer({"error": {"message": "temperature is\nwrong"}}, 400), "HTTP 400: temperature is wrong"),
        (json_answer({"error": "Unauthorized"}, 401), "HTTP 401: Unauthorized"),
        (FakeAnswer(b"oops", 502), "HTTP 502: oops"),
        (json_answer({"error": {"message": "the maximum context length is 64"}}, 400), "maximum context length is 64"),
    ],
)
def test_what_the_server_refuses_is_one_line(answer: FakeAnswer, message: str, capfd: pytest.CaptureFixture[str]):
    with server_with(lambda _: answer) as server:
        assert main(["chat", "--url", server.url + "/v1", "-q", "Hi"]) == 2
    errors = capfd.readouterr().err
    assert message in errors and errors.count("nanovllm: error:") == 1 and len(errors.splitlines()) == 1


def test_a_stream_that_breaks_off_is_one_line(capfd: pytest.CaptureFixture[str]):
    with server_with(lambda _: FakeAnswer(chat_events("a").body, cut=True)) as server:
        assert main(["chat", "--url", server.url + "/v1", "-q", "Hi"]) == 2
    assert "nanovllm: error: --url" in capfd.readouterr().err
    with server_with(lambda _: events({"error": {"message": "the engine died"}})) as server:
        assert main(["chat", "--url", server.url + "/v1", "-q", "Hi"]) == 2
    assert "nanovllm: error: the engine died" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "http://127.0.0.1:9/v1"], "is the server running?"),
        (["--url", "nowhere"], "--url nowhere"),
        (["--url", "URL", "--model-name", "third"], "has no model 'third', but first, second"),
        (["--url", "URL/wrong"], "HTTP 404"),
        (["--url", "URL", "--model", "demo"], "--model concerns an engine in this process, and --url asks a server; "),
        (["--url", "URL", "--max-num-seqs", "4"], "--max-num-seqs concerns an engine in this process"),
        (["--model-name", "x"], "--model-name belongs to a server; give --url as well"),
        (["--api-key", "x"], "--api-key belongs to a server"),
        (["--url", "URL", "--temperature", "-1"], "temperature"),
    ],
)
@pytest.mark.parametrize("command", ["chat", "complete"])
def test_options_that_make_no_sense_are_refused(
    command: str, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
):
    with server_with(lambda _: json_answer({"error": "Not Found"}, 404)) as server:
        words = [word.replace("URL", server.url + "/v1") for word in options]
        assert main([command, *words, "-q", "Hi"]) == 2
    assert message in capfd.readouterr().err


def test_a_server_that_is_no_such_api_is_refused(capfd: pytest.CaptureFixture[str]):
    with FakeServer(lambda _: FakeAnswer(b"<html>")) as server:
        assert main(["chat", "--url", server.url, "-q", "Hi"]) == 2
    assert "not an OpenAI-compatible API; does the path end in /v1?" in capfd.readouterr().err


# -- complete ----------------------------------------------------------------------------------------------------------


def test_each_line_is_continued_by_itself(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    pipe(monkeypatch, "one\n\ntwo\n")
    with server_with(lambda request: completion_events(" and ", request.json()["prompt"].upper())) as server:
        assert main(["complete", "--url", server.url + "/v1", "--seed", "3"]) == 0
        sent = posts(server)
    assert [(body["prompt"], body["max_tokens"], body["seed"]) for body in sent] == [("one", 256, 3), ("two", 256, 3)]
    assert capfd.readouterr().out == " and ONE\n and TWO\n"


def test_a_text_is_continued_in_this_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    make_checkpoint(tmp_path, "qwen3", vocab_size=337, eos_token_id=332)
    options = ["--model", str(qwen(tmp_path)), "--kv-cache-memory-bytes", "16M", "--max-tokens", "5", "--ignore-eos"]
    assert main(["complete", "-q", "Once", "--temperature", "0", "--stats", *options]) == 0
    output, errors = capfd.readouterr()
    assert "5 tokens; prompt" in errors
    assert main(["generate", "Once", "--raw", "--temperature", "0", *options]) == 0
    assert capfd.readouterr().out == output


# -- at a terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_ctrl_c_stops_an_answer_of_the_server_and_not_the_program(command: str, tmp_path: Path):
    def answer(request: FakeRequest) -> FakeAnswer:
        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield event({"choices": [{"text": "tick ", "delta": {"content": "tick "}, "finish_reason": None}]})
                await asyncio.sleep(0.01)

        body = request.json()
        if (body["messages"][-1]["content"] if command == "chat" else body["prompt"]) == "go on":
            return FakeAnswer(endless())
        return chat_events("bye") if command == "chat" else completion_events("bye")

    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    with server_with(answer) as server:
        words = [sys.executable, "-m", "nanovllm", command, "--url", server.url + "/v1"]
        with PseudoTerminal(words, env) as terminal:
            at = terminal.wait_for_screen("> ")
            terminal.type("go on\n")
            at = terminal.wait_for_screen("tick tick ", at)
            terminal.type("\x03")
            terminal.wait_for_error("(stopped)")
            at = terminal.wait_for_screen("> ", at)
            terminal.type("end\n")
            at = terminal.wait_for_screen("bye", at)
            terminal.wait_for_screen("> ", at)
            terminal.type("\x04")
            assert terminal.wait() == 0
