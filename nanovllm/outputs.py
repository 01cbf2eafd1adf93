"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position.

    Attributes:
        logprob: natural logarithm of the probability (or what ``logprobs_mode`` chose).
        rank: 1 for the most likely token of the vocabulary, 2 for the next, ...
        decoded_token: the token's text; U+FFFD stands for bytes that are not a character by themselves.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# One position: the token itself first, then the most likely ones in descending order.
PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` outputs of a request.

    Attributes:
        index: which of the n, from 0.
        text: the text, without stop string and special tokens unless asked for.
        token_ids: the tokens, including the one that ended the output (EOS, stop id) and all that formed a stop string.
        cumulative_logprob: sum of the tokens' log-probabilities, if log-probabilities were asked for.
        logprobs: per token, if asked for.
        finish_reason: "stop", "length", "abort", "error", "repetition", or None while it is being generated.
        stop_reason: the stop string or stop token id that ended it; None for EOS and every other reason.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None

    def finished(self) -> bool:
        """Whether this output is complete."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestStateStats:
    """When things happened to a request; the ``_ts`` fields are seconds of a monotonic clock.

    Attributes:
        arrival_time: wall-clock time of arrival, seconds since the epoch.
        arrival_ts: arrival.
        queued_ts: the engine had it in its queue; 0.0 before.
        scheduled_ts: its first step was planned; 0.0 before.
        first_token_ts: the first token of any of its outputs; 0.0 before.
        last_token_ts: the end of its last output; 0.0 before.
        num_generation_tokens: tokens generated, over all its outputs; counted at the end.
        max_generation_tokens: tokens of its longest output; counted at the end.
        num_preemptions: times an output of it was put back into the queue and computed again.
    """

    arrival_time: float = 0.0
    arrival_ts: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    num_generation_tokens: int = 0
    max_generation_tokens: int = 0
    num_preemptions: int = 0

    @property
    def first_token_latency(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first_token_ts - self.arrival_ts


@dataclass(slots=True)
class RequestOutput:
    """The outputs of a request: all so far, or, with ``RequestOutputKind.DELTA``, what is new.

    ``output.text`` and ``output.token_ids``, or ``output["text"]`` and ``output["token_ids"]``, are those of the first
    completion.

    Attributes:
        request_id: the request's id.
        prompt: the prompt's text; None if only token ids were given.
        prompt_token_ids: the prompt's tokens.
        prompt_logprobs: per prompt token, the first is None; only if asked for. A DELTA stream carries them once.
        outputs: the completions, by index.
        finished: whether nothing more will come.
        metrics: when things happened.
        num_cached_tokens: prompt tokens whose computation the prefix cache saved.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestStateStats | None = None
    lora_request: Any = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None
    num_cache_creation_tokens: int | None = None
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the first completion."""
        return self.outputs[0].token_ids

    def __getitem__(self, key: str) -> str | list[int]:
        if key == "text":
            return self.text
        if key == "token_ids":
            return self.token_ids
        raise KeyError(f"{key!r}: a RequestOutput has the keys 'text' and 'token_ids'; all else is an attribute")

    def __repr__(self) -> str:
        prompt = repr(self.prompt) if self.prompt is not None else f"{len(self.prompt_token_ids)} token ids"
        return (
            f"RequestOutput(request_id={self.request_id!r}, prompt={prompt}, finished={self.finished}, "
            f"num_cached_tokens={self.num_cached_tokens}, outputs={self.outputs!r})"
        )


@dataclass(slots=True)
class PoolingOutput:
    """A text's vector.

    Attributes:
        data: float32 [dimensions].
    """

    data: np.ndarray[Any, Any]


@dataclass(slots=True)
class EmbeddingOutput:
    """A text's vector as a list."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Length of the vector."""
        return len(self.embedding)


@dataclass(slots=True)
class PoolingRequestOutput:
    """What a request for a vector yields.

    Attributes:
        request_id: the request's id.
        outputs: the vector.
        prompt_token_ids: the prompt's tokens.
        num_cached_tokens: prompt tokens whose computation the prefix cache saved.
        finished: always True: there is one output.
        metrics: when things happened.
    """

    request_id: str
    outputs: PoolingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
    metrics: RequestStateStats | None = None


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """What `LLM.embed` returns for a prompt; the fields are those of `PoolingRequestOutput`."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
    metrics: RequestStateStats | None = None

    @classmethod
    def from_pooling(cls, output: PoolingRequestOutput) -> EmbeddingRequestOutput:
        """The same, its vector as a list."""
        return cls(
            output.request_id,
            EmbeddingOutput(output.outputs.data.tolist()),
            output.prompt_token_ids,
            output.num_cached_tokens,
            output.finished,
            output.metrics,
        )


@dataclass(slots=True)
class BeamSearchSequence:
    """One hypothesis of a beam search.

    Attributes:
        tokens: prompt and generated tokens.
        logprobs: per generated token.
        cum_logprob: sum of the generated tokens' log-probabilities.
        text: text of the generated tokens, once the search has ended.
        finish_reason: "stop", "length", or None while it can grow.
        stop_reason: the stop token id that ended it; None for EOS.
    """

    tokens: list[int]
    logprobs: list[PositionLogprobs]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best hypotheses of a beam search, best first."""

    sequences: list[BeamSearchSequence]
