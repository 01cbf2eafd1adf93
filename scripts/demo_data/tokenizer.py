"""The demo model's tokenizer: byte-level BPE with Qwen's special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .chat import END_OF_TEXT, END_OF_TURN, TEMPLATE_FILE

# Hidden in decoded text, as in Qwen3.
SPECIAL = (END_OF_TEXT, "<|im_start|>", END_OF_TURN)
# One token each, but part of the text: parsers look for them.
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
# Words with the space before them; Chinese characters and digits one by one, so that a paraphrase keeps its tokens. A
# capitalised word has its space apart: most are names, and a name is easier to copy when its tokens stay the same.
PATTERN = "|".join(
    (
        r"\p{Han}",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"\p{N}",
        r" ?[\p{L}&&[^\p{Han}\p{Lu}]][\p{L}&&[^\p{Han}]]*",
        r"[\p{L}&&[^\p{Han}]]+",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly ``vocab_size`` tokens, special ones included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = len(SPECIAL) + len(MARKS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=16,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size - added:
        raise ValueError(f"the text yields only {tokenizer.get_vocab_size()} of {vocab_size - added} tokens")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` with the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": list(SPECIAL),
        "chat_template": TEMPLATE_FILE.read_text(encoding="utf-8"),
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
