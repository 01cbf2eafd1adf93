"""What the two faces of the engine share: `LLMEngine`, which is stepped, and `AsyncLLM`, which runs by itself."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import Any, TypeVar

from nanovllm.config import EngineArgs, EngineConfig, ModelConfig
from nanovllm.engine.core import EngineCore, Executor
from nanovllm.engine.family import derive_seed
from nanovllm.engine.garbage import collect_rarely
from nanovllm.engine.input import InputProcessor
from nanovllm.engine.output import OutputProcessor
from nanovllm.engine.stats import EngineStats

logger = logging.getLogger(__name__)

Face = TypeVar("Face", bound="EngineFace")


class EngineFace:
    """Text on both sides of an engine, wherever its core runs.

    Args:
        config: from ``EngineArgs.build()``.
        executor: where the model runs, if that is in this process.
    """

    def __init__(self, config: EngineConfig, executor: Executor | None = None) -> None:
        collect_rarely()
        self.config = config
        self.input = InputProcessor(config, None if executor is None else executor.grammars)
        self.output = OutputProcessor(self.input.tokenizer)
        self.stats = EngineStats()
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

    def _next_seed(self) -> int:
        """The seed of a request that brings none."""
        return derive_seed(self.config.seed, next(self._arrivals))


def make_core(config: EngineConfig, executor: Executor | None = None) -> tuple[EngineConfig, EngineCore]:
    """A core, and the configuration with the context that its cache allows.

    Args:
        executor: where the model runs; None makes the one the configuration asks for, which loads the model.

    Raises:
        ParameterError, ModelError: it cannot be loaded.
    """
    if executor is None:
        from nanovllm.executor import create_executor

        executor = create_executor(config)
    config = fit_context(config, executor.num_blocks)
    return config, EngineCore(config, executor)


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
