"""From the engine's tokens to what users read: one `RequestOutput` per request and step.

A request with ``n`` > 1 runs as n children in the engine; their outputs come together here. A child whose output ends
is forgotten at once, so whatever the engine still says of it (a step in flight when it was aborted) has no effect.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanovllm.engine.completion import Completion
from nanovllm.engine.input import EngineInput
from nanovllm.engine.logprobs import position_logprobs
from nanovllm.engine.plan import EngineOutput
from nanovllm.engine.stats import Admission, StepStats
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.outputs import (
    PoolingOutput,
    PoolingRequestOutput,
    PositionLogprobs,
    RequestOutput,
    RequestStateStats,
)
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

Array = np.ndarray[Any, Any]
AnyOutput = RequestOutput | PoolingRequestOutput


@dataclass(slots=True)
class _Request:
    """A request that has not had its final output."""

    request_id: str
    engine_input: EngineInput
    kind: RequestOutputKind
    stream_interval: int
    child_ids: list[str]
    completions: list[Completion]
    stats: RequestStateStats
    unfinished: int  # completions
    prompt_logprobs: list[PositionLogprobs | None] | None
    num_cached_tokens: int | None = None
    vector: Array | None = None  # of a pooling request
    due: bool = False  # an output is to be handed out this step


@dataclass(slots=True)
class _Child:
    """Where the engine's outputs of one child go."""

    completion: Completion
    request: _Request
    is_first: bool  # the child with index 0 speaks for the prompt
    heard_of: bool = field(default=False)  # the engine has said something of it


class OutputProcessor:
    """Makes `RequestOutput`s of the engine's `EngineOutput`s.

    Args:
        tokenizer: the model's; without one, outputs have token ids and no text.
        stream_interval: when streaming, hand out an output every so many tokens; a request can ask for more.
    """

    def __init__(self, tokenizer: Tokenizer | None, stream_interval: int = 1) -> None:
        self._tokenizer = tokenizer
        self._stream_interval = stream_interval
        self._requests: dict[str, _Request] = {}
        self._children: dict[str, _Child] = {}
        self.num_prefill_tokens = 0  # of prompts that have had no token yet, whole

    @property
    def num_requests(self) -> int:
        """Requests that have not had their final output."""
        return len(self._requests)

    def has(self, request_id: str) -> bool:
        """Whether the request has not had its final output."""
        return request_id in self._requests

    def add(
        self,
        request_id: str,
        engine_input: EngineInput,
        params: SamplingParams,
        child_ids: list[str],
        arrival_ts: float | None = None,
    ) -> None:
        """Expect the outputs of a request.

        Args:
            request_id: the user's name for it.
            engine_input: what `InputProcessor.process` made of it.
            params: the parameters as the user gave them; they say how outputs are handed out.
            child_ids: the ids that its n outputs have in the engine, by index.
            arrival_ts: when it arrived, in seconds of the monotonic clock; None: now.
        """
        now = time.monotonic()
        arrival_ts = now if arrival_ts is None else arrival_ts
        completions = [
            Completion(index, engine_input, self._tokenizer, params.output_kind) for index in range(len(child_ids))
        ]
        request = _Request(
            request_id=request_id,
            engine_input=engine_input,
            kind=params.output_kind,
            stream_interval=max(self._stream_interval, params.stream_interval or 1),
            child_ids=list(child_ids),
            completions=completions,
            stats=RequestStateStats(arrival_time=time.time() - (now - arrival_ts), arrival_ts=arrival_ts),
            unfinished=len(completions),
            # Nothing predicts the first token.
            prompt_logprobs=None if engine_input.params.prompt_logprobs is None else [None],
        )
        self._requests[request_id] = request
        self.num_prefill_tokens += len(engine_input.prompt_token_ids)
        for child_id, completion in zip(child_ids, completions, strict=True):
            self._children[child_id] = _Child(completion, request, completion is completions[0])

    def process(
        self, outputs: Iterable[EngineOutput], stats: StepStats | None = None
    ) -> tuple[list[AnyOutput], list[str]]:
        """Take what a step gave, and hand out what is due.

        Returns:
            The outputs to hand out, at most one per request; and the ids of the children that a stop string ended
            while the engine goes on with them.
        """
        due, to_stop = self.take(outputs, stats)
        return [self.hand_out(request_id) for request_id in due], to_stop

    def take(self, outputs: Iterable[EngineOutput], stats: StepStats | None = None) -> tuple[list[str], list[str]]:
        """Take what a step gave. Nothing is lost if it is handed out late: what comes meanwhile is added to it.

        Returns:
            The ids of the requests that have become due, that is, have something for `hand_out` and had nothing before;
            and the ids of the children that a stop string ended while the engine goes on with them.
        """
        due: list[str] = []
        to_stop: list[str] = []
        now = time.monotonic() if stats is None else stats.timestamp
        if stats is not None and stats.admissions:
            self._note_admissions(stats.admissions)
        for output in outputs:
            child = self._children.get(output.request_id)
            if child is None:
                continue
            completion, request = child.completion, child.request
            if completion.quiet and child.heard_of and output.finish_reason is None:
                completion.token_ids += output.new_token_ids
                continue
            if not child.heard_of or output.prompt_logprobs:
                self._take_prompt_part(child, output, now)
            completion.take(output)
            if completion.finish_reason is not None:
                del self._children[output.request_id]
                request.unfinished -= 1
                request.stats.last_token_ts = now
                if output.finish_reason is None:
                    to_stop.append(output.request_id)
            if not request.due and _is_due(request, completion):
                request.due = True
                due.append(request.request_id)
        return due, to_stop

    def abort(self, request_id: str, reason: str = "abort") -> tuple[RequestOutput | None, list[str]]:
        """End a request.

        Returns:
            Its final output, with that finish reason, and the ids of the children that the engine still runs; None
            and no ids if there is no such request.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None, []
        to_stop = []
        for child_id, completion in zip(request.child_ids, request.completions, strict=True):
            if completion.finish_reason is None:
                completion.finish(reason)
                del self._children[child_id]
                to_stop.append(child_id)
                request.stats.last_token_ts = time.monotonic()
        request.unfinished = 0
        request.vector = None
        final = self.hand_out(request_id)
        assert isinstance(final, RequestOutput)
        return final, to_stop

    def _note_admissions(self, admissions: Iterable[Admission]) -> None:
        for admission in admissions:
            child = self._children.get(admission.request_id)
            if child is None:
                continue
            stats = child.request.stats
            if admission.num_preemptions:
                stats.num_preemptions += 1
            elif not stats.scheduled_ts:
                stats.queued_ts, stats.scheduled_ts = admission.queued_ts, admission.scheduled_ts

    def _take_prompt_part(self, child: _Child, output: EngineOutput, now: float) -> None:
        """What an output says of the prompt, and the time of the first token."""
        request = child.request
        request.vector = output.pooled
        if child.is_first:
            if not child.heard_of:
                request.num_cached_tokens = output.num_cached_tokens
            if request.prompt_logprobs is not None and output.prompt_logprobs:
                num_named = len(request.engine_input.params.prompt_logprob_token_ids or ())
                request.prompt_logprobs += [
                    position_logprobs(each, self._tokenizer, num_named) for each in output.prompt_logprobs
                ]
        if output.new_token_ids:
            child.heard_of = True
            if not request.stats.first_token_ts:
                request.stats.first_token_ts = now
                self.num_prefill_tokens -= len(request.engine_input.prompt_token_ids)

    def is_running(self, request_id: str) -> bool:
        """Whether more tokens are expected for a request."""
        request = self._requests.get(request_id)
        return request is not None and request.unfinished > 0

    def arrival_ts(self, request_id: str) -> float:
        """When a request has arrived, in seconds of the monotonic clock."""
        return self._requests[request_id].stats.arrival_ts

    def is_untouched(self, request_id: str) -> bool:
        """Whether the engine has said nothing yet of a request's outputs."""
        request = self._requests.get(request_id)
        if request is None or request.unfinished < len(request.child_ids):
            return False
        return not request.stats.first_token_ts and request.prompt_logprobs in (None, [None])

    def is_due(self, request_id: str) -> bool:
        """Whether there is something to hand out."""
        request = self._requests.get(request_id)
        return request is not None and request.due

    def hand_out(self, request_id: str) -> AnyOutput:
        """The output of a request, all of it or what is new since the last. A finished request is forgotten.

        A request for a vector has a `PoolingRequestOutput`, unless it was aborted or failed.
        """
        request = self._requests[request_id]
        request.due = False
        finished = request.unfinished == 0
        if finished:
            del self._requests[request.request_id]
            if not request.stats.first_token_ts:
                self.num_prefill_tokens -= len(request.engine_input.prompt_token_ids)
        if request.vector is not None:
            return _pooling_output(request, request.vector)
        completions, prompt_logprobs = request.completions, request.prompt_logprobs
        if request.kind is RequestOutputKind.DELTA:
            request.prompt_logprobs = None
            if len(completions) > 1:
                completions = [completion for completion in completions if completion.has_news()]
        if finished:
            lengths = [completion.num_tokens for completion in request.completions]
            request.stats.num_generation_tokens = sum(lengths)
            request.stats.max_generation_tokens = max(lengths)
        return RequestOutput(
            request.request_id,
            request.engine_input.prompt,
            request.engine_input.prompt_token_ids,
            prompt_logprobs,
            [completion.hand_out() for completion in completions],
            finished,
            request.stats,
            num_cached_tokens=request.num_cached_tokens,
        )


def _pooling_output(request: _Request, vector: Array) -> PoolingRequestOutput:
    """The vector cut to size, then scaled to length 1, as the request asks."""
    pooling = request.engine_input.pooling
    assert pooling is not None
    data = vector[: pooling.dimensions]
    if pooling.normalize:
        data = data / max(float(np.linalg.norm(data)), 1e-12)
    return PoolingRequestOutput(
        request.request_id,
        PoolingOutput(data),
        request.engine_input.prompt_token_ids,
        request.num_cached_tokens or 0,
        metrics=request.stats,
    )


def _is_due(request: _Request, completion: Completion) -> bool:
    if request.unfinished == 0:
        return True
    return request.kind is not RequestOutputKind.FINAL_ONLY and completion.is_due(request.stream_interval)
