"""Making the engine a command runs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.engine.async_llm import AsyncLLM
    from nanovllm.entrypoints.llm import LLM


def load_llm(engine_args: dict[str, Any], verbose: bool = False) -> LLM:
    """An `LLM`, loaded quickly and quietly.

    Args:
        engine_args: keyword arguments of `LLM`.
        verbose: show the engine's messages; otherwise warnings only, unless the environment sets a level.

    Raises:
        ParameterError, ModelError: as `LLM`.
    """
    with _loading(verbose):
        from nanovllm.entrypoints.llm import LLM

        return LLM(**engine_args)


def load_async_llm(engine_args: dict[str, Any], verbose: bool = False) -> AsyncLLM:
    """An `AsyncLLM`, as `load_llm`."""
    with _loading(verbose):
        from nanovllm.config import EngineArgs
        from nanovllm.engine.async_llm import AsyncLLM

        return AsyncLLM(EngineArgs.from_kwargs(**engine_args).build())


@contextmanager
def _loading(verbose: bool) -> Iterator[None]:
    # Importing torch makes some 300,000 objects that live as long as the process. Not looking for garbage among them,
    # neither now nor at exit, saves a third of a second.
    gc.disable()
    try:
        from nanovllm.entrypoints.log import setup_logging

        asked = verbose or os.environ.get("NANOVLLM_LOGGING_LEVEL") or os.environ.get("VLLM_LOGGING_LEVEL")
        setup_logging(None if asked else "WARNING")
        yield
    finally:
        gc.freeze()
        gc.enable()
