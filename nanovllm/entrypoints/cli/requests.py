"""What the commands that generate ask of the engine: sampling parameters, and a stream of text."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from nanovllm.entrypoints.cli.answers import Piece, Pieces
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from nanovllm.entrypoints.llm import LLM
    from nanovllm.inputs import PromptType

_numbers = itertools.count()


def sampling_params(llm: LLM, given: dict[str, Any], max_tokens: int | None) -> SamplingParams:
    """The model's own defaults under what the user gave.

    Args:
        given: fields of `SamplingParams`.
        max_tokens: if neither the user nor the model says; None means the rest of the context.

    Raises:
        ParameterError: a value out of range.
    """
    params = llm.get_default_sampling_params()
    model = llm.llm_engine.model_config
    if "max_tokens" not in model.generation_defaults:
        params.max_tokens = None if max_tokens is None else min(max_tokens, model.max_model_len)
    for name, value in given.items():
        setattr(params, name, value)
    params.validate()
    return params


def stream(llm: LLM, prompt: PromptType, params: SamplingParams) -> Generator[RequestOutput, None, None]:
    """What is new of one request, step by step. Closing the iterator ends the request.

    Raises:
        ParameterError: the prompt or a parameter cannot be honoured.
    """
    engine = llm.llm_engine
    deltas = params.clone()
    deltas.output_kind = RequestOutputKind.DELTA
    request_id = engine.add_request(f"stream-{next(_numbers)}", prompt, deltas)
    try:
        while engine.has_unfinished_requests():
            yield from (output for output in engine.step() if isinstance(output, RequestOutput))
    finally:
        engine.abort_request(request_id)


def stream_pieces(llm: LLM, prompt: PromptType, params: SamplingParams) -> Pieces:
    """`stream`, as the pieces of one answer."""
    with closing(stream(llm, prompt, params)) as outputs:
        for output in outputs:
            new = output.outputs[0]
            yield Piece(
                new.text,
                len(new.token_ids),
                new.finish_reason,
                num_prompt_tokens=len(output.prompt_token_ids),
                num_cached_tokens=output.num_cached_tokens or 0,
            )
