"""The fewest tokens a text can have, told by its bytes: never more than it has, enough to refuse what is too long."""

from __future__ import annotations

import random
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanovllm.engine.token_size import NFC_SHRINKS, most_bytes_per_token
from nanovllm.engine.tokenizer import Tokenizer

DEMO = Path(tiny_tokenizers.__file__).parents[1] / "nanovllm" / "assets" / "demo"
PIECES = [
    *(" ", "  ", "\n", "\t", "\u3000", "\u200b", "\x00", "a", "the", "The quick", "function", "0", "123", "!", "..."),
    *("é", "e\u0301", "\u212a", "\u2126\u0313\u0300\u0345", "\u1112\u1161\u11ab", "ﬁ", "你", "好", "猫", "\U0001d400"),
    "👩\u200d👩\u200d👧",
    *("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin_of_text|>", "<0x41>", "▁", "▁▁▁", "Ġ"),
]  # fmt: skip


@pytest.fixture(params=["qwen", "llama3", "llama2", "demo"])
def tokenizer(request: Any, tmp_path: Path) -> Tokenizer:
    folder = DEMO if request.param == "demo" else getattr(tiny_tokenizers, request.param)(tmp_path)
    return Tokenizer.load(folder)


def test_no_text_has_fewer_tokens(tokenizer: Tokenizer):
    chance = random.Random(0)
    for _ in range(2000):
        count = chance.choice([1, 3, 30])
        text = "".join(chance.choice(PIECES) * chance.choice([1, 1, 2, 20]) for _ in range(count))
        if chance.random() < 0.2:
            text += "".join(map(chr, (chance.randrange(0x20, 0xD800) for _ in range(20))))
        assert 1 <= tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False)), repr(text)


def test_the_longest_token_again_and_again_is_what_the_bound_is_for(tokenizer: Tokenizer):
    texts = [tokenizer.token_text(token_id) for token_id in range(len(tokenizer))]
    longest = max((text for text in texts if "\ufffd" not in text), key=lambda text: len(text.encode()))
    text = longest * 1000
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer.fewest_tokens(text) >= 1000 / (2 * NFC_SHRINKS)


def test_composition_shrinks_a_text_by_less_than_is_allowed_for():
    singles: dict[str, int] = {}  # character -> bytes of the longest character that is canonically the same
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        composed = unicodedata.normalize("NFC", character)
        if len(composed) == 1:
            singles[composed] = max(singles.get(composed, 0), len(character.encode(errors="surrogatepass")))

    @cache
    def most(character: str) -> int:
        """Bytes of the longest text that composes to a character."""
        parts = unicodedata.decomposition(character)
        if 0xAC00 <= ord(character) < 0xD7A4:
            return 3 * len(unicodedata.normalize("NFD", character))
        whole = singles.get(character, 0)
        if not parts or parts.startswith("<"):
            return whole
        return max(whole, sum(most(chr(int(part, 16))) for part in parts.split()))

    ratios = [most(character) / len(character.encode(errors="surrogatepass")) for character in singles]
    assert max(ratios) == 3.5 < NFC_SHRINKS


def _byte_level() -> Backend:
    """A character for every byte and nothing else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def _with_swallowing_token() -> Backend:
    backend = _byte_level()
    backend.add_tokens([AddedToken("<mask>", lstrip=True)])
    return backend


def _without_a_byte() -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[1:]
    backend = Backend(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    return backend


def _with(**parts: Any) -> Backend:
    backend = _byte_level()
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def test_bytes_alone_are_a_byte_each():
    assert most_bytes_per_token(_byte_level()) == 1
    assert most_bytes_per_token(_with(normalizer=normalizers.NFC())) == NFC_SHRINKS


@pytest.mark.parametrize(
    "backend",
    [
        Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        Backend(models.Unigram([("a", -1.0), ("b", -2.0)], 0)),
        Backend(models.BPE({"a": 0}, [])),
        _with(normalizer=normalizers.Strip()),
        _with(normalizer=normalizers.NFKC()),
        _with(normalizer=normalizers.Replace("  ", " ")),
        _with(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
        _with(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])),
        _with(
            pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
        ),
        _with(pre_tokenizer=pre_tokenizers.Digits()),
        _with_swallowing_token(),
        _without_a_byte(),
    ],
)
def test_where_text_can_vanish_nothing_is_said(backend: Backend):
    assert most_bytes_per_token(backend) is None
    assert Tokenizer(backend).fewest_tokens("x" * 10_000) == 0
