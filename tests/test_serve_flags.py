"""The options of ``serve``: ours, vLLM's others, files, and what the environment says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from serving import served
from test_import_time import HEAVY, RUN_COMMAND, modules_loaded_by

from nanovllm.entrypoints.cli import vllm_flags
from nanovllm.entrypoints.cli.main import main, make_parser
from nanovllm.entrypoints.cli.serve_flags import SERVE_HELP, serve_args
from nanovllm.entrypoints.cli.vllm_flags import judge_vllm_flags
from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.errors import ParameterError


def parse(*options: str) -> Any:
    return make_parser(["serve"]).parse_args(["serve", *options])


def test_every_setting_of_the_server_has_an_option():
    described = [name for group in SERVE_HELP.values() for name in group]
    assert sorted(described) == sorted(ServeArgs.__dataclass_fields__)


def test_values_arrive_as_their_types():
    args = serve_args(
        parse(
            "demo", "--port", "8k", "--api-key", "a", "b", "--api_key", "c", "--served-model-name", "x", "y",
            "--allowed-origins", '["*"]', "--no-reasoning-content-field", "--shutdown-timeout", "2.5",
            "--default-chat-template-kwargs.enable_thinking", "true", "--sse-keep-alive-interval=3",
        )
    )  # fmt: skip
    assert args.port == 8000 and args.api_key == ["a", "b", "c"] and args.served_model_name == ["x", "y"]
    assert args.allowed_origins == ["*"] and args.reasoning_content_field is False and args.shutdown_timeout == 2.5
    assert args.default_chat_template_kwargs == {"enable_thinking": True} and args.sse_keep_alive_interval == 3.0


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "70000"],
        ["--shutdown-timeout", "-1"],
        ["--stream-interval", "0"],
        ["--enable-auto-tool-choice"],
        ["--max-engine-restarts", "-1"],
        ["--tool-call-parser", "nope"],
    ],
)
def test_values_that_make_no_sense_are_refused_before_anything_starts(options: list[str]):
    with pytest.raises(ParameterError):
        serve_args(parse(*options))


def test_options_without_meaning_are_taken_with_a_warning_that_says_why(caplog: pytest.LogCaptureFixture):
    options = []
    for name in vllm_flags.TAKEN_SWITCHES:
        options += ["--" + name.replace("_", "-")]
    for name in vllm_flags.TAKEN_VALUES:
        options += ["--" + name, "1"]
    options += ["--compilation-config.mode", "3", "-sc", '{"method": "ngram"}']
    with caplog.at_level(logging.WARNING, "nanovllm"):
        judge_vllm_flags(parse("demo", *options))
    assert len(caplog.records) == len(vllm_flags.TAKEN_SWITCHES) + len(vllm_flags.TAKEN_VALUES) + 2
    assert all("has no effect: " in record.message for record in caplog.records)


@pytest.mark.parametrize("name", [*vllm_flags.REFUSED_SWITCHES, *vllm_flags.REFUSED_VALUES])
def test_options_a_server_would_be_wrong_without_are_refused(name: str):
    value = [] if name in vllm_flags.REFUSED_SWITCHES else ["something"]
    with pytest.raises(ParameterError, match="not supported by this version: ") as found:
        judge_vllm_flags(parse("demo", "--" + name, *value))
    assert found.value.parameter == name


@pytest.mark.parametrize("name", [name for name, (_, harmless) in vllm_flags.REFUSED_VALUES.items() if harmless])
def test_unless_their_value_asks_for_nothing(name: str):
    for value in vllm_flags.REFUSED_VALUES[name][1]:
        judge_vllm_flags(parse("demo", "--" + name, value))


def test_an_unknown_option_is_an_error_that_suggests(capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "--prot", "1"]) == 2
    assert "did you mean --port" in capsys.readouterr().err


def test_a_file_may_hold_the_options(tmp_path: Path):
    file = tmp_path / "server.yaml"
    file.write_text(
        "model: demo\nserved-model-name: [one, two]\nmax-model-len: 512\nenable-prompt-tokens-details: true\n"
        "api-key: from-file\nresponse-role: narrator\nmax-logprobs: 3\n"
        "override-generation-config:\n  max_new_tokens: 7\n  temperature: 0.0\n"
    )
    with served("--config", str(file), "--api-key", "from-line", "--return-tokens-as-token-ids", "-O0") as server:
        key = {"x-api-key": "from-line"}
        cards = server.client.get("/v1/models", headers=key).json()["data"]
        assert [card["id"] for card in cards] == ["one", "two"] and cards[0]["max_model_len"] == 512
        assert server.client.get("/v1/models", headers={"x-api-key": "from-file"}).status_code == 401
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "logprobs": True}
        answer = server.ask("/v1/chat/completions", body, headers=key)
        assert answer["choices"][0]["message"]["role"] == "narrator"
        assert answer["choices"][0]["logprobs"]["content"][0]["token"].startswith("token_id:")
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert server.post("/v1/completions", {"prompt": "x", "logprobs": 4}, headers=key).status_code == 400
        # What a request sets goes before the model's defaults, and those before OpenAI's.
        body = {"messages": body["messages"], "ignore_eos": True}
        once, again = (server.ask("/v1/chat/completions", body, headers=key) for _ in range(2))
        assert once["choices"] == again["choices"] and once["usage"]["completion_tokens"] == 7
        longer = server.ask("/v1/chat/completions", {**body, "max_tokens": 9, "temperature": 1.5}, headers=key)
        assert longer["usage"]["completion_tokens"] == 9


def test_settings_that_change_answers():
    with served(
        "--default-chat-template-kwargs.enable_thinking", "true", "--enable-force-include-usage",
        "--no-reasoning-content-field", "--reasoning-parser", "qwen3", "--disable-fastapi-docs",
        "--trust-request-chat-template", "--enable-log-requests", "--max-log-len", "12",
        "--disable-uvicorn-access-log", "--middleware", "fake_middleware.AddHeader", "fake_middleware.refuse_teapots",
        "--sse-keep-alive-interval", "0.05", "--stream-interval", "4", "--scheduling-policy", "priority",
        PYTHONPATH=f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
    ) as server:  # fmt: skip
        body = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "temperature": 0}
        message = server.ask("/v1/chat/completions", {**body, "user": "somebody"})["choices"][0]["message"]
        assert message["reasoning"] and "reasoning_content" not in message
        chunks = server.stream("/v1/chat/completions", body)
        assert chunks[-1]["usage"]["completion_tokens"] > 2 * len(chunks)
        assert server.client.get("/docs").status_code == 404
        own = {**body, "chat_template": "Question: {{ messages[0].content }} Answer:"}
        assert server.ask("/v1/chat/completions", {**own, "max_tokens": 2})["usage"]["prompt_tokens"] < 16
        assert server.post("/v1/chat/completions", {**body, "chat_template": "/etc/passwd"}).status_code == 400
        assert "prompt: '<|im_start|>'" in server.log and "somebody" in server.log and "POST /v1" not in server.log
        assert server.client.get("/version").headers["x-added"] == "yes"
        assert server.client.get("/version", headers={"x-teapot": "1"}).status_code == 418
        assert server.ask("/v1/completions", {"prompt": "x", "max_tokens": 1, "priority": -2})
        slow = {"prompt": "word " * 1500, "max_tokens": 500, "stream_interval": 400, "ignore_eos": True}
        assert ": keep-alive" in server.stream_lines("/v1/completions", slow)


def test_help_loads_no_heavy_library():
    assert (
        modules_loaded_by(RUN_COMMAND.format(arguments=["serve", "--help"])) & {*HEAVY, "fastapi", "uvicorn"} == set()
    )
