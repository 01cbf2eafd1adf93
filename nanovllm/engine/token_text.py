"""What each token contributes to the text, as a table.

A tokenizer's decoder turns a list of tokens into text. For the decoders language models use, that is the same as
giving every token some bytes, joining them and reading the result as UTF-8 (plus a rule for the very start of the
text). With such a table a token costs one look-up, so decoding a stream is linear and needs no window of old tokens.

Two families are recognised (see `decoder_rule`):

- byte-level BPE (GPT-2, Qwen, Llama 3): every character of a token stands for one byte;
- sentencepiece (Llama 2, Mistral, Gemma): "▁" is a space, ``<0xE4>`` is a byte, all else is itself.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\ufffd"

# `tokenizers` puts one U+FFFD for every byte that ByteFallback cannot use; Python one for every ill-formed sequence.
EACH_BYTE = "nanovllm.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class DecoderRule:
    """How a recognised decoder makes bytes of tokens.

    Attributes:
        byte_level: characters of a token are bytes of the GPT-2 alphabet.
        replacements: (pattern, content) applied to a token in turn.
        byte_fallback: tokens like ``<0xE4>`` are bytes.
        strip_start: spaces dropped from the start of the text, at most.
        dropped_from_first: a character that vanishes from the first token of the text.
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_start: int = 0
    dropped_from_first: str = ""

    @property
    def errors(self) -> str:
        """The error handler that replaces ill-formed UTF-8 as `tokenizers` does."""
        return EACH_BYTE if self.byte_fallback else "replace"

    def token_bytes(self, token: str, first: bool = False) -> bytes:
        """Bytes of one token; ``first`` if no token stands before it."""
        if self.byte_level:
            try:
                return bytes([BYTE_ALPHABET[character] for character in token])
            except KeyError:  # an added token that was never spelt in the alphabet
                return token.encode()
        if first and self.dropped_from_first:
            token = token.replace(self.dropped_from_first, "")
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()


def decoder_rule(spec: dict[str, Any] | None) -> DecoderRule | None:
    """The rule for a decoder as tokenizer.json describes it, or None if it is not one that a table can express."""
    if spec is None:
        return None
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return DecoderRule(byte_level=True)
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        first = "" if steps[0].get("prepend_scheme", "always") == "never" else mark
        return DecoderRule(replacements=((mark, " "),), dropped_from_first=first)
    # Replace*, ByteFallback?, Fuse, Strip?: before Fuse steps see single tokens, after it the whole text.
    shape = re.fullmatch(r"(?:Replace )*(ByteFallback )?Fuse (Strip )?", "".join(f"{kind} " for kind in kinds))
    if shape is None:
        return None
    replacements = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
    if any(not pattern for pattern, _ in replacements):  # a regular expression
        return None
    strip_start = 0
    if shape[2]:
        if steps[-1]["content"] != " " or steps[-1]["stop"]:
            return None
        strip_start = steps[-1]["start"]
    return DecoderRule(replacements=tuple(replacements), byte_fallback=bool(shape[1]), strip_start=strip_start)


class TokenText(dict[int, "str | bytes"]):
    """Token id -> its text, or its bytes where they are not whole characters. Entries are made when first used.

    Args:
        rule: the tokenizer's rule.
        id_to_token: the tokenizer's own look-up; None for an id it does not know.
        skipped: ids that leave no trace (special tokens, if they are not to be shown).
    """

    def __init__(
        self, rule: DecoderRule, id_to_token: Callable[[int], str | None], skipped: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self.rule = rule
        self._id_to_token = id_to_token
        self._skipped = skipped

    def is_skipped(self, token_id: int) -> bool:
        """Whether decoding leaves this token out altogether."""
        return token_id in self._skipped or self._id_to_token(token_id) is None

    def first(self, token_id: int) -> str | bytes:
        """The entry of a token that begins the text."""
        return self._entry(token_id, first=True)

    def __missing__(self, token_id: int) -> str | bytes:
        entry = self[token_id] = self._entry(token_id, first=False)
        return entry

    def _entry(self, token_id: int, first: bool) -> str | bytes:
        token = None if token_id in self._skipped else self._id_to_token(token_id)
        if token is None:
            return ""
        data = self.rule.token_bytes(token, first)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data

    def unfinished(self, token_ids: Sequence[int]) -> bytes:
        """The bytes of a character that the text of these tokens ends in the middle of; at most three."""
        tail = b""
        for token_id in reversed(token_ids):
            entry = self[token_id]
            if isinstance(entry, bytes):
                tail = entry + tail
            elif entry:
                break
            if len(tail) >= 3:
                break
        _, used = codecs.utf_8_decode(tail, "replace", False)
        return tail[used:]
