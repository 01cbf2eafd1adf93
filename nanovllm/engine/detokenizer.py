"""From a stream of tokens to a stream of text: whole characters only, nothing lost, linear in total.

The text of a sequence is what decoding prompt and output together adds to decoding the prompt:

- the space that sentencepiece decoders strip from the start of a text stays at the start of a continuation;
- a character begun in the prompt and completed by the output belongs to the output; the U+FFFD of a character begun in
  the prompt and never completed belongs to the prompt;
- bytes that never become a character turn into U+FFFD as soon as the next byte shows it, or at the end.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from typing import Protocol

from nanovllm.engine.token_text import REPLACEMENT, TokenText


class Detokenizer(Protocol):
    """Makes text of one growing sequence."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        ...

    def push_all(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        ...

    def flush(self) -> str:
        """The sequence has ended: what was held back."""
        ...


class TableDetokenizer:
    """Detokenizer for tokenizers with a `TokenText` table: holds back at most the three bytes of an open character."""

    __slots__ = ("_at_first_token", "_pending", "_plain", "_strip", "_surplus", "_table")

    def __init__(self, table: TokenText, prompt_token_ids: Sequence[int]) -> None:
        self._table = table
        self._pending = table.unfinished(prompt_token_ids)
        # U+FFFDs that decoding the prompt alone would have ended with.
        self._surplus = utf_8_decode(self._pending, table.rule.errors, True)[0]
        self._strip = _spaces_left_to_strip(table, prompt_token_ids)
        self._at_first_token = bool(table.rule.dropped_from_first) and all(map(table.is_skipped, prompt_token_ids))
        self._plain = self._is_plain()

    def push(self, token_id: int) -> str:
        entry = self._table[token_id]
        if self._plain and entry.__class__ is str:
            return entry  # type: ignore[return-value]
        if self._at_first_token and not self._table.is_skipped(token_id):
            self._at_first_token = False
            entry = self._table.first(token_id)
        return self._decode(entry.encode() if isinstance(entry, str) else entry, final=False)

    def push_all(self, token_ids: Sequence[int]) -> str:
        if self._at_first_token:
            return "".join(map(self.push, token_ids))
        entries = map(self._table.__getitem__, token_ids)
        return self._decode(b"".join([e.encode() if isinstance(e, str) else e for e in entries]), final=False)

    def flush(self) -> str:
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, final: bool) -> str:
        data = self._pending + data
        text, used = utf_8_decode(data, self._table.rule.errors, final)
        self._pending = data[used:]
        if text and self._surplus:
            text = text.removeprefix(self._surplus)
            self._surplus = ""
        if text and self._strip:
            spaces = min(len(text) - len(text.lstrip(" ")), self._strip)
            self._strip = self._strip - spaces if spaces == len(text) else 0
            text = text[spaces:]
        self._plain = self._is_plain()
        return text

    def _is_plain(self) -> bool:
        """Whether a token's own text is all it adds."""
        return not (self._pending or self._surplus or self._strip or self._at_first_token)


def _spaces_left_to_strip(table: TokenText, prompt_token_ids: Sequence[int]) -> int:
    """Spaces that the decoder would still strip after the prompt: none, once the prompt has any other text."""
    left = table.rule.strip_start
    if left:
        for token_id in prompt_token_ids:
            entry = table[token_id]
            if isinstance(entry, bytes) or entry.strip(" "):
                return 0
            left -= len(entry)
            if left <= 0:
                return 0
    return left


class WindowDetokenizer:
    """Detokenizer for any tokenizer: decodes a short window twice and takes the difference.

    The window keeps the tokens whose text was last handed out as context. A text that ends in U+FFFD may end inside a
    character; it is held back for up to `MAX_HELD` tokens, more than any character has bytes.
    """

    CONTEXT = 5  # tokens of the prompt
    MAX_HELD = 8

    __slots__ = ("_decode", "_read", "_read_text", "_window")

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-self.CONTEXT :])
        self._read = len(self._window)  # tokens of the window whose text is out
        self._read_text = decode(self._window)

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._read < self.MAX_HELD:
            return ""
        return self._advance(text)

    def push_all(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        new = text[len(self._read_text) :]
        if new:
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._read_text = self._decode(self._window)
        elif len(self._window) - self._read >= self.MAX_HELD:  # a run of tokens without text
            del self._window[self._read]
        return new
