"""Our own clients against our own server: ``bench serve``, ``chat --url`` and ``complete --url``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from serving import shared_server

from nanovllm.entrypoints.cli.main import main


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("backend", ["openai", "openai-chat", "openai-embeddings"])
def test_bench_serve_measures_the_server(backend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    options = ["--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "7", "--max-concurrency", "3"]
    options += ["--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    options += ["--backend", backend, "--temperature", "1", "--percentile-metrics", "ttft,tpot,itl,e2el"]
    sampling = ["--ignore-eos"] if backend != "openai-embeddings" else []
    if not sampling:  # fields of sampling are not for embeddings
        options[options.index("--temperature") : options.index("--temperature") + 2] = []
    server = shared_server("demo")
    assert main(["bench", "serve", "--port", str(server.port), *options, *sampling]) == 0
    written = json.loads((tmp_path / "result.json").read_text())
    assert (written["completed"], written["failed"], written["model_id"]) == (6, 0, "demo")
    assert written["total_input_tokens"] >= 6 * 19
    if sampling:
        assert written["output_lens"] == [7] * 6
        assert all(len(itls) <= 6 for itls in written["itls"])
        assert 0 < written["mean_ttft_ms"] <= written["mean_e2el_ms"]
    assert "Maximum request concurrency:             3" in capfd.readouterr().out


def test_chat_and_complete_on_the_server_say_what_they_say_here(capfd: pytest.CaptureFixture[str]):
    server = shared_server("demo")
    for command, text in (("chat", "What is paged attention?"), ("complete", "The capital of France is")):
        options = ["-q", text, "--temperature", "0", "--max-tokens", "24", "--stats"]
        assert main([command, "--url", server.url + "/v1", *options]) == 0
        remote = capfd.readouterr()
        assert main([command, *options, "--kv-cache-memory-bytes", "16M"]) == 0
        here = capfd.readouterr()
        assert remote.out == here.out != "\n"
        counts = [re.findall(r" s, (\d+ tokens; prompt \d+ tokens)", stats) for stats in (remote.err, here.err)]
        assert counts[0] == counts[1] != []


def test_a_refusal_of_the_server_is_one_line(capfd: pytest.CaptureFixture[str]):
    server = shared_server("demo")
    assert main(["chat", "--url", server.url + "/v1", "-q", "x " * 5000]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("nanovllm: error: HTTP 400: ") and "maximum context length" in line
