"""Beam search over the engine's streams: every round asks for the likeliest next tokens of every hypothesis.

A hypothesis is a prompt of its own; the prefix cache saves computing what they share.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanovllm.engine.caller import Caller
from nanovllm.entrypoints.serve.admission import Ticket
from nanovllm.entrypoints.serve.context import ServeContext
from nanovllm.entrypoints.serve.generation import final_outputs
from nanovllm.entrypoints.serve.protocol.generation import GenerationRequest
from nanovllm.errors import ParameterError
from nanovllm.inputs import PromptType, TokensPrompt
from nanovllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from nanovllm.sampling_params import SamplingParams


@dataclass
class _Hypothesis:
    tokens: list[int]
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    total: float = 0.0
    ended: str | None = None


async def beam_outputs(
    context: ServeContext,
    call_id: str,
    prompts: Sequence[PromptType],
    params: SamplingParams,
    request: GenerationRequest,
    ticket: Ticket,
) -> list[RequestOutput]:
    """The ``n`` likeliest completions of each prompt, best first.

    Raises:
        ParameterError: the search cannot be honoured.
    """
    width = params.n
    limit = context.engine.model_config.max_logprobs
    if limit != -1 and 2 * width > limit:
        raise ParameterError(f"a beam search needs 2 * n log-probabilities, and max_logprobs is {limit}", "n", width)
    if params.structured_outputs is not None:
        raise ParameterError("not supported with beam search in this version", "structured_outputs", "...")
    searches = [_search(context, call_id, each, params, request, ticket) for each in prompts]
    return list(await asyncio.gather(*searches))


class _Round(Caller):
    """A round of a search runs as its caller's request does; what it uses is counted once, by the search."""

    def __init__(self, ticket: Ticket) -> None:
        self.tenant, self.weight, self.deadline = ticket.tenant, ticket.weight, ticket.deadline


async def _search(
    context: ServeContext,
    call_id: str,
    prompt: PromptType,
    params: SamplingParams,
    request: GenerationRequest,
    ticket: Ticket,
) -> RequestOutput:
    checked = await asyncio.to_thread(context.engine.input.process, prompt, params)
    prompt_ids, eos = checked.prompt_token_ids, checked.eos_token_ids
    max_tokens = checked.params.max_tokens
    assert max_tokens is not None
    step = SamplingParams(temperature=0.0, max_tokens=1, logprobs=2 * params.n, detokenize=False, ignore_eos=True)
    alive, done = [_Hypothesis(prompt_ids)], []
    caller, priority = _Round(ticket), ticket.priority(request.priority)
    ticket.begins(len(prompt_ids))

    def score(found: _Hypothesis) -> float:
        """Ranks as ``total / length ** length_penalty`` does, whatever the penalty: by the logarithm of its size."""
        length = len(found.tokens) - (found.ended == "stop")
        size = math.log(-found.total) if found.total < 0 else -math.inf
        return request.length_penalty * math.log(length) - size

    for _ in range(max_tokens):
        streams = []
        for parent in alive:
            asked: TokensPrompt = {"prompt_token_ids": parent.tokens}
            if request.cache_salt is not None:
                asked["cache_salt"] = request.cache_salt
            name = context.engine_id(f"{call_id}-beam")
            streams.append(context.engine.generate(asked, step, name, priority=priority, caller=caller))
        growing = []
        outputs = await final_outputs(streams)
        ticket.ended(len(outputs))
        for parent, output in zip(alive, outputs, strict=True):
            for child in _extended(parent, output, 2 * params.n):
                if child.tokens[-1] in eos:
                    child.ended = "stop"
                    done.append(child)
                else:
                    growing.append(child)
        alive = sorted(growing, key=score, reverse=True)[: params.n]
    for each in alive:
        each.ended = "length"
    best = sorted([*done, *alive], key=score, reverse=True)[: params.n]
    completions = [_output(context, index, found, len(prompt_ids), params) for index, found in enumerate(best)]
    return RequestOutput(call_id, checked.prompt, prompt_ids, outputs=completions, finished=True)


def _extended(parent: _Hypothesis, output: RequestOutput, count: int) -> list[_Hypothesis]:
    found = output.outputs[0].logprobs
    assert found is not None
    ranked = sorted(found[0].items(), key=lambda item: item[1].rank or count)[:count]
    return [
        _Hypothesis([*parent.tokens, token], [*parent.logprobs, {token: entry}], parent.total + entry.logprob)
        for token, entry in ranked
    ]


def _output(
    context: ServeContext, index: int, found: _Hypothesis, prompt_length: int, params: SamplingParams
) -> CompletionOutput:
    token_ids = found.tokens[prompt_length:]
    shown = token_ids[:-1] if found.ended == "stop" and not params.include_stop_str_in_output else token_ids
    detokenizer = context.tokenizer.detokenizer(found.tokens[:prompt_length], params.skip_special_tokens)
    text = detokenizer.push_all(shown) + detokenizer.flush()
    logprobs = None if params.logprobs is None else found.logprobs
    return CompletionOutput(index, text, token_ids, found.total, logprobs, found.ended)
