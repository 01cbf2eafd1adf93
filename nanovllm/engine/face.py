"""What the two faces of the engine share: `LLMEngine`, which is stepped, and `AsyncLLM`, which runs by itself."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from nanovllm.config import EngineArgs, EngineConfig, ModelConfig
from nanovllm.engine.core import EngineCore, Executor
from nanovllm.engine.family import derive_seed, make_family
from nanovllm.engine.garbage import collect_rarely
from nanovllm.engine.input import EngineInput, InputProcessor
from nanovllm.engine.output import OutputProcessor
from nanovllm.engine.request import Request
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.inputs import PromptType

logger = logging.getLogger(__name__)

Face = TypeVar("Face", bound="EngineFace")


class EngineFace:
    """An `EngineCore` with text on both sides.

    Args:
        config: from ``EngineArgs.build()``.
        executor: where the model runs; None makes the one the configuration asks for.
    """

    def __init__(self, config: EngineConfig, executor: Executor | None = None) -> None:
        if executor is None:
            from nanovllm.executor import create_executor

            executor = create_executor(config)
        collect_rarely()
        self.config = fit_context(config, executor.num_blocks)
        self.core = EngineCore(self.config, executor)
        self.input = InputProcessor(self.config)
        self.output = OutputProcessor(self.input.tokenizer)
        self._arrivals = itertools.count()

    @classmethod
    def from_engine_args(cls: type[Face], args: EngineArgs) -> Face:
        """Build the configuration and the engine."""
        return cls(args.build())

    @property
    def model_config(self) -> ModelConfig:
        return self.config.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None with ``skip_tokenizer_init``."""
        return self.input.tokenizer

    def _prepare(
        self, request_id: str, prompt: PromptType, params: SamplingParams
    ) -> tuple[EngineInput, list[Request]]:
        """Check and tokenise a prompt; the requests that answer it. Any thread may call this.

        Raises:
            ParameterError: the prompt or a parameter cannot be honoured.
        """
        prepared = self.input.process(prompt, params)
        seed = derive_seed(self.config.seed, next(self._arrivals))
        return prepared, make_family(request_id, prepared, self.config.model.max_model_len, seed)


def fit_context(config: EngineConfig, num_blocks: int) -> EngineConfig:
    """Shorten the context to what the KV cache holds, with one notice."""
    capacity = (num_blocks - 1) * config.cache.block_size
    if config.model.max_model_len <= capacity:
        return config
    logger.warning(
        "max_model_len is shortened from %d to %d tokens: that is what the KV cache holds. For a longer context give "
        "the cache more memory (kv_cache_memory_bytes) or use a smaller model.",
        config.model.max_model_len,
        capacity,
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, max_model_len=capacity))
