"""Command line conventions, and options made of dataclass fields."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from nanovllm.config import RETIRED, EngineArgs
from nanovllm.entrypoints.cli.flags import (
    ENGINE_HELP,
    SAMPLING_HELP,
    add_engine_flags,
    add_field_flags,
    engine_args,
)
from nanovllm.entrypoints.cli.parser import CommandParser, UsageError, human_int
from nanovllm.sampling_params import SamplingParams


def parse(*arguments: str) -> dict[str, Any]:
    """What `EngineArgs` are given for these options."""
    parser = CommandParser(prog="test")
    add_engine_flags(parser)
    return engine_args(parser.parse_args(arguments))


def test_every_engine_argument_is_an_option_with_help():
    helped = [name for group in ENGINE_HELP.values() for name in group]
    assert sorted(helped) == sorted(field.name for field in dataclasses.fields(EngineArgs))


def test_what_is_not_given_is_left_to_the_defaults():
    assert parse() == {}
    assert EngineArgs.from_kwargs(**parse()) == EngineArgs()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "a/b"], {"model": "a/b"}),
        (["--max-model-len", "4k"], {"max_model_len": 4000}),
        (["--max-model-len", "auto"], {"max_model_len": "auto"}),
        (["--max-model-len", "-1"], {"max_model_len": -1}),
        (["--kv_cache_memory_bytes=1.5G"], {"kv_cache_memory_bytes": 3 * 2**29}),
        (["--gpu-memory-utilization", "0.5"], {"gpu_memory_utilization": 0.5}),
        (["--enforce-eager"], {"enforce_eager": True}),
        (["--no_enable_prefix_caching"], {"enable_prefix_caching": False}),
        (["--enable-prefix-caching"], {"enable_prefix_caching": True}),
        (["--hf-overrides", '{"rope_theta": 5}'], {"hf_overrides": {"rope_theta": 5}}),
        (["--hf-token"], {"hf_token": True}),
        (["--hf-token", "abc"], {"hf_token": "abc"}),
        (["--seed", "-7"], {"seed": -7}),
        (["-tp", "2", "-pp", "3", "-dp", "4", "-q", "awq"],
         {"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "data_parallel_size": 4, "quantization": "awq"}),
        (["--swap-space", "4", "--disable-log-requests"], {"swap_space": "4", "disable_log_requests": True}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_options_become_engine_arguments(arguments: list[str], expected: dict[str, Any]):
    assert parse(*arguments) == expected


def test_all_retired_names_are_taken():
    for name in RETIRED:
        flag = "--" + name.replace("_", "-")
        value = [] if name.startswith(("disable_", "use_", "worker_")) else ["1"]
        assert set(parse(flag, *value)) == {name}


def test_sampling_options_become_sampling_parameters():
    parser = CommandParser(prog="test")
    add_field_flags(parser, SamplingParams, SAMPLING_HELP)
    options = ["--stop", "a", "--stop=--b_c", "--stop-token-ids", "3", "--top-p", "0.5", "--no-skip-special-tokens"]
    given = vars(parser.parse_args([*options, "--max-tokens", "1K"]))
    assert given == {
        "stop": ["a", "--b_c"],
        "stop_token_ids": [3],
        "top_p": 0.5,
        "skip_special_tokens": False,
        "max_tokens": 1024,
    }
    SamplingParams(**given)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-1", -1), ("1k", 1000), ("1K", 1024), ("25.6k", 25_600), ("2m", 2 * 10**6), ("2M", 2**21),
     ("1g", 10**9), ("1G", 2**30), ("1t", 10**12), ("0.5T", 2**39)],
)  # fmt: skip
def test_whole_numbers_as_people_write_them(text: str, value: int):
    assert human_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "1kk", "1 k", "one", "1e3", "0x10"])
def test_other_numbers_are_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="not a whole number"):
        human_int(text)


def test_values_are_not_changed_with_the_names():
    parser = CommandParser(prog="test")
    parser.add_argument("--some-name")
    parser.add_argument("rest", nargs="*")
    parsed = parser.parse_args(["--some_name=a_b", "c_d", "--", "--e_f"])
    assert (parsed.some_name, parsed.rest) == ("a_b", ["c_d", "--e_f"])


def test_an_unknown_option_is_not_guessed_but_suggested():
    with pytest.raises(UsageError, match=r"there is no option --max-model-length; did you mean --max-model-len\?"):
        parse("--max-model-length", "5")
    with pytest.raises(UsageError, match="there is no option --enforce"):
        parse("--enforce")
