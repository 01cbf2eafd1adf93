"""The messages of the engine loop: a step's plan, its result, and what the result means for each request.

None of them holds a tensor. A plan names requests by *row*: the runner keeps the token ids, block table and sampling
state of row ``r`` between steps, so a plan carries only what has changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from nanovllm.engine.request import Request
    from nanovllm.engine.structured import GuideSpec
    from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a vector is made of a prompt's hidden states.

    Attributes:
        method: "last" takes the last token's, "mean" the mean of all.
        normalize: scale the vector to length 1.
        dimensions: keep the first so many; None keeps all.
    """

    method: str
    normalize: bool = True
    dimensions: int | None = None


@dataclass(slots=True)
class RowStart:
    """A request enters a row: at its first admission, or again after preemption.

    Whatever the row held before is void. ``token_ids`` are all known tokens, prompt first, then output generated
    before a preemption. The row's block table arrives with ``StepPlan.block_updates``.
    """

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int  # 64 bits; with a token's position it determines every random draw of the request
    stop_token_ids: tuple[int, ...]  # EOS and stop ids: masked until min_tokens are out
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    guide: GuideSpec | None = None  # what the tokens from position guided_from on must follow
    guided_from: int = 0
    pooling: str | None = None  # "last" | "mean": no tokens are wanted but one vector of the prompt

    @classmethod
    def of(cls, request: Request) -> RowStart:
        """The start of a request in the row it has been given."""
        return cls(
            row=request.row,
            token_ids=list(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            params=request.params,
            seed=request.seed,
            stop_token_ids=tuple(sorted(request.stop_token_ids | request.eos_token_ids)),
            bad_words_ids=request.bad_words_ids,
            guide=request.guide,
            guided_from=request.guided_from,
            pooling=request.pooling,
        )


@dataclass(slots=True)
class StepPlan:
    """What one step computes. Row ``rows[i]`` computes positions ``num_computed[i] .. +num_new[i]``.

    Order of execution in the runner: ``starts``, ``block_updates``, ``copies``, then the forward pass over ``rows``
    in order (rows with one new token come first), then sampling of ``rows[i] for i in sampled``.
    """

    step: int
    starts: list[RowStart] = field(default_factory=list)
    # (row, index of the first table entry written, block ids)
    block_updates: list[tuple[int, int, list[int]]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source block, target block): copy on write
    rows: list[int] = field(default_factory=list)
    num_computed: list[int] = field(default_factory=list)
    num_new: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)  # indexes into rows, ascending
    pooled: list[int] = field(default_factory=list)  # indexes into rows whose prompt ends here and is pooled
    num_tokens: int = 0  # sum of num_new

    # The scheduler's own half: never sent to a rank.
    requests: list[Request] = field(default_factory=list)  # aligned with rows


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the token itself first, then the most likely ones in descending order.

    ``token_ids`` and ``logprobs`` have 1 + k entries; ``rank`` is the 1-based rank of the token itself.
    """

    token_ids: np.ndarray[Any, Any]  # int64 [1 + k]
    logprobs: np.ndarray[Any, Any]  # float32 [1 + k]
    rank: int


@dataclass(slots=True)
class StepResult:
    """What came out of a step."""

    token_ids: list[int]  # one per entry of plan.sampled
    # index into plan.sampled -> logprobs of the sampled token; only requests that asked
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    # index into plan.rows -> logprobs of prompt tokens num_computed+1 .. ; only requests that asked
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    # indexes into plan.sampled: the output is complete with this token, whatever stop rules say; ...
    complete: list[int] = field(default_factory=list)
    # ... it has no valid token, and why
    failed: dict[int, str] = field(default_factory=dict)
    pooled: list[np.ndarray[Any, Any]] = field(default_factory=list)  # one per entry of plan.pooled, float32 [hidden]


@dataclass(slots=True)
class EngineOutput:
    """What a step's result means for one request, after the stop rules: the scheduler's word to the detokeniser."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error" | "repetition"
    stop_reason: int | str | None = None  # the stop id that ended it; None for EOS
    logprobs: list[TokenLogprobs] | None = None  # aligned with new_token_ids
    prompt_logprobs: list[TokenLogprobs] | None = None  # the next prompt positions, in order (first of all: position 1)
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    pooled: np.ndarray[Any, Any] | None = None  # float32 [hidden]: all that a pooling request is after
