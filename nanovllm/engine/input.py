"""What a user asks, checked and made ready for the engine: tokens, resolved parameters, the ids that end the output."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanovllm.engine.plan import Pooling
from nanovllm.engine.structured import GrammarCompiler, GuideBuilder, GuideSpec
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ParameterError
from nanovllm.inputs import PromptType, TokensPrompt
from nanovllm.pooling_params import PoolingParams
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig

# Parameters that have no engine behind them yet. A feature is enabled by taking its name off this list.
UNSUPPORTED_PARAMETERS = (
    "extra_args",
    "trace_decode_token_ids",
    "prompt_logprob_start",
    "flat_logprobs",
)

PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "cache_salt", "reasoning_ended"})


@dataclass(slots=True)
class EngineInput:
    """One tokenised prompt and everything about it that does not change while it runs.

    Attributes:
        prompt: the prompt's text, if the user gave text.
        prompt_token_ids: at least one id, each in the vocabulary; fewer than the context length.
        params: a copy of the user's parameters with ``max_tokens`` resolved to what fits (never None).
        stop_token_ids: ids that end the output with themselves as stop reason.
        eos_token_ids: ids that end the output with no stop reason; empty if EOS is ignored.
        bad_words_ids: token sequences that may not be generated.
        cache_salt: prompts with different salts share no cached blocks.
        guide: what the output must follow; ``params.structured_outputs`` has gone into it.
        pooling: no output is wanted but a vector of the prompt.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    bad_words_ids: tuple[tuple[int, ...], ...]
    cache_salt: str | None
    guide: GuideSpec | None = None
    pooling: Pooling | None = None


class InputProcessor:
    """Turns prompts and sampling parameters into `EngineInput`.

    Attributes:
        tokenizer: the model's, or None if it was not to be loaded.
        max_model_len: context length in tokens, prompt and output together. May be lowered when the cache is sized.
        eos_token_ids: the model's, whether or not a request ignores them.
    """

    def __init__(self, config: EngineConfig, grammars: GrammarCompiler | None = None) -> None:
        """``grammars``: where the engine compiles them, if it is in this process."""
        model = config.model
        self.max_model_len = model.max_model_len
        self._vocab_size = model.vocab_size
        self._max_logprobs = model.vocab_size if model.max_logprobs == -1 else model.max_logprobs
        self._pooling_config = config.pooling
        self._hidden_size: int = model.hf_config.get("hidden_size", 0)
        self._generation_defaults = dict(model.generation_defaults)
        self.tokenizer: Tokenizer | None = None
        if model.tokenizer is not None:
            self.tokenizer = Tokenizer.load(
                model.tokenizer,
                mode=model.tokenizer_mode,
                chat_template=model.chat_template,
                trust_remote_code=model.trust_remote_code,
            )
        eos = set(model.eos_token_ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            eos.add(self.tokenizer.eos_token_id)
        self.eos_token_ids = frozenset(eos)
        grammars = grammars or GrammarCompiler(model)
        grammars.use(self.tokenizer)
        self.guides = GuideBuilder(config.structured_outputs, self.tokenizer, grammars)

    def default_params(self) -> SamplingParams:
        """What a request without parameters is sampled with: the checkpoint's generation config."""
        defaults = dict(self._generation_defaults)
        if defaults.get("max_tokens") is not None:
            defaults["max_tokens"] = min(defaults["max_tokens"], self.max_model_len)
        return SamplingParams(**defaults)

    def process(self, prompt: PromptType, params: SamplingParams | None = None) -> EngineInput:
        """Check and tokenise one prompt.

        Args:
            prompt: text, token ids, or a `TextPrompt` or `TokensPrompt`.
            params: how to sample; None means `default_params`.

        Raises:
            ParameterError: with the parameter's name, its value, and what would be right.
        """
        if self._pooling_config.only:
            raise ParameterError(
                "this model makes vectors and does not generate; if it can, try runner='generate'", "runner", "pooling"
            )
        if params is None:
            resolved = self.default_params()
        elif isinstance(params, SamplingParams):
            resolved = params.clone()
            resolved.validate()  # fields may have been assigned since it was made
        else:
            raise ParameterError("sampling_params must be SamplingParams", "sampling_params", type(params).__name__)
        self._refuse_unsupported(resolved)
        text, token_ids, cache_salt, reasoning_ended = self._tokenize(prompt)
        self._check_prompt(token_ids)
        self._resolve_max_tokens(resolved, len(token_ids))
        self._check_logprobs(resolved)
        stop_token_ids = frozenset(resolved.stop_token_ids or ())
        eos_token_ids = frozenset() if resolved.ignore_eos else self.eos_token_ids
        self._check_ids("stop_token_ids", stop_token_ids)
        self._check_ids("logit_bias", resolved.logit_bias or ())
        for name in ("allowed_token_ids", "logprob_token_ids", "prompt_logprob_token_ids"):
            self._check_ids(name, getattr(resolved, name) or ())
        bad_words_ids = self._bad_words_ids(resolved)
        _check_something_allowed(resolved, stop_token_ids | eos_token_ids, bad_words_ids)
        if resolved.stop and self.tokenizer is None:
            raise ParameterError("stop strings need a tokenizer, and skip_tokenizer_init is set", "stop", resolved.stop)
        guide = self.guides.build(resolved, token_ids, self.eos_token_ids, reasoning_ended)
        resolved.structured_outputs = None
        return EngineInput(
            prompt=text,
            prompt_token_ids=token_ids,
            params=resolved,
            stop_token_ids=stop_token_ids,
            eos_token_ids=eos_token_ids,
            bad_words_ids=bad_words_ids,
            cache_salt=cache_salt,
            guide=guide,
        )

    def process_pooling(self, prompt: PromptType, params: PoolingParams | None = None) -> EngineInput:
        """Check and tokenise one prompt whose vector is wanted.

        Args:
            prompt: as for `process`; it may fill the whole context.
            params: None takes the model's defaults.

        Raises:
            ParameterError: the prompt or a parameter cannot be honoured.
        """
        pooling = self._pooling(params)
        text, token_ids, cache_salt, _ = self._tokenize(prompt)
        self._check_prompt(token_ids, room_for_output=False)
        # A mean needs the hidden states of all positions, and the cache has none.
        skip = pooling.method == "mean"
        return EngineInput(
            prompt=text,
            prompt_token_ids=token_ids,
            params=SamplingParams(
                max_tokens=1, detokenize=False, skip_reading_prefix_cache=skip, output_kind=RequestOutputKind.FINAL_ONLY
            ),
            stop_token_ids=frozenset(),
            eos_token_ids=frozenset(),
            bad_words_ids=(),
            cache_salt=cache_salt,
            pooling=pooling,
        )

    def render_chat(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        any_length: bool = False,
    ) -> TokensPrompt:
        """A conversation as a prompt, its text included. The template writes BOS itself; it is not added again.

        Args:
            messages: dicts with "role" and "content".
            tools: tool definitions as dicts.
            chat_template: template text, path, or name of one of the model's.
            add_generation_prompt: end with the header of the assistant's answer.
            continue_final_message: let the model go on with the final message.
            chat_template_kwargs: further variables of the template, such as ``enable_thinking``.
            any_length: tokenise also what is far too long for the context.

        Raises:
            ParameterError: no tokenizer or template, malformed messages, or the template refuses them; or the prompt is
                far too long.
        """
        if self.tokenizer is None:
            raise ParameterError("chat needs a tokenizer, and skip_tokenizer_init is set", "messages", None)
        variables = dict(chat_template_kwargs or {})
        for name in ("tokenize", "messages", "tools"):
            if name in variables:
                raise ParameterError(f"chat_template_kwargs must not hold {name!r}", "chat_template_kwargs", name)
        options: dict[str, Any] = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **variables,
        }
        text = self.tokenizer.apply_chat_template(messages, tools, tokenize=False, **options)
        assert isinstance(text, str)
        if not any_length:
            self.refuse_by_size(text)
        prompt: TokensPrompt = {
            "prompt": text,
            "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False),
        }
        if self.guides.switched_off(variables):
            prompt["reasoning_ended"] = True
        return prompt

    def refuse_by_size(self, text: str) -> None:
        """Refuse a prompt so large that it cannot have few enough tokens, instead of tokenising it.

        That would take seconds, and a hundred times the memory of the text, only to come to the same answer.

        Raises:
            ParameterError: it is.
        """
        if self.tokenizer is not None and len(text) > self.max_model_len:
            fewest = self.tokenizer.fewest_tokens(text)
            if fewest > self.max_model_len:
                raise self._too_long(fewest, "at least ", "exceeds this limit even without any")

    # Steps of `process`

    def _refuse_unsupported(self, params: SamplingParams) -> None:
        for name in UNSUPPORTED_PARAMETERS:
            value = getattr(params, name)
            if value is not None and value is not False:
                raise ParameterError(f"{name} is not supported by this version", name, value)

    def _tokenize(self, prompt: PromptType) -> tuple[str | None, list[int], str | None, bool]:
        """(text, token ids, cache salt, whether reasoning is over) of a prompt in any of its forms."""
        if isinstance(prompt, str):
            return prompt, self._encode(prompt), None, False
        if not isinstance(prompt, Mapping):
            return None, _as_token_ids(prompt), None, False
        given = {key: value for key, value in prompt.items() if value is not None}
        for key in given:
            if key not in PROMPT_KEYS:
                raise ParameterError(f"{key} in a prompt is not supported by this model and version", key, "...")
        text, salt = given.get("prompt"), given.get("cache_salt")
        if text is not None and not isinstance(text, str):
            raise ParameterError(f"prompt must be a string, got {type(text).__name__}", "prompt", text)
        if salt is not None and not (isinstance(salt, str) and salt):
            raise ParameterError("cache_salt must be a non-empty string", "cache_salt", salt)
        ended = bool(given.get("reasoning_ended", False))
        if "prompt_token_ids" in given:
            return text, _as_token_ids(given["prompt_token_ids"]), salt, ended
        if text is None:
            raise ParameterError("a prompt dict needs 'prompt' or 'prompt_token_ids'", "prompt", sorted(given))
        return text, self._encode(text), salt, ended

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ParameterError(
                "a text prompt needs a tokenizer, and skip_tokenizer_init is set: give prompt_token_ids", "prompt", text
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ParameterError(f"the prompt is not Unicode text (position {error.start})", "prompt", text) from None
        self.refuse_by_size(text)
        return self.tokenizer.encode(text)

    def _pooling(self, params: PoolingParams | None) -> Pooling:
        if params is None:
            params = PoolingParams()
        elif not isinstance(params, PoolingParams):
            raise ParameterError("pooling_params must be PoolingParams", "pooling_params", type(params).__name__)
        config = self._pooling_config
        size = config.dimensions if params.dimensions is None else params.dimensions
        if size is not None and config.sizes is not None and size not in config.sizes:
            raise ParameterError(f"this model's vectors have one of the sizes {config.sizes}", "dimensions", size)
        if size is not None and size > self._hidden_size:
            raise ParameterError(f"this model's vectors have {self._hidden_size} dimensions", "dimensions", size)
        normalize = config.normalize if params.use_activation is None else params.use_activation
        return Pooling(config.method, normalize, size)

    def _check_prompt(self, token_ids: list[int], room_for_output: bool = True) -> None:
        if not token_ids:
            raise ParameterError("The prompt cannot be empty: it needs at least one token.", "prompt", "")
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < self._vocab_size:
                raise ParameterError(
                    f"Token id {token_id} is out of vocabulary (0 <= id < {self._vocab_size}).",
                    "prompt_token_ids",
                    token_id,
                )
        length = len(token_ids)
        if length > self.max_model_len:
            raise self._too_long(length, "", "exceeds this limit even without any")
        if room_for_output and length == self.max_model_len:
            raise self._too_long(length, "", "leaves no room for")

    def _too_long(self, length: int, how: str, reason: str) -> ParameterError:
        return ParameterError(
            f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains {how}"
            f"{length} input tokens, which {reason} output tokens. Please reduce the length of the input prompt.",
            "input_tokens",
            length,
        )

    def _resolve_max_tokens(self, params: SamplingParams, prompt_length: int) -> None:
        room = self.max_model_len - prompt_length
        if params.max_tokens is None:
            params.max_tokens = room
        elif params.max_tokens > self.max_model_len:
            raise ParameterError(
                f"max_tokens={params.max_tokens} cannot be greater than max_model_len={self.max_model_len}. "
                "Please request fewer output tokens.",
                "max_tokens",
                params.max_tokens,
            )
        else:
            params.max_tokens = min(params.max_tokens, room)

    def _check_logprobs(self, params: SamplingParams) -> None:
        for name, label in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
            value = getattr(params, name)
            count = self._vocab_size if value == -1 else value
            if count is not None and count > self._max_logprobs:
                raise ParameterError(
                    f"Requested {label} logprobs of {count}, which is greater than max allowed: {self._max_logprobs}",
                    name,
                    value,
                )

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        outside = [token_id for token_id in token_ids if not 0 <= token_id < self._vocab_size]
        if outside:
            raise ParameterError(
                f"token_id(s) {outside} in {name} contain out-of-vocab token ids. Vocabulary size: {self._vocab_size}",
                name,
                outside,
            )

    def _bad_words_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Token sequences of the bad words, at the start of a text and after a space."""
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise ParameterError(
                "bad_words need a tokenizer, and skip_tokenizer_init is set", "bad_words", params.bad_words
            )
        sequences: list[tuple[int, ...]] = []
        for word in params.bad_words:
            plain = tuple(self.tokenizer.encode(word.lstrip(), add_special_tokens=False))
            if not plain:
                raise ParameterError(
                    "bad_words entries must tokenize to at least one token.", "bad_words", params.bad_words
                )
            sequences.append(plain)
            spaced = tuple(self.tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
            # Another spelling of the same word, and not the word after a token for the space.
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                sequences.append(spaced)
        self._check_ids("bad_words", (token_id for sequence in sequences for token_id in sequence))
        return tuple(sequences)


def _as_token_ids(values: Any) -> list[int]:
    """A list of Python ints from any sequence of integers (arrays too)."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ParameterError(
            f"a prompt must be a string, a list of token ids or a dict, got {type(values).__name__}",
            "prompt",
            values,
        )
    token_ids = values.tolist() if hasattr(values, "tolist") else list(values)
    if not set(map(type, token_ids)) <= {int}:
        try:
            token_ids = [_index(token_id) for token_id in token_ids]
        except TypeError:
            raise ParameterError("prompt_token_ids must contain only integers", "prompt_token_ids", "...") from None
    return token_ids


def _index(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _check_something_allowed(
    params: SamplingParams, ending_ids: frozenset[int], bad_words_ids: tuple[tuple[int, ...], ...]
) -> None:
    """Refuse allowed_token_ids of which bad_words or min_tokens leave nothing: no token could be sampled."""
    if params.allowed_token_ids is None:
        return
    banned = {sequence[0] for sequence in bad_words_ids if len(sequence) == 1}
    if params.min_tokens > 0:
        banned |= ending_ids
    if banned.issuperset(params.allowed_token_ids):
        raise ParameterError(
            "allowed_token_ids, bad_words and min_tokens contradict each other: no token is left to generate",
            "allowed_token_ids",
            params.allowed_token_ids,
        )
