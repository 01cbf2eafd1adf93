"""Options of the server itself, from the fields of `ServeArgs`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any, get_origin, get_type_hints

from nanovllm.entrypoints.cli.flags import add_field_flags
from nanovllm.entrypoints.cli.parser import CommandParser
from nanovllm.entrypoints.serve.args import ServeArgs

SERVE_HELP: dict[str, dict[str, str]] = {
    "server": {
        "host": "address to serve on (default: all)",
        "port": "0 takes a free one",
        "uds": "serve on this Unix domain socket instead",
        "shutdown_timeout": "seconds that requests have to end after SIGTERM or SIGINT; a second signal ends them",
        "max_engine_restarts": "how often in ten minutes an engine that has died is started again",
        "root_path": "path under which a proxy shows the server",
        "ssl_keyfile": "private key, for https",
        "ssl_certfile": "certificate, for https",
        "ssl_ca_certs": "authorities that clients' certificates are checked with",
        "ssl_cert_reqs": "whether clients need a certificate: 0 no, 1 if they have one, 2 yes",
        "ssl_ciphers": "OpenSSL's list of ciphers",
        "h11_max_incomplete_event_size": "most bytes of a request's head",
        "middleware": "ASGI middleware (module.Class, or an async function of request and call_next); may be repeated",
        "disable_fastapi_docs": "no /docs, /redoc, /openapi.json",
        "disable_inspector": "no /inspector",
    },
    "protection": {
        "api_key": "one or more keys, of which a client must send one; also VLLM_API_KEY",
        "tenants": "YAML file of tenants: their keys, quotas, priorities and shares",
        "max_num_queued_reqs": "most requests under way, waiting or running; others get a 503. 0: no limit",
        "max_num_queued_tokens": "most prompt tokens that wait for a first token; new requests get a 503. 0: no limit",
        "request_timeout": "seconds that a request may take, if its X-Request-Timeout is no shorter; 0: no limit",
        "client_timeout": "seconds a client may take to send its request, or take nothing of its answer; 0: no limit",
        "max_request_body_size": "most bytes of a request's body",
        "allowed_origins": 'JSON list of web pages\' origins that may call, such as ["*"] (default: none)',
        "allowed_methods": "JSON list",
        "allowed_headers": "JSON list",
        "allow_credentials": "let web pages send cookies",
    },
    "answers": {
        "served_model_name": "one or more names of the model; the first is the one answers carry",
        "response_role": "role of an answer",
        "default_chat_template_kwargs": "variables of the chat template for requests that do not set them",
        "trust_request_chat_template": "let requests bring a chat template of their own",
        "enable_auto_tool_choice": "let the model call tools when it sees fit",
        "tool_call_parser": "how the model writes tool calls: hermes, llama3_json, mistral, qwen3_coder",
        "reasoning_parser": "how the model writes reasoning: qwen3, deepseek_r1",
        "reasoning_content_field": "give reasoning also under its old name reasoning_content",
        "return_tokens_as_token_ids": "name tokens in log-probabilities token_id:7",
        "enable_prompt_tokens_details": "tell in usage how many tokens of the prompt were cached",
        "enable_force_include_usage": "end every stream with its usage",
        "enable_tokenizer_info_endpoint": "tell about the tokenizer on /tokenizer_info",
        "stream_interval": "tokens per event of a stream, for requests that do not say",
        "sse_keep_alive_interval": "seconds of silence after which a stream carries a comment; 0: never",
    },
    "messages": {
        "uvicorn_log_level": "critical, error, warning, info, debug or trace",
        "disable_uvicorn_access_log": "no line per request",
        "enable_log_requests": "log prompt and parameters of every request",
        "max_log_len": "most characters or tokens of a prompt that are logged",
        "enable_request_id_headers": "answer with the X-Request-Id of the request, or a new one",
        "enable_server_load_tracking": "count requests under way on /load",
        "otlp_traces_endpoint": "send a span per request to this OpenTelemetry collector; needs the extra 'otel'",
    },
}


def add_serve_flags(parser: CommandParser, titles: Iterable[str] = SERVE_HELP) -> None:
    """Options for the fields of `ServeArgs`, in the groups ``titles``."""
    hints = get_type_hints(ServeArgs)
    for title in titles:
        helps = SERVE_HELP[title]
        group = parser.add_argument_group(title)
        for name, text in helps.items():
            option = "--" + name.replace("_", "-")
            if name in _JSON_LISTS:
                group.add_argument(option, type=_json_list, default=argparse.SUPPRESS, metavar="JSON", help=text)
            elif get_origin(hints[name]) is list:
                many: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "VALUE"}
                group.add_argument(option, default=argparse.SUPPRESS, help=text, **many)
            else:
                add_field_flags(group, ServeArgs, {name: text})


def serve_args(arguments: argparse.Namespace) -> ServeArgs:
    """The server's settings from the command line and the environment.

    Raises:
        ParameterError: a value that cannot be honoured.
    """
    given = vars(arguments)
    names = [field.name for field in dataclasses.fields(ServeArgs)]
    values = {name: given[name] for name in names if name in given}
    if "api_key" not in values and os.environ.get("VLLM_API_KEY"):
        values["api_key"] = [os.environ["VLLM_API_KEY"]]
    return ServeArgs(**values)


_JSON_LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")


def _json_list(text: str) -> list[str]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON list of strings such as ["*"]')
    return value
