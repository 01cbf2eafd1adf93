"""Frames and codec: what one side says the other hears, in whatever pieces it arrives, and nothing else is believed."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_executor import engine_config
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.config import EngineConfig
from nanovllm.engine.channel import Channel, ChannelClosed
from nanovllm.engine.input import EngineInput
from nanovllm.engine.messages import Add, Died, Finish, Ready, ResetPrefixCache, Update
from nanovllm.engine.plain import from_plain, to_plain
from nanovllm.engine.plan import EngineOutput, TokenLogprobs
from nanovllm.engine.stats import Admission, StepStats
from nanovllm.engine.wire import WireError, decode_command, decode_message, encode_command, encode_message
from nanovllm.errors import EngineGenerateError, ModelError, ParameterError
from nanovllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, SamplingParams

# -- frames ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    payloads=st.lists(st.binary(max_size=300), max_size=20),
    cuts=st.lists(st.integers(1, 64), min_size=1, max_size=50),
)
def test_frames_arrive_whole_however_the_bytes_are_cut(payloads: list[bytes], cuts: list[int]):
    sender, receiver = socket.socketpair()
    with sender, receiver:
        stream = b"".join(len(payload).to_bytes(4, "little") + payload for payload in payloads)
        channel, received, start = Channel(receiver), [], 0
        for number in range(len(stream)):
            if start >= len(stream):
                break
            end = start + cuts[number % len(cuts)]
            sender.sendall(stream[start:end])
            received += channel.receive()
            start = end
        assert received == payloads


def test_a_peer_that_does_not_read_costs_memory_and_no_time():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel, peer = Channel(ours), Channel(theirs)
        frames = [bytes([number % 256]) * 100_000 for number in range(100)]
        for frame in frames:
            channel.send(frame)
        assert channel.backlog > 1_000_000
        received: list[bytes] = []
        while len(received) < len(frames):
            received += peer.receive()
            channel.flush()
        assert received == frames and channel.backlog == 0


def test_the_end_of_the_peer_is_seen_after_all_it_has_said():
    ours, theirs = socket.socketpair()
    channel, peer = Channel(ours), Channel(theirs)
    peer.send(b"last words")
    peer.close()
    assert channel.receive() == [b"last words"]
    with pytest.raises(ChannelClosed):
        channel.receive()
    with pytest.raises(ChannelClosed):
        channel.send(b"hello")
    channel.close()


def test_a_frame_of_impossible_length_is_an_error():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"HTTP/1.1 200 OK")
        with pytest.raises(ValueError, match="none of ours"):
            Channel(ours).receive()


# -- plain data ------------------------------------------------------------------------------------------------------


def test_a_configuration_survives():
    config = engine_config(policy="priority", in_flight=2)
    hf_config = {"rope_parameters": {"rope_theta": 1e6}, "eos_token_id": [1, 2], "x": None}
    model = dataclasses.replace(
        config.model, hf_config=hf_config, path=Path("some") / "model", tokenizer=Path("other"), eos_token_ids=(5, 7)
    )
    config = dataclasses.replace(config, model=model)
    again = from_plain(EngineConfig, json.loads(json.dumps(to_plain(config))))
    assert again == config and isinstance(again.model.path, Path)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.0, max_tokens=None, stop=["a", "b\ud800"], bad_words=["x"]),
        SamplingParams(n=3, seed=2**64 - 1, logit_bias={7: -1.5, 12: 100}, allowed_token_ids=[1, 2], top_k=5),
        SamplingParams(repetition_detection=RepetitionDetectionParams(8, 1, 3), stop_token_ids=[9], min_tokens=2),
        SamplingParams(prompt_logprobs=3, logprobs=-1, output_kind=RequestOutputKind.DELTA, ignore_eos=True),
    ],
)
def test_sampling_parameters_survive(params: SamplingParams):
    assert from_plain(SamplingParams, json.loads(json.dumps(to_plain(params)))) == params


def test_what_is_not_plain_data_does_not_travel():
    with pytest.raises(TypeError, match="no plain data"):
        to_plain(object())
    with pytest.raises(KeyError, match="nonsense"):
        from_plain(StepStats, {"nonsense": 1})


# -- commands and messages -------------------------------------------------------------------------------------------


def test_commands_survive_without_the_text_of_the_prompt():
    prompt = EngineInput(
        prompt="secret",
        prompt_token_ids=[1, 2, 3],
        params=SamplingParams(n=2, logit_bias={3: 1.0}),
        stop_token_ids=frozenset({4}),
        eos_token_ids=frozenset({5, 6}),
        bad_words_ids=((1, 2), (3,)),
        cache_salt="salt",
    )
    frame = encode_command(Add("id", prompt, 2**63, -4, "search", 2.5))
    assert b"secret" not in frame
    assert decode_command(frame) == Add("id", dataclasses.replace(prompt, prompt=None), 2**63, -4, "search", 2.5)
    for command in (Finish(["0_a", "1_a"], "abort"), ResetPrefixCache(7)):
        assert decode_command(encode_command(command)) == command


def same(one: Any, two: Any) -> bool:
    """Equality that looks into arrays."""
    if isinstance(one, np.ndarray):
        return isinstance(two, np.ndarray) and one.dtype == two.dtype and np.array_equal(one, two, equal_nan=True)
    if dataclasses.is_dataclass(one) and type(one) is type(two):
        return all(same(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, (list, tuple)) and type(one) is type(two):
        return len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


token_ids = st.integers(0, 2**31 - 1)


@st.composite
def positions(draw: st.DrawFn) -> TokenLogprobs:
    ids = draw(st.lists(token_ids, min_size=1, max_size=4))
    values = [draw(st.sampled_from([0.0, -0.25, -1e30, -math.inf])) for _ in ids]
    return TokenLogprobs(np.array(ids, np.int64), np.array(values, np.float32), draw(st.integers(1, 10)))


outputs = st.builds(
    EngineOutput,
    request_id=st.text(max_size=20),
    new_token_ids=st.lists(token_ids, max_size=3),
    finish_reason=st.sampled_from([None, None, "stop", "length", "error"]),
    stop_reason=st.one_of(st.none(), token_ids, st.text(max_size=5)),
    logprobs=st.one_of(st.none(), st.lists(positions(), max_size=3)),
    prompt_logprobs=st.one_of(st.none(), st.lists(positions(), max_size=3)),
    num_cached_tokens=st.integers(0, 100),
    pooled=st.sampled_from([None, None, np.arange(5, dtype=np.float32)]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(outputs, max_size=6))
def test_outputs_survive(batch: list[EngineOutput]):
    for output in batch:
        if output.finish_reason is None:
            output.stop_reason = None
    admissions, tenants = [Admission("0_a", 1.0, 1.25, 2)], {"a": (1, 2)}
    stats = StepStats(1.5, 3, 2, 0.25, 1, 64, 10, 10, 5, 1, 2, ["step_failed"], admissions, tenants)
    update = Update(batch, stats, replies=[(3, True)])
    assert same(decode_message(encode_message(update)), update)


def test_errors_of_users_keep_their_type_and_others_their_name():
    error = ParameterError("too long", "max_tokens", 7)
    update = decode_message(encode_message(Update(refused=[("a", error)])))
    assert isinstance(update, Update)
    ((_, found),) = update.refused
    assert isinstance(found, ParameterError) and str(found) == str(error)
    assert (found.parameter, found.value) == ("max_tokens", 7)
    for given_error, kind, text in (
        (ModelError("no weights"), ModelError, "no weights"),
        (RuntimeError("boom"), EngineGenerateError, "RuntimeError: boom"),
    ):
        died = decode_message(encode_message(Died(given_error)))
        assert isinstance(died, Died) and type(died.error) is kind and str(died.error) == text


def test_the_first_message_survives():
    assert decode_message(encode_message(Ready(2048, 100))) == Ready(2048, 100)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_nonsense_is_refused_on_both_sides(frame: bytes):
    for decode in (decode_command, decode_message):
        with pytest.raises(WireError):
            decode(frame)


@pytest.mark.parametrize(
    "head",
    [
        {"add": {"request_id": "a"}},
        {"quit": {}},
        {"finish": {"request_ids": ["a"], "reason": "x", "more": 1}},
        {"ids": ["a"], "tokens": [1, 2], "cached": [0]},
        {"arrays": [["|O", 4]]},
        {"arrays": [["<f4", 1000]]},
        {"died": {}},
        [],
    ],
)
def test_heads_that_do_not_fit_are_refused(head: Any):
    text = json.dumps(head).encode()
    frame = len(text).to_bytes(4, "little") + text
    for decode in (decode_command, decode_message):
        with pytest.raises(WireError):
            decode(frame)
