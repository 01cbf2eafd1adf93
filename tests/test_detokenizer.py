"""Incremental detokenising and stop strings: the stream is the whole, in whole characters."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest
import tiny_tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers import Tokenizer as Backend

from nanovllm.engine.detokenizer import TableDetokenizer, WindowDetokenizer
from nanovllm.engine.stop_strings import StopStrings
from nanovllm.engine.token_text import decoder_rule
from nanovllm.engine.tokenizer import Tokenizer

FFFD = "\ufffd"
SAMPLES = [
    "Hello world, the quick  brown fox.\n\n  def f(x):\n\treturn x\n",
    "你好，世界！今天天气很好。",
    "family 👩‍👩‍👧‍👦 flags 🇩🇪🇫🇷 skin 👍🏽 heart ❤️",
    "naïve café e\u0301 Ω \U0001f9ff 𝔘𝔫𝔦 ",
    "   ",
    "مرحبا हिन्दी ภาษาไทย",
]


@pytest.fixture(scope="module")
def tokenizers_by_family(tmp_path_factory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: Tokenizer.load(getattr(tiny_tokenizers, name)(root / name)) for name in ("qwen", "llama2", "llama3")}


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int], **options) -> list[str]:
    """The deltas of an output; the last is what `flush` gives."""
    detokenizer = tokenizer.detokenizer(prompt, **options)
    return [detokenizer.push(token_id) for token_id in output] + [detokenizer.flush()]


# Random streams of ids: any tokens at all, and encoded texts that are cut anywhere.
def streams(tokenizer: Tokenizer):
    any_ids = st.lists(st.integers(0, len(tokenizer) + 3), max_size=12)
    texts = st.one_of(st.sampled_from(SAMPLES), st.text(max_size=8))
    encoded = st.tuples(texts, st.integers(0, 6), st.integers(0, 3)).map(
        lambda drawn: tokenizer.encode(drawn[0], add_special_tokens=False)[drawn[1] : 40 - drawn[2]]
    )
    return st.lists(st.one_of(any_ids, encoded), max_size=4).map(lambda parts: [i for part in parts for i in part])


def reference(tokenizer: Tokenizer, token_ids: list[int], skip: bool) -> str:
    """The text of all tokens at once, from the decoder's definition and with no state.

    For byte-level tokenizers that is `tokenizers` itself. Its ByteFallback makes U+FFFD of every byte of a run in which
    any byte is wrong, however long the run; a stream keeps the characters before and after it.
    """
    spec = json.loads(tokenizer.backend.decoder.__getstate__())
    if spec["type"] == "ByteLevel":
        return tokenizer.decode(token_ids, skip_special_tokens=skip)
    special = set(tokenizer.all_special_ids) if skip else set()
    data = b""
    for token_id in token_ids:
        token = tokenizer.backend.id_to_token(token_id)
        if token is not None and token_id not in special:
            byte = re.fullmatch(r"<0x(..)>", token)
            data += bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
    text = re.sub("[\udc80-\udcff]", FFFD, data.decode("utf-8", "surrogateescape"))
    return text.removeprefix(" ")


def continuation(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> str | None:
    """What the output adds to the prompt's text; None where decoding the prompt alone changes what is there."""
    before, whole = reference(tokenizer, prompt, skip), reference(tokenizer, prompt + output, skip)
    return whole[len(before) :] if whole.startswith(before) else None


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("family", ["qwen", "llama2", "llama3"])
def test_the_deltas_add_up_to_the_full_decode(tokenizers_by_family, family, skip):
    tokenizer = tokenizers_by_family[family]

    @settings(max_examples=150)
    @given(streams(tokenizer), streams(tokenizer))
    def check(prompt, output):
        deltas = stream(tokenizer, prompt, output, skip_special_tokens=skip)
        at_once = tokenizer.detokenizer(prompt, skip_special_tokens=skip)
        assert at_once.push_all(output) + at_once.flush() == "".join(deltas)
        expected = continuation(tokenizer, prompt, output, skip)
        if expected is not None:
            assert "".join(deltas) == expected
        # Against the library itself, wherever it has no byte to replace.
        whole = tokenizer.decode(prompt + output, skip_special_tokens=skip)
        if FFFD not in whole:
            assert "".join(deltas) == whole[len(tokenizer.decode(prompt, skip_special_tokens=skip)) :]

    check()


@pytest.mark.parametrize("family", ["qwen", "llama2", "llama3"])
def test_text_comes_as_soon_as_it_is_whole_and_never_earlier(tokenizers_by_family, family):
    tokenizer = tokenizers_by_family[family]
    for text in SAMPLES:
        output = tokenizer.encode(text, add_special_tokens=False)
        detokenizer = tokenizer.detokenizer()
        seen = ""
        for position, token_id in enumerate(output, 1):
            delta = detokenizer.push(token_id)
            assert FFFD not in delta
            seen += delta
            # Nothing is held back but the bytes of one unfinished character.
            assert seen == reference(tokenizer, output[:position], skip=True).rstrip(FFFD)
        assert seen == tokenizer.decode(output)
        assert detokenizer.flush() == ""


@pytest.mark.parametrize("family", ["qwen", "llama2"])
def test_a_character_cut_by_the_end_becomes_a_replacement_as_in_a_full_decode(tokenizers_by_family, family):
    tokenizer = tokenizers_by_family[family]
    output = tokenizer.encode("🙂", add_special_tokens=False)[:-1]
    if family == "llama2":
        output = output[1:]  # the space
    deltas = stream(tokenizer, [], output)
    assert deltas[:-1] == [""] * len(output)
    assert deltas[-1] == tokenizer.decode(output) != ""


def test_wrong_bytes_are_replaced_when_the_next_token_shows_it(tokenizers_by_family):
    qwen = tokenizers_by_family["qwen"]
    vocab = qwen.get_vocab()
    assert stream(qwen, [], [vocab["ä"], vocab["½"], vocab["a"]]) == ["", "", FFFD + "a", ""]
    llama = tokenizers_by_family["llama2"]
    vocab = llama.get_vocab()
    assert stream(llama, [], [vocab["<0xE4>"], vocab["<0xBD>"], vocab["a"]]) == ["", "", FFFD * 2 + "a", ""]


def test_characters_around_a_wrong_byte_are_kept(tokenizers_by_family):
    llama = tokenizers_by_family["llama2"]
    ids = [llama.get_vocab()[f"<0x{byte:02X}>"] for byte in "你".encode() + b"\xff" + "好".encode()]
    assert "".join(stream(llama, [], ids)) == f"你{FFFD}好"


def test_the_leading_space_is_stripped_from_a_text_but_not_from_a_continuation(tokenizers_by_family):
    llama = tokenizers_by_family["llama2"]
    hello = llama.encode("Hello", add_special_tokens=False)
    assert "".join(stream(llama, [], hello)) == "Hello"
    assert "".join(stream(llama, [llama.bos_token_id], hello)) == "Hello"  # a skipped token is no text
    assert "".join(stream(llama, [llama.bos_token_id], hello, skip_special_tokens=False)) == " Hello"
    assert "".join(stream(llama, llama.encode("Say"), hello)) == " Hello"
    space = llama.get_vocab()["▁"]
    assert "".join(stream(llama, [], [space, *hello])) == " Hello"
    assert "".join(stream(llama, [space], hello)) == " Hello"


def test_a_character_begun_in_the_prompt_belongs_to_the_output_that_completes_it(tokenizers_by_family):
    for family in ("qwen", "llama2"):
        tokenizer = tokenizers_by_family[family]
        ids = tokenizer.encode("a🙂b", add_special_tokens=False)
        for cut in (1, 2, 3, 4):
            prompt, output = ids[: -cut - 1], ids[-cut - 1 :]
            assert "".join(stream(tokenizer, prompt, output)) == "🙂b"
        # Never completed: its U+FFFD is the prompt's.
        prompt = ids[:-2]
        assert "".join(stream(tokenizer, prompt, tokenizer.encode("b", add_special_tokens=False))).strip() == "b"
        assert stream(tokenizer, prompt, []) == [""]


def test_added_tokens_are_text_and_special_tokens_only_on_request(tokenizers_by_family):
    qwen = tokenizers_by_family["qwen"]
    ids = qwen.encode("<think>a</think><|im_end|>b", add_special_tokens=False)
    assert "".join(stream(qwen, [], ids)) == "<think>a</think>b"
    assert "".join(stream(qwen, [], ids, skip_special_tokens=False)) == "<think>a</think><|im_end|>b"


def test_ids_beyond_the_tokenizer_are_no_text(tokenizers_by_family):
    # Models pad their vocabulary.
    qwen = tokenizers_by_family["qwen"]
    a = qwen.get_vocab()["a"]
    assert "".join(stream(qwen, [], [a, len(qwen) + 5, a])) == "aa"


def test_a_skipped_token_inside_a_character_does_not_break_it(tokenizers_by_family):
    qwen = tokenizers_by_family["qwen"]
    ids = qwen.encode("🙂", add_special_tokens=False)
    assert "".join(stream(qwen, [], [*ids[:2], qwen.eos_token_id, *ids[2:]])) == "🙂"


# Other decoders


def word_tokenizer(decoder) -> Tokenizer:
    vocab = {"[UNK]": 0, "▁Hello": 1, "▁world": 2, "▁": 3, "x": 4, "##y": 5, "<0xC3>": 6, "<0xA9>": 7, "▁▁": 8, "z▁": 9}
    backend = Backend(models.WordLevel(vocab, unk_token="[UNK]"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(backend)


RECOGNISED = [
    decoders.Metaspace(),
    decoders.Metaspace(prepend_scheme="never"),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
]
UNRECOGNISED = [
    None,
    decoders.WordPiece(),
    decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.ByteFallback(), decoders.Fuse()]),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0), decoders.Fuse()]),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip("_", 1, 0)]),
]


@pytest.mark.parametrize("decoder", RECOGNISED, ids=lambda decoder: decoder.__getstate__().decode()[:60])
def test_recognised_decoders_stream_exactly(decoder):
    tokenizer = word_tokenizer(decoder)
    assert isinstance(tokenizer.detokenizer(), TableDetokenizer)

    @settings(max_examples=150)
    @given(st.lists(st.integers(0, 11), max_size=5), st.lists(st.integers(0, 11), max_size=6))
    @example([10], [8, 8, 1])
    def check(prompt, output):
        whole = tokenizer.decode(prompt + output)
        if FFFD not in whole:
            assert "".join(stream(tokenizer, prompt, output)) == whole[len(tokenizer.decode(prompt)) :]

    check()


@pytest.mark.parametrize("decoder", UNRECOGNISED, ids=lambda decoder: str(decoder and decoder.__getstate__())[:80])
def test_other_decoders_go_through_a_window(decoder):
    tokenizer = word_tokenizer(decoder)
    assert isinstance(tokenizer.detokenizer(), WindowDetokenizer)
    output = [2, 4, 2, 4, 4, 5, 2, 0, 4]
    assert (
        "".join(stream(tokenizer, [1, 2], output)) == tokenizer.decode([1, 2, *output])[len(tokenizer.decode([1, 2])) :]
    )
    # `token_text` needs no table either.
    assert tokenizer.token_text(4) == "x"


def test_the_window_stays_small_and_loses_nothing(tokenizers_by_family):
    qwen = tokenizers_by_family["qwen"]
    sizes = []

    def decode(token_ids):
        sizes.append(len(token_ids))
        return qwen.decode(token_ids)

    text = "".join(SAMPLES)
    lone, eos = qwen.get_vocab()["ä"], qwen.eos_token_id
    output = qwen.encode(text) + [lone] * 50 + [eos] * 50 + qwen.encode("end")
    detokenizer = WindowDetokenizer(decode, qwen.encode("a prompt that is longer than the window"))
    deltas = [detokenizer.push(token_id) for token_id in output] + [detokenizer.flush()]
    assert "".join(deltas) == unicodedata.normalize("NFC", text) + FFFD * 50 + "end"
    assert max(sizes) <= 3 * WindowDetokenizer.MAX_HELD


def test_decoders_without_a_rule_are_told_apart():
    assert decoder_rule(None) is None
    assert decoder_rule({"type": "CTC"}) is None
    assert decoder_rule({"type": "Sequence", "decoders": []}) is None
    strip_both = {"type": "Strip", "content": " ", "start": 1, "stop": 1}
    assert decoder_rule({"type": "Sequence", "decoders": [{"type": "Fuse"}, strip_both]}) is None
    assert decoder_rule({"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}).byte_level


# Stop strings


def run_stops(stops, pieces, include=False, unchecked=0):
    checker = StopStrings(stops, include)
    out = []
    for number, piece in enumerate(pieces):
        text, stop = checker.push(piece, check=number >= unchecked)
        out.append(text)
        if stop is not None:
            return out, stop
    return [*out, checker.flush()], None


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """By definition: character by character, the first that is complete; of several the longest."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return end - len(stop), end, stop
    return None


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.booleans(),
)
def test_stop_strings_are_found_across_any_cut(stops, pieces, include):
    out, stop = run_stops(stops, pieces, include)
    text = "".join(pieces)
    expected = first_stop(text, stops)
    if expected is None:
        assert stop is None and "".join(out) == text
    else:
        start, end, which = expected
        assert stop == which
        assert "".join(out) == text[: end if include else start]


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_no_character_of_a_stop_string_is_ever_handed_out(stops, pieces):
    checker = StopStrings(stops, include=False)
    hold = max(map(len, stops)) - 1
    given_out, text = "", ""
    for piece in pieces:
        text += piece
        released, stop = checker.push(piece)
        given_out += released
        if stop is not None:
            break
        assert given_out == text[: max(0, len(text) - hold)]


def test_unchecked_text_may_begin_a_stop_string_but_not_complete_it():
    assert run_stops(["ab"], ["ab", "c", "ab"], unchecked=1) == (["a", "b", "c"], "ab")
    assert run_stops(["bc"], ["ab", "c"], unchecked=1) == (["a", ""], "bc")
    assert run_stops(["ab"], ["ab", "c"], unchecked=2) == (["a", "b", "c"], None)
    assert run_stops(["ab", "wxyz"], ["ab", "c"], unchecked=1) == (["", "", "abc"], None)


def test_included_stop_strings_need_no_holding_back():
    assert run_stops(["END"], ["x E", "N", "D y"], include=True) == (["x E", "N", "D"], "END")
    assert run_stops(["END"], ["x E", "N", "D y"]) == (["x", " ", ""], "END")
