"""How a request is sampled, when it stops, and what its output carries.

Names, defaults and rules are vLLM's. A value that breaks a rule raises :class:`~nanovllm.errors.ParameterError`, a
``ValueError``; nothing is accepted and then ignored. What depends on the model (vocabulary, context length) or on what
the engine can do is checked by ``nanovllm.engine.input.InputProcessor``.
"""

from __future__ import annotations

import copy
import logging
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from enum import Enum, IntEnum
from typing import Any

from nanovllm.constraints import GuidedDecodingParams as GuidedDecodingParams
from nanovllm.constraints import StructuredOutputsParams as StructuredOutputsParams
from nanovllm.errors import ParameterError

logger = logging.getLogger(__name__)

GREEDY_EPSILON = 1e-5  # a temperature below it means argmax
MIN_TEMPERATURE = 1e-2  # smaller positive temperatures overflow the scaled logits
MAX_N = 16384
MAX_LOGIT_BIAS = 100.0
MAX_LOGPROB_TOKEN_IDS = 128


class SamplingType(IntEnum):
    """The kind of choice a request's tokens are."""

    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2


class RequestOutputKind(Enum):
    """What each ``RequestOutput`` of a request carries."""

    CUMULATIVE = 0  # everything generated so far
    DELTA = 1  # only what is new since the last one
    FINAL_ONLY = 2  # there is one output, at the end


@dataclass
class RepetitionDetectionParams:
    """End a request whose output has become a loop, with finish reason ``"repetition"``.

    Attributes:
        max_pattern_size: longest pattern looked for, in tokens; 0 turns detection off.
        min_pattern_size: shortest pattern looked for, in tokens; 0 means 1.
        min_count: how often in a row the pattern must stand at the end of the output; at least 2.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_pattern_size <= self.max_pattern_size:
            raise ParameterError(
                "max_pattern_size, min_pattern_size must be >=0, with min_pattern_size <= max_pattern_size. "
                "Set both to 0 to disable repetitive pattern detection.",
                "repetition_detection",
                self,
            )
        if self.max_pattern_size > 0 and self.min_count < 2:
            raise ParameterError(
                "min_count must be >= 2 to detect repetitive patterns in engine output. "
                "If you do not wish to detect repetitive patterns, set max_pattern_size to 0.",
                "repetition_detection",
                self,
            )


@dataclass(slots=True, kw_only=True, repr=False)
class SamplingParams:
    """Sampling parameters of a text generation request.

    Attributes:
        n: number of independent outputs for the prompt.
        presence_penalty: in [-2, 2]; taken off the logit of every token already in the output.
        frequency_penalty: in [-2, 2]; the same, times the number of its occurrences.
        repetition_penalty: above 0; divides positive and multiplies negative logits of tokens in prompt or output.
        temperature: in [0, 2]; 0 is greedy, and positive values below 0.01 are raised to it.
        top_p: in (0, 1]; keep the smallest set of tokens whose probabilities reach it.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: in [0, 1]; keep tokens at least this fraction as likely as the likeliest.
        seed: makes the output reproducible whatever else is in the batch; -1 is the same as None.
        stop: string or strings that end the output; they are cut off the text.
        stop_token_ids: token ids that end the output; they stay in ``token_ids``.
        bad_words: strings that may not be generated.
        ignore_eos: go on after the model's end-of-sequence tokens.
        max_tokens: most tokens to generate; None means up to the context length.
        min_tokens: before this many tokens neither EOS nor a stop id nor a stop string ends the output.
        logprobs: log-probabilities per output token: this many of the likeliest, and the token itself; -1 means all.
        prompt_logprobs: the same for the prompt's tokens. Such a request does not read the prefix cache.
        logprob_token_ids: also the log-probabilities of these tokens, at most 128, in every position of the output.
        prompt_logprob_token_ids: the same in every position of the prompt but the first.
        prompt_logprob_start: the prompt's first position to score.
        flat_logprobs: hand out log-probabilities as flat arrays.
        detokenize: make text; without it outputs hold token ids only.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: put spaces between special tokens that are shown (slow tokenizers only: fast
            ones never add any).
        include_stop_str_in_output: leave the stop string, or the stop token's text, in the text.
        output_kind: cumulative outputs, deltas, or the final one only.
        stream_interval: when streaming, hand out an output every so many tokens (the first and last at once).
        structured_outputs: constraint on the form of the output.
        logit_bias: token id -> value added to its logit, clamped to [-100, 100].
        allowed_token_ids: only these tokens may be generated.
        thinking_token_budget: most tokens of reasoning; None or -1 is no limit.
        repetition_detection: end outputs that loop.
        extra_args: arguments for sampling extensions.
        skip_reading_prefix_cache: compute the whole prompt afresh. None means: only if prompt_logprobs asks for it.
        trace_decode_token_ids: token ids to emit instead of sampled ones.

    ``best_of``, ``guided_decoding`` and ``logits_processors`` are names of old versions. ``guided_decoding`` is taken
    for ``structured_outputs``, with a warning, and ``best_of`` if it is equal to ``n``; else they raise an error that
    names the remedy.

    Raises:
        ParameterError: a value that breaks its rule, with the parameter's name and value.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: list[int] | None = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    bad_words: list[str] | None = None
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    trace_decode_token_ids: list[int] | None = None
    best_of: InitVar[int | None] = None
    guided_decoding: InitVar[Any] = None
    logits_processors: InitVar[Any] = None

    def __post_init__(self, best_of: int | None, guided_decoding: Any, logits_processors: Any) -> None:
        if guided_decoding is not None:
            if not isinstance(guided_decoding, StructuredOutputsParams) or self.structured_outputs is not None:
                raise ParameterError(
                    "guided_decoding has been replaced: use structured_outputs=StructuredOutputsParams(...)",
                    "guided_decoding",
                    guided_decoding,
                )
            logger.warning("guided_decoding is deprecated: use structured_outputs=StructuredOutputsParams(...).")
            self.structured_outputs = guided_decoding
        if logits_processors:
            raise ParameterError(
                "logits_processors per request are not supported: use logit_bias, bad_words, allowed_token_ids "
                "or structured_outputs",
                "logits_processors",
                logits_processors,
            )
        if best_of is not None:
            if best_of != self.n:
                raise ParameterError(
                    f"best_of is no longer supported: ask for n={best_of} outputs and choose among them",
                    "best_of",
                    best_of,
                )
            logger.warning("best_of is deprecated and has no effect; use n.")
        self.validate()

    def validate(self) -> None:
        """Bring the fields to their canonical form and check them; needed again after fields were assigned."""
        self._normalise()
        self._verify_sampling()
        self._verify_lengths()
        self._verify_strings_and_ids()
        if self.is_greedy:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
            if self.n > 1:
                raise ParameterError(f"n must be 1 when using greedy sampling, got {self.n}.", "n", self.n)
        # Cached positions have no logits, so their log-probabilities could not be given.
        if self.prompt_logprobs is not None:
            self.skip_reading_prefix_cache = True

    def _normalise(self) -> None:
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p"):
            setattr(self, name, _number(name, getattr(self, name)))
        for name in ("n", "top_k", "min_tokens"):
            setattr(self, name, _integer(name, getattr(self, name)))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:
                setattr(self, name, 1)
        for name in ("max_tokens", "seed", "stream_interval", "logprobs", "prompt_logprobs", "thinking_token_budget"):
            if getattr(self, name) is not None:
                setattr(self, name, _integer(name, getattr(self, name)))
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            logger.warning(
                "temperature %s is less than %s, which may cause numerical errors; it is raised to %s.",
                self.temperature,
                MIN_TEMPERATURE,
                MIN_TEMPERATURE,
            )
            self.temperature = MIN_TEMPERATURE
        if self.seed == -1:
            self.seed = None
        if self.thinking_token_budget == -1:
            self.thinking_token_budget = None
        self.stop = [self.stop] if isinstance(self.stop, str) else _items("stop", self.stop)
        self.bad_words = list(dict.fromkeys(_items("bad_words", self.bad_words)))
        self.stop_token_ids = list(dict.fromkeys(_token_ids("stop_token_ids", self.stop_token_ids or [])))
        for name, count in (("logprob_token_ids", "logprobs"), ("prompt_logprob_token_ids", "prompt_logprobs")):
            if (ids := getattr(self, name)) is not None:
                setattr(self, name, list(dict.fromkeys(_token_ids(name, ids))))
                if getattr(self, count) is None:  # the token's own, and those asked for by name
                    setattr(self, count, 0)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = list(dict.fromkeys(_token_ids("allowed_token_ids", self.allowed_token_ids)))
        if self.logit_bias is not None:
            self.logit_bias = _logit_bias(self.logit_bias)
        if self.skip_reading_prefix_cache is None:
            self.skip_reading_prefix_cache = False

    def _verify_sampling(self) -> None:
        _require(self.n >= 1, "n", self.n, "at least 1")
        _require(self.n <= MAX_N, "n", self.n, f"at most {MAX_N}")
        _require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", self.presence_penalty, "in [-2, 2]")
        _require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", self.frequency_penalty, "in [-2, 2]")
        penalty = self.repetition_penalty
        _require(math.isfinite(penalty), "repetition_penalty", penalty, "a finite number")
        _require(penalty > 0.0, "repetition_penalty", penalty, "greater than zero")
        # Beyond these, a logit divided or multiplied by it may leave float32.
        _require(1e-6 <= penalty <= 1e6, "repetition_penalty", penalty, "between 1e-6 and 1e6")
        _require(math.isfinite(self.temperature), "temperature", self.temperature, "a finite number")
        _require(self.temperature >= 0.0, "temperature", self.temperature, "non-negative")
        _require(self.temperature <= 2.0, "temperature", self.temperature, "in [0, 2]")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= -1, "top_k", self.top_k, "0 (disable), or at least 1")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "in [0, 1]")
        _require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", self.seed, "a 64-bit integer")
        _require(
            isinstance(self.output_kind, RequestOutputKind), "output_kind", self.output_kind, "a RequestOutputKind"
        )

    def _verify_lengths(self) -> None:
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "greater than or equal to 0")
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"less than or equal to max_tokens={self.max_tokens}",
        )
        interval, budget = self.stream_interval, self.thinking_token_budget
        _require(interval is None or interval >= 1, "stream_interval", interval, "at least 1")
        _require(budget is None or budget >= 0, "thinking_token_budget", budget, "non-negative or -1 for unlimited")
        _require(self.logprobs is None or self.logprobs >= -1, "logprobs", self.logprobs, "non-negative or -1")
        _require(
            self.prompt_logprobs is None or self.prompt_logprobs >= -1,
            "prompt_logprobs",
            self.prompt_logprobs,
            "non-negative or -1",
        )

    def _verify_strings_and_ids(self) -> None:
        for name, values in (("stop", self.stop), ("bad_words", self.bad_words)):
            for value in values or ():
                if not isinstance(value, str):
                    raise ParameterError(f"{name} must contain only strings.", name, values)
                if not value:
                    raise ParameterError(f"{name} cannot contain an empty string.", name, values)
        if self.stop and not self.detokenize:
            raise ParameterError(
                "stop strings are only supported when detokenize is True. Set detokenize=True to use stop.",
                "stop",
                self.stop,
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ParameterError("allowed_token_ids is not None and empty!", "allowed_token_ids", [])
        for name in ("logprob_token_ids", "prompt_logprob_token_ids"):
            ids = getattr(self, name)
            if ids is not None and not 0 < len(ids) <= MAX_LOGPROB_TOKEN_IDS:
                raise ParameterError(f"{name} must hold 1 to {MAX_LOGPROB_TOKEN_IDS} ids", name, ids)

    @classmethod
    def from_optional(cls, **fields: Any) -> SamplingParams:
        """Like the constructor, but None means the default (except for ``max_tokens``, where it means no limit)."""
        return cls(**{name: value for name, value in fields.items() if value is not None or name == "max_tokens"})

    def clone(self) -> SamplingParams:
        """A copy that shares nothing changeable with this one."""
        other = copy.copy(self)
        for name in _CONTAINER_FIELDS:
            value = getattr(self, name)
            if value is not None:
                setattr(other, name, copy.copy(value))
        if self.extra_args is not None:
            other.extra_args = copy.deepcopy(self.extra_args)
        return other

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_EPSILON

    @property
    def sampling_type(self) -> SamplingType:
        """Greedy, random, or random from a seed of the request's own."""
        if self.is_greedy:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED

    def __repr__(self) -> str:
        return f"SamplingParams({', '.join(f'{name}={getattr(self, name)!r}' for name in _REPR_FIELDS)})"


@dataclass(slots=True)
class BeamSearchParams:
    """Parameters of a beam search.

    Attributes:
        beam_width: hypotheses kept after every step; at least 1.
        max_tokens: most tokens to generate; at least 1.
        ignore_eos: do not end a hypothesis at EOS.
        temperature: must be 0: the search ranks by the model's own probabilities.
        length_penalty: a hypothesis scores its summed log-probability / length ** length_penalty.
        include_stop_str_in_output: leave the end-of-sequence token's text in the text.
        structured_outputs: constraint on the form of the output.
        skip_special_tokens: leave special tokens out of the text.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = _integer(name, getattr(self, name))
            _require(value >= 1, name, value, "at least 1")
            setattr(self, name, value)
        self.temperature = _number("temperature", self.temperature)
        self.length_penalty = _number("length_penalty", self.length_penalty)
        _require(0.0 <= self.temperature <= 2.0, "temperature", self.temperature, "in [0, 2]")
        _require(math.isfinite(self.length_penalty), "length_penalty", self.length_penalty, "a finite number")


_CONTAINER_FIELDS = (
    "stop",
    "stop_token_ids",
    "prompt_logprob_token_ids",
    "logprob_token_ids",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "trace_decode_token_ids",
)

_REPR_FIELDS = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "bad_words",
    "thinking_token_budget",
    "include_stop_str_in_output",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "structured_outputs",
    "extra_args",
)


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise ParameterError(f"{name} must be {rule}, got {value}.", name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ParameterError(f"{name} must be a number, got {type(value).__name__}", name, value)
    return float(value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ParameterError(f"{name} must be an integer, got {type(value).__name__}", name, value)
    return operator.index(value)


def _items(name: str, value: Any) -> list[Any]:
    """A list of what the user gave as a sequence, or nothing."""
    if value is None:
        return []
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, (Sequence, set, frozenset)):
        raise ParameterError(f"{name} must be a list of strings, got {type(value).__name__}", name, value)
    return list(value)


def _token_ids(name: str, values: Any) -> list[int]:
    try:
        return [_integer(name, value) for value in values]
    except (TypeError, ParameterError):
        raise ParameterError(f"{name} must contain only integers, got {values}.", name, values) from None


def _logit_bias(bias: Any) -> dict[int, float]:
    """Keys to token ids, values into [-100, 100]."""
    if not isinstance(bias, Mapping):
        raise ParameterError("logit_bias must map token ids to numbers", "logit_bias", bias)
    result: dict[int, float] = {}
    for key, value in bias.items():
        try:
            token_id = int(key)
        except (TypeError, ValueError):
            raise ParameterError(
                f"logit_bias contains key(s) that cannot be converted to integer token IDs: {[key]!r}",
                "logit_bias",
                bias,
            ) from None
        number = _number("logit_bias", value)
        if math.isnan(number):
            raise ParameterError("logit_bias values must not be NaN", "logit_bias", bias)
        result[token_id] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, number))
    return result
