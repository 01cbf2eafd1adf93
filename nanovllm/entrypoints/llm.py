"""`LLM`: offline inference, with vLLM's interface.

with LLM("demo") as llm:
    for output in llm.generate(["What is paged attention?"], SamplingParams(max_tokens=64)):
        print(output.outputs[0].text)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from nanovllm.config import EngineArgs
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.entrypoints.log import setup_logging
from nanovllm.errors import ParameterError
from nanovllm.hub import DEMO_MODEL
from nanovllm.inputs import PromptType
from nanovllm.outputs import BeamSearchOutput, EmbeddingRequestOutput, PoolingRequestOutput, RequestOutput
from nanovllm.pooling_params import PoolingParams
from nanovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

Message = dict[str, Any]


class LLM:
    """A model, ready to generate.

    Args:
        model: a folder, a hub id such as ``Qwen/Qwen3-0.6B``, or ``"demo"``, the model in the box.
        dtype: ``auto`` takes the checkpoint's, or float32 where the device lacks it.
        device: ``auto`` takes the best there is.
        max_model_len: context in tokens; None takes the model's, shortened to what the KV cache holds.
        max_num_seqs: most requests in a step.
        max_num_batched_tokens: most tokens in a step.
        block_size: tokens in a KV cache block.
        gpu_memory_utilization: share of the device's memory the engine may use; on a CPU, of free memory (half).
        kv_cache_memory_bytes: size of the KV cache; overrides the share.
        seed: of every random draw of requests that bring no seed of their own.
        load_format: ``auto``, ``safetensors``, or ``dummy`` for random weights.
        **kwargs: every other field of `EngineArgs`.

    Raises:
        ParameterError: a parameter that cannot be honoured.
        ModelError: the model cannot be found or loaded.
    """

    def __init__(
        self,
        model: str = DEMO_MODEL,
        *,
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        device: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        chat_template: str | None = None,
        seed: int | None = 0,
        max_model_len: int | str | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int | None = None,
        enable_prefix_caching: bool | None = None,
        enable_chunked_prefill: bool | None = None,
        gpu_memory_utilization: float | None = None,
        kv_cache_memory_bytes: int | None = None,
        num_gpu_blocks_override: int | None = None,
        enforce_eager: bool = False,
        load_format: str = "auto",
        hf_token: str | bool | None = None,
        hf_overrides: dict[str, Any] | None = None,
        generation_config: str = "auto",
        **kwargs: Any,
    ) -> None:
        setup_logging()
        named = dict(locals())
        for name in ("self", "kwargs", "hf_overrides"):
            del named[name]
        kwargs.setdefault("disable_log_stats", True)
        args = EngineArgs.from_kwargs(**named, hf_overrides=hf_overrides or {}, **kwargs)
        self.llm_engine = LLMEngine(args.build())
        self._ids = itertools.count()
        self._pending: list[str] = []  # enqueued, not yet waited for
        self._finished: dict[str, RequestOutput | PoolingRequestOutput] = {}  # done, not yet handed out

    # -- text ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., tqdm] = True,
        priority: int | Sequence[int] | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: text, token ids, a dict of either, or a sequence of these.
            sampling_params: for all, or one per prompt; None takes the model's defaults.
            use_tqdm: show a progress bar, or the function that makes one.
            priority: for all, or one per prompt; smaller goes first.
            **others: vLLM's ``lora_request``, ``tokenization_kwargs`` and ``mm_processor_kwargs``, as None.

        Returns:
            One output per prompt, in order.

        Raises:
            ParameterError: a prompt or parameter cannot be honoured; nothing was generated.
            StepError: the model failed; the requests of this call have ended.
        """
        _refuse("generate", others)
        return self._wait(self._submit(_as_prompts(prompts), sampling_params, priority), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., tqdm] = True,
        priority: int | Sequence[int] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Continue conversations.

        Args:
            messages: one conversation (a list of ``{"role": ..., "content": ...}``) or a list of them.
            **template: ``tools``, ``chat_template``, ``add_generation_prompt``, ``continue_final_message`` and
                ``chat_template_kwargs``, as for `InputProcessor.render_chat`.

        Raises:
            ParameterError: as `generate`; also a message the chat template refuses.
        """
        return self._wait(self._submit(self._render(messages, template), sampling_params, priority), use_tqdm)

    def encode(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., tqdm] = True,
        priority: int | Sequence[int] | None = None,
        pooling_task: str = "embed",
        **others: Any,
    ) -> list[PoolingRequestOutput]:
        """Turn prompts into vectors: made of the last layer's hidden states, as the model is made for.

        Args:
            pooling_params: for all, or one per prompt; None takes the model's defaults.
            pooling_task: "embed"; there is nothing else in this version.
            **others: vLLM's ``lora_request``, ``tokenization_kwargs`` and ``mm_processor_kwargs``, as None.

        Raises:
            ParameterError: a prompt or parameter cannot be honoured; nothing was computed.
            StepError: the model failed; the requests of this call have ended.
        """
        _refuse("encode", others)
        if pooling_task != "embed":
            raise ParameterError("only 'embed' is supported by this version", "pooling_task", pooling_task)
        return self._wait(self._submit_pooling(_as_prompts(prompts), pooling_params, priority), use_tqdm)

    def embed(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        use_tqdm: bool | Callable[..., tqdm] = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        priority: int | Sequence[int] | None = None,
        **others: Any,
    ) -> list[EmbeddingRequestOutput]:
        """Turn prompts into vectors, as lists of numbers: ``output.outputs.embedding``. Otherwise as `encode`."""
        _refuse("embed", others)
        outputs = self.encode(prompts, pooling_params, use_tqdm=use_tqdm, priority=priority)
        return [EmbeddingRequestOutput.from_pooling(output) for output in outputs]

    def enqueue(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
    ) -> list[str]:
        """Queue prompts and return their ids at once; `wait_for_completion` runs them."""
        ids = self._submit(_as_prompts(prompts), sampling_params, priority)
        self._pending += ids
        return ids

    def enqueue_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        **template: Any,
    ) -> list[str]:
        """Queue conversations, as `enqueue`."""
        ids = self._submit(self._render(messages, template), sampling_params, priority)
        self._pending += ids
        return ids

    def wait_for_completion(self, *, use_tqdm: bool | Callable[..., tqdm] = True) -> list[RequestOutput]:
        """Run everything that was enqueued; outputs in the order of enqueuing."""
        ids, self._pending = self._pending, []
        return self._wait(ids, use_tqdm)

    def beam_search(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Find the likeliest completions of each prompt.

        Args:
            concurrency_limit: most prompts searched at a time.

        Raises:
            ParameterError: a prompt or parameter cannot be honoured.
        """
        waiting = [(f"beam-{next(self._ids)}", prompt) for prompt in _as_prompts(prompts)]
        results: dict[str, BeamSearchOutput] = {}
        order = [search_id for search_id, _ in waiting]
        limit = concurrency_limit or len(waiting)
        active: list[str] = []
        with tqdm(total=len(order), desc="Beam search", disable=not use_tqdm, dynamic_ncols=True) as bar:
            try:
                while waiting or active:
                    while waiting and len(active) < limit:
                        search_id, prompt = waiting.pop(0)
                        self.llm_engine.add_beam_search(search_id, prompt, params)
                        active.append(search_id)
                    for output in self.llm_engine.step():
                        self._finished[output.request_id] = output  # it was enqueued
                    for search_id in list(active):
                        result = self.llm_engine.take_beam_output(search_id)
                        if result is not None:
                            results[search_id] = result
                            active.remove(search_id)
                            bar.update()
            finally:
                for search_id in active:
                    self.llm_engine.abort_beam_search(search_id)
        return [results[search_id] for search_id in order]

    # -- the engine ----------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The tokenizer; None with ``skip_tokenizer_init``."""
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses if it is given none: the model's generation_config.json over vLLM's defaults."""
        return self.llm_engine.input.default_params()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing changes, while requests are under way."""
        return self.llm_engine.reset_prefix_cache()

    def close(self) -> None:
        """Free weights, cache and threads. Idempotent; the instance is of no use afterwards."""
        self.llm_engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- shared by the above -------------------------------------------------------------------------------------

    def _render(self, messages: Any, template: dict[str, Any]) -> list[PromptType]:
        options = {name: template.pop(name) for name in list(template) if name not in _TEMPLATE_OPTIONS}
        if options.get("chat_template_content_format") in ("auto", "string", "openai"):
            del options["chat_template_content_format"]  # what a template takes is found out, not declared
        _refuse("chat", options)
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        return [self.llm_engine.input.render_chat(conversation, **template) for conversation in conversations]

    def _submit(
        self,
        prompts: Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int] | None,
    ) -> list[str]:
        """Queue all prompts or none."""
        default = self.get_default_sampling_params() if sampling_params is None else sampling_params
        all_params = _one_each("sampling_params", default, len(prompts), SamplingParams)
        priorities = _one_each("priority", 0 if priority is None else priority, len(prompts), int)
        all_params = [params.clone() for params in all_params]
        for params in all_params:
            params.output_kind = RequestOutputKind.FINAL_ONLY
        return self._add(prompts, all_params, priorities)

    def _submit_pooling(
        self,
        prompts: Sequence[PromptType],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None,
        priority: int | Sequence[int] | None,
    ) -> list[str]:
        """Queue all prompts or none."""
        all_params = _one_each("pooling_params", pooling_params or PoolingParams(), len(prompts), PoolingParams)
        priorities = _one_each("priority", 0 if priority is None else priority, len(prompts), int)
        return self._add(prompts, all_params, priorities)

    def _add(self, prompts: Sequence[PromptType], params: Sequence[Any], priorities: Sequence[int]) -> list[str]:
        ids: list[str] = []
        try:
            for prompt, each, rank in zip(prompts, params, priorities, strict=True):
                ids.append(self.llm_engine.add_request(str(next(self._ids)), prompt, each, priority=rank))
        except BaseException:
            self.llm_engine.abort_request(ids)
            raise
        return ids

    def _wait(self, ids: list[str], use_tqdm: bool | Callable[..., tqdm]) -> list[Any]:
        """Step the engine until these requests are done."""
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        bar = make_bar(
            total=len(ids),
            desc="Processed prompts",
            dynamic_ncols=True,
            disable=not use_tqdm,
            postfix="est. speed input: 0.00 toks/s, output: 0.00 toks/s",
        )
        missing = {request_id for request_id in ids if request_id not in self._finished}
        bar.update(len(ids) - len(missing))
        num_input = num_output = 0
        start = time.perf_counter()
        try:
            while missing:
                for output in self.llm_engine.step():
                    self._finished[output.request_id] = output  # or it was enqueued, and waits for its own call
                    if output.request_id in missing:
                        missing.remove(output.request_id)
                        completions = output.outputs if isinstance(output, RequestOutput) else []
                        num_input += len(output.prompt_token_ids) * max(len(completions), 1)
                        num_output += sum(len(c.token_ids) for c in completions)
                        speed = [count / (time.perf_counter() - start) for count in (num_input, num_output)]
                        bar.postfix = f"est. speed input: {speed[0]:.2f} toks/s, output: {speed[1]:.2f} toks/s"
                        bar.update()
        except BaseException:
            self.llm_engine.abort_request(missing)
            for request_id in ids:
                self._finished.pop(request_id, None)
            raise
        finally:
            bar.close()
        return [self._finished.pop(request_id) for request_id in ids]


# What `InputProcessor.render_chat` takes, and what vLLM's methods take that this version has no meaning for.
_TEMPLATE_OPTIONS = frozenset(
    {"tools", "chat_template", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"}
)
_WITHOUT_MEANING = ("lora_request", "tokenization_kwargs", "mm_processor_kwargs", "chat_template_content_format")


def _refuse(method: str, options: dict[str, Any]) -> None:
    """Options of vLLM's that this version does not have are taken as None only; any other name is a TypeError."""
    for name, value in options.items():
        if name not in _WITHOUT_MEANING:
            raise TypeError(f"LLM.{method}() got an unexpected keyword argument {name!r}")
        if value is not None:
            raise ParameterError("not supported by this version", name, value)


def _as_prompts(prompts: Any) -> list[PromptType]:
    """A list of prompts from one prompt (text, dict, list of ids) or a sequence of them."""
    listed: list[Any] = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
    return [listed] if listed and isinstance(listed[0], int) else listed


def _one_each(name: str, values: Any, count: int, kind: type) -> Sequence[Any]:
    """``values`` for every prompt.

    Raises:
        ParameterError: a sequence of another length.
    """
    if isinstance(values, kind):
        return [values] * count
    if not isinstance(values, Sequence) or not all(isinstance(value, kind) for value in values):
        raise ParameterError(f"must be {kind.__name__}, or a list of them", name, values)
    if len(values) != count:
        raise ParameterError(f"give one, or one for each of the {count} prompts", name, f"{len(values)} of them")
    return values
