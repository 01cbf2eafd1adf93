"""Options that `chat` and `complete` share: they answer at a terminal or through a pipe, here or on a server."""

from __future__ import annotations

import argparse
from typing import Any

from nanovllm.entrypoints.cli.flags import SAMPLING_HELP, add_engine_flags, add_field_flags, engine_args
from nanovllm.entrypoints.cli.parser import CommandParser
from nanovllm.entrypoints.cli.remote import add_remote_flags, check_remote_flags
from nanovllm.sampling_params import SamplingParams

_SAMPLING = {name: text for name, text in SAMPLING_HELP.items() if name not in ("n", "logprobs")}


def add_answering_flags(parser: CommandParser, answer: str, max_tokens: int | str) -> None:
    """The shared options.

    Args:
        answer: what the command calls one answer.
        max_tokens: shown as the default of the option.
    """
    parser.add_argument("--stats", action="store_true", help=f"after each {answer}, print its speed to standard error")
    parser.add_argument("--verbose", "-v", action="store_true", help="show the engine's messages")
    add_remote_flags(parser)
    sampling = parser.add_argument_group(
        "sampling", "Defaults are the model's own (generation_config.json), and these where it has none."
    )
    add_field_flags(sampling, SamplingParams, _SAMPLING, {"max_tokens": max_tokens})
    add_engine_flags(parser, without=("seed", "-q"))  # --seed is the request's, -q is --quick


def read_answering_flags(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `SamplingParams`, and of `EngineArgs`, as given; nonsense is refused before a model is loaded.

    Raises:
        UsageError, ParameterError: the options contradict each other, or a value is out of range.
    """
    given = {name: getattr(arguments, name) for name in _SAMPLING if hasattr(arguments, name)}
    engine = engine_args(arguments, without=("seed",))
    check_remote_flags(arguments, engine)
    SamplingParams(**given)
    return given, engine
