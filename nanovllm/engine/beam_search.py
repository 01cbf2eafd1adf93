"""Beam search over forks: every hypothesis is a request of one token that shares its parent's blocks.

A round asks each hypothesis for its ``2 * beam_width`` likeliest next tokens, which is enough to fill the beam even if
half of them end. The best continuations become forks of the requests that produced them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanovllm.engine.plan import EngineOutput
from nanovllm.engine.request import Request
from nanovllm.outputs import BeamSearchSequence, Logprob
from nanovllm.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.structured import GuideSpec


@dataclass(slots=True)
class _Hypothesis:
    sequence: BeamSearchSequence
    request: Request


class BeamSearch:
    """The search for one prompt.

    `start` and `advance` return the requests to run next; when a round yields none, `best` has the result.
    """

    def __init__(
        self,
        search_id: str,
        prompt_token_ids: list[int],
        params: BeamSearchParams,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        cache_salt: str | None = None,
        guide: GuideSpec | None = None,
    ) -> None:
        self.search_id = search_id
        self.params = params
        # With a guide that is to go on, EOS comes only where nothing else may.
        self._eos = eos_token_ids if guide is not None or not params.ignore_eos else frozenset()
        self._guide = guide
        self._max_model_len = max_model_len
        self._salt = cache_salt
        self._prompt = prompt_token_ids
        self._step_params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=2 * params.beam_width)
        self._alive: dict[str, _Hypothesis] = {}
        self._reported: dict[str, EngineOutput] = {}
        self._completed: list[BeamSearchSequence] = []
        self._num_requests = 0

    def start(self) -> list[Request]:
        """The request of the first round: the prompt itself."""
        return [self._spawn(BeamSearchSequence(tokens=list(self._prompt), logprobs=[]), None)]

    def advance(self, output: EngineOutput) -> tuple[list[Request], list[str]]:
        """Take one hypothesis' output. At the end of a round: the next round's requests, and ids to release after."""
        self._reported[output.request_id] = output
        if len(self._reported) < len(self._alive):
            return [], []
        parents, reported = self._alive, self._reported
        self._alive, self._reported = {}, {}
        candidates = [
            (self._extend(parent.sequence, reported[name], index), parent.request)
            for name, parent in parents.items()
            for index in range(2 * self.params.beam_width)
            if index + 1 < len(reported[name].logprobs[0].token_ids)  # type: ignore[index]
            and reported[name].logprobs[0].logprobs[index + 1] > -math.inf  # type: ignore[index]
        ]
        growing = []
        for sequence, parent in candidates:
            if sequence.tokens[-1] in self._eos:
                sequence.finish_reason = "stop"
                self._completed.append(sequence)
            else:
                growing.append((sequence, parent))
        growing.sort(key=lambda entry: self._score(entry[0]), reverse=True)
        requests = []
        for sequence, parent in growing[: self.params.beam_width]:
            length = len(sequence.tokens)
            if length - len(self._prompt) >= self.params.max_tokens or length >= self._max_model_len:
                sequence.finish_reason = "length"
                self._completed.append(sequence)
            else:
                requests.append(self._spawn(sequence, parent))
        return requests, list(parents)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prompt)

    def best(self) -> list[BeamSearchSequence]:
        """The ``beam_width`` best finished hypotheses, best first."""
        return sorted(self._completed, key=self._score, reverse=True)[: self.params.beam_width]

    def _score(self, sequence: BeamSearchSequence) -> float:
        """Summed log-probability over length ** length_penalty; prompt included, EOS not."""
        length = len(sequence.tokens) - (sequence.tokens[-1] in self._eos)
        return sequence.cum_logprob / length**self.params.length_penalty

    def _extend(self, sequence: BeamSearchSequence, output: EngineOutput, index: int) -> BeamSearchSequence:
        assert output.logprobs is not None
        found = output.logprobs[0]
        token, logprob = int(found.token_ids[index + 1]), float(found.logprobs[index + 1])
        return BeamSearchSequence(
            tokens=[*sequence.tokens, token],
            logprobs=[*sequence.logprobs, {token: Logprob(logprob, index + 1)}],
            cum_logprob=sequence.cum_logprob + logprob,
        )

    def _spawn(self, sequence: BeamSearchSequence, parent: Request | None) -> Request:
        request = Request(
            f"{self.search_id}-beam-{self._num_requests}",
            sequence.tokens,
            self._step_params,
            max_model_len=self._max_model_len,
            guide=self._guide,
            guided_from=len(self._prompt),
            cache_salt=self._salt,
            fork_of=parent,
            held=True,
        )
        self._num_requests += 1
        self._alive[request.request_id] = _Hypothesis(sequence, request)
        return request
