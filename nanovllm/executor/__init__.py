"""Where the model runs. In this version: in this process."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from nanovllm.errors import ParameterError
from nanovllm.reserve import memory_for_weights

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig
    from nanovllm.executor.in_process import InProcessExecutor


def create_executor(config: EngineConfig) -> InProcessExecutor:
    """The executor for ``config``: loads the model.

    Raises:
        ParameterError: more than one rank is asked for, or memory does not suffice.
        ModelError: the checkpoint cannot be served.
    """
    if config.tensor_parallel_size != 1:
        raise ParameterError(
            "this version runs on one device; use 1", "tensor_parallel_size", config.tensor_parallel_size
        )
    model = config.model
    packed_in_place = config.device == "cpu" and model.load_format == "safetensors" and model.quantization is None
    tied = bool(model.hf_config.get("tie_word_embeddings", False))
    with memory_for_weights(model.path, model.dtype, tied) if packed_in_place else nullcontext():
        from nanovllm.executor.in_process import InProcessExecutor  # imports torch

        return InProcessExecutor(config)
