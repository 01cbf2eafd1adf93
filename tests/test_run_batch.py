"""``nanovllm run-batch``: every line of the input has its line in the output, whatever is in it."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeAnswer, FakeRequest, FakeServer

from nanovllm.entrypoints.cli import run_batch
from nanovllm.entrypoints.cli.main import main

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(custom_id: Any, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"max_tokens": 4, "temperature": 0, **body}}


def chat(custom_id: str, text: str = "Hello", **body: Any) -> dict[str, Any]:
    return line(custom_id, CHAT, messages=[{"role": "user", "content": text}], **body)


def write(file: Path, *lines: Any) -> Path:
    """Objects as JSON, strings as they are."""
    file.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return file


def run(source: Path | str, target: Path | str, *options: str) -> int:
    engine = ["--model", "demo", "--max-model-len", "256", "--kv-cache-memory-bytes", "16M"]
    return main(["run-batch", "-i", str(source), "-o", str(target), *engine, *options])


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in file.read_text().splitlines()]


def test_requests_are_answered_in_order_and_bad_lines_become_errors(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    lines = [
        chat("long", max_tokens=40, ignore_eos=True),
        "",
        line("text", TEXT, prompt="Once upon", n=2, temperature=1.0, seed=1),
        "{broken",
        "[1]",
        chat("model", model="nope"),
        line("value", TEXT, prompt="x", temperature=-1),
        line("url", "/v1/elsewhere"),
        {**chat("method"), "method": "GET"},
        {"custom_id": "body", "url": TEXT, "body": None},
        line(7, TEXT, prompt="x"),
        chat("stream", stream=True),
        line("embed", "/v1/embeddings", input="Hello"),
        {"custom_id": "last", "url": CHAT, "body": {"messages": [{"role": "user", "content": "Bye"}]}},
    ]
    target = tmp_path / "answers.jsonl"
    assert run(write(tmp_path / "requests.jsonl", *lines), target, "--max-concurrency", "3") == 0
    answers = read(target)
    assert [answer["custom_id"] for answer in answers] == [
        "long", "text", None, None, "model", "value", "url", "method", "body", 7, "stream", "embed", "last"
    ]  # fmt: skip
    by_id = {answer["custom_id"]: answer for answer in answers}
    assert all(list(answer) == ["id", "custom_id", "response", "error"] for answer in answers)
    assert all(re.fullmatch(r"nanovllm-[0-9a-f]{32}", answer["id"]) for answer in answers)
    assert len({answer["response"]["request_id"] for answer in answers}) == len(answers)
    good = by_id["long"]
    assert (good["error"], good["response"]["status_code"]) == (None, 200)
    assert good["response"]["body"]["object"] == "chat.completion"
    assert good["response"]["body"]["usage"]["completion_tokens"] == 40
    assert len(by_id["text"]["response"]["body"]["choices"]) == 2
    assert by_id["last"]["response"]["status_code"] == 200
    assert len(by_id["embed"]["response"]["body"]["data"][0]["embedding"]) > 1
    for custom_id, status, message in [
        ("model", 404, "does not exist"),
        ("value", 400, "temperature"),
        ("url", 400, "url must be one of"),
        ("method", 400, "method must be POST, not 'GET'"),
        ("body", 400, "body must be a JSON object"),
        (7, 400, "custom_id must be a string"),
        ("stream", 400, "leave out stream"),
    ]:
        answer = by_id[custom_id]
        assert answer["response"]["status_code"] == status
        assert answer["response"]["body"] is None
        assert message in answer["error"]["error"]["message"]
    assert "not a request: Expecting property name" in answers[2]["error"]["error"]["message"]
    assert not (tmp_path / "answers.jsonl.part").exists()
    assert "13 requests, 9 of them with an error\n" in capfd.readouterr().err


def test_standard_input_and_output_are_files_too(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    data = "\ufeff" + json.dumps(chat("a")) + "\r\n" + json.dumps(chat("b"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    assert run("-", "-") == 0
    output = capfd.readouterr().out
    assert [json.loads(each)["custom_id"] for each in output.splitlines()] == ["a", "b"]


def test_files_come_from_and_go_to_urls(capfd: pytest.CaptureFixture[str]):
    def answer(request: FakeRequest) -> FakeAnswer:
        if request.method == "GET":
            return FakeAnswer((json.dumps(chat("far")) + "\n").encode())
        return FakeAnswer(b"", 200 if request.path == "/out" else 403)

    with FakeServer(answer) as server:
        assert run(server.url + "/in", server.url + "/out") == 0
        assert server.requests[-1].method == "PUT"
        assert server.requests[-1].json()["custom_id"] == "far"
        assert run(server.url + "/in", server.url + "/closed") == 2
    message = capfd.readouterr().err
    kept = re.search(r"403 .*; the answers are in (\S+\.part)", message)
    assert kept is not None, message
    assert json.loads(Path(kept[1]).read_text())["custom_id"] == "far"
    Path(kept[1]).unlink()


def test_what_is_there_stays_when_the_run_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    answer, count = run_batch._answer, 0

    async def interrupted(client: Any, line: bytes) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count > 2:
            raise KeyboardInterrupt
        return await answer(client, line)

    monkeypatch.setattr(run_batch, "_answer", interrupted)
    target = tmp_path / "answers.jsonl"
    target.write_text("before")
    source = write(tmp_path / "requests.jsonl", *(chat(str(number)) for number in range(5)))
    assert run(source, target, "--max-concurrency", "1") == 130
    assert target.read_text() == "before"
    assert [each["custom_id"] for each in read(tmp_path / "answers.jsonl.part")] == ["0", "1"]
    assert "2 answers are in" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("nowhere.jsonl", "out.jsonl", "--input-file nowhere.jsonl: No such file"),
        ("http://127.0.0.1:9/in", "out.jsonl", "--input-file http://127.0.0.1:9/in: "),
        ("in.jsonl", "no/folder/out.jsonl", "--output-file no/folder/out.jsonl: No such file"),
        ("in.jsonl", ".", "--output-file .: is a folder"),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_a_model_is_loaded(
    source: str, target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", chat("a"))
    assert main(["run-batch", "-i", source, "-o", target, "--model", "nowhere"]) == 2
    assert message in capfd.readouterr().err
