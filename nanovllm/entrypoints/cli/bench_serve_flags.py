"""Options of ``nanovllm bench serve``. Their names are those of vLLM's command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from nanovllm.entrypoints.cli.parser import CommandParser, MergeJson, add_config_flag, human_int

BACKENDS = ("openai", "vllm", "openai-chat", "openai-embeddings")
METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")

DEFAULT_INPUT_LEN = 1024
DEFAULT_OUTPUT_LEN = 128

# Sampling parameters, which are sent if they are given.
SAMPLING: dict[str, type] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "repetition_penalty": float,
}


def add_serve_arguments(parser: CommandParser) -> None:
    """Options of the command."""
    parser.epilog = "Example: nanovllm bench serve --input-len 256 --output-len 128 --ignore-eos --max-concurrency 8"
    add_config_flag(parser)
    for title, add in (("server", _server), ("requests", _requests), ("load", _load), ("results", _results)):
        add(_adder(parser.add_argument_group(title)))


Adder = Callable[..., None]


def _adder(group: Any) -> Adder:
    """A function that adds an option: its names, its help, what argparse is to know. Defaults go into the help."""

    def add(names: str, text: str, **settings: Any) -> None:
        if isinstance(settings.get("default"), (str, int, float)):
            text += f" (default: {settings['default']})"
        if settings == {"switch": True}:
            settings = {"action": "store_true"}
        group.add_argument(*names.split(), help=text, **settings)

    return add


def _server(add: Adder) -> None:
    add("--backend --endpoint-type", "kind of endpoint", choices=BACKENDS, default="openai")
    add("--base-url", "the server, such as https://host:8443, instead of --host and --port", metavar="URL")
    add("--host", "the server", default="127.0.0.1")
    add("--port", "of the server", type=int, metavar="N", default=8000)
    add("--endpoint", "path of the endpoint (default: what the backend has)", metavar="PATH")
    add("--header", "HTTP headers of every request", nargs="*", metavar="NAME=VALUE", default=[])
    add("--insecure", "do not check the certificate of an https server", switch=True)
    add("--model", "default: the first that the server lists", metavar="MODEL")
    add("--served-model-name", "the model's name in requests, if it has another on the server", metavar="NAME")
    add("--tokenizer", "folder or hub id of the tokenizer, if not the model's", metavar="MODEL")
    add("--tokenizer-mode", "as for the engine", choices=("auto", "hf", "slow"), default="auto")
    add("--trust-remote-code", "let transformers run code that comes with the tokenizer", switch=True)
    text = "seconds to wait for a first answer before measuring; 0: do not try"
    add("--ready-check-timeout-sec", text, type=float, metavar="S", default=0.0)


def _requests(add: Adder) -> None:
    add("--dataset-name", "default: sharegpt if there is a file, else random", choices=("random", "sharegpt"))
    add("--dataset-path", "a ShareGPT file (JSON)", metavar="FILE")
    add("--num-prompts", "number of requests", type=positive, metavar="N", default=1000)
    text = "tokens of a random prompt"
    add("--random-input-len --input-len", text, type=positive, metavar="N", default=DEFAULT_INPUT_LEN)
    text = f"tokens to generate (default: {DEFAULT_OUTPUT_LEN}; for sharegpt those of the answer in the file)"
    add("--random-output-len --output-len --sharegpt-output-len", text, type=positive, metavar="N")
    text = "draw random lengths from length x (1 - R) to length x (1 + R)"
    add("--random-range-ratio", text, type=float, metavar="R", default=0.0)
    text = "tokens that all random prompts begin with, beside --random-input-len"
    add("--random-prefix-len", text, type=human_int, metavar="N", default=0)
    add("--seed", "of requests and arrivals", type=int, metavar="N", default=0)
    add("--ignore-eos", "make every answer as long as asked", switch=True)
    add("--logprobs", "ask for log-probabilities of so many tokens", type=int, metavar="N")
    for name, kind in SAMPLING.items():
        add("--" + name.replace("_", "-"), "sent with every request", type=kind, metavar="X")
    text = "variables for the chat template, with openai-chat"
    add("--chat-template-kwargs", text, action=MergeJson, default={})
    add("--extra-body", "laid over what is posted", action=MergeJson, default={})
    add("--request-id-prefix", "of the header x-request-id (default: a random one)", metavar="TEXT")


def _load(add: Adder) -> None:
    add("--request-rate", "requests per second; inf sends all at once", type=float, metavar="R", default=math.inf)
    text = "1: exponential intervals; less: bursts; more: even"
    add("--burstiness", text, type=float, metavar="B", default=1.0)
    add("--max-concurrency", "most requests under way at once", type=positive, metavar="N")
    add("--ramp-up-strategy", "change the rate over the run", choices=("linear", "exponential"))
    add("--ramp-up-start-rps", "requests per second at the first request", type=float, metavar="R")
    add("--ramp-up-end-rps", "and at the last", type=float, metavar="R")
    add("--num-warmups", "requests that are sent before, and not counted", type=human_int, metavar="N", default=0)


def _results(add: Adder) -> None:
    text = f"of {','.join(METRICS)} (default: ttft,tpot,itl; for embeddings e2el)"
    add("--percentile-metrics", text, metavar="NAMES")
    add("--metric-percentiles", "such as 25,50,99", metavar="NUMBERS", default="99")
    text = "count the requests that keep these limits, such as ttft:500 tpot:50 e2el:9000"
    add("--goodput", text, nargs="+", metavar="METRIC:MS")
    add("--save-result", "write a JSON file", switch=True)
    add("--save-detailed", "with all that is known of every request", switch=True)
    add("--append-result", "add to the file instead of replacing it", switch=True)
    add("--result-dir", "folder of the file", metavar="FOLDER", default=".")
    add("--result-filename", "default: made of label, rate, model and time", metavar="FILE")
    add("--metadata", "kept in the file", nargs="*", metavar="KEY=VALUE", default=[])
    add("--label", "of the run, in the file and its name (default: the backend)", metavar="TEXT")
    add("--disable-tqdm", "no progress bar", switch=True)


def positive(text: str) -> int:
    """A whole number of at least 1, as `human_int`.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    value = human_int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value
