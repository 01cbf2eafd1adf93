"""Command line conventions, and options made of dataclass fields."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
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
from nanovllm.entrypoints.cli.parser import CommandParser, MergeJson, UsageError, add_config_flag, human_int
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


# -- one key of a JSON value -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--hf-overrides.rope_theta", "5"], {"rope_theta": 5}),
        (["--hf_overrides.rope_theta=5.5"], {"rope_theta": 5.5}),
        (["--hf-overrides.a.b", "true", "--hf-overrides.a.c", "word"], {"a": {"b": True, "c": "word"}}),
        (["--hf-overrides", '{"a": {"b": 1}, "d": 2}', "--hf-overrides.a.b", "3"], {"a": {"b": 3}, "d": 2}),
        (["--hf-overrides.sizes", "[1, 2]"], {"sizes": [1, 2]}),
        (["--hf-overrides.name", "-1"], {"name": -1}),
    ],
)
def test_a_json_option_takes_one_key_at_a_time(arguments: list[str], expected: dict[str, Any]):
    assert parse(*arguments) == {"hf_overrides": expected}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed.x", "1"], "there is no option --seed.x"),
        (["--hf-overrides."], "a key is missing between the dots"),
        (["--hf-overrides..a", "1"], "a key is missing between the dots"),
        (["--hf-overrides.a"], "its value is missing"),
    ],
)
def test_other_options_with_dots_are_refused(arguments: list[str], message: str):
    with pytest.raises(UsageError, match=message):
        parse(*arguments)


def test_after_a_bare_double_dash_nothing_is_an_option():
    parser = CommandParser(prog="test")
    parser.add_argument("--json", action=MergeJson)
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--json.a_b", "1", "--", "--json.c"]) == argparse.Namespace(
        json={"a_b": 1}, rest=["--json.c"]
    )


# -- optimisation levels -----------------------------------------------------------------------------------------------


def test_level_0_is_enforce_eager_and_higher_levels_change_nothing():
    assert parse("-O0") == parse("-O", "0") == {"enforce_eager": True}
    assert parse("-O1") == parse("-O2") == parse("-O3") == {}
    assert parse("--optimization-level", "0") == {"enforce_eager": True}
    assert parse("--enforce-eager", "-O2") == {"enforce_eager": True}
    with pytest.raises(UsageError, match="invalid choice: '4'"):
        parse("-O4")


# -- the configuration file --------------------------------------------------------------------------------------------


def parse_file(folder: Path, text: str, *arguments: str) -> dict[str, Any]:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return parse("--config", str(file), *arguments)


def test_a_config_file_holds_options_of_every_kind(tmp_path: Path):
    text = """
        model: a/b
        max-model-len: 4k
        gpu_memory_utilization: 0.5
        seed: -7
        enforce-eager: true
        enable_prefix_caching: false
        hf-token: true
        disable-log-requests: true
        worker-use-ray: false
        override-generation-config:
          temperature: 0.5
          stop: [x]
        """
    assert parse_file(tmp_path, text) == {
        "model": "a/b",
        "max_model_len": 4000,
        "gpu_memory_utilization": 0.5,
        "seed": -7,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "hf_token": True,
        "disable_log_requests": True,
        "override_generation_config": {"temperature": 0.5, "stop": ["x"]},
    }


def test_lists_in_a_config_file(tmp_path: Path):
    parser = CommandParser(prog="test")
    add_config_flag(parser)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--stop", action="append")
    file = tmp_path / "config.yaml"
    file.write_text("names: [a, 1]\nstop: [--x, 'yes']\n")
    parsed = parser.parse_args(["--config", str(file)])
    assert (parsed.names, parsed.stop) == (["a", "1"], ["--x", "yes"])
    parsed = parser.parse_args(["--stop", "only", f"--config={file}"])
    assert (parsed.names, parsed.stop) == (["a", "1"], ["only"])


def test_the_command_line_wins_over_the_file(tmp_path: Path):
    text = "seed: 1\nenforce-eager: true\ntensor-parallel-size: 2\nhf-overrides: {a: 1, b: 2}\n"
    assert parse_file(tmp_path, text, "--seed=2", "--no-enforce-eager", "-tp", "4", "--hf_overrides", '{"c": 3}') == {
        "seed": 2, "enforce_eager": False, "tensor_parallel_size": 4, "hf_overrides": {"c": 3}
    }  # fmt: skip
    assert parse_file(tmp_path, text, "--hf-overrides.b", "5")["hf_overrides"] == {"a": 1, "b": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-model-length: 5", r"there is no option 'max-model-length'; did you mean max-model-len\?"),
        ("config: other.yaml", "there is no option 'config'"),
        ("seed: [1, 2]", "seed: takes one value, not a list"),
        ("seed:", "seed: its value is missing"),
        ("dtype: no", "dtype: needs a value, not false"),
        ("enforce-eager: 3", "enforce-eager: is a switch, true or false, not 3"),
        ("- seed", "must hold options"),
        ("seed: {", "not YAML"),
        ("seed: many", "argument --seed: 'many' is not a whole number"),
    ],
)
def test_a_config_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(UsageError, match=message):
        parse_file(tmp_path, text)


def test_an_unused_value_of_the_file_is_checked_all_the_same(tmp_path: Path):
    with pytest.raises(UsageError, match="seed: takes one value"):
        parse_file(tmp_path, "seed: [1]", "--seed", "2")


def test_a_missing_config_file_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"--config .*nowhere\.yaml: No such file"):
        parse("--config", str(tmp_path / "nowhere.yaml"))


# -- help on a part ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "shown", "hidden"),
    [
        ("scheduler", ["--max-num-seqs", "--scheduling-policy"], ["--dtype", "--config"]),
        ("Scheduler", ["--max-num-seqs"], ["--dtype"]),
        ("max_num_seqs", ["--max-num-seqs"], ["--max-num-batched-tokens"]),
        ("--max-num", ["--max-num-seqs", "--max-num-batched-tokens"], ["--dtype"]),
        ("all", ["--max-num-seqs", "--dtype", "--config"], ["--swap-space"]),
    ],
)
def test_help_on_a_group_or_an_option(
    word: str, shown: list[str], hidden: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        parse(f"--help={word}")
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert all(option in output for option in shown)
    assert not any(option in output for option in hidden)


def test_help_on_nothing_there_is():
    with pytest.raises(UsageError, match=r"no group and no option has that name; did you mean scheduler\?"):
        parse("--help=schedular")
