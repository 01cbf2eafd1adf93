"""Tokenizer and chat templates against transformers, on tokenizers built here."""

from __future__ import annotations

import datetime
import json
import re
import sys
from pathlib import Path

import pytest
import tiny_tokenizers
from transformers import AutoTokenizer

from nanovllm.engine.tokenizer import SlowTokenizer, Tokenizer
from nanovllm.errors import ModelError, ParameterError

FAMILIES = ("qwen", "llama2", "llama3")
TEXTS = (
    "",
    "Hello world",
    "  two  spaces ",
    " leading",
    "你好 世界 🙂 é ‍👩‍👩‍👧",
    "tab\t and\r\n newlines\n\n",
    "<think>x</think><|im_end|> <s> </s>a <|eot_id|>",
    "1234567890 == '\\x00' \x00",
)
USER = {"role": "user", "content": "  What is 2+2? "}
ASSISTANT = {"role": "assistant", "content": "It is four."}
CHATS = (
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, ASSISTANT, {"role": "user", "content": "Sure?"}],
    [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour"}, USER],
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Wetter für <Städte> & co", "parameters": {"type": "object"}},
    }
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: getattr(tiny_tokenizers, name)(root / name) for name in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, folders):
    """Our tokenizer and transformers', of the same files."""
    folder = folders[request.param]
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def test_encoding_and_decoding_equal_transformers(pair):
    ours, theirs = pair
    for text in TEXTS:
        for special in (True, False):
            token_ids = ours.encode(text, add_special_tokens=special)
            assert token_ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(token_ids, skip_special_tokens=skip) == theirs.decode(
                    token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )
    assert ours.decode(ours.encode("a")[-1]) == "a"


def test_vocabulary_equals_transformers(pair):
    ours, theirs = pair
    assert len(ours) == len(theirs) and ours.vocab_size == theirs.vocab_size
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.bos_token_id == theirs.bos_token_id and ours.bos_token == theirs.bos_token
    assert ours.eos_token_id == theirs.eos_token_id and ours.eos_token == theirs.eos_token
    assert ours.pad_token_id == theirs.pad_token_id
    assert set(theirs.all_special_ids) <= set(ours.all_special_ids)
    token_ids = ours.encode("Hello 你好")
    tokens = ours.convert_ids_to_tokens(token_ids)
    assert tokens == theirs.convert_ids_to_tokens(token_ids)
    assert ours.convert_tokens_to_ids(tokens) == token_ids


def test_token_text_keeps_the_space_and_marks_partial_characters(folders):
    llama = Tokenizer.load(folders["llama2"])
    assert llama.token_text(llama.get_vocab()["▁the"]) == " the"
    assert llama.token_text(llama.get_vocab()["<0xE4>"]) == "\ufffd"
    assert llama.token_text(llama.eos_token_id) == "</s>"
    qwen = Tokenizer.load(folders["qwen"])
    assert qwen.token_text(qwen.get_vocab()["ä"]) == "\ufffd"  # byte 0xE4
    assert qwen.token_text(qwen.get_vocab()["Ġthe"]) == " the"


@pytest.mark.parametrize("add_bos_token", [True, False, None])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_the_post_processor_rules_over_add_bos_token_as_in_transformers(tmp_path, tokenizer_class, add_bos_token):
    folder = tiny_tokenizers.llama2(
        tmp_path, add_bos_token=add_bos_token, add_eos_token=False, tokenizer_class=tokenizer_class, legacy=False
    )
    token_ids = Tokenizer.load(folder).encode("Hello")
    assert token_ids[0] == 1 and token_ids == AutoTokenizer.from_pretrained(folder).encode("Hello")


def test_a_config_can_ask_for_bos_and_eos_that_the_post_processor_leaves_out(tmp_path):
    folder = tiny_tokenizers.llama2(tmp_path, add_bos_token=True, add_eos_token=True)
    plain = Tokenizer.load(folder).encode("Hello", add_special_tokens=False)
    assert Tokenizer.load(folder).encode("Hello") == [1, *plain, 2]
    contents = json.loads((folder / "tokenizer.json").read_text())
    contents["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    assert Tokenizer.load(folder).encode("Hello") == [1, *plain, 2]


def test_tokens_known_only_to_the_config_are_added(tmp_path):
    folder = tiny_tokenizers.qwen(tmp_path, eos_token="<|new_eos|>", extra_special_tokens=["<|new_extra|>"])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    size = len(Tokenizer.load(folder))
    config["added_tokens_decoder"]["337"] = {"content": "<note>", "special": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == size + 1
    token_ids = ours.encode("a<note>b<|new_eos|><|new_extra|>")
    assert token_ids == theirs.encode("a<note>b<|new_eos|><|new_extra|>")
    assert ours.decode(token_ids) == "a<note>b"
    assert ours.eos_token_id == theirs.eos_token_id == token_ids[-2]


def test_special_tokens_map_counts_beside_an_old_config(tmp_path):
    folder = tiny_tokenizers.llama3(tmp_path)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end_of_text|>"}}))
    assert Tokenizer.load(folder).eos_token == "<|end_of_text|>"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|end_of_text|>"


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    folder = tiny_tokenizers.llama3(tmp_path)
    contents = json.loads((folder / "tokenizer.json").read_text())
    contents["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    assert len(Tokenizer.load(folder).encode("a b c d e f g h")) > 8


# Chat templates


def chats_of(theirs):
    llama2 = theirs.bos_token == "<s>"
    return [chat for chat in CHATS if not (llama2 and chat[0]["role"] == "system" and len(chat) == 1)]


def test_chat_templates_render_as_in_transformers(pair):
    ours, theirs = pair
    for chat in chats_of(theirs):
        for options in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
            text = theirs.apply_chat_template(chat, tokenize=False, **options)
            assert ours.apply_chat_template(chat, tokenize=False, **options) == text
            assert ours.apply_chat_template(chat, **options) == ours.encode(text, add_special_tokens=False)
            expected = theirs.apply_chat_template(chat, return_dict=False, **options)
            assert ours.apply_chat_template(chat, **options) == expected


def test_tools_render_as_in_transformers(folders):
    ours, theirs = Tokenizer.load(folders["qwen"]), AutoTokenizer.from_pretrained(folders["qwen"])
    chat = [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
        },
        {"role": "tool", "content": "12°"},
    ]
    text = theirs.apply_chat_template(chat, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(chat, TOOLS, tokenize=False, add_generation_prompt=True) == text
    assert "<Städte> & co" in text
    # The OpenAI form: arguments as JSON text, and content None.
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
    openai = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, chat[2]]
    assert ours.apply_chat_template(openai, TOOLS, tokenize=False, add_generation_prompt=True) == text
    assert call["function"]["arguments"] == '{"city": "Zürich"}'  # the caller's message is as it was


def test_bos_is_written_once(folders):
    for name in ("llama2", "llama3"):
        tokenizer = Tokenizer.load(folders[name])
        token_ids = tokenizer.apply_chat_template([USER], add_generation_prompt=True)
        assert token_ids.count(tokenizer.bos_token_id) == 1 and token_ids[0] == tokenizer.bos_token_id


def test_strftime_now_gives_the_date(folders):
    text = Tokenizer.load(folders["llama3"]).apply_chat_template([USER], tokenize=False)
    assert re.search(r"Today Date: \d\d \w{3} \d{4}", text)
    assert str(datetime.datetime.now().year) in text or "Dec" in text


@pytest.mark.parametrize("content", ["It is", "It is ", "  It is  "])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_final_message_can_be_continued(folders, name, content):
    ours, theirs = Tokenizer.load(folders[name]), AutoTokenizer.from_pretrained(folders[name])
    chat = [USER, {"role": "assistant", "content": content}]
    text = ours.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert text == theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert text.rstrip().endswith("It is")


def test_keys_that_are_none_are_absent_for_the_template(folders):
    message = {"role": "user", "content": "x", "name": None}
    template = "{{ messages[0].name is defined }}"
    ours, theirs = Tokenizer.load(folders["qwen"]), AutoTokenizer.from_pretrained(folders["qwen"])
    text = ours.apply_chat_template([message], tokenize=False, chat_template=template)
    assert text == theirs.apply_chat_template([message], tokenize=False, chat_template=template) == "False"


def test_text_parts_are_joined_unless_the_template_reads_parts(folders):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    tokenizer = Tokenizer.load(folders["qwen"])
    joined = tokenizer.apply_chat_template([{"role": "user", "content": "one\ntwo"}], tokenize=False)
    assert tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False) == joined
    for template in (
        "{% for m in messages %}{% for part in m['content'] %}[{{ part.text }}]{% endfor %}{% endfor %}",
        "{% macro show(content) %}{% for p in content %}[{{ p.text }}]{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
        "{% for m in messages %}{% for part in m.content | list %}[{{ part['text'] }}]{% endfor %}{% endfor %}",
    ):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, chat_template=template
        )
        assert text == "[one][two]"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "non-empty list"),
        ("hello", {}, "non-empty list"),
        ([{"content": "x"}], {}, "'role'"),
        ([{"role": "wizard", "content": "x"}], {}, "Unexpected role wizard"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], {}, "'image_url'"),
        ([{"role": "user", "content": object()}], {}, "plain data"),
        ([USER], {"tools": ["weather"]}, "tools must be a list of dicts"),
        ([USER], {"add_generation_prompt": True, "continue_final_message": True}, "not compatible"),
        ([{"role": "user"}], {"continue_final_message": True}, "final message with text"),
        ([USER], {"chat_template": "{% if %}"}, "malformed"),
        ([USER], {"chat_template": "no-such-file"}, "neither a template nor the path"),
        ([USER], {"chat_template": "{{ messages.__class__.mro() }}"}, "cannot render"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            {},
            "must be JSON",
        ),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}], {}, "'function'"),
    ],
)
def test_bad_conversations_are_parameter_errors(folders, messages, options, message):
    with pytest.raises(ParameterError, match=re.escape(message)):
        Tokenizer.load(folders["qwen"]).apply_chat_template(messages, **options)


def test_templates_are_found_where_checkpoints_keep_them(tmp_path):
    inline, file, processor = "{{ 'inline' }}", "{{ 'file' }}", "{{ 'processor' }}"

    def rendered(folder: Path, **options) -> str:
        return Tokenizer.load(folder).apply_chat_template([USER], tokenize=False, **options)

    folder = tiny_tokenizers.qwen(tmp_path / "a", template=None)
    with pytest.raises(ParameterError, match="no chat template"):
        rendered(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor}))
    assert rendered(folder) == "processor"
    tiny_tokenizers.qwen(tmp_path / "a", template=inline)
    assert rendered(folder) == "inline"
    (folder / "chat_template.jinja").write_text(file)
    assert rendered(folder) == "file"
    (tmp_path / "mine.jinja").write_text("{{ 'mine' }}")
    assert rendered(folder, chat_template=str(tmp_path / "mine.jinja")) == "mine"
    assert Tokenizer.load(folder, chat_template="{{ 'given' }}").chat_template == "{{ 'given' }}"


def test_named_templates(tmp_path):
    folder = tiny_tokenizers.qwen(tmp_path, template=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "{{ 'plain' }}"},
        {"name": "tool_use", "template": "{{ 'tools' }}"},
        {"name": "rag", "template": "{{ 'rag' }}"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for options in ({}, {"tools": TOOLS}, {"chat_template": "rag"}):
        expected = theirs.apply_chat_template([USER], tokenize=False, **options)
        assert ours.apply_chat_template([USER], tokenize=False, **options) == expected
    ours.chat_templates.pop("default")
    with pytest.raises(ParameterError, match="'rag', 'tool_use'"):
        ours.apply_chat_template([USER])


# Loading


def test_a_broken_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_without_transformers_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=re.escape("nano-vllm-ascend[hf]")):
        Tokenizer.load(tmp_path)


def test_a_folder_without_a_tokenizer_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
        Tokenizer.load(tmp_path)


def test_transformers_can_load_what_we_cannot(folders, tmp_path):
    ours = Tokenizer.load(folders["llama2"])
    through = Tokenizer.load(folders["llama2"], mode="hf")
    assert type(through) is Tokenizer
    assert through.encode("Hello 你好") == ours.encode("Hello 你好")
    assert through.apply_chat_template([USER]) == ours.apply_chat_template([USER])
    assert through.eos_token_id == ours.eos_token_id


def test_a_python_tokenizer_works_through_transformers(tmp_path):
    # A character-level tokenizer that exists only as Python code.
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 2, "eos_token": "</s>"})
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert isinstance(tokenizer, SlowTokenizer)
    token_ids = tokenizer.encode("né", add_special_tokens=True)
    assert token_ids[-1] == tokenizer.eos_token_id and tokenizer.decode(token_ids) == "né"
    assert len(tokenizer) == len(tokenizer.get_vocab()) >= tokenizer.vocab_size
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(token_ids)) == token_ids
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(token_id) for token_id in token_ids] == ["n", "", "é", ""]
    assert tokenizer.token_text(token_ids[0]) == "n"
