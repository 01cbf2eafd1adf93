"""The synchronous engine: prompts in, `RequestOutput`s out, one `step` at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nanovllm.config import EngineConfig
from nanovllm.engine.beam_search import BeamSearch
from nanovllm.engine.core import Executor
from nanovllm.engine.face import EngineFace, make_core
from nanovllm.engine.family import make_family
from nanovllm.engine.output import AnyOutput
from nanovllm.engine.plan import EngineOutput
from nanovllm.engine.stats import StatsLog
from nanovllm.errors import EngineDeadError, ParameterError, StepError
from nanovllm.outputs import BeamSearchOutput, RequestOutput
from nanovllm.pooling_params import PoolingParams
from nanovllm.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from nanovllm.inputs import PromptType


class LLMEngine(EngineFace):
    """The engine that its user steps."""

    def __init__(self, config: EngineConfig, executor: Executor | None = None) -> None:
        config, self.core = make_core(config, executor)
        super().__init__(config, self.core.executor)
        self._log = StatsLog() if config.log_stats else None
        if self._log is not None:
            self.stats.observers.append(self._log)
        self._beams: dict[str, BeamSearch] = {}  # request id -> its search
        self._beam_outputs: dict[str, BeamSearchOutput | StepError] = {}
        self._closed = False

    # -- requests ------------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams | PoolingParams | None = None,
        *,
        priority: int = 0,
    ) -> str:
        """Queue a prompt.

        Args:
            params: None takes the model's own defaults (generation_config.json); `PoolingParams` ask for a vector.
            priority: smaller goes first; needs ``scheduling_policy="priority"``.

        Raises:
            ParameterError: the prompt or a parameter cannot be honoured. Nothing was queued.
        """
        arrival = time.monotonic()
        self._check_open()
        if self.output.has(request_id):
            raise ParameterError("a request of this id is under way", "request_id", request_id)
        if isinstance(params, PoolingParams):
            prepared = self.input.process_pooling(prompt, params)
            given = prepared.params
        else:
            given = params if params is not None else self.input.default_params()
            prepared = self.input.process(prompt, given)
        family = make_family(request_id, prepared, self.config.model.max_model_len, self._next_seed())
        self.core.add(family[0], priority, family[1:])
        self.output.add(request_id, prepared, given, [member.request_id for member in family], arrival)
        return request_id

    def abort_request(self, request_id: str | Iterable[str]) -> list[RequestOutput]:
        """End requests. Returns their final outputs (finish reason "abort"); unknown ids are passed over."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        finals = []
        for name in ids:
            final, children = self.output.abort(name)
            self.core.finish(children, "abort")
            if final is not None:
                finals.append(final)
        return finals

    def has_unfinished_requests(self) -> bool:
        return self.core.has_work

    def get_num_unfinished_requests(self) -> int:
        return self.output.num_requests

    def step(self) -> list[AnyOutput]:
        """Run one step of the engine and hand out what it yields.

        Raises:
            StepError: a step failed. Its requests have ended, and are handed out by the next call with finish reason
                "error"; all others go on.
        """
        outputs = self.core.step()
        stats = self.core.meter.take()
        if self._log is not None:
            self.stats.step(outputs, stats)
            if self._log.due:
                self._log.report()
        if self._beams:
            outputs = self._advance_beams(outputs)
        request_outputs, stopped = self.output.process(outputs, stats)
        if stopped:
            self.core.finish(stopped, "stop")
            self.stats.forget(stopped)
        return request_outputs

    # -- beam search ---------------------------------------------------------------------------------------------

    def add_beam_search(self, search_id: str, prompt: PromptType, params: BeamSearchParams) -> None:
        """Queue a beam search; `step` advances it, `take_beam_output` has the result.

        Raises:
            ParameterError: the prompt or a parameter cannot be honoured.
        """
        self._check_open()
        if params.temperature != 0.0:
            raise ParameterError("beam search ranks by the model's own probabilities: use 0", "temperature",
                                 params.temperature)  # fmt: skip
        vocab_size = self.config.model.vocab_size
        if 2 * params.beam_width > vocab_size:
            raise ParameterError(f"at most half the vocabulary of {vocab_size}", "beam_width", params.beam_width)
        as_sampling = SamplingParams(max_tokens=params.max_tokens, ignore_eos=params.ignore_eos,
                                     structured_outputs=params.structured_outputs)  # fmt: skip
        prepared = self.input.process(prompt, as_sampling)
        search = BeamSearch(
            search_id,
            prepared.prompt_token_ids,
            params,
            self.input.eos_token_ids,
            self.config.model.max_model_len,
            prepared.cache_salt,
            prepared.guide,
        )
        for request in search.start():
            self._beams[request.request_id] = search
            self.core.add(request)

    def take_beam_output(self, search_id: str) -> BeamSearchOutput | None:
        """The result of a finished search, once; None while it runs.

        Raises:
            StepError: a step of the search failed.
        """
        output = self._beam_outputs.pop(search_id, None)
        if isinstance(output, StepError):
            raise output
        return output

    def abort_beam_search(self, search_id: str) -> None:
        """End a search wherever it stands. Idempotent."""
        ids = [name for name, search in self._beams.items() if search.search_id == search_id]
        self.core.finish(ids, "abort")
        for name in ids:
            self.core.scheduler.release(name)
            del self._beams[name]

    def _advance_beams(self, outputs: list[EngineOutput]) -> list[EngineOutput]:
        others = []
        for output in outputs:
            search = self._beams.get(output.request_id)
            if search is None:
                others.append(output)
                continue
            if output.finish_reason == "error":
                self.abort_beam_search(search.search_id)
                self._beam_outputs[search.search_id] = StepError(str(output.stop_reason))
                continue
            requests, released = search.advance(output)
            for request in requests:
                self._beams[request.request_id] = search
                self.core.add(request)
            for name in released:
                self.core.scheduler.release(name)
                del self._beams[name]
            if released and not requests:
                self._beam_outputs[search.search_id] = self._finish_beams(search)
        return others

    def _finish_beams(self, search: BeamSearch) -> BeamSearchOutput:
        sequences = search.best()
        if self.tokenizer is not None:
            for sequence in sequences:
                prompt = sequence.tokens[: search.num_prompt_tokens]
                tokens = sequence.tokens[search.num_prompt_tokens :]
                if sequence.finish_reason == "stop" and not search.params.include_stop_str_in_output:
                    tokens = tokens[:-1]
                detokenizer = self.tokenizer.detokenizer(prompt, search.params.skip_special_tokens)
                sequence.text = detokenizer.push_all(tokens) + detokenizer.flush()
        return BeamSearchOutput(sequences)

    # -- the engine itself ---------------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing changes, while requests hold blocks."""
        return self.core.reset_prefix_cache()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineDeadError("the engine is closed")

    def shutdown(self) -> None:
        """Free weights and cache. Idempotent."""
        self._closed = True
        self.core.shutdown()
