"""nano-vLLM-Ascend: a small, readable, fast LLM inference engine with vLLM's interface.

Importing this package imports neither torch nor transformers; each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "nanovllm.entrypoints.llm",
    "LLMEngine": "nanovllm.engine.llm_engine",
    "AsyncLLM": "nanovllm.engine.async_llm",
    "EngineArgs": "nanovllm.config",
    "AsyncEngineArgs": "nanovllm.config",
    "SamplingParams": "nanovllm.sampling_params",
    "BeamSearchParams": "nanovllm.sampling_params",
    "PoolingParams": "nanovllm.pooling_params",
    "RequestOutputKind": "nanovllm.sampling_params",
    "RequestOutput": "nanovllm.outputs",
    "CompletionOutput": "nanovllm.outputs",
    "PoolingOutput": "nanovllm.outputs",
    "PoolingRequestOutput": "nanovllm.outputs",
    "EmbeddingOutput": "nanovllm.outputs",
    "EmbeddingRequestOutput": "nanovllm.outputs",
    "Logprob": "nanovllm.outputs",
    "TextPrompt": "nanovllm.inputs",
    "TokensPrompt": "nanovllm.inputs",
    "PromptType": "nanovllm.inputs",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from nanovllm.config import AsyncEngineArgs, EngineArgs
    from nanovllm.engine.async_llm import AsyncLLM
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.entrypoints.llm import LLM
    from nanovllm.inputs import PromptType, TextPrompt, TokensPrompt
    from nanovllm.outputs import (
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        PoolingOutput,
        PoolingRequestOutput,
        RequestOutput,
    )
    from nanovllm.pooling_params import PoolingParams
    from nanovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
