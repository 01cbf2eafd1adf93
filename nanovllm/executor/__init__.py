"""Where the model runs. In this version: in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.errors import ParameterError

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
    from nanovllm.executor.in_process import InProcessExecutor

    return InProcessExecutor(config)
