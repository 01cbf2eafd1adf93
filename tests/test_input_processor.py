"""Prompts and parameters are checked and resolved before the engine sees them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_tokenizers

from nanovllm.config import StructuredOutputsConfig
from nanovllm.engine.input import UNSUPPORTED_PARAMETERS, InputProcessor
from nanovllm.errors import ModelError, ParameterError
from nanovllm.pooling_params import PoolingConfig
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams

MAX_MODEL_LEN = 64
VOCAB_SIZE = 350  # the tokenizers have a little fewer


def make_config(tokenizer, **model):
    defaults = {
        "tokenizer": tokenizer,
        "tokenizer_mode": "auto",
        "trust_remote_code": False,
        "hf_config": {},
        "chat_template": None,
        "max_model_len": MAX_MODEL_LEN,
        "vocab_size": VOCAB_SIZE,
        "eos_token_ids": (7, 9),
        "generation_defaults": {"temperature": 0.6, "top_k": 20},
        "max_logprobs": 20,
    }
    return SimpleNamespace(
        model=SimpleNamespace(**{**defaults, **model}),
        structured_outputs=StructuredOutputsConfig(),
        pooling=PoolingConfig(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tokenizers.qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    return tiny_tokenizers.llama2(tmp_path_factory.mktemp("llama2"))


@pytest.fixture
def processor(folder):
    return InputProcessor(make_config(folder))


# Prompts


def test_text_ids_and_dicts_give_the_same_tokens(processor):
    text = "Hello world"
    ids = processor.tokenizer.encode(text)
    for prompt, shown in (
        (text, text),
        (ids, None),
        (tuple(ids), None),
        (np.array(ids), None),
        ({"prompt": text}, text),
        ({"prompt_token_ids": ids}, None),
        ({"prompt": text, "prompt_token_ids": np.array(ids, dtype=np.int32)}, text),
        ({"prompt": text, "multi_modal_data": None}, text),
    ):
        result = processor.process(prompt, SamplingParams())
        assert result.prompt_token_ids == ids and result.prompt == shown
        assert {type(token_id) for token_id in result.prompt_token_ids} == {int}
        assert result.cache_salt is None
    assert processor.process({"prompt": text, "cache_salt": "tenant"}).cache_salt == "tenant"


def test_text_gets_the_models_bos_and_ids_are_taken_as_they_are(llama2):
    processor = InputProcessor(make_config(llama2, vocab_size=500))
    assert processor.process("Hello").prompt_token_ids[0] == 1
    assert processor.process("").prompt_token_ids == [1]
    assert processor.process([5, 6]).prompt_token_ids == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "message", "parameter"),
    [
        ("", "The prompt cannot be empty", "prompt"),
        ([], "The prompt cannot be empty", "prompt"),
        ({"prompt_token_ids": []}, "The prompt cannot be empty", "prompt"),
        ([1, VOCAB_SIZE], f"Token id {VOCAB_SIZE} is out of vocabulary", "prompt_token_ids"),
        ([-1, 1], "Token id -1 is out of vocabulary", "prompt_token_ids"),
        ([1, "a"], "must contain only integers", "prompt_token_ids"),
        ([1, True], "must contain only integers", "prompt_token_ids"),
        ([1.0], "must contain only integers", "prompt_token_ids"),
        (5, "must be a string, a list of token ids or a dict", "prompt"),
        (None, "must be a string, a list of token ids or a dict", "prompt"),
        (b"bytes", "must be a string, a list of token ids or a dict", "prompt"),
        ({}, "needs 'prompt' or 'prompt_token_ids'", "prompt"),
        ({"prompt": 5}, "prompt must be a string", "prompt"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt must be a non-empty string", "cache_salt"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "multi_modal_data", "multi_modal_data"),
        ({"prompt_embeds": [[0.1]]}, "prompt_embeds", "prompt_embeds"),
        ({"encoder_prompt": "a", "decoder_prompt": "b"}, "encoder_prompt", "encoder_prompt"),
        ({"prompt": "a", "promt_token_ids": [1]}, "promt_token_ids", "promt_token_ids"),
    ],
)
def test_bad_prompts_are_named(processor, prompt, message, parameter):
    with pytest.raises(ParameterError, match=re.escape(message)) as caught:
        processor.process(prompt, SamplingParams())
    assert caught.value.parameter == parameter


def test_a_prompt_must_leave_room_for_a_token(processor):
    assert len(processor.process([1] * (MAX_MODEL_LEN - 1)).prompt_token_ids) == MAX_MODEL_LEN - 1
    with pytest.raises(ParameterError) as caught:
        processor.process([1] * (MAX_MODEL_LEN + 6))
    assert str(caught.value).startswith(
        "This model's maximum context length is 64 tokens. However, your prompt contains 70 input tokens, which "
        "exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
    )
    assert caught.value.parameter == "input_tokens" and caught.value.value == 70
    with pytest.raises(ParameterError, match=r"maximum context length is 64 .* 64 input .* leaves no room for output"):
        processor.process([1] * MAX_MODEL_LEN)


def test_what_is_far_too_long_is_refused_by_its_size(processor, monkeypatch):
    text = "A dog ran. " * 100_000
    with monkeypatch.context() as patch:
        patch.setattr(processor.tokenizer, "encode", None)
        for ask in (
            lambda: processor.process(text),
            lambda: processor.process_pooling({"prompt": text}),
            lambda: processor.render_chat([{"role": "user", "content": text}]),
        ):
            with pytest.raises(ParameterError) as caught:
                ask()
            words = (
                r"maximum context length is 64 tokens. However, your prompt contains at least (\d+) input tokens, which"
            )
            fewest = int(re.search(words, str(caught.value))[1])
            assert caught.value.parameter == "input_tokens" and caught.value.value == fewest
    tokens = processor.render_chat([{"role": "user", "content": text}], any_length=True)["prompt_token_ids"]
    assert MAX_MODEL_LEN < fewest <= len(tokens)


def test_the_context_length_may_be_lowered_later(processor):
    processor.max_model_len = 10
    assert processor.process([1] * 4, SamplingParams(max_tokens=None)).params.max_tokens == 6
    with pytest.raises(ParameterError, match="maximum context length is 10"):
        processor.process([1] * 10)


# Parameters


def test_max_tokens_is_resolved_to_what_fits(processor):
    for given, prompt_length, expected in ((16, 4, 16), (None, 4, 60), (64, 4, 60), (5, 63, 1)):
        params = SamplingParams(max_tokens=given)
        assert processor.process([1] * prompt_length, params).params.max_tokens == expected
        assert params.max_tokens == given  # the user's own object is as it was
    with pytest.raises(ParameterError) as caught:
        processor.process([1], SamplingParams(max_tokens=5000))
    assert str(caught.value).startswith(
        "max_tokens=5000 cannot be greater than max_model_len=64. Please request fewer output tokens."
    )


def test_the_generation_config_counts_only_without_parameters(processor, folder):
    params = processor.process("a").params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 20, 16)
    assert processor.process("a", SamplingParams()).params.temperature == 1.0
    long = InputProcessor(make_config(folder, generation_defaults={"max_tokens": 9999}))
    assert long.default_params().max_tokens == MAX_MODEL_LEN
    assert long.process([1, 2]).params.max_tokens == MAX_MODEL_LEN - 2


def test_eos_is_what_model_and_tokenizer_say_together(processor):
    own = processor.tokenizer.eos_token_id
    result = processor.process("a", SamplingParams(stop_token_ids=[3, 7]))
    assert result.eos_token_ids == {7, 9, own}
    assert result.stop_token_ids == {3, 7}
    ignoring = processor.process("a", SamplingParams(stop_token_ids=[3, 7], ignore_eos=True))
    assert ignoring.eos_token_ids == frozenset() and ignoring.stop_token_ids == {3, 7}


def test_parameters_assigned_later_are_checked_again(processor):
    params = SamplingParams()
    params.temperature = -1.0
    with pytest.raises(ParameterError, match="temperature"):
        processor.process("a", params)
    with pytest.raises(ParameterError, match="SamplingParams"):
        processor.process("a", {"temperature": 0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": 21}, "Requested sample logprobs of 21, which is greater than max allowed: 20"),
        ({"logprobs": -1}, f"Requested sample logprobs of {VOCAB_SIZE}, which is greater than max allowed: 20"),
        ({"prompt_logprobs": 30}, "Requested prompt logprobs of 30, which is greater than max allowed: 20"),
        ({"stop_token_ids": [VOCAB_SIZE]}, f"token_id(s) [{VOCAB_SIZE}] in stop_token_ids contain out-of-vocab"),
        ({"allowed_token_ids": [-1]}, "token_id(s) [-1] in allowed_token_ids contain out-of-vocab"),
        ({"logit_bias": {999: 1.0}}, "token_id(s) [999] in logit_bias contain out-of-vocab"),
    ],
)
def test_limits_of_the_model(processor, fields, message):
    with pytest.raises(ParameterError, match=re.escape(message)) as caught:
        processor.process("a", SamplingParams(**fields))
    assert caught.value.parameter in fields


def test_max_logprobs_can_be_unlimited(folder):
    processor = InputProcessor(make_config(folder, max_logprobs=-1))
    assert processor.process("a", SamplingParams(logprobs=-1, prompt_logprobs=300)).params.logprobs == -1


UNSUPPORTED_EXAMPLES = {
    "structured_outputs": StructuredOutputsParams(regex="a"),
    "thinking_token_budget": 0,
    "extra_args": {"a": 1},
    "trace_decode_token_ids": [1],
    "logprob_token_ids": [1],
    "prompt_logprob_token_ids": [1],
    "prompt_logprob_start": 0,
    "flat_logprobs": True,
}


@pytest.mark.parametrize("name", UNSUPPORTED_PARAMETERS)
def test_what_has_no_engine_behind_it_is_refused_by_name(processor, name):
    with pytest.raises(ParameterError, match=f"{name} is not supported by this version"):
        processor.process("a", SamplingParams(**{name: UNSUPPORTED_EXAMPLES[name]}))


def test_bad_words_are_spelt_with_and_without_a_leading_space(processor, llama2):
    def spellings(processor, *words):
        return processor.process("a", SamplingParams(bad_words=list(words))).bad_words_ids

    vocab = processor.tokenizer.get_vocab()
    assert spellings(processor, "o") == ((vocab["o"],),)  # " o" is two tokens: the space and the word again
    assert spellings(processor, " a") == ((vocab["a"],), (vocab["Ġa"],))
    assert spellings(processor, "a", "o") == ((vocab["a"],), (vocab["Ġa"],), (vocab["o"],))
    assert spellings(processor) == ()
    with pytest.raises(ParameterError, match="at least one token"):
        spellings(processor, " ")
    metaspace = InputProcessor(make_config(llama2, vocab_size=500))
    vocab = metaspace.tokenizer.get_vocab()
    assert spellings(metaspace, "the")[0] == (vocab["▁the"],)


def test_contradictory_token_sets_are_refused(processor):
    vocab = processor.tokenizer.get_vocab()
    allowed = [vocab["o"]]
    with pytest.raises(ParameterError, match="no token is left"):
        processor.process("a", SamplingParams(allowed_token_ids=allowed, bad_words=["o"]))
    with pytest.raises(ParameterError, match="no token is left"):
        processor.process("a", SamplingParams(allowed_token_ids=[7, 3], stop_token_ids=[3], min_tokens=1))
    processor.process("a", SamplingParams(allowed_token_ids=[7, 3], stop_token_ids=[3]))
    processor.process("a", SamplingParams(allowed_token_ids=[*allowed, 7], min_tokens=1))


# Without a tokenizer


def test_token_ids_need_no_tokenizer():
    processor = InputProcessor(make_config(None))
    assert processor.tokenizer is None
    result = processor.process([1, 2], SamplingParams(stop_token_ids=[3]))
    assert result.prompt_token_ids == [1, 2] and result.eos_token_ids == {7, 9}
    for prompt, fields in (("text", {}), ([1], {"stop": "x"}), ([1], {"bad_words": ["x"]})):
        with pytest.raises(ParameterError, match="skip_tokenizer_init"):
            processor.process(prompt, SamplingParams(**fields))
    with pytest.raises(ParameterError, match="skip_tokenizer_init"):
        processor.render_chat([{"role": "user", "content": "x"}])


def test_a_folder_without_tokenizer_files_is_a_model_error(tmp_path):
    with pytest.raises(ModelError):
        InputProcessor(make_config(tmp_path))


# Chat


def test_a_conversation_becomes_a_prompt_with_its_text(processor):
    messages = [{"role": "user", "content": "hi"}]
    prompt = processor.render_chat(messages, chat_template_kwargs={"enable_thinking": False})
    assert prompt["prompt"] == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert prompt["prompt_token_ids"] == processor.tokenizer.encode(prompt["prompt"], add_special_tokens=False)
    assert processor.process(prompt).prompt == prompt["prompt"]
    assert processor.render_chat(messages, add_generation_prompt=False)["prompt"].endswith("hi<|im_end|>\n")
    given = processor.render_chat(messages, chat_template="{{ messages[0].content }}!")
    assert given["prompt"] == "hi!"


def test_chat_adds_no_second_bos(llama2):
    processor = InputProcessor(make_config(llama2, vocab_size=500))
    prompt = processor.render_chat([{"role": "user", "content": "hi"}])
    assert processor.process(prompt).prompt_token_ids.count(processor.tokenizer.bos_token_id) == 1


def test_chat_options_cannot_be_smuggled_in(processor):
    with pytest.raises(ParameterError, match="tokenize"):
        processor.render_chat([{"role": "user", "content": "hi"}], chat_template_kwargs={"tokenize": True})


def test_the_configured_chat_template_replaces_the_models(folder):
    processor = InputProcessor(make_config(folder, chat_template="{{ 'mine' }}"))
    assert processor.render_chat([{"role": "user", "content": "hi"}])["prompt"] == "mine"


def test_a_template_told_not_to_reason_says_so_in_the_prompt(folder):
    config = make_config(folder)
    config.structured_outputs = StructuredOutputsConfig(reasoning_parser="qwen3")
    processor = InputProcessor(config)
    messages = [{"role": "user", "content": "hi"}]
    for variables, ended in (({}, None), ({"enable_thinking": True}, None), ({"enable_thinking": False}, True)):
        prompt = processor.render_chat(messages, chat_template_kwargs=variables)
        assert prompt.get("reasoning_ended") is ended
        params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
        guide = processor.process(prompt, params).guide
        assert guide is not None and bool(guide.think_end) == (ended is None)
    assert "reasoning_ended" not in InputProcessor(make_config(folder)).render_chat(
        messages, chat_template_kwargs={"enable_thinking": False}
    )
