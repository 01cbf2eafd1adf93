"""Text to token ids and back, from a checkpoint's tokenizer files.

`tokenizers` reads tokenizer.json; what Hugging Face keeps beside it (special tokens, BOS and EOS rules, the chat
template) is read here, so that neither loading nor running a model needs `transformers`. Only tokenizers without a
tokenizer.json are loaded through it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from nanovllm.engine import chat_template as chat
from nanovllm.engine.detokenizer import Detokenizer, TableDetokenizer, WindowDetokenizer
from nanovllm.engine.token_size import most_bytes_per_token
from nanovllm.engine.token_text import TokenText, decoder_rule
from nanovllm.errors import ModelError, ParameterError
from nanovllm.model_files import read_json

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A `tokenizers` tokenizer with its special tokens and chat template.

    Args:
        backend: the tokenizer; it is changed (truncation and padding are switched off).
        special_tokens: names such as "eos_token" -> token.
        chat_templates: name -> Jinja source; "default" is used unless another is asked for.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        chat_templates: dict[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        added = backend.get_added_tokens_decoder()
        self.all_special_ids = sorted(token_id for token_id, token in added.items() if token.special)
        decoder = backend.decoder
        rule = decoder_rule(json.loads(decoder.__getstate__())) if decoder is not None else None
        self._shown, self._skipped = None, None
        if rule is not None:
            self._shown = TokenText(rule, backend.id_to_token)
            self._skipped = TokenText(rule, backend.id_to_token, frozenset(self.all_special_ids))

    @classmethod
    def load(
        cls, path: str | Path, *, mode: str = "auto", chat_template: str | None = None, trust_remote_code: bool = False
    ) -> Tokenizer:
        """Load the tokenizer of a checkpoint folder.

        Args:
            path: the folder.
            mode: "auto" reads tokenizer.json and asks transformers only if there is none; "hf" always goes through
                transformers; "slow" does so for the Python implementation.
            chat_template: a template's path or text, instead of the checkpoint's.
            trust_remote_code: let transformers run tokenizer code that comes with the checkpoint.

        Raises:
            ModelError: files are missing or malformed, or transformers is needed and not installed.
        """
        path = Path(path)
        if mode == "auto" and (path / "tokenizer.json").is_file():
            tokenizer = cls._from_files(path)
        else:
            tokenizer = _from_transformers(path, mode, trust_remote_code)
        if chat_template is not None:
            tokenizer.chat_templates = {"default": _template_text(chat_template)}
        return tokenizer

    @classmethod
    def _from_files(cls, path: Path) -> Tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # `tokenizers` raises plain Exception
            raise ModelError(f"{path / 'tokenizer.json'} is not a tokenizer: {error}") from error
        config = _read_json(path / "tokenizer_config.json")
        # Newer configs describe added tokens themselves; beside older ones the map counts.
        special_map = _read_json(path / "special_tokens_map.json")
        merged = special_map | config if "added_tokens_decoder" in config else config | special_map
        special_tokens = {
            name: _content(value)
            for name, value in merged.items()
            if name.endswith("_token") and isinstance(value, (str, dict))
        }
        _add_missing_tokens(backend, merged, special_tokens)
        _add_wanted_bos_eos(backend, config, special_tokens)
        return cls(backend, special_tokens, _chat_templates(path, config))

    # Encoding and decoding

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with ``add_special_tokens`` what the model expects around one (often BOS)."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def fewest_tokens(self, text: str) -> int:
        """Tokens that a text has at least, told by its size; 0 for a tokenizer of which nothing can be said."""
        size = self._bytes_per_token
        return 0 if size is None else -(-len(text.encode(errors="surrogatepass")) // size)

    @cached_property
    def _bytes_per_token(self) -> int | None:
        return most_bytes_per_token(self.backend)

    def decode(
        self,
        token_ids: Sequence[int] | int,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of token ids. The decoder of a fast tokenizer adds no spaces, so the last argument changes nothing."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(
        self,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> Detokenizer:
        """An incremental decoder for the text that follows a prompt."""
        table = self._skipped if skip_special_tokens else self._shown
        if table is not None:
            return TableDetokenizer(table, prompt_token_ids)
        decode = partial(
            self.decode,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )
        return WindowDetokenizer(decode, prompt_token_ids)

    def token_text(self, token_id: int) -> str:
        """One token's text, its leading space included; U+FFFD for bytes that are no character by themselves."""
        if self._shown is None:
            return self.decode([token_id], skip_special_tokens=False)
        entry = self._shown[token_id]
        return entry if isinstance(entry, str) else entry.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """One token's text in UTF-8, also where it is only a part of a character."""
        entry = self.token_text(token_id) if self._shown is None else self._shown[token_id]
        return entry.encode() if isinstance(entry, str) else entry

    # Vocabulary

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens; ``len()`` counts them."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        """The tokens as the vocabulary spells them; None for an unknown id."""
        return [self.backend.id_to_token(token_id) for token_id in token_ids]

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        """Ids of tokens spelt as in the vocabulary; None for an unknown one."""
        return [self.backend.token_to_id(token) for token in tokens]

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of `bos_token`."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of `eos_token`."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, if there is one."""
        return self._special_id("pad_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    # Chat

    @property
    def chat_template(self) -> str | None:
        """The template used when none is named."""
        return self.chat_templates.get("default")

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """The template to use: the given one (a name, a path or the text), one for tools, or the default.

        Raises:
            ParameterError: there is none.
        """
        if chat_template is not None:
            return self.chat_templates.get(chat_template) or _template_text(chat_template)
        if tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" in self.chat_templates:
            return self.chat_templates["default"]
        if self.chat_templates:
            raise ParameterError(
                f"the model has several chat templates and no default: name one of {sorted(self.chat_templates)}",
                "chat_template",
                None,
            )
        raise ParameterError(
            "the model has no chat template: give one (chat_template=...) or use a plain prompt", "chat_template", None
        )

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> str | list[int]:
        """Render a conversation, as token ids or (``tokenize=False``) as text.

        The template writes BOS itself, so no special tokens are added. See `nanovllm.engine.chat_template.render`.
        """
        named = {name: token for name, token in self.special_tokens.items() if name in SPECIAL_TOKEN_NAMES}
        text = chat.render(
            self.get_chat_template(chat_template, tools),
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**named, **variables},
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text


class SlowTokenizer(Tokenizer):
    """A tokenizer that only `transformers` can run (Python code, no `tokenizers` equivalent)."""

    def __init__(self, tokenizer: Any, special_tokens: dict[str, str], chat_templates: dict[str, str]) -> None:
        self._tokenizer = tokenizer
        self._shown = self._skipped = None
        self.special_tokens = special_tokens
        self.chat_templates = chat_templates
        self.all_special_ids = sorted(tokenizer.all_special_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def fewest_tokens(self, text: str) -> int:
        return 0

    def decode(
        self,
        token_ids: Sequence[int] | int,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        return self._tokenizer.decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def __len__(self) -> int:
        return len(self._tokenizer)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        return self._tokenizer.convert_ids_to_tokens(list(token_ids))

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        return self._tokenizer.convert_tokens_to_ids(list(tokens))

    def _special_id(self, name: str) -> int | None:
        return getattr(self._tokenizer, f"{name}_id")


def _from_transformers(path: Path, mode: str, trust_remote_code: bool) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ModelError(
            f"the tokenizer in {path} has no tokenizer.json and needs transformers: pip install nano-vllm-ascend[hf]"
        ) from None
    try:
        loaded = AutoTokenizer.from_pretrained(path, use_fast=mode != "slow", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"transformers cannot load a tokenizer from {path}: {error}") from error
    special_tokens = {name: str(token) for name in SPECIAL_TOKEN_NAMES if (token := getattr(loaded, name, None))}
    templates = loaded.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    backend = getattr(loaded, "backend_tokenizer", None)
    if mode != "slow" and isinstance(backend, tokenizers.Tokenizer):
        return Tokenizer(backend, special_tokens, templates)
    return SlowTokenizer(loaded, special_tokens, templates)


def _read_json(path: Path) -> dict[str, Any]:
    """A file that a tokenizer may lack."""
    return read_json(path) if path.is_file() else {}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _added_token(token: dict[str, Any]) -> tokenizers.AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return tokenizers.AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Add what the config knows and tokenizer.json does not: added tokens in order of id, then special tokens."""
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    described = config.get("added_tokens_decoder", {})
    for token_id in sorted(described, key=int):
        token = described[token_id]
        if token["content"] not in known:
            backend.add_tokens([_added_token(token)])
            known[token["content"]] = bool(token.get("special"))
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    for content in (*special_tokens.values(), *map(_content, extra)):
        if not known.get(content):
            backend.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])
            known[content] = True


def _add_wanted_bos_eos(backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Let the post-processor write BOS and EOS also where only the config asks for them.

    Llama-style checkpoints say ``add_bos_token: true`` and leave it to the tokenizer's class to obey. What
    tokenizer.json adds by itself stays, whatever the config says, as in transformers 5.
    """
    present = backend.encode("").tokens
    wanted = {name: special_tokens.get(name) for name in ("bos_token", "eos_token")}
    missing = [name for name, token in wanted.items() if config.get(f"add_{name}") and token and token not in present]
    if not missing:
        return
    bos, eos = (token if name in missing or token in present else None for name, token in wanted.items())
    template = [token for token in (bos, "$A", eos) if token is not None]
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token is not None]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=ids)


def _chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name. Files of their own count more than tokenizer_config.json, that more than a processor's."""
    file = path / "chat_template.jinja"
    named = {
        extra.stem: extra.read_text(encoding="utf-8")
        for extra in sorted((path / "additional_chat_templates").glob("*.jinja"))
    }
    if file.is_file():
        return {**named, "default": file.read_text(encoding="utf-8")}
    template = config.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        return {**named, "default": template}
    return {**named, **{entry["name"]: entry["template"] for entry in template or []}}


def _template_text(template: str) -> str:
    """A template the user gave as a path or as its text."""
    if "{" in template or "\n" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise ParameterError("chat_template is neither a template nor the path of one", "chat_template", template)
    return path.read_text(encoding="utf-8")
