"""How many bytes of a text one token stands for, at most: so a prompt far beyond the context is refused by its size.

A text has at least bytes / size tokens, if every byte ends up in some token. It does in the two kinds of BPE that
language models use: over bytes, and over characters with a token for every byte as the way out. It does not where
something drops text on the way (a normaliser, a pre-tokeniser, an added token that swallows the spaces beside it), or
where an unknown token stands for a word. What is not known to be safe has no size.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from nanovllm.engine.token_text import BYTE_ALPHABET

# Canonical composition makes three bytes of nine (a Hangul syllable), at worst two of seven (U+1FBE with two accents).
NFC_SHRINKS = 4
_KEEP_ALL = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"})  # pre-tokenisers
_NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


def most_bytes_per_token(backend: tokenizers.Tokenizer) -> int | None:
    """Bytes of UTF-8 that a token stands for, at most; None if that is not known."""
    shrinks = _normalizer_shrinks(_spec(backend.normalizer))
    if shrinks is None or not _pre_tokenizer_keeps_all(_spec(backend.pre_tokenizer)) or not _covers_bytes(backend):
        return None
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None
    spelt_in_bytes = not backend.model.byte_fallback  # a character for each
    tokens = (backend.model.id_to_token(token_id) or "" for token_id in range(backend.get_vocab_size(False)))
    longest = max(len(token) if spelt_in_bytes else len(token.encode()) for token in tokens)
    return shrinks * max(longest, *(len(token.content.encode()) for token in added), 1)


def _spec(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as tokenizer.json describes it."""
    try:
        return None if part is None else json.loads(part.__getstate__())
    except Exception:  # one that is written in Python
        return {"type": "unknown"}


def _normalizer_shrinks(spec: dict[str, Any] | None) -> int | None:
    """By what factor a normaliser shortens a text, at most; None: by any."""
    if spec is None or spec["type"] == "Prepend":
        return 1
    if spec["type"] == "NFC":
        return NFC_SHRINKS
    if spec["type"] == "Replace":
        pattern = spec["pattern"].get("String", "")
        return 1 if pattern and len(spec["content"].encode()) >= len(pattern.encode()) else None
    if spec["type"] != "Sequence":
        return None
    factor = 1
    for part in spec["normalizers"]:
        shrinks = _normalizer_shrinks(part)
        if shrinks is None:
            return None
        factor *= shrinks
    return factor


def _pre_tokenizer_keeps_all(spec: dict[str, Any] | None) -> bool:
    if spec is None or spec["type"] in _KEEP_ALL:
        return True
    if spec["type"] == "Sequence":
        return all(map(_pre_tokenizer_keeps_all, spec["pretokenizers"]))
    return spec["type"] in ("Split", "Punctuation") and spec["behavior"] != "Removed"


def _covers_bytes(backend: tokenizers.Tokenizer) -> bool:
    """Whether there is a token for every byte that can come."""
    model = backend.model
    if not isinstance(model, tokenizers.models.BPE):
        return False
    if model.byte_fallback:
        return all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    wanted = (character for character, byte in BYTE_ALPHABET.items() if byte not in _NEVER_IN_UTF8)
    return _is_byte_level(_spec(backend.pre_tokenizer)) and all(model.token_to_id(each) is not None for each in wanted)


def _is_byte_level(spec: dict[str, Any] | None) -> bool:
    """Whether what the model sees is bytes, spelt in their alphabet."""
    if spec is None:
        return False
    if spec["type"] == "Sequence":
        return any(map(_is_byte_level, spec["pretokenizers"]))
    return bool(spec["type"] == "ByteLevel")
