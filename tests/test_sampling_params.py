"""SamplingParams: defaults, rules and error texts of the public interface."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest

from nanovllm.errors import ParameterError
from nanovllm.sampling_params import (
    BeamSearchParams,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    SamplingType,
    StructuredOutputsParams,
)


def test_defaults():
    params = SamplingParams()
    expected = {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": [],
        "stop_token_ids": [],
        "bad_words": [],
        "ignore_eos": False,
        "detokenize": True,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "include_stop_str_in_output": False,
        "output_kind": RequestOutputKind.CUMULATIVE,
        "structured_outputs": None,
        "logit_bias": None,
        "allowed_token_ids": None,
        "thinking_token_budget": None,
        "repetition_detection": None,
        "stream_interval": None,
        "extra_args": None,
        "skip_reading_prefix_cache": False,
    }
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)"),
        ({"temperature": 2.5}, "temperature must be in [0, 2], got 2.5."),
        ({"temperature": math.nan}, "temperature must be a finite number, got nan."),
        ({"temperature": "hot"}, "temperature must be a number, got str"),
        ({"n": 0}, "n must be at least 1, got 0."),
        ({"n": 20000}, "n must be at most 16384, got 20000."),
        ({"n": 1.5}, "n must be an integer, got float"),
        ({"n": 2, "temperature": 0.0}, "n must be 1 when using greedy sampling, got 2."),
        ({"presence_penalty": 2.1}, "presence_penalty must be in [-2, 2], got 2.1."),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be in [-2, 2], got -2.1."),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than zero, got 0.0."),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be a finite number, got inf."),
        ({"repetition_penalty": 1e-320}, "repetition_penalty must be between 1e-6 and 1e6, got 1e-320."),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0."),
        ({"top_p": 1.1}, "top_p must be in (0, 1], got 1.1."),
        ({"top_k": -2}, "top_k must be 0 (disable), or at least 1, got -2."),
        ({"top_k": 1.0}, "top_k must be an integer, got float"),
        ({"min_p": 1.1}, "min_p must be in [0, 1], got 1.1."),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
        ({"min_tokens": -1}, "min_tokens must be greater than or equal to 0, got -1."),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be less than or equal to max_tokens=4, got 5."),
        ({"stream_interval": 0}, "stream_interval must be at least 1, got 0."),
        ({"logprobs": -2}, "logprobs must be non-negative or -1, got -2."),
        ({"prompt_logprobs": -2}, "prompt_logprobs must be non-negative or -1, got -2."),
        ({"stop": [""]}, "stop cannot contain an empty string."),
        ({"stop": [3]}, "stop must contain only strings."),
        ({"stop": "x", "detokenize": False}, "stop strings are only supported when detokenize is True."),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must contain only integers, got ['a']."),
        ({"bad_words": [""]}, "bad_words cannot contain an empty string."),
        ({"bad_words": "word"}, "bad_words must be a list of strings, got str"),
        ({"allowed_token_ids": []}, "allowed_token_ids is not None and empty!"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias contains key(s) that cannot be converted to integer token IDs: ['x']"),
        ({"thinking_token_budget": -2}, "thinking_token_budget must be non-negative or -1 for unlimited, got -2."),
        ({"seed": 2**64}, "seed must be a 64-bit integer"),
        ({"seed": 1.5}, "seed must be an integer, got float"),
        ({"output_kind": "delta"}, "output_kind must be a RequestOutputKind"),
        ({"best_of": 3}, "ask for n=3"),
        ({"guided_decoding": {"json": "{}"}}, "structured_outputs=StructuredOutputsParams"),
        ({"logits_processors": [len]}, "logit_bias, bad_words, allowed_token_ids"),
    ],
)
def test_a_broken_rule_is_a_value_error_that_names_the_parameter(fields, message):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**fields)
    assert isinstance(caught.value, ParameterError)
    assert message in str(caught.value)
    assert caught.value.parameter in fields


def test_unknown_names_are_refused():
    with pytest.raises(TypeError):
        SamplingParams(temprature=0.5)
    with pytest.raises(AttributeError):
        SamplingParams().temprature = 0.5


def test_greedy_resets_the_filters():
    params = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    assert params.is_greedy and params.sampling_type is SamplingType.GREEDY
    assert SamplingParams().sampling_type is SamplingType.RANDOM
    assert SamplingParams(seed=1).sampling_type is SamplingType.RANDOM_SEED


def test_tiny_temperatures_are_raised_with_a_warning(caplog):
    params = SamplingParams(temperature=0.001, top_k=5)
    assert params.temperature == 0.01 and params.top_k == 5
    assert "temperature" in caplog.text


def test_values_are_brought_to_one_form():
    params = SamplingParams(
        stop="end",
        stop_token_ids=[3, 1, 3],
        bad_words=["a", "b", "a"],
        seed=-1,
        logprobs=True,
        prompt_logprobs=True,
        logit_bias={"7": 200, 8: -200.0, 9: 1},
        thinking_token_budget=-1,
        temperature=np.float32(0.5),
        top_k=np.int64(4),
        allowed_token_ids=np.array([5, 6, 5]),
    )
    assert params.stop == ["end"]
    assert params.stop_token_ids == [3, 1]
    assert params.bad_words == ["a", "b"]
    assert params.seed is None and params.thinking_token_budget is None
    assert params.logprobs == 1 and params.prompt_logprobs == 1
    assert params.logit_bias == {7: 100.0, 8: -100.0, 9: 1.0}
    assert params.temperature == 0.5 and type(params.temperature) is float
    assert params.top_k == 4 and type(params.top_k) is int
    assert params.allowed_token_ids == [5, 6]
    assert SamplingParams(top_k=-1).top_k == -1


def test_prompt_logprobs_do_not_read_the_prefix_cache():
    assert SamplingParams(prompt_logprobs=0).skip_reading_prefix_cache is True
    assert SamplingParams(prompt_logprobs=0, skip_reading_prefix_cache=False).skip_reading_prefix_cache is True
    assert SamplingParams(skip_reading_prefix_cache=True).skip_reading_prefix_cache is True


def test_best_of_equal_to_n_is_only_a_warning(caplog):
    assert SamplingParams(n=2, best_of=2).n == 2
    assert "best_of" in caplog.text


def test_validate_sees_fields_assigned_later():
    params = SamplingParams(top_p=0.5)
    params.temperature = 0
    params.stop = "x"
    params.prompt_logprobs = 1
    params.validate()
    assert params.is_greedy and params.top_p == 1.0 and params.stop == ["x"] and params.skip_reading_prefix_cache
    params.max_tokens = 0
    with pytest.raises(ParameterError):
        params.validate()


def test_from_optional_takes_none_for_the_default():
    params = SamplingParams.from_optional(
        n=None, temperature=None, top_p=None, stop=None, max_tokens=None, logit_bias=None, top_k=7
    )
    assert params == SamplingParams(max_tokens=None, top_k=7)


def test_a_clone_shares_nothing_changeable():
    containers = {
        "stop": ["x"],
        "stop_token_ids": [1],
        "bad_words": ["b"],
        "logit_bias": {1: 2.0},
        "allowed_token_ids": [1],
        "logprob_token_ids": [1],
        "prompt_logprob_token_ids": [1],
        "trace_decode_token_ids": [1],
        "extra_args": {"a": [1]},
    }
    params = SamplingParams(**containers)
    clone = params.clone()
    assert clone == params and clone is not params
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if isinstance(value, (list, dict)):
            assert getattr(clone, field.name) is not value, field.name
    clone.extra_args["a"].append(2)
    assert params.extra_args == {"a": [1]}
    assert pickle.loads(pickle.dumps(params)) == params


def test_repr_has_the_known_fields_in_order():
    assert repr(SamplingParams(temperature=0.0, max_tokens=5)) == (
        "SamplingParams(n=1, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, temperature=0.0, "
        "top_p=1.0, top_k=0, min_p=0.0, seed=None, stop=[], stop_token_ids=[], bad_words=[], "
        "thinking_token_budget=None, include_stop_str_in_output=False, ignore_eos=False, max_tokens=5, min_tokens=0, "
        "logprobs=None, prompt_logprobs=None, skip_special_tokens=True, spaces_between_special_tokens=True, "
        "structured_outputs=None, extra_args=None)"
    )


def test_structured_outputs_need_exactly_one_constraint():
    assert StructuredOutputsParams(regex="a+").regex == "a+"
    with pytest.raises(ParameterError, match=r"only use one kind.*json, regex"):
        StructuredOutputsParams(json="{}", regex="a")
    with pytest.raises(ParameterError, match="must use one kind"):
        StructuredOutputsParams()
    with pytest.raises(ParameterError, match="choice"):
        StructuredOutputsParams(choice=[])


def test_repetition_detection_rules():
    assert RepetitionDetectionParams(max_pattern_size=4, min_count=3).min_pattern_size == 0
    with pytest.raises(ParameterError, match="min_pattern_size <= max_pattern_size"):
        RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=3, min_count=2)
    with pytest.raises(ParameterError, match="min_count must be >= 2"):
        RepetitionDetectionParams(max_pattern_size=2, min_count=1)


def test_beam_search_params():
    params = BeamSearchParams(beam_width=4, max_tokens=8)
    assert (params.temperature, params.length_penalty, params.ignore_eos) == (0.0, 1.0, False)
    for fields in (
        {"beam_width": 0, "max_tokens": 1},
        {"beam_width": 1, "max_tokens": 0},
        {"beam_width": 1, "max_tokens": 1, "temperature": -1},
        {"beam_width": 1, "max_tokens": 1, "length_penalty": math.inf},
    ):
        with pytest.raises(ParameterError):
            BeamSearchParams(**fields)
